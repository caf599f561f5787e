// The CPU projector: one Gaussian in rows of pixels, for any view. cuda/projection/walk.h goes over views and Gaussians.
//
// The geometry of a row is found in double, as many rows at a time as there are lanes; from the first pixel of the row on, the
// weights are computed in the type of the arrays, a vector of pixels at a time.
// Everything is in an anonymous namespace, see common.h.
#pragma once

#include "groups.h"

namespace medgmae {

namespace {

// 1 / sqrt(x) to about 1 ulp, for normal x.
inline Vec<float> inverse_root(Vec<float> x) {
#if defined(__AVX512F__)
  Vec<float> const r = _mm512_maskz_rsqrt14_ps(0xffff, x);
#elif defined(__AVX2__)
  Vec<float> const r = _mm256_rsqrt_ps(x);
#elif defined(__SSE2__)
  Vec<float> const r = _mm_rsqrt_ps(x);
#else
  Vec<float> r;
  for (int i = 0; i < kLanes<float>; ++i) r[i] = 1.0f / sqrtf(x[i]);
#endif
  return r + r * (0.5f - (0.5f * r) * (x * r));
}

inline Doubles inverse_root(Doubles x) { return 1.0 / root_lanes(x); }

// Exponents are powers of two in float32, so that one is an integer and a polynomial.
template <class T>
constexpr T kExponentUnit = T(1);
template <>
constexpr float kExponentUnit<float> = 1.44269504088896341f;

// For exponents down to -126; of lower ones it means nothing.
inline Vec<float> power_lanes(Vec<float> x) {
  Vec<float> const shifted = x + kRounding;
  return power_from_parts(shifted, x - (shifted - kRounding));
}

inline Doubles power_lanes(Doubles x) { return exp_lanes(x); }

enum class Shape { cone, flat };

// A function of its own: inlined, its loop would share the registers with what is around it.
#define MEDGMAE_ALONE __attribute__((noinline)) static

constexpr int kRowBlock = 64;

// Rows of one Gaussian, and rows without pixels behind them up to a multiple of kRowsTogether.
template <class T>
struct RowTable {
  static constexpr int kSize = kRowBlock + (kGroup > kRowsTogether ? kGroup : kRowsTogether);
  T start[kSize], fixed[kSize];           // x of the first pixel, -kappa dv^2 / 2
  T level[kSize], tilt[kSize];            // L of the first pixel, and its slope there
  T dv[kSize], last[kSize];               // last: number of the last pixel, counted from the first; -1: none
  int32_t first[kSize];
};

// One Gaussian, whose weights are amplitude power((curve x^2 + fixed) / L) / sqrt(L).
template <class T>
struct Profile {
  T curve, bend, amplitude;  // bend: of L
};

template <class T>
inline Profile<T> profile_of(const Group& g, int i) {
  Profile<T> p;
  double const curve = lane(g.k00, i), unit = -0.5 * double(kExponentUnit<T>);
  p.curve = T(unit * (curve < 1e30 ? curve : 1e30)), p.bend = T(lane(g.l[2], i)), p.amplitude = T(lane(g.amplitude, i));
  return p;
}

// Rows first, first + 1, ... of a detector of so many columns.
template <class T>
inline void fill_rows(const Group& g, int i, int first, int rows, int columns, RowTable<T>* table) {
  double const u = lane(g.u, i), v = lane(g.v, i), gamma = lane(g.gamma, i), kappa = lane(g.kappa, i);
  double const l0 = lane(g.l[0], i), l1 = lane(g.l[1], i), l2 = lane(g.l[2], i), l3 = lane(g.l[3], i), l4 = lane(g.l[4], i);
  double const inverse = 1 / lane(g.reach.a2, i), h0 = lane(g.reach.h0, i) * inverse, h1 = lane(g.reach.h1, i) * inverse;
  double const e0 = lane(g.reach.e0, i), e1 = lane(g.reach.e1, i), e2 = lane(g.reach.e2, i);
  double const unit = -0.5 * double(kExponentUnit<T>) * kappa, end = columns;
  for (int r = 0; r < rows; r += kGroup) {
    Doubles const number = ramp(double(r)), dv = (number + double(first)) - v;  // the same in whatever block the row is
    Doubles const centre = gamma * dv + u;
    Doubles const square = e0 + dv * (e1 + e2 * dv), middle = centre + (h0 + h1 * dv);
    Doubles const half = root_lanes(square > 0.0 ? square : Doubles{}) * inverse;
    Doubles from = -floor_lanes(half - middle), to = floor_lanes(middle + half) + 1.0;
    from = between(from, end), to = to < end ? to : splat(end);
    // A row without pixels is computed beside others: at its pixel -1, where x = 0 and L = 1 + bend whatever the Gaussian.
    Mask<double> const seen = (to > from) & (square >= 0.0) & (number < double(rows));
    Doubles const du = from - u, level = dv * (l1 + l4 * dv) + du * (l0 + l3 * dv + l2 * du);
    store_as(table->start + r, seen ? from - centre : splat(1.0)), store_as(table->fixed + r, keep<double>(seen, unit * (dv * dv)));
    store_as(table->level + r, 1.0 + keep<double>(seen, level));
    store_as(table->tilt + r, keep<double>(seen, l0 + l3 * dv + 2.0 * l2 * du));
    store_as(table->dv + r, dv), store_as(table->last + r, seen ? to - from - 1.0 : splat(-1.0));
    store_as(table->first + r, from);
  }
}

inline Doubles at_most_lanes(Doubles x, double high) { return x < high ? x : splat(high); }

// A vector of pixels in each of several rows.
template <class T>
struct PixelLanes {
  Vec<T> x[kRowsTogether], exponent[kRowsTogether], inverse[kRowsTogether], weight[kRowsTogether];  // 1 / L; amplitude 1
};

template <class Visit>
inline void for_rows(Visit visit) {
  for (int k = 0; k < kRowsTogether; ++k) visit(k);
}

// Pixels j of the rows from i on, counted from each row's first. Lanes behind a row repeat its last pixel: beyond it numbers may have
// no meaning. Every step is taken for all rows, since one row alone waits for the results of its last step.
template <class T, Shape shape>
inline PixelLanes<T> pixel_lanes(const Profile<T>& p, const RowTable<T>& rows, int i, Vec<T> j) {
  PixelLanes<T> out;
  Vec<T> at[kRowsTogether], root[kRowsTogether];
  for_rows([&](int k) { at[k] = at_most_lanes(j, rows.last[i + k]); });
  for_rows([&](int k) { out.x[k] = at[k] + rows.start[i + k]; });
  for_rows([&](int k) { out.exponent[k] = (out.x[k] * p.curve) * out.x[k] + rows.fixed[i + k]; });
  if constexpr (shape == Shape::flat) {
    for_rows([&](int k) { out.inverse[k] = splat(T(1)), out.weight[k] = power_lanes(out.exponent[k]); });
    return out;
  }
  for_rows([&](int k) { root[k] = at[k] * (at[k] * p.bend + rows.tilt[i + k]) + rows.level[i + k]; });
  for_rows([&](int k) { root[k] = inverse_root(root[k]); });
  for_rows([&](int k) { out.inverse[k] = root[k] * root[k]; });
  for_rows([&](int k) { out.exponent[k] = out.exponent[k] * out.inverse[k]; });
  for_rows([&](int k) { out.weight[k] = power_lanes(out.exponent[k]); });
  for_rows([&](int k) { out.weight[k] = out.weight[k] * root[k]; });
  return out;
}

// Calls visit(i, offset, j) for rows i, i + 1, ... that are taken together and vectors of their pixels j, which lie in row i + k of an
// image from at[k] + offset on, and end(i) behind them.
template <class T, class Image, class Visit, class End>
inline void for_vectors(const RowTable<T>& table, int rows, Image* image, int64_t stride, Visit visit, End end) {
  for (int i = 0; i < rows; i += kRowsTogether) {
    Image* at[kRowsTogether];
    T last = T(0);
    for_rows([&](int k) { at[k] = image + (i + k) * stride + table.first[i + k]; });
    for_rows([&](int k) { last = table.last[i + k] > last ? table.last[i + k] : last; });
    int done = 0;
    Vec<T> j = ramp(T(0));
    do {
      visit(i, at, done, j);
      done += kLanes<T>, j += T(kLanes<T>);
    } while (done <= int(last));
    end(i);
  }
}

// Adds a Gaussian to rows of an image that begin at `image`, `stride` apart; of a buffer, since vectors reach beyond the rows' ends.
template <class T, Shape shape>
MEDGMAE_ALONE void add_rows(const Profile<T>& p, const RowTable<T>& table, int rows, T* image, int64_t stride) {
  auto const visit = [&](int i, T* const* at, int offset, Vec<T> j) {
    PixelLanes<T> const pixel = pixel_lanes<T, shape>(p, table, i, j);
    for_rows([&](int k) {
      T* const to = at[k] + offset;
      store(to, load(to) + keep<T>(j <= table.last[i + k], pixel.weight[k] * p.amplitude));
    });
  };
  for_vectors<T>(table, rows, image, stride, visit, [](int) {});
}

// Sums of one Gaussian, as project.h numbers them.
template <class T>
struct MomentSums {
  Vec<T> of[16];  // the last four are 0
};

// The sums over all lanes.
template <class T>
inline void total_sums(MomentSums<T> sums, T* totals) {
  for (int k = 0; k < 16; k += kLanes<T>) medgmae::sums<T>(sums.of + k), store(totals + k, sums.of[k]);
}

// From sums over du to those over x = du - gamma dv, in the order of kProjectMoments: du, dv, du^2, du dv, dv^2.
inline void shear_moments(double gamma, double* m) {
  m[2] -= gamma * (2 * m[3] - gamma * m[4]), m[0] -= gamma * m[1], m[3] -= gamma * m[4];
}

// Sums over one row.
template <class T>
struct RowSums {
  Vec<T> t, q, qx, qxx, r, rx, rxx;
};

template <class T, Shape shape>
MEDGMAE_ALONE void sum_rows(const Profile<T>& p, const RowTable<T>& table, int rows, const T* image, int64_t stride, MomentSums<T>* sums) {
  constexpr bool cone = shape == Shape::cone;
  Vec<T> s[kProjectMoments];
  for (int k = 0; k < kProjectMoments; ++k) s[k] = sums->of[k];
  // Sums of rows before those over rows: fewer additions in a chain, so less rounding.
  RowSums<T> of_row[kRowsTogether] = {};
  auto const visit = [&](int i, const T* const* at, int offset, Vec<T> j) {
    PixelLanes<T> const pixel = pixel_lanes<T, shape>(p, table, i, j);
    for_rows([&](int k) {
      RowSums<T>& row = of_row[k];
      Vec<T> const x = pixel.x[k], t = keep<T>(j <= table.last[i + k], load(at[k] + offset)) * pixel.weight[k];
      Vec<T> const q = cone ? t * pixel.inverse[k] : t, qx = q * x;
      row.t += t, row.q += q, row.qx += qx, row.qxx += qx * x;
      if constexpr (cone) {
        Vec<T> const r = q * (pixel.exponent[k] * T(-1 / kExponentUnit<T>) - T(0.5)), rx = r * x;
        row.r += r, row.rx += rx, row.rxx += rx * x;
      }
    });
  };
  auto const end = [&](int i) {
    for_rows([&](int k) {
      T const dv = table.dv[i + k];
      RowSums<T> const row = of_row[k];
      Vec<T> const qv = row.q * dv, rv = row.r * dv;
      of_row[k] = RowSums<T>{};
      s[0] += row.t, s[1] += row.qx, s[2] += qv, s[3] += row.qxx, s[4] += row.qx * dv, s[5] += qv * dv;
      if constexpr (cone) s[6] += row.r, s[7] += row.rx, s[8] += rv, s[9] += row.rxx, s[10] += row.rx * dv, s[11] += rv * dv;
    });
  };
  for_vectors<T>(table, rows, image, stride, visit, end);
  for (int k = 0; k < kProjectMoments; ++k) sums->of[k] = s[k];
}

}  // namespace
}  // namespace medgmae
