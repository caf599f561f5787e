// One Gaussian in columns of voxels along z, the way CUDA threads render it: one column to a thread. Written for the device
// and, so that tests can run the same arithmetic without one, for the host.
//
// With n = (z, y, x) the offset from an anchor voxel, a weight is column(y, x) * step(y, x)^z * plane(z). The 16 or 32
// numbers plane(z) are shared by all columns; so a weight costs two multiplications. Where a factor could leave the range of
// its type, or its exponent its digits, a column's quadratic is found in double and every voxel has its own exponential.
#pragma once

#include "../block_math.h"
#include "voxelize.h"

namespace medgmae {

constexpr int kRun = 8;  // steps of the recurrence before a column starts anew: step(y, x) is only good to 2 ulp
// Limits on sums of exponents, natural logarithm. kSafe: in a voxel's weight, column(y, x) step(y, x)^z may come as far above
// 1 before plane(z), which holds the density, brings it down; exp(60) times densities up to 1e8 is 1e34, under the 3e38 of
// a float. kPrecise: terms of the exponent that cancel leave an error of the largest's rounding; 120 * 2^-24 is 7e-6 of the
// weight, which keeps Gaussians of any shape under 2e-5.
constexpr double kSafe = 60, kPrecise = 120;
constexpr double kLog2E = 1.4426950408889634074;  // exponents are powers of two from here on

template <class T>
MEDGMAE_DEVICE T clamped(T value, T low, T high) {
  return value < low ? low : value > high ? high : value;
}

// A box of voxels of the volume, inclusive.
struct VoxelBox {
  int first[3], last[3];
};

MEDGMAE_DEVICE bool overlap(const VoxelBox& a, const VoxelBox& b) {
  bool all = true;
  for (int k = 0; k < 3; ++k) all = all && a.first[k] <= b.last[k] && a.last[k] >= b.first[k];
  return all;
}

MEDGMAE_DEVICE VoxelBox intersection(const int* first, const int* last, const VoxelBox& b) {
  VoxelBox part;
  for (int k = 0; k < 3; ++k) {
    part.first[k] = first[k] > b.first[k] ? first[k] : b.first[k];
    part.last[k] = last[k] < b.last[k] ? last[k] : b.last[k];
  }
  return part;
}

// Every voxel counts; a threshold decides; columns are found in double.
enum class ColumnKind : int { whole, rim, exact };

// A Gaussian in a few planes. Rows and lanes (y, x) count from a corner that the columns share. In groups of four, as they
// are read.
template <class T>
struct alignas(4 * sizeof(T)) Slab {
  T low[2], high[2];
  T anchor[2], start, first;           // first: offset of plane 0 from the anchor's
  T slope[2], threshold, curve_deep;   // of a rim: weights below the threshold are outside; curve_deep: zx
  T curve[4];                          // exponent in the anchor's plane: yy / 2, xx / 2, yx; and zy
  int low_plane, high_plane;           // that count
  ColumnKind kind;
  int gaussian;  // of the sample
  T z_slope, z_curve;  // exponent along z
};

// The geometry of a slab. The frame's voxel may lie in another plane.
template <class T>
MEDGMAE_DEVICE void place_slab(const VoxelFrame<double>& f, const VoxelBox& range, const int* corner, Slab<T>* s) {
  int const anchor = clamped(f.at[0], range.first[0], range.last[0]), shift = anchor - f.at[0];
  s->start = T(kLog2E * (f.start - shift * (f.slope[0] + 0.5 * f.curve[0] * shift)));
  s->z_slope = T(kLog2E * (f.slope[0] + f.curve[0] * shift)), s->z_curve = T(kLog2E * 0.5 * f.curve[0]);
  s->curve[0] = T(kLog2E * 0.5 * f.curve[1]), s->curve[1] = T(kLog2E * 0.5 * f.curve[2]);
  s->curve[2] = T(kLog2E * f.curve[5]), s->curve[3] = T(kLog2E * f.curve[3]), s->curve_deep = T(kLog2E * f.curve[4]);
  for (int k = 0; k < 2; ++k) {
    s->slope[k] = T(kLog2E * (f.slope[1 + k] + f.curve[3 + k] * shift));
    s->anchor[k] = T(f.at[1 + k] - corner[1 + k]);
    s->low[k] = T(range.first[1 + k] - corner[1 + k]), s->high[k] = T(range.last[1 + k] - corner[1 + k]);
  }
  s->first = T(corner[0] - anchor);
  s->low_plane = range.first[0] - corner[0], s->high_plane = range.last[0] - corner[0];
}

// plane(z) of plane k; 0 outside the Gaussian's range.
template <class T>
MEDGMAE_DEVICE T plane_factor(const Slab<T>& s, int k) {
  T const n = s.first + T(k);
  return k >= s.low_plane && k <= s.high_plane ? power_of_two(-n * (s.z_slope + s.z_curve * n)) : T(0);
}

// Whether the factors of the frame's weights keep their range and digits in a range of voxels, in slabs of `depth` planes.
MEDGMAE_DEVICE bool factors_are_safe(const VoxelFrame<double>& f, const VoxelBox& range, int depth) {
  double n[3];  // the largest offset from the anchor
  for (int k = 0; k < 3; ++k) {
    int const before = f.at[k] - range.first[k], after = range.last[k] - f.at[k];
    n[k] = before > after ? before : after;
  }
  const double* c = f.curve;
  double const step = fabs(c[3]) * n[1] + fabs(c[4]) * n[2], planes = depth - 1;
  bool const in_range = planes * (step + fabs(f.slope[0])) < kSafe && fmax(fmax(c[0], c[1]), fmax(c[2], -f.start)) < 1e30;
  double const in_plane = fabs(f.slope[1]) * n[1] + fabs(f.slope[2]) * n[2] + fabs(c[5]) * n[1] * n[2];
  double const terms = in_plane + (n[0] > planes ? n[0] : planes) * step;
  return in_range && terms < kPrecise;
}

// The exponent below which a voxel is outside.
template <class T>
MEDGMAE_DEVICE T least_exponent(const VoxelizeCall& call) {
  bool const bounded = call.support > 0 && !isinf(call.support);
  return bounded ? T(-0.5 * kLog2E * call.support * call.support) : -T(INFINITY);
}

// Whether a corner of the slab, and so perhaps a voxel, lies outside the support.
template <class T>
MEDGMAE_DEVICE bool has_rim(const Slab<T>& s, T least) {
  bool rim = false;
#pragma unroll 1
  for (int corner = 0; corner < 8; ++corner) {
    T const z = s.first + T(corner & 1 ? s.high_plane : s.low_plane);
    T const y = (corner & 2 ? s.high[0] : s.low[0]) - s.anchor[0], x = (corner & 4 ? s.high[1] : s.low[1]) - s.anchor[1];
    T const plane = s.start - y * (s.slope[0] + s.curve[0] * y) - x * (s.slope[1] + s.curve[1] * x + s.curve[2] * y);
    rim = rim || !(plane - z * (s.z_slope + s.z_curve * z + s.curve[3] * y + s.curve_deep * x) > least);
  }
  return rim;
}

// A column of a slab: the weight of plane k is weight(k) plane[k], taken from start(k) on by factors of step.
template <class T>
struct Column {
  T exponent, cross, step;
};

template <class T>
MEDGMAE_DEVICE Column<T> column_at(const Slab<T>& s, T row, T lane) {
  T const y = row - s.anchor[0], x = lane - s.anchor[1];
  Column<T> c;
  c.cross = s.curve[3] * y + s.curve_deep * x;
  T const plane = s.start - y * (s.slope[0] + s.curve[0] * y) - x * (s.slope[1] + s.curve[1] * x + s.curve[2] * y);
  c.exponent = plane - s.first * c.cross;
  c.step = power_of_two(-c.cross);
  return c;
}

template <class T>
MEDGMAE_DEVICE T column_start(const Column<T>& c, int k) {
  return power_of_two(c.exponent - T(k) * c.cross);
}

// A column found in double: the exponent of plane k is start - n (slope + curve n) with n = k - at, its highest plane.
template <class T>
struct ExactColumn {
  T start, slope, curve;
  int at;
};

template <class T>
MEDGMAE_DEVICE ExactColumn<T> exact_column(const VoxelizeCall& call, const VoxelGaussian<double>& g, int z, int planes, int y,
                                           int x) {
  int const at[3] = {z, y, x};
  double d[3];
  for (int k = 0; k < 3; ++k) d[k] = call.origin[k] + call.step[k] * at[k] - g.mean[k];
  const double* p = g.precision;
  double const pd0 = p[0] * d[0] + p[3] * d[1] + p[4] * d[2], pd1 = p[3] * d[0] + p[1] * d[1] + p[5] * d[2];
  double const pd2 = p[4] * d[0] + p[5] * d[1] + p[2] * d[2];
  double const start = -0.5 * (d[0] * pd0 + d[1] * pd1 + d[2] * pd2), slope = pd0 * call.step[0];
  double const curve = p[0] * call.step[0] * call.step[0];
  ExactColumn<T> c;
  c.at = curve > 0 ? bounded_index(0.5 - slope / curve, 0, planes - 1) : 0;
  double const highest = start - c.at * (slope + 0.5 * curve * c.at);
  // Within what a float can hold, so that no infinity meets a zero.
  c.start = T(clamped(kLog2E * highest, -1e30, 0.0));
  c.slope = T(clamped(kLog2E * (slope + curve * c.at), -1e30, 1e30));
  c.curve = T(clamped(0.5 * kLog2E * curve, 0.0, 1e30));
  return c;
}

template <class T>
MEDGMAE_DEVICE T exact_weight(const ExactColumn<T>& c, T least, int k) {
  T const n = T(k - c.at), exponent = c.start - n * (c.slope + c.curve * n);
  return exponent >= least ? power_of_two(exponent < T(0) ? exponent : T(0)) : T(0);
}

}  // namespace medgmae
