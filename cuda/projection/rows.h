// The CPU projector: one Gaussian in rows of pixels, for any view. cuda/projection/walk.h goes over views and Gaussians.
//
// The geometry of a row is found in double, as many rows at a time as there are lanes; from the first pixel of the row on, the
// weights are computed in the type of the arrays, a vector of pixels at a time.
// Everything is in an anonymous namespace, see common.h.
#pragma once

#include "../lanes.h"
#include "project.h"

namespace medgmae {

namespace {

typedef Vec<double> Doubles;
constexpr int kGroup = kLanes<double>;  // Gaussians, or rows, whose geometry is found together

inline Doubles root_lanes(Doubles x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_pd(0xff, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(x);
#elif defined(__SSE2__)
  return _mm_sqrt_pd(x);
#else
  for (int i = 0; i < kGroup; ++i) x[i] = sqrt(x[i]);
  return x;
#endif
}

inline Doubles floor_lanes(Doubles x) {
#if defined(__AVX512F__)
  return _mm512_maskz_roundscale_pd(0xff, x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_floor_pd(x);
#else
  for (int i = 0; i < kGroup; ++i) x[i] = floor(x[i]);
  return x;
#endif
}

template <>
struct Arithmetic<Doubles> {
  static inline Doubles root(Doubles x) { return root_lanes(x); }
  static inline Doubles at_least(Doubles x, double low) { return x > low ? x : splat(low); }
  static inline Doubles exponential(Doubles x) { return exp_lanes(x); }
  static inline Doubles where_at_most(Doubles x, double limit, Doubles value) { return keep<double>(x <= limit, value); }
};

inline double lane(const Doubles& v, int i) {
  double x;
  memcpy(&x, reinterpret_cast<const char*>(&v) + sizeof(double) * size_t(i), sizeof(x));
  return x;
}

template <class To>
inline void store_as(To* to, Doubles v) {
  typedef To Narrow __attribute__((vector_size(sizeof(To) * kGroup)));
  Narrow const narrow = __builtin_convertvector(v, Narrow);
  memcpy(to, &narrow, sizeof(narrow));
}

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

// For exponents down to -126.
inline Vec<float> power_lanes(Vec<float> x) {
  Vec<float> const shifted = x + kRounding;
  return power_from_parts(shifted, x - (shifted - kRounding));
}

inline Doubles power_lanes(Doubles x) { return exp_lanes(x); }

// Group of Gaussians in a view, ready to be walked over.
struct Group {
  Doubles u, v, gamma, kappa, k00, l[5], amplitude;  // with the density in a forward
  ProjectReach<Doubles> reach;
  ProjectRange range[kGroup];
};

enum class Shape { cone, flat };

constexpr int kRowBlock = 64;

// Rows of one Gaussian.
template <class T>
struct RowTable {
  T start[kRowBlock], fixed[kRowBlock];  // x of the first pixel, -kappa dv^2 / 2
  T level[kRowBlock], tilt[kRowBlock];   // L of the first pixel, and its slope there
  T dv[kRowBlock];
  int32_t first[kRowBlock], count[kRowBlock];
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
    Doubles const dv = ramp(double(first + r)) - v, centre = gamma * dv + u;
    Doubles const square = e0 + dv * (e1 + e2 * dv), middle = centre + (h0 + h1 * dv);
    Doubles const half = root_lanes(square > 0.0 ? square : Doubles{}) * inverse;
    Doubles from = -floor_lanes(half - middle), to = floor_lanes(middle + half) + 1.0;
    from = from > 0.0 ? from : Doubles{}, from = from < end ? from : splat(end);
    to = to < end ? to : splat(end);
    Doubles count = to > from ? to - from : Doubles{};
    count = square >= 0.0 ? count : Doubles{};
    Doubles const du = from - u;
    store_as(table->start + r, from - centre), store_as(table->fixed + r, unit * (dv * dv)), store_as(table->dv + r, dv);
    store_as(table->level + r, 1.0 + dv * (l1 + l4 * dv) + du * (l0 + l3 * dv + l2 * du));
    store_as(table->tilt + r, l0 + l3 * dv + 2.0 * l2 * du);
    store_as(table->first + r, from), store_as(table->count + r, count);
  }
}

inline Doubles at_most_lanes(Doubles x, double high) { return x < high ? x : splat(high); }

// The first `count` lanes, all of them if there are more.
template <class T>
inline Mask<T> first_lanes(int count) {
  return ramp(T(0)) < T(count);
}

template <class T>
struct PixelLanes {
  Vec<T> x, exponent, inverse, weight;  // 1 / L; amplitude 1
};

// Pixels j of row i, counted from the row's first. Lanes behind the row repeat its last pixel: beyond it numbers may have no meaning.
template <class T, Shape shape>
inline PixelLanes<T> pixel_lanes(const Profile<T>& p, const RowTable<T>& rows, int i, Vec<T> j) {
  PixelLanes<T> out;
  j = at_most_lanes(j, T(rows.count[i] - 1));
  out.x = j + rows.start[i];
  out.exponent = (out.x * p.curve) * out.x + rows.fixed[i];
  if constexpr (shape == Shape::flat) {
    out.inverse = splat(T(1));
    out.weight = power_lanes(out.exponent);
    return out;
  }
  Vec<T> const root = inverse_root(j * (j * p.bend + rows.tilt[i]) + rows.level[i]);
  out.inverse = root * root;
  out.exponent = out.exponent * out.inverse;
  out.weight = power_lanes(out.exponent) * root;
  return out;
}

// Adds a Gaussian to rows of an image that begin at `image`, `stride` apart, and may be written up to a vector beyond a row's end.
template <class T, Shape shape>
inline void add_rows(const Profile<T>& p, const RowTable<T>& table, int rows, T* image, int64_t stride) {
  for (int i = 0; i < rows; ++i, image += stride) {
    int const count = table.count[i];
    T* at = image + table.first[i];
    Vec<T> j = ramp(T(0));
    for (int left = count; left > 0; left -= kLanes<T>, at += kLanes<T>, j += T(kLanes<T>)) {
      PixelLanes<T> const pixel = pixel_lanes<T, shape>(p, table, i, j);
      Mask<T> const inside = first_lanes<T>(left);
      store(at, load(at) + keep<T>(inside, pixel.weight * p.amplitude));
    }
  }
}

// Sums of one Gaussian, as project.h numbers them.
template <class T>
struct MomentSums {
  Vec<T> of[16];  // the last four are 0
};

template <class T, Shape shape>
inline void sum_rows(const Profile<T>& p, const RowTable<T>& table, int rows, const T* image, int64_t stride, MomentSums<T>* sums) {
  Vec<T> s[kProjectMoments];
  for (int k = 0; k < kProjectMoments; ++k) s[k] = sums->of[k];
  for (int i = 0; i < rows; ++i, image += stride) {
    int const count = table.count[i];
    if (count == 0) continue;
    const T* at = image + table.first[i];
    T const dv = table.dv[i], square = dv * dv;
    // Sums of rows before those over rows: fewer additions in a chain, so less rounding.
    Vec<T> j = ramp(T(0)), t_row = {}, q_row = {}, qx_row = {}, qxx_row = {}, r_row = {}, rx_row = {}, rxx_row = {};
    for (int left = count; left > 0; left -= kLanes<T>, at += kLanes<T>, j += T(kLanes<T>)) {
      PixelLanes<T> const pixel = pixel_lanes<T, shape>(p, table, i, j);
      Mask<T> const inside = first_lanes<T>(left);
      Vec<T> const t = keep<T>(inside, load(at)) * pixel.weight, q = shape == Shape::flat ? t : t * pixel.inverse;
      Vec<T> const qx = q * pixel.x;
      t_row += t, q_row += q, qx_row += qx, qxx_row += qx * pixel.x;
      if constexpr (shape != Shape::flat) {
        Vec<T> const r = q * (pixel.exponent * T(-1 / kExponentUnit<T>) - T(0.5)), rx = r * pixel.x;
        r_row += r, rx_row += rx, rxx_row += rx * pixel.x;
      }
    }
    s[0] += t_row, s[1] += qx_row, s[2] += q_row * dv, s[3] += qxx_row, s[4] += qx_row * dv, s[5] += q_row * square;
    if constexpr (shape != Shape::flat) {
      s[6] += r_row, s[7] += rx_row, s[8] += r_row * dv, s[9] += rxx_row, s[10] += rx_row * dv, s[11] += r_row * square;
    }
  }
  for (int k = 0; k < kProjectMoments; ++k) sums->of[k] = s[k];
}

}  // namespace
}  // namespace medgmae
