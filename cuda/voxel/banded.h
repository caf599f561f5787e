// Product of a banded matrix with the rows of a stack of matrices, on the CPU: it interpolates between lattices.
#pragma once

#include "../simd.h"

namespace medgmae {

constexpr int kBandRows = 4;  // rows of the result that are computed together, from one reading of the input

// out[s][4 g + o] (+)= sum over t < taps of weights[g][t][o] in[s][first[g] + t], for stacked float32 matrices of `length`
// columns. first + taps may pass rows_in where the weights are zero.
struct BandedCall {
  int64_t stack, rows_in, rows_out, length, taps;
  const int64_t* first;
  const float *weights, *in;
  float* out;
  bool add;
};

namespace {

// Two vectors of columns of one matrix; the rows of `in` and `out` are `length` apart.
inline void banded_columns(const BandedCall& call, const float* in, float* out) {
  constexpr int kWide = kLanes<float>;
  for (int64_t o = 0; o < call.rows_out; o += kBandRows) {
    int64_t const first = call.first[o / kBandRows], left = call.rows_in - first, taps = call.taps < left ? call.taps : left;
    const float* weights = call.weights + o * call.taps;
    Vec<float> total[kBandRows][2] = {};
    for (int64_t t = 0; t < taps; ++t, weights += kBandRows) {
      Vec<float> const a = load(in + (first + t) * call.length), b = load(in + (first + t) * call.length + kWide);
      for (int r = 0; r < kBandRows; ++r) total[r][0] += a * weights[r], total[r][1] += b * weights[r];
    }
    for (int r = 0; r < kBandRows && o + r < call.rows_out; ++r) {
      float* const to = out + (o + r) * call.length;
      store(to, call.add ? load(to) + total[r][0] : total[r][0]);
      store(to + kWide, call.add ? load(to + kWide) + total[r][1] : total[r][1]);
    }
  }
}

// One column.
inline void banded_column(const BandedCall& call, const float* in, float* out) {
  for (int64_t o = 0; o < call.rows_out; ++o) {
    int64_t const first = call.first[o / kBandRows], left = call.rows_in - first, taps = call.taps < left ? call.taps : left;
    const float* weights = call.weights + o / kBandRows * kBandRows * call.taps + o % kBandRows;
    float total = 0;
    for (int64_t t = 0; t < taps; ++t) total += in[(first + t) * call.length] * weights[t * kBandRows];
    float* const to = out + o * call.length;
    *to = call.add ? *to + total : total;
  }
}

inline void banded_product(const BandedCall& call, int threads) {
  constexpr int64_t kColumns = 2 * kLanes<float>;
  int64_t const groups = (call.length + kColumns - 1) / kColumns;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t g = 0; g < call.stack * groups; ++g) {
    int64_t const s = g / groups, c = g % groups * kColumns, left = call.length - c;
    const float* in = call.in + s * call.rows_in * call.length + c;
    float* out = call.out + s * call.rows_out * call.length + c;
    if (left >= kColumns) banded_columns(call, in, out);
    else for (int64_t i = 0; i < left; ++i) banded_column(call, in + i, out + i);
  }
}

}  // namespace
}  // namespace medgmae
