// The arithmetic of one 3D Gaussian on a flat detector, for host and device. docs/projection.md explains the algorithm.
//
// V is a double, or a vector of doubles that holds as many Gaussians.
#pragma once

#include <math.h>

#include "../rotations.h"

namespace medgmae {

// A call of the projector. Parameters are (batch, count, ...) arrays, images (batch, views, rows, columns).
struct ProjectCall {
  int64_t batch, count, views;
  const void *means, *scales, *quats, *densities;
  const double* geometry;  // (batch, views, 4, 3): source or direction, centre of pixel (0, 0), step per column, step per row
  int rows, columns;
  double support;         // standard deviations; infinity: all
  bool parallel, affine;  // affine: rays are parallel near each Gaussian
  const void* grad;       // backward: images
  void* out;              // forward: images
  void *grad_means, *grad_scales, *grad_quats, *grad_densities;
};

// A view. With p = corner + column u + row v the rays are p - source, or direction everywhere.
struct ProjectView {
  double origin[3];                      // the source, or pixel (0, 0)
  double ray[3], column[3], row[3];      // ray: through pixel (0, 0)
  double to_u[3], to_v[3], to_depth[3];  // (x - origin) on these: u t, v t and t, with x = origin + t (ray + column u + row v)
  bool parallel, flat;                   // flat: weights are Gaussian functions of (u, v)
};

namespace {
template <class V>
struct Arithmetic;
template <>
struct Arithmetic<double> {
  MEDGMAE_HD double root(double x) { return sqrt(x); }
  MEDGMAE_HD double at_least(double x, double low) { return x > low ? x : low; }
  MEDGMAE_HD double exponential(double x) { return exp(x); }
  MEDGMAE_HD double where_at_most(double x, double limit, double value) { return x <= limit ? value : 0.0; }
};
}  // namespace

// A Gaussian, whatever the view: A = diag(1 / s) R', in row order.
template <class V>
struct ProjectGaussian {
  V mean[3], a[9], density;
  V spoiled;  // 0, or NaN: a parameter or 1 / s^2 is not finite in the type of the arrays
};

// A Gaussian in a view. Its weight, the integral at density 1, is amplitude |w| L^-1/2 exp(-n / (2 L)) with
// n = k00 x^2 + kappa dv^2 and L = 1 + l0 du + l1 dv + l2 du^2 + l3 du dv + l4 dv^2, where (du, dv) is the way from its centre's
// pixel (u, v), x = du - gamma dv, and w the ray. Flat: L = 1, and |w| is in the amplitude.
template <class V>
struct ProjectFrame {
  V u, v, depth;
  V toward[3], along[3], down[3];  // A of the ray through the centre, of the steps per column and per row
  V square;                        // |toward|^2
  V ray[3];
  V k00, k01, k11, gamma, kappa, l[5], amplitude;
};

// Where a frame counts, as quadratic functions of dv: in a row, |a2 x - half| <= sqrt(e0 + e1 dv + e2 dv^2) with
// half = h0 + h1 dv. That is an ellipse if e2 < 0 < a2; else the source is inside the support, or the plane through the
// source, parallel to the detector, cuts it.
template <class V>
struct ProjectReach {
  V a2, h0, h1, e0, e1, e2;
};

// 1, x, dv, x^2, x dv, dv^2: sums over pixels with P = g weight / L, the first with T = g weight; and with
// S = P (n / (2 L) - 1/2).
constexpr int kProjectMoments = 12;

// What is summed over views, in order.
template <class V>
struct ProjectTotals {
  V mean[3], a[9], density;
};
constexpr int kProjectTotals = 13;

template <class A, class B>
MEDGMAE_HD auto dot3(const A* a, const B* b) {
  return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}

template <class A, class B, class C>
MEDGMAE_HD void cross3(const A* a, const B* b, C* out) {
  out[0] = a[1] * b[2] - a[2] * b[1], out[1] = a[2] * b[0] - a[0] * b[2], out[2] = a[0] * b[1] - a[1] * b[0];
}

// View number i of all sets.
MEDGMAE_HD ProjectView project_view(const ProjectCall& call, int64_t i) {
  const double* const g = call.geometry + 12 * i;
  ProjectView view;
  view.parallel = call.parallel, view.flat = call.parallel || call.affine;
  for (int k = 0; k < 3; ++k) {
    view.origin[k] = call.parallel ? g[3 + k] : g[k];
    view.ray[k] = call.parallel ? g[k] : g[3 + k] - g[k];
    view.column[k] = g[6 + k], view.row[k] = g[9 + k];
  }
  cross3(view.row, view.ray, view.to_u), cross3(view.ray, view.column, view.to_v), cross3(view.column, view.row, view.to_depth);
  double const volume = dot3(view.to_depth, view.ray);
  for (int k = 0; k < 3; ++k) view.to_u[k] /= volume, view.to_v[k] /= volume, view.to_depth[k] /= volume;
  return view;
}

constexpr double kLeastSine = 1e-9;  // as in medgmae/ops/projection/inputs.py

// Whether a view is no detector.
MEDGMAE_HD bool is_no_detector(const ProjectView& view) {
  double const flat = sqrt(dot3(view.column, view.column) * dot3(view.row, view.row)), ray = sqrt(dot3(view.ray, view.ray));
  double normal[3];
  cross3(view.column, view.row, normal);
  return !(fabs(dot3(normal, view.ray)) > kLeastSine * flat * ray && sqrt(dot3(normal, normal)) > kLeastSine * flat && isfinite(ray) &&
           isfinite(flat) && isfinite(view.origin[0] + view.origin[1] + view.origin[2]));
}

// |w| of a pixel's ray.
MEDGMAE_HD double ray_square(const ProjectView& view, double u, double v) {
  double square = 0;
  for (int k = 0; k < 3; ++k) {
    double const w = view.ray[k] + u * view.column[k] + v * view.row[k];
    square += w * w;
  }
  return square;
}

// Infinity where the type of the arrays could not hold 1 / s^2.
template <class T, class V>
MEDGMAE_HD V beyond_range(V inverse_square) {
  return inverse_square * (sizeof(T) == 4 ? 5.2829452999e269 : 1.0);  // 2^(1023 - 127)
}

// The direction of a quaternion and its rotation; returns its length, at least 1e-12.
template <class V, class Load>
MEDGMAE_HD V load_rotation(const Load& load, V* q, V* r) {
  V square = V{};
  for (int k = 0; k < 4; ++k) q[k] = load(2, k), square += q[k] * q[k];
  V const length = Arithmetic<V>::at_least(Arithmetic<V>::root(square), 1e-12), inverse = 1.0 / length;
  for (int k = 0; k < 4; ++k) q[k] = q[k] * inverse;
  rotation_matrix(q, r);
  return length;
}

// T is the type of the arrays; load(array, k) gives number k of the Gaussian in the arrays means, scales, quats, densities.
template <class T, class V, class Load>
MEDGMAE_HD ProjectGaussian<V> whiten(const Load& load) {
  ProjectGaussian<V> g;
  V q[4], r[9];
  load_rotation<V>(load, q, r);
  V spoiled = r[1] * 0.0;  // all four numbers are in it
  for (int k = 0; k < 3; ++k) {
    V const scale = load(1, k), inverse = 1.0 / scale;
    spoiled += scale * 0.0 + beyond_range<T>(V(inverse * inverse)) * 0.0;
    for (int j = 0; j < 3; ++j) g.a[3 * k + j] = inverse * r[3 * j + k];
    g.mean[k] = load(0, k), spoiled += g.mean[k] * 0.0;
  }
  g.density = load(3, 0), spoiled += g.density * 0.0;
  g.spoiled = spoiled;
  return g;
}

template <class V>
MEDGMAE_HD void whitened(const ProjectGaussian<V>& g, const double* vector, V* out) {
  for (int k = 0; k < 3; ++k) out[k] = g.a[3 * k] * vector[0] + g.a[3 * k + 1] * vector[1] + g.a[3 * k + 2] * vector[2];
}

// What is behind the source has depth <= 0; its other numbers mean nothing.
template <class V>
MEDGMAE_HD ProjectFrame<V> project_frame(const ProjectView& view, const ProjectGaussian<V>& g) {
  ProjectFrame<V> f;
  V const d[3] = {g.mean[0] - view.origin[0], g.mean[1] - view.origin[1], g.mean[2] - view.origin[2]};
  whitened(g, view.column, f.along), whitened(g, view.row, f.down);
  f.u = dot3(d, view.to_u), f.v = dot3(d, view.to_v);
  if (view.parallel) {
    f.depth = V{} + 1.0;
    for (int k = 0; k < 3; ++k) f.ray[k] = V{} + view.ray[k];
    whitened(g, view.ray, f.toward);
  } else {
    f.depth = dot3(d, view.to_depth);
    V const inverse = 1.0 / f.depth;
    f.u *= inverse, f.v *= inverse;
    for (int k = 0; k < 3; ++k) f.ray[k] = d[k] * inverse;
    for (int k = 0; k < 3; ++k) f.toward[k] = dot3(g.a + 3 * k, f.ray);
  }
  f.square = dot3(f.toward, f.toward);
  V across[3], below[3], normal[3];
  cross3(f.toward, f.along, across), cross3(f.toward, f.down, below), cross3(f.along, f.down, normal);
  V const inverse = 1.0 / f.square, scale = f.depth * f.depth * inverse, triple = f.depth * dot3(f.toward, normal);
  V const width = dot3(across, across), skew = dot3(across, below);
  f.k00 = scale * width, f.k01 = scale * skew, f.k11 = scale * dot3(below, below);
  V const narrow = 1.0 / width;
  f.gamma = -skew * narrow, f.kappa = triple * triple * narrow;
  f.amplitude = 2.5066282746310002 * Arithmetic<V>::root(inverse);
  for (int i = 0; i < 5; ++i) f.l[i] = V{};
  if (view.flat) {
    f.amplitude *= Arithmetic<V>::root(V(dot3(f.ray, f.ray)));
  } else {
    f.l[0] = 2.0 * inverse * dot3(f.toward, f.along), f.l[1] = 2.0 * inverse * dot3(f.toward, f.down);
    f.l[2] = inverse * dot3(f.along, f.along), f.l[3] = 2.0 * inverse * dot3(f.along, f.down);
    f.l[4] = inverse * dot3(f.down, f.down);
  }
  return f;
}

template <class V>
MEDGMAE_HD ProjectReach<V> project_reach(const ProjectFrame<V>& f, double support) {
  double const square = support * support, half = 0.5 * square;
  ProjectReach<V> r;
  V const p1 = f.l[0] * f.gamma + f.l[1], p2 = (f.l[2] * f.gamma + f.l[3]) * f.gamma + f.l[4];
  V const p3 = 2.0 * f.l[2] * f.gamma + f.l[3];
  r.a2 = f.k00 - square * f.l[2], r.h0 = half * f.l[0], r.h1 = half * p3;
  r.e0 = r.h0 * r.h0 + square * r.a2, r.e1 = 2.0 * r.h0 * r.h1 + square * r.a2 * p1;
  r.e2 = r.h1 * r.h1 + r.a2 * (square * p2 - f.kappa);
  return r;
}

MEDGMAE_HD int pixel_within(double at, int low, int high) {
  return at > double(low) ? at < double(high) ? int(at) : high : low;
}

// Standard deviations beyond which a weight is left out: those of the support, but none that cannot be seen.
template <class T>
MEDGMAE_HD double visible_support(double support) {
  double const most = sizeof(T) == 4 ? 6.928203230275509 : 8.94427190999916;  // exp(-24) and exp(-40)
  return support < most ? support : most;
}

// The gradients of one view, from its moments at amplitude 1; adds to the totals. The density of the means and of A is left out.
template <class V>
MEDGMAE_HD void project_chain(const ProjectView& view, const ProjectFrame<V>& f, const V* moments,
                              ProjectTotals<V>* totals) {
  V m[kProjectMoments];
  for (int i = 0; i < kProjectMoments; ++i) m[i] = f.amplitude * moments[i];
  V const count = view.flat ? V{} : m[6], c = f.gamma;
  V const pu = m[3] + c * (2.0 * m[4] + c * m[5]), puv = m[4] + c * m[5];
  V const k00 = -0.5 * pu, k01 = -puv, k11 = -0.5 * m[5];
  V l[5] = {V{}, V{}, V{}, V{}, V{}};
  if (!view.flat) l[0] = m[7] + c * m[8], l[1] = m[8], l[2] = m[9] + c * (2.0 * m[10] + c * m[11]), l[3] = m[10] + c * m[11], l[4] = m[11];
  V by_u = f.k00 * m[1] - (f.l[0] * count + 2.0 * f.l[2] * l[0] + f.l[3] * l[1]);
  V by_v = f.k01 * m[1] + f.kappa * m[2] - (f.l[1] * count + 2.0 * f.l[4] * l[1] + f.l[3] * l[0]);
  V const by_k = k00 * f.k00 + k01 * f.k01 + k11 * f.k11, inverse = 1.0 / f.square;
  V by_l = V{};
  for (int i = 0; i < 5; ++i) by_l += l[i] * f.l[i];
  V const by_square = -inverse * (by_k + by_l + 0.5 * m[0]);
  V across[3], below[3], by_across[3], by_below[3], toward[3], along[3], down[3], part[3];
  cross3(f.toward, f.along, across), cross3(f.toward, f.down, below);
  V const scale = f.depth * f.depth * inverse;
  for (int k = 0; k < 3; ++k) {
    by_across[k] = scale * (2.0 * k00 * across[k] + k01 * below[k]);
    by_below[k] = scale * (2.0 * k11 * below[k] + k01 * across[k]);
  }
  cross3(f.along, by_across, toward), cross3(f.down, by_below, part);
  cross3(by_across, f.toward, along), cross3(by_below, f.toward, down);
  for (int k = 0; k < 3; ++k) {
    toward[k] += part[k] + 2.0 * (by_square * f.toward[k] + inverse * (l[0] * f.along[k] + l[1] * f.down[k]));
    along[k] += inverse * (2.0 * (l[0] * f.toward[k] + l[2] * f.along[k]) + l[3] * f.down[k] * 2.0);
    down[k] += inverse * (2.0 * (l[1] * f.toward[k] + l[4] * f.down[k]) + l[3] * f.along[k] * 2.0);
  }
  for (int k = 0; k < 3; ++k) {
    for (int j = 0; j < 3; ++j) totals->a[3 * k + j] += toward[k] * f.ray[j] + along[k] * view.column[j] + down[k] * view.row[j];
  }
  totals->density += m[0];
  if (view.parallel) {
    for (int k = 0; k < 3; ++k) totals->mean[k] += by_u * view.to_u[k] + by_v * view.to_v[k];
    return;
  }
  by_u += dot3(toward, f.along), by_v += dot3(toward, f.down);
  if (view.flat) {
    V const length = m[0] / dot3(f.ray, f.ray);
    by_u += length * dot3(f.ray, view.column), by_v += length * dot3(f.ray, view.row);
  }
  V const nearer = 1.0 / f.depth, by_depth = nearer * (2.0 * by_k - by_u * f.u - by_v * f.v);
  for (int k = 0; k < 3; ++k) {
    totals->mean[k] += nearer * (by_u * view.to_u[k] + by_v * view.to_v[k]) + by_depth * view.to_depth[k];
  }
}

// The gradients of a Gaussian from its totals, through A = diag(1 / s) R' and the normalised quaternion: eleven numbers in the
// order of the arrays. load as for whiten.
template <class V, class Load>
MEDGMAE_HD void project_gradients(const Load& load, const ProjectTotals<V>& totals, V* out) {
  V q[4], r[9], by_rotation[9], dot = V{};
  V const length = load_rotation<V>(load, q, r), density = load(3, 0), shorter = 1.0 / length;
  for (int k = 0; k < 3; ++k) {
    V const inverse = 1.0 / load(1, k);
    V by_scale = V{};
    for (int j = 0; j < 3; ++j) {
      V const by_a = density * totals.a[3 * k + j] * inverse;
      by_scale -= by_a * r[3 * j + k], by_rotation[3 * j + k] = by_a;
    }
    out[k] = density * totals.mean[k], out[3 + k] = by_scale * inverse;
  }
  unit_quaternion_gradient(q, by_rotation, out + 6);
  for (int k = 0; k < 4; ++k) dot += q[k] * out[6 + k];
  dot = Arithmetic<V>::where_at_most(-length, -1.000001e-12, dot);  // a shorter one's length is the constant 1e-12
  for (int k = 0; k < 4; ++k) out[6 + k] = (out[6 + k] - q[k] * dot) * shorter;
  out[10] = totals.density;
}

// Writes the gradients of Gaussian i of all sets, get(0) to get(10).
template <class T, class Get>
MEDGMAE_HD void write_project_gradients(const ProjectCall& call, int64_t i, Get get) {
  for (int k = 0; k < 3; ++k) static_cast<T*>(call.grad_means)[3 * i + k] = T(get(k)), static_cast<T*>(call.grad_scales)[3 * i + k] = T(get(3 + k));
  for (int k = 0; k < 4; ++k) static_cast<T*>(call.grad_quats)[4 * i + k] = T(get(6 + k));
  static_cast<T*>(call.grad_densities)[i] = T(get(10));
}

}  // namespace medgmae
