// The CPU projector where shadows are Gaussian functions of the pixel: a parallel beam, and the affine approximation.
//
// A vector of columns goes down a block of rows: the weight i rows below the block's first is start down^i scaled[i], with start
// and down from one exponential each and the sixteen numbers scaled, exp(-k11 i^2 / 2), the same for all columns and blocks. So a
// weight costs two multiplications. A column is inside the support where its weight says so.
// Everything is in an anonymous namespace, see common.h.
#pragma once

#include "rows.h"

namespace medgmae {
namespace {

constexpr int kBlockRows = 16;
constexpr int kStepRows = 4;  // blocks are multiples of it: what is below the last row of one lies outside the support

// Columns of a vector, and the rows that the support reaches in them.
struct StripTable {
  double column[kGroup], first[kGroup], last[kGroup];
  int count;
};

// One Gaussian in blocks of rows; in exponents unit is -1/2 (float32: times log2 e).
template <class T>
struct Strips {
  double u, v, gamma, kappa, k00, k01, k11, support;
  int begin, end;  // columns
  int rows;        // of a block
  T sign, threshold, next;  // next: factor of down from block to block
  alignas(64) T scaled[16];
};

// Prepares a Gaussian; false for one that loses digits here or gains nothing, which goes through rows.h: small ones, needles, whose
// moments about an axis are more precise than those about a pixel, and supports whose edge a weight does not tell. Blocks end where
// scaled would fall below exp(-6): the exponent of a block's first row, and so its rounding, is small where a later row counts.
template <class T>
inline bool prepare_strips(const Group& g, int i, double support, int columns, double amplitude, Strips<T>* s) {
  s->u = lane(g.u, i), s->v = lane(g.v, i), s->gamma = lane(g.gamma, i), s->kappa = lane(g.kappa, i), s->k00 = lane(g.k00, i);
  s->k01 = -s->gamma * s->k00, s->k11 = s->kappa + s->gamma * s->gamma * s->k00, s->support = support;
  if (!(s->k11 < 1.3 && s->k00 < 1e6 && s->k11 <= 16 * s->kappa && s->kappa > 1e-12 && support >= 2)) return false;
  double const fit = 3.5 / sqrt(s->k11) + 1, reach = support * sqrt(s->k11 / (s->k00 * s->kappa));
  s->rows = fit < kBlockRows ? int(fit) / kStepRows * kStepRows : kBlockRows;
  s->begin = pixel_within(ceil(s->u - reach - 1e-6), 0, columns), s->end = pixel_within(floor(s->u + reach + 1e-6) + 1, 0, columns);
  double const size = fabs(amplitude);
  s->sign = T(amplitude < 0 ? -1 : 1), s->threshold = T(size * exp(-0.5 * support * support)), s->next = T(exp(-s->k11 * s->rows));
  for (int k = 0; k < 16; k += kLanes<T>) {
    Vec<T> const n = ramp(T(k)), exponent = T(-0.5 * double(kExponentUnit<T>) * s->k11) * n * n;
    store(s->scaled + k, T(size) * power_lanes(exponent > T(-100) ? exponent : splat(T(-100))));
  }
  return true;
}

// Strips of kWide vectors from column `from` on, as many as there are lanes. Over a range of columns the highest row is at the
// column nearest to that of the ellipse's highest point, likewise the lowest.
template <class T, int kWide>
inline void fill_strips(const Strips<T>& s, int from, int rows, StripTable* table) {
  constexpr int kColumns = kWide * kLanes<T>;
  double const determinant = s.k00 * s.kappa, top = s.gamma * s.support / sqrt(s.kappa), bound = s.support * s.support * s.k11;
  double const inverse = 1 / s.k11, width = kColumns - 1;
  Doubles const column = double(from) + ramp(0.0) * double(kColumns), a = column - s.u, b = a + width;
  Doubles edge[2];
  for (int side = 0; side < 2; ++side) {
    double const sign = side == 0 ? -1 : 1;
    Doubles du = sign * top > a ? splat(sign * top) : a;
    du = du < b ? du : b;
    Doubles const square = bound - determinant * du * du;
    edge[side] = s.v + inverse * (sign * root_lanes(square > 0.0 ? square : Doubles{}) - s.k01 * du);
  }
  Doubles const first = -floor_lanes(1e-6 - edge[0]), last = floor_lanes(edge[1] + 1e-6), end = splat(double(rows - 1));
  store(table->column, column), store(table->first, first > 0.0 ? first : Doubles{}), store(table->last, last < end ? last : end);
  int const left = (s.end - from + kColumns - 1) / kColumns;
  table->count = left < kGroup ? left : kGroup;
}

// The weights of a strip at the first row of a block, without scaled, and their factors from row to row.
template <class T, int kWide>
struct StripLanes {
  Vec<T> value[kWide], down[kWide];
};

// Of the first block of a strip, or of the next one; of one that is not needed itself only what the next one needs.
template <class T, int kWide>
inline void start_block(const Strips<T>& s, double column, double row, bool first, bool needed, StripLanes<T, kWide>* lanes) {
  if (!first) {
    for (int k = 0; k < kWide; ++k) lanes->down[k] *= s.next;
    if (!needed) return;
  }
  double const dv = row - s.v, unit = kExponentUnit<T>;
  T const fixed = T(-0.5 * unit * s.kappa * dv * dv), curve = T(-0.5 * unit * s.k00), slope = T(-s.k01);
  Vec<T> x = ramp(T(column - s.u - s.gamma * dv));
  for (int k = 0; k < kWide; ++k, x += T(kLanes<T>)) {
    Vec<T> const exponent = (curve * x) * x + fixed;
    Mask<T> const seen = exponent > T(-125);  // no other is inside the support in any row of the block
    lanes->value[k] = keep<T>(seen, power_lanes(keep<T>(seen, exponent)));
    if (first) {
      // power_lanes has twice the error.
      Vec<T> const step = slope * x - T(s.kappa * dv), least = splat(T(-40)), most = splat(T(40));
      lanes->down[k] = exp_lanes(step < least ? least : step > most ? most : step);
    }
  }
}

// Calls visit(lanes, block's first row, its rows, strip's first column) for the blocks of a Gaussian that meet the rows [low, high].
// Blocks begin where they would without these limits, so that the bits are the same.
template <class T, int kWide, class Visit>
inline void for_blocks(const Strips<T>& s, int rows, int low, int high, Visit visit) {
  StripTable table;
  for (int from = s.begin; from < s.end; from += kGroup * kWide * kLanes<T>) {
    fill_strips<T, kWide>(s, from, rows, &table);
    for (int k = 0; k < table.count; ++k) {
      int const first = int(table.first[k]), last = int(table.last[k]);
      if (first > high || last < low) continue;
      StripLanes<T, kWide> lanes = {};
      for (int row = first; row <= last && row <= high; row += s.rows) {
        bool const needed = row + s.rows > low;
        start_block(s, table.column[k], row, row == first, needed, &lanes);
        int const left = last - row + 1;
        if (needed) visit(lanes, row, left < s.rows ? left : s.rows, int(table.column[k]));
      }
    }
  }
}

// Adds a Gaussian to the rows [low, high] of a view of so many rows; they begin at `image`, and up to kStepRows - 1 on both sides
// of them are written as well.
template <class T, int kWide>
inline void add_strips(const Strips<T>& s, int rows, int low, int high, T* image, int64_t stride) {
  for_blocks<T, kWide>(s, rows, low, high, [&](StripLanes<T, kWide> lanes, int row, int count, int column) {
    int const begin = row < low ? (low - row) / kStepRows * kStepRows : 0, end = row + count - 1 > high ? high - row + 1 : count;
    for (int i = 0; i < begin; ++i) {
      for (int k = 0; k < kWide; ++k) lanes.value[k] *= lanes.down[k];
    }
    T* at = image + int64_t(row + begin - low) * stride + column;
    for (int i = begin; i < end; i += kStepRows) {
#pragma GCC unroll 4
      for (int r = 0; r < kStepRows; ++r, at += stride) {
        for (int k = 0; k < kWide; ++k) {
          Vec<T> const weight = lanes.value[k] * s.scaled[i + r];
          T* const to = at + k * kLanes<T>;
          store(to, load(to) + s.sign * keep<T>(weight >= s.threshold, weight));
          lanes.value[k] *= lanes.down[k];
        }
      }
    }
  });
}

// Moments 0 to 5 of a Gaussian over an image.
template <class T, int kWide>
inline void sum_strips(const Strips<T>& s, int rows, const T* image, int64_t stride, double* moments) {
  MomentSums<T> total = {};  // 1, du, dv, du^2, du dv, dv^2
  for_blocks<T, kWide>(s, rows, 0, rows - 1, [&](StripLanes<T, kWide> lanes, int row, int count, int column) {
    Vec<T> zero[kWide] = {}, one[kWide] = {}, two[kWide] = {};
    const T* at = image + int64_t(row) * stride + column;
    for (int i = 0; i < count; i += kStepRows) {
#pragma GCC unroll 4
      for (int r = 0; r < kStepRows; ++r, at += stride) {
        for (int k = 0; k < kWide; ++k) {
          Vec<T> const weight = lanes.value[k] * s.scaled[i + r];
          zero[k] += keep<T>(weight >= s.threshold, load(at + k * kLanes<T>)) * weight, one[k] += zero[k], two[k] += one[k];
          lanes.value[k] *= lanes.down[k];
        }
      }
    }
    // Sums of sums, n - i and (n - i) (n - i + 1) / 2 times row i, become those of i and of i^2.
    T const n = T((count + kStepRows - 1) / kStepRows * kStepRows);
    for (int k = 0; k < kWide; ++k) {
      two[k] = T(2) * two[k] - one[k] + n * (n * zero[k] - T(2) * one[k]);
      one[k] = n * zero[k] - one[k];
    }
    T const dv = T(row - s.v);
    Vec<T> du = ramp(T(column - s.u));
    for (int k = 0; k < kWide; ++k, du += T(kLanes<T>)) {
      Vec<T> const tv = one[k] + zero[k] * dv, tu = zero[k] * du;
      total.of[0] += zero[k], total.of[1] += tu, total.of[2] += tv, total.of[3] += tu * du, total.of[4] += tv * du;
      total.of[5] += two[k] + dv * (one[k] + tv);
    }
  });
  T totals[16];
  total_sums(total, totals);
  for (int k = 0; k < 6; ++k) moments[k] = double(totals[k]);
  shear_moments(s.gamma, moments + 1);
}

// One vector or two side by side.
template <class T>
inline bool is_wide(const Strips<T>& s) {
  return s.end - s.begin > kLanes<T>;
}

}  // namespace
}  // namespace medgmae
