// The CPU renderer: one Gaussian in one strip. cuda/voxel/strips.h walks over the strips and renders, cuda/voxel/sums.h
// has the backward.
//
// With n = (z, y, x) the offset from the frame's voxel, the weight is a product of factors of one or two axes. A row of
// voxels along x is one vector or more, `start`; going down a row multiplies it by `down`, going down a plane by `deep`;
// the factors that are constant along x wait in a table `scaled` of 16 planes and 16 rows. So a weight costs one
// multiplication in the recurrence and one fused multiply-add into the volume.
#pragma once

#include "../simd.h"
#include "voxelize.h"

namespace medgmae {
namespace {

constexpr int kSide = 16;  // planes and rows of a strip
constexpr int kHalf = 8;   // rows that are summed in registers at a time
// The limit on the sum of the exponents of a part's factors, without the squares, which only make them smaller. So far above
// 1 may start * down^y * deep^z come before `scaled`, which holds the density, brings it down; exp(60) times densities up to
// 1e8 is 1e34, under the 3e38 of a float.
constexpr float kSafeExponent = 60.0f;
// Rows of a needle below this exponent are left out: 3e-8 of the peak.
constexpr float kNegligible = -17.3f;

// A box of voxels of the volume: up to 16 planes and 16 rows, of any length along x.
struct Strip {
  int at[3], extent[3];
};

// Values of a strip. Rows are a multiple of 16 long, so that vectors fit in.
template <class T>
struct Values {
  T* first;
  int64_t plane, row;  // strides
  T* at(int z, int y, int x) const { return first + z * plane + y * row + x; }
};

// The part of a Gaussian's range inside a strip, relative to it.
struct Part {
  int low[3], high[3];  // inclusive
};

inline bool intersect(const int* first, const int* last, const Strip& strip, Part* part) {
  for (int k = 0; k < 3; ++k) {
    int const low = first[k] - strip.at[k], high = last[k] - strip.at[k], end = strip.extent[k] - 1;
    part->low[k] = low > 0 ? low : 0;
    part->high[k] = high < end ? high : end;
    if (part->low[k] > part->high[k]) return false;
  }
  return true;
}

// All of the part counts; a threshold decides; no recurrence is safe; nothing counts.
enum class Kind { whole, rim, needle, outside };

// One Gaussian in one strip, or in a part of it.
template <class T>
struct Entry {
  alignas(64) T scaled[kSide][kSide];  // planes and rows outside the part are 0 or unset
  T threshold;                         // of a rim: weights below it are outside
  Kind kind;
  bool upper, lower;  // rows 0..7 and 8..15 are touched
  Part part;
  VoxelFrame<T> frame;
  int offset[3];  // of the frame's voxel in the strip
  T density;      // 1 in the backward
};

// The factors that change along x, of one vector: of a row in the first plane of the part, and from there on.
template <class T>
struct Lanes {
  Vec<T> start, down, deep;
};

// Whether the ellipsoid of k standard deviations holds the part: it is convex, so its corners tell.
template <class T>
inline bool all_inside(const Entry<T>& e, const Part& part, T k) {
  for (int corner = 0; corner < 8; ++corner) {
    T n[3];
    for (int a = 0; a < 3; ++a) n[a] = T((corner >> a & 1 ? part.high[a] : part.low[a]) - e.offset[a]);
    if (!(exponent_at(e.frame, n[0], n[1], n[2]) > -T(0.5) * k * k)) return false;
  }
  return true;
}

// Whether the part surely lies outside: the exponent is concave, so it is below its tangent at the middle of the part.
template <class T>
inline bool all_outside(const Entry<T>& e, const Part& part, T k) {
  const T *slope = e.frame.slope, *c = e.frame.curve;
  T n[3], reach[3];
  for (int a = 0; a < 3; ++a) {
    n[a] = T(0.5) * T(part.low[a] + part.high[a]) - T(e.offset[a]), reach[a] = T(0.5) * T(part.high[a] - part.low[a]);
  }
  T const rise = reach[0] * fabs(slope[0] + c[0] * n[0] + c[3] * n[1] + c[4] * n[2]) +
                 reach[1] * fabs(slope[1] + c[3] * n[0] + c[1] * n[1] + c[5] * n[2]) +
                 reach[2] * fabs(slope[2] + c[4] * n[0] + c[5] * n[1] + c[2] * n[2]);
  return exponent_at(e.frame, n[0], n[1], n[2]) + rise < -T(0.501) * k * k;
}

template <class T>
inline Kind classify(Entry<T>* e, T support) {
  const VoxelFrame<T>& f = e->frame;
  // The recurrence runs over whole halves, also over rows that do not count.
  T const z = T(e->part.high[0] - e->part.low[0]), y = T((e->lower ? kSide : kHalf) - (e->upper ? 0 : kHalf) - 1);
  T const x = T(e->part.high[2] - e->part.low[2]);
  T const lanes = x * (fabs(f.slope[2]) + fabs(f.curve[5]) * y + fabs(f.curve[4]) * z);
  T const rows = y * (fabs(f.slope[1]) + fabs(f.curve[3]) * z);
  e->threshold = 0;  // every weight counts
  Kind kind = Kind::whole;
  if (support > 0 && !isinf(support)) {
    e->threshold = exp(-T(0.5) * support * support) * fabs(e->density);
    if (all_outside(*e, e->part, support)) return Kind::outside;
    if (!all_inside(*e, e->part, support)) kind = Kind::rim;
  }
  // A density so large that it could overflow a factor is handled with care too.
  return lanes + rows < T(kSafeExponent) && fabs(e->density) < T(1e8) ? kind : Kind::needle;
}

// Lanes x of [low, high].
template <class T>
inline Mask<T> between(Vec<T> x, T low, T high) {
  return (x >= low) & (x <= high);
}

// The table: a recurrence over the planes.
template <class T>
inline void fill_table(Entry<T>* e) {
  const VoxelFrame<T>& f = e->frame;
  T const z = T(e->part.low[0] - e->offset[0]);
  alignas(64) T plane[kSide];
  Vec<T> row[kSide / kLanes<T>], deep[kSide / kLanes<T>];
  for (int c = 0; c < kSide / kLanes<T>; ++c) {
    Vec<T> const lane = ramp(T(c * kLanes<T>)), y = lane - T(e->offset[1]), n = lane - T(e->offset[0]);
    Mask<T> const inside = between<T>(lane, T(e->part.low[1]), T(e->part.high[1]));
    row[c] = keep<T>(inside, exp_lanes(-y * (f.slope[1] + (T(0.5) * f.curve[1]) * y + f.curve[3] * z)) * e->density);
    deep[c] = keep<T>(inside, exp_lanes(-y * f.curve[3]));
    store(plane + c * kLanes<T>, exp_lanes(f.start - n * (f.slope[0] + (T(0.5) * f.curve[0]) * n)));
  }
  for (int k = e->part.low[0]; k <= e->part.high[0]; ++k) {
    for (int c = 0; c < kSide / kLanes<T>; ++c) {
      store(e->scaled[k] + c * kLanes<T>, row[c] * plane[k]);
      row[c] *= deep[c];
    }
  }
}

// Gaussian g in part `e->part` of the strip.
template <class T>
inline void make_entry(const VoxelizeCall& call, const VoxelGaussian<double>& g, const Strip& strip, Entry<T>* e) {
  int low[3], high[3];
  for (int k = 0; k < 3; ++k) low[k] = strip.at[k] + e->part.low[k], high[k] = strip.at[k] + e->part.high[k];
  e->frame = frame_in_box<T>(call, g, low, high);
  for (int k = 0; k < 3; ++k) e->offset[k] = e->frame.at[k] - strip.at[k];
  e->upper = e->part.low[1] < kHalf, e->lower = e->part.high[1] >= kHalf;
  e->density = call.grad == nullptr ? T(g.density) : T(1);
  e->kind = classify(e, T(call.support));
  if (e->kind == Kind::whole || e->kind == Kind::rim) fill_table(e);
}

// The entries of a Gaussian: one for the strip; one for each 16 voxels along x where the whole strip is too long for
// the recurrence. Each is made in *e and handed to use(e), which says where the next one may be made.
template <class T, class Use>
inline void for_entries(const VoxelizeCall& call, const VoxelGaussian<double>& g, const Strip& strip, Entry<T>* e, Use use) {
  Part part;
  if (!intersect(g.first, g.last, strip, &part)) return;
  e->part = part;
  make_entry(call, g, strip, e);
  if (e->kind != Kind::needle) {
    if (e->kind != Kind::outside) use(e);
    return;
  }
  for (int x = part.low[2] / kSide * kSide; x <= part.high[2]; x += kSide) {
    e->part = part;
    if (x > part.low[2]) e->part.low[2] = x;
    if (x + kSide - 1 < part.high[2]) e->part.high[2] = x + kSide - 1;
    make_entry(call, g, strip, e);
    if (e->kind != Kind::outside) e = use(e);
  }
}

// The part of an entry in the voxels [x, x + width) along x.
template <class T>
inline Part part_in(const Entry<T>& e, int x, int width) {
  Part part = e.part;
  if (x > part.low[2]) part.low[2] = x;
  if (x + width - 1 < part.high[2]) part.high[2] = x + width - 1;
  return part;
}

// What a threshold does to these voxels: the rim of a Gaussian is a small part of it.
template <class T>
inline Kind kind_in(const Entry<T>& e, T support, int x, int width) {
  Part const part = part_in(e, x, width);
  if (part.low[2] > part.high[2]) return Kind::outside;
  if (e.kind != Kind::rim) return e.kind;
  if (all_inside(e, part, support)) return Kind::whole;
  return all_outside(e, part, support) ? Kind::outside : Kind::rim;
}

// The lanes from x on that belong to the part.
template <class T>
inline Mask<T> lanes_inside(const Entry<T>& e, int x) {
  return between<T>(ramp(T(0)), T(e.part.low[2] - x), T(e.part.high[2] - x));
}

// The factors of the lanes from x on, from this row on. Those outside are zero: a factor could overflow there.
template <class T>
inline void make_lanes(const Entry<T>& e, int x, int row, Lanes<T>* l) {
  const VoxelFrame<T>& f = e.frame;
  T const z = T(e.part.low[0] - e.offset[0]), y = T(row - e.offset[1]);
  T const slope = f.slope[2] + f.curve[4] * z + f.curve[5] * y;
  Vec<T> const n = ramp(T(x - e.offset[2]));
  Mask<T> const inside = lanes_inside(e, x);
  l->start = keep<T>(inside, exp_lanes(-n * (slope + (T(0.5) * f.curve[2]) * n)));
  l->down = keep<T>(inside, exp_lanes(-n * f.curve[5]));
  l->deep = keep<T>(inside, exp_lanes(-n * f.curve[4]));
}

// Weights of row (z, y) at the lanes from c; false if the whole row is negligible.
template <class T>
inline bool needle_row(const Entry<T>& e, T support, int z, int y, int c, Vec<T>* weights) {
  const VoxelFrame<T>& f = e.frame;
  T const nz = T(z - e.offset[0]), ny = T(y - e.offset[1]);
  T const constant = exponent_at(f, nz, ny, T(0)), slope = f.slope[2] + f.curve[4] * nz + f.curve[5] * ny;
  T const half = T(0.5) * f.curve[2];
  if (half > 0 && sizeof(T) == 4 && constant + slope * slope / (4 * half) < T(kNegligible)) return false;
  Vec<T> const x = ramp(T(c - e.offset[2]));
  Vec<T> const exponent = constant - x * (slope + half * x);
  Mask<T> inside = lanes_inside(e, c);
  if (support > 0) inside &= exponent >= -T(0.5) * support * support;
  *weights = keep<T>(inside, exp_lanes(exponent > T(0) ? Vec<T>{} : exponent));  // NaN gives 0
  return true;
}

template <class T>
inline void render_needle(const Entry<T>& e, T support, const Values<T>& values) {
  for (int z = e.part.low[0]; z <= e.part.high[0]; ++z) {
    for (int y = e.part.low[1]; y <= e.part.high[1]; ++y) {
      for (int x = e.part.low[2] / kSide * kSide; x <= e.part.high[2]; x += kLanes<T>) {
        Vec<T> weights;
        T* const to = values.at(z, y, x);
        if (needle_row(e, support, z, y, x, &weights)) store(to, load(to) + weights * e.density);
      }
    }
  }
}

}  // namespace
}  // namespace medgmae
