// The CPU projector: Gaussians in a view, a register of them at a time, in double.
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

// x, but at least 0 and at most high; 0 for NaN.
inline Doubles between(Doubles x, double high) {
  x = x > 0.0 ? x : Doubles{};
  return x < high ? x : splat(high);
}

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

inline Doubles size_lanes(Doubles x) { return x < 0.0 ? -x : x; }

typedef ProjectGaussian<Doubles> Whitened;

inline int64_t groups_of(const ProjectCall& call) { return (call.count + kGroup - 1) / kGroup; }

// Gaussians of group g of a set.
inline int lanes_of(const ProjectCall& call, int64_t g) {
  int64_t const left = call.count - g * kGroup;
  return left < kGroup ? int(left) : kGroup;
}

constexpr int kRowsTogether = 2;  // rows whose pixels are computed side by side: one alone waits for its own results
constexpr int kPatchVectors = 2;  // of pixels across a patch, see patches.h

// Group of Gaussians in a view, ready to be walked over.
struct Group {
  Doubles u, v, gamma, kappa, k00, l[5], amplitude;  // with the density in a forward
  ProjectReach<Doubles> reach;
  int32_t first[kGroup], last[kGroup];   // rows
  int32_t open[kGroup];                  // 1: no ellipse, of any rows
  // Of a patch: the first column, vectors, first and last row of the second vector. No vectors: no patch.
  int32_t column[kGroup], vectors[kGroup], right[2][kGroup];
};

// The numbers of a group's Gaussians, as whiten wants them; lanes without a Gaussian repeat the last one.
template <class T>
struct GroupLoader {
  Doubles numbers[4][4];
  GroupLoader(const ProjectCall& call, int64_t i) {
    int64_t const set = i / groups_of(call), group = i % groups_of(call), first = set * call.count + group * kGroup;
    int const last = lanes_of(call, group) - 1;
    load_array(call.means, 3, first, last, numbers[0]), load_array(call.scales, 3, first, last, numbers[1]);
    load_array(call.quats, 4, first, last, numbers[2]), load_array(call.densities, 1, first, last, numbers[3]);
  }
  static void load_array(const void* array, int width, int64_t first, int last, Doubles* to) {
    const T* const from = static_cast<const T*>(array) + first * width;
    for (int n = 0; n < kGroup; ++n) {
      const T* const row = from + (n < last ? n : last) * width;
      for (int k = 0; k < width; ++k) reinterpret_cast<double*>(to + k)[n] = double(row[k]);
    }
  }
  const Doubles& operator()(int array, int k) const { return numbers[array][k]; }
};

// Finds which Gaussians are patches: ellipses of few columns, with L from 1/4 to 7/4, and no needles at an angle to the pixels, since
// numbers that are found from the centre of one would lose digits.
template <class T>
inline void find_patches(const ProjectCall& call, const ProjectFrame<Doubles>& f, double support, Group* g) {
  double const square = support * support, lanes = kLanes<T>, most = kPatchVectors * lanes, columns = call.columns, rows = call.rows;
  Doubles const k01 = -f.gamma * f.k00, k11 = f.kappa + f.gamma * f.gamma * f.k00;
  // About its middle (u, v) the ellipse is q00 x^2 + 2 q01 x y + q11 y^2 <= height.
  Doubles const q00 = f.k00 - square * f.l[2], q01 = k01 - 0.5 * square * f.l[3], q11 = k11 - square * f.l[4];
  Doubles const r0 = -0.5 * square * f.l[0], r1 = -0.5 * square * f.l[1], determinant = q00 * q11 - q01 * q01, inverse = 1.0 / determinant;
  Doubles const u = (q01 * r1 - q11 * r0) * inverse, v = (q01 * r0 - q00 * r1) * inverse, height = square - r0 * u - r1 * v;
  Doubles const wide = root_lanes(height * q11 * inverse), high = root_lanes(height * q00 * inverse), middle = f.u + u;
  Doubles const from = between(-floor_lanes(wide - middle + 1e-6), columns);
  Doubles const to = between(floor_lanes(middle + wide + 1e-6) + 1.0, columns), vectors = -floor_lanes((from - to) / lanes);
  Doubles const before = size_lanes(from - f.u), behind = size_lanes(from + vectors * lanes - f.u);
  Doubles const across = before > behind ? before : behind, down = size_lanes(v) + high + double(kRowsTogether);
  Doubles const bend = across * (size_lanes(f.l[0]) + f.l[2] * across) +
                       down * (size_lanes(f.l[1]) + size_lanes(f.l[3]) * across + f.l[4] * down);
  Mask<double> const fit = (to - from <= most) & (bend <= 0.75) & (k11 <= 16.0 * f.kappa) & (f.k00 < 1e6);
  store_as(g->column, from), store_as(g->vectors, keep<double>(fit, vectors));
  // The rows of the second vector: the highest is at the column nearest to that of the ellipse's highest point, likewise the lowest.
  Doubles const left = from + lanes - middle, shorter = 1.0 / q11, tip = q01 / q00 * high;
  Doubles edge[2];
  for (int side = 0; side < 2; ++side) {
    double const sign = side == 0 ? -1 : 1;
    Doubles const at = left > -sign * tip ? left : -sign * tip, rest = q11 * height - determinant * at * at;
    edge[side] = f.v + v + shorter * (sign * root_lanes(rest > 0.0 ? rest : Doubles{}) - q01 * at);
  }
  store_as(g->right[0], between(-floor_lanes(1e-6 - edge[0]), rows));
  store_as(g->right[1], between(floor_lanes(edge[1] + 1e-6) + 1.0, rows) - 1.0);
}

template <class T>
Group group_in_view(const ProjectCall& call, const ProjectFrame<Doubles>& f, Doubles factor, int lanes) {
  Group g;
  double const support = visible_support<T>(call.support), rows = call.rows;
  g.u = f.u, g.v = f.v, g.gamma = f.gamma, g.kappa = f.kappa, g.k00 = f.k00, g.amplitude = f.amplitude * factor;
  for (int k = 0; k < 5; ++k) g.l[k] = f.l[k];
  g.reach = project_reach(f, support);
  const ProjectReach<Doubles>& r = g.reach;
  Mask<double> const seen = (f.depth > 0.0) & (ramp(0.0) < double(lanes)), ellipse = (r.a2 > 0.0) & (r.e2 < 0.0);
  Doubles const inverse = 0.5 / r.e2, middle = f.v - r.e1 * inverse, half = root_lanes(r.e1 * r.e1 - 4.0 * r.e0 * r.e2) * -inverse;
  Doubles first = -floor_lanes(half - middle + 1e-6), end = floor_lanes(middle + half + 1e-6) + 1.0;
  first = keep<double>(ellipse, between(first, rows)), end = ellipse ? between(end, rows) : splat(rows);
  store_as(g.first, first), store_as(g.last, keep<double>(seen, end) - 1.0), store_as(g.open, keep<double>(~ellipse, splat(1.0)));
  find_patches<T>(call, f, support, &g);
  return g;
}

}  // namespace
}  // namespace medgmae
