// The arithmetic of one 3D Gaussian on a grid of voxels, for host and device. docs/renderer.md explains the algorithm.
#pragma once

#include <math.h>

#include "../rotations.h"

namespace medgmae {

// A call of the renderer. Parameters are (batch, count, ...) arrays; the voxels are `patches` boxes of `patch` voxels per
// sample, numbered in raster order over the grid of patches; the whole volume is one patch of its own size.
struct VoxelizeCall {
  int64_t batch, count, patches;
  const void *means, *scales, *quats, *densities;
  const int64_t* index;  // (batch, patches)
  int size[3], patch[3];
  double origin[3], step[3];            // voxel i sits at origin + step i
  double support;                       // 0: the box of 2 scales; k: ellipsoid of k standard deviations; infinity: all
  double least_width, limit_width;      // only Gaussians with least <= width() < limit take part
  const void* grad;                     // backward: (batch, patches, voxels of a patch)
  void* out;                            // forward, same shape
  void *grad_means, *grad_scales, *grad_quats, *grad_densities;
};

// A Gaussian ready to be rendered, in precision L. Matrices are symmetric: 00 11 22 01 02 12.
template <class L>
struct VoxelGaussian {
  L mean[3];
  L precision[6];
  L density;
  int first[3], last[3];  // voxels that it may reach, inclusive; none if first > last
  bool active;            // takes part in this call
  bool bad;               // a parameter or 1 / scale^2 is not finite in the type of the arrays
};

// What a Gaussian is near voxel `at`: its exponent n voxels away is start - slope n - 1/2 n' curve n.
template <class T>
struct VoxelFrame {
  T start, slope[3], curve[6];
  int at[3];
};

// Below these exponents a Gaussian is not computed where its support would be everything.
template <class T>
MEDGMAE_HD T lowest_exponent() {
  return sizeof(T) == 4 ? T(-24) : T(-40);
}

// R diag(d) R' of a rotation in row order.
template <class L>
MEDGMAE_HD void turn_diagonal(const L* r, const L* d, L* out) {
  int const rows[6] = {0, 1, 2, 0, 0, 1}, columns[6] = {0, 1, 2, 1, 2, 2};
  for (int e = 0; e < 6; ++e) {
    const L *a = r + 3 * rows[e], *b = r + 3 * columns[e];
    out[e] = a[0] * b[0] * d[0] + a[1] * b[1] * d[1] + a[2] * b[2] * d[2];
  }
}

// Truncation toward zero of a bound, kept within [lo, hi] before it becomes an integer.
template <class L>
MEDGMAE_HD int bounded_index(L bound, int lo, int hi) {
  if (!(bound > L(lo))) return lo;
  return bound < L(hi) ? int(bound) : hi;
}

// MedGMAE's support along one axis: float32, one rounding for n c -/+ e (utils/discretize_grid.cu).
MEDGMAE_HD void box_range(float center, float scale, int n, int* first, int* last) {
  float const size = float(n), extent = size * (scale + scale);
  float const low = fmaf(size, center, -extent), high = fmaf(size, center, extent);
  *first = bounded_index(low, 0, n);       // n: nothing
  *last = bounded_index(high, -1, n - 1);  // a bound in (-1, 0) is truncated to 0
  if (high > -1.0f && high < 0.0f) *last = 0;
}

// Voxels within `reach` of the center along one axis.
template <class L>
MEDGMAE_HD void reach_range(L center, L reach, double origin, double step, int n, int* first, int* last) {
  if (!(step > 0)) {  // one voxel, which the exponent decides about
    *first = 0, *last = n - 1;
    return;
  }
  L const slack = L(sizeof(L) == 4 ? 1e-3 : 1e-6), middle = L((center - L(origin)) / L(step)), half = L(reach / L(step));
  *first = bounded_index(ceil(middle - half - slack), 0, n);
  *last = bounded_index(floor(middle + half + slack), -1, n - 1);
}

// Whether every value is finite, also as a T.
template <class T, class L>
MEDGMAE_HD bool all_finite(const L* values, int n) {
  L const limit = sizeof(T) == 4 ? L(3.4028234e38) : L(1.7976931348623157e308);
  bool finite = true;
  for (int i = 0; i < n; ++i) finite = finite && fabs(values[i]) <= limit;
  return finite;
}

// 1 / s^2; the square of a small scale would be subnormal, which counts as 0 in the kernels.
template <class L>
MEDGMAE_HD L inverse_square(L s) {
  L const inverse = 1 / s;
  return inverse * inverse;
}

// The i-th Gaussian of all samples. T is the type of the arrays.
template <class T, class L>
MEDGMAE_HD VoxelGaussian<L> prepare_gaussian(const VoxelizeCall& call, int64_t i) {
  const T *mean = static_cast<const T*>(call.means) + 3 * i, *scale = static_cast<const T*>(call.scales) + 3 * i;
  VoxelGaussian<L> g;
  L q[4], r[9], square[3], inverse[3], covariance[6];
  normalize_quaternion(static_cast<const T*>(call.quats) + 4 * i, q);
  rotation_matrix(q, r);
  for (int k = 0; k < 3; ++k) {
    g.mean[k] = mean[k], square[k] = L(scale[k]) * L(scale[k]), inverse[k] = inverse_square(L(scale[k]));
  }
  turn_diagonal(r, inverse, g.precision);
  turn_diagonal(r, square, covariance);
  g.density = static_cast<const T*>(call.densities)[i];
  bool const finite = all_finite<T>(g.mean, 3) && all_finite<T>(scale, 3) && all_finite<T>(&g.density, 1);
  g.bad = !(finite && all_finite<T>(inverse, 3) && all_finite<T>(g.precision, 6));
  L width = L(INFINITY);  // the least standard deviation along an axis with the other coordinates held, in voxels
  L const k = isinf(call.support) ? sqrt(-2 * L(lowest_exponent<T>())) : L(call.support);
  for (int a = 0; a < 3; ++a) {
    L const along = 1 / (sqrt(g.precision[a]) * L(call.step[a]));
    width = along < width ? along : width;
    if (call.support == 0) {
      box_range(float(mean[a]), float(scale[a]), call.size[a], &g.first[a], &g.last[a]);
    } else {
      reach_range(g.mean[a], k * sqrt(covariance[a]), call.origin[a], call.step[a], call.size[a], &g.first[a], &g.last[a]);
    }
  }
  g.active = width >= L(call.least_width) && width < L(call.limit_width);
  if (isinf(call.limit_width)) g.active = !(width < L(call.least_width));
  if (g.bad || !g.active) g.first[0] = 0, g.last[0] = -1;
  return g;
}

// The frame at the voxel of the box [low, high] that is nearest to the center.
template <class T, class L>
MEDGMAE_HD VoxelFrame<T> frame_in_box(const VoxelizeCall& call, const VoxelGaussian<L>& g, const int* low, const int* high) {
  VoxelFrame<T> f;
  L d[3], step[3];
  for (int k = 0; k < 3; ++k) {
    step[k] = L(call.step[k]);
    L const nearest = step[k] > 0 ? (g.mean[k] - L(call.origin[k])) / step[k] + L(0.5) : L(0);
    f.at[k] = bounded_index(nearest, low[k], high[k]);
    d[k] = L(call.origin[k]) + step[k] * L(f.at[k]) - g.mean[k];
  }
  const L* p = g.precision;
  L const pd[3] = {p[0] * d[0] + p[3] * d[1] + p[4] * d[2], p[3] * d[0] + p[1] * d[1] + p[5] * d[2],
                   p[4] * d[0] + p[5] * d[1] + p[2] * d[2]};
  L const start = -L(0.5) * (d[0] * pd[0] + d[1] * pd[1] + d[2] * pd[2]);
  f.start = T(start < 0 ? start : L(0));
  int const rows[6] = {0, 1, 2, 0, 0, 1}, columns[6] = {0, 1, 2, 1, 2, 2};
  for (int k = 0; k < 3; ++k) f.slope[k] = T(pd[k] * step[k]);
  for (int e = 0; e < 6; ++e) f.curve[e] = T(p[e] * step[rows[e]] * step[columns[e]]);
  return f;
}

// The exponent n voxels away from the frame's voxel, (z, y, x) in the order of the axes.
template <class T>
MEDGMAE_HD T exponent_at(const VoxelFrame<T>& f, T z, T y, T x) {
  const T* c = f.curve;
  return f.start - z * (f.slope[0] + T(0.5) * c[0] * z) - y * (f.slope[1] + T(0.5) * c[1] * y + c[3] * z) -
         x * (f.slope[2] + T(0.5) * c[2] * x + c[4] * z + c[5] * y);
}

// Adds the moments of one box, taken over offsets n from the frame's voxel, to those over distances from the center.
// Both are 1, (0 1 2), (00 11 22 01 02 12).
template <class T, class L>
MEDGMAE_HD void add_moments(const VoxelizeCall& call, const VoxelGaussian<L>& g, const int* at, const T* n, double* total) {
  double d[3], m1[3];
  for (int k = 0; k < 3; ++k) {
    d[k] = call.origin[k] + call.step[k] * at[k] - double(g.mean[k]);
    m1[k] = call.step[k] * double(n[1 + k]);
    total[1 + k] += d[k] * double(n[0]) + m1[k];
  }
  total[0] += double(n[0]);
  int const rows[6] = {0, 1, 2, 0, 0, 1}, columns[6] = {0, 1, 2, 1, 2, 2};
  for (int e = 0; e < 6; ++e) {
    int const i = rows[e], j = columns[e];
    total[4 + e] += d[i] * d[j] * double(n[0]) + d[i] * m1[j] + d[j] * m1[i] + call.step[i] * call.step[j] * double(n[4 + e]);
  }
}

// The chain rule from the moments of g w (w without the density) to the gradients of one Gaussian:
// dL/dmu = a P M1, dL/dP = -1/2 a M2, P = R diag(1 / s^2) R', then through the normalised quaternion.
template <class T>
MEDGMAE_HD void parameter_gradients(const VoxelizeCall& call, int64_t i, const double* m) {
  const T* scale = static_cast<const T*>(call.scales) + 3 * i;
  double q[4], r[9], inverse[3], p[6], rotation_grad[9], quat_grad[4];
  double const length = normalize_quaternion(static_cast<const T*>(call.quats) + 4 * i, q);
  double const density = static_cast<const T*>(call.densities)[i];
  rotation_matrix(q, r);
  for (int k = 0; k < 3; ++k) inverse[k] = inverse_square(double(scale[k]));
  turn_diagonal(r, inverse, p);
  T* mean_grad = static_cast<T*>(call.grad_means) + 3 * i;
  mean_grad[0] = T(density * (p[0] * m[1] + p[3] * m[2] + p[4] * m[3]));
  mean_grad[1] = T(density * (p[3] * m[1] + p[1] * m[2] + p[5] * m[3]));
  mean_grad[2] = T(density * (p[4] * m[1] + p[5] * m[2] + p[2] * m[3]));
  static_cast<T*>(call.grad_densities)[i] = T(m[0]);
  double const s[9] = {m[4], m[7], m[8], m[7], m[5], m[9], m[8], m[9], m[6]};  // M2, full
  for (int k = 0; k < 3; ++k) {
    double column[3];  // M2 r_k
    for (int a = 0; a < 3; ++a) column[a] = s[3 * a] * r[k] + s[3 * a + 1] * r[3 + k] + s[3 * a + 2] * r[6 + k];
    double const quadratic = r[k] * column[0] + r[3 + k] * column[1] + r[6 + k] * column[2];
    static_cast<T*>(call.grad_scales)[3 * i + k] = T(density * quadratic * inverse[k] / double(scale[k]));
    for (int a = 0; a < 3; ++a) rotation_grad[3 * a + k] = -density * column[a] * inverse[k];
  }
  quaternion_gradient(q, length, rotation_grad, quat_grad);
  for (int k = 0; k < 4; ++k) static_cast<T*>(call.grad_quats)[4 * i + k] = T(quat_grad[k]);
}

// The gradients of a Gaussian that cannot be rendered: NaN.
template <class T>
MEDGMAE_HD void nan_gradients(const VoxelizeCall& call, int64_t i) {
  T* const rows[4] = {static_cast<T*>(call.grad_means) + 3 * i, static_cast<T*>(call.grad_scales) + 3 * i,
                      static_cast<T*>(call.grad_quats) + 4 * i, static_cast<T*>(call.grad_densities) + i};
  int const widths[4] = {3, 3, 4, 1};
  for (int t = 0; t < 4; ++t) {
    for (int k = 0; k < widths[t]; ++k) rows[t][k] = T(NAN);
  }
}

}  // namespace medgmae
