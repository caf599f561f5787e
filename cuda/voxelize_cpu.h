// The CPU renderer: one Gaussian in one tile. cuda/voxelize_tiles.h walks over the tiles.
//
// With n = (z, y, x) the offset from the frame's voxel, the weight is a product of factors of one or two axes. A row of
// voxels along x is a vector `lanes`; going down a row multiplies it by `down`, going down a plane by `deep`; the factors
// that are constant along x wait in the 16 numbers `row`, times one number per plane. So a weight costs one
// multiplication in the recurrence and one fused multiply-add into the volume.
#pragma once

#include "simd.h"
#include "voxelize.h"

namespace medgmae {
namespace {

constexpr int kSide = 16;  // voxels of a tile along y and x
constexpr int kDeep = 16;  // and along z
constexpr int kHalf = 8;   // rows that are summed in registers at a time
// Beyond this sum of cross exponents a factor could overflow, and the weights are computed one exponential each.
constexpr float kSafeExponent = 60.0f;
// Rows of such needles below this exponent are left out: 3e-8 of the peak.
constexpr float kNegligible = -17.3f;

// A box of voxels of the volume.
struct Tile {
  int at[3], extent[3];
};

// Values of a tile: kSide of them can be read at every row and plane that counts.
template <class T>
struct Values {
  const T* first;
  int64_t plane, row;  // strides
  const T* at(int z, int y, int x) const { return first + z * plane + y * row + x; }
};

// The part of a Gaussian's range inside a tile, relative to the tile.
struct Part {
  int low[3], high[3];  // inclusive
};

inline bool intersect(const int* first, const int* last, const Tile& tile, Part* part) {
  for (int k = 0; k < 3; ++k) {
    int const low = first[k] - tile.at[k], high = last[k] - tile.at[k], end = tile.extent[k] - 1;
    part->low[k] = low > 0 ? low : 0;
    part->high[k] = high < end ? high : end;
    if (part->low[k] > part->high[k]) return false;
  }
  return true;
}

// All of the part counts; a threshold decides; no recurrence is safe.
enum class Kind { whole, rim, needle };

// One Gaussian in one tile, ready for its loops.
template <class T>
struct Entry {
  static constexpr int kChunks = kSide / kLanes<T>;
  alignas(64) T lanes[2][kSide], down[kSide], deep[kSide];  // of the two halves
  T row[kSide], row_deep[kSide], plane[kDeep];
  T threshold;  // of a rim: weights below it are outside
  Kind kind;
  bool upper, lower;  // rows 0..7 and 8..15 are touched
  Part part;
  VoxelFrame<T> frame;
  int offset[3];  // of the frame's voxel in the tile
  int64_t index;
};

template <class T>
inline Kind classify(const Entry<T>& e, T support, T* threshold) {
  const VoxelFrame<T>& f = e.frame;
  // The recurrence runs over whole halves, also over rows that do not count.
  T const z = T(e.part.high[0] - e.part.low[0]), y = T((e.lower ? kSide : kHalf) - (e.upper ? 0 : kHalf) - 1);
  T const x = T(e.part.high[2] - e.part.low[2]);
  T const lanes = x * (fabs(f.slope[2]) + fabs(f.curve[5]) * y + fabs(f.curve[4]) * z);
  T const rows = y * (fabs(f.slope[1]) + fabs(f.curve[3]) * z);
  *threshold = T(0);
  bool rim = false;
  if (support > 0 && !isinf(support)) {
    T const least = -T(0.5) * support * support;
    *threshold = exp(least);
    for (int corner = 0; corner < 8 && !rim; ++corner) {
      T n[3];
      for (int k = 0; k < 3; ++k) n[k] = T((corner >> k & 1 ? e.part.high[k] : e.part.low[k]) - e.offset[k]);
      rim = !(exponent_at(f, n[0], n[1], n[2]) > least);
    }
  }
  if (!(lanes + rows < T(kSafeExponent))) return Kind::needle;
  return rim ? Kind::rim : Kind::whole;
}

// Lanes x of [low, high].
template <class T>
inline Mask<T> between(Vec<T> x, T low, T high) {
  return (x >= low) & (x <= high);
}

template <class T>
inline void prepare_lanes(Entry<T>* e) {
  const VoxelFrame<T>& f = e->frame;
  T const z = T(e->part.low[0] - e->offset[0]);
  for (int c = 0; c < kSide; c += kLanes<T>) {
    Vec<T> const lane = ramp(T(c)), x = lane - T(e->offset[2]);
    Mask<T> const inside = between<T>(lane, T(e->part.low[2]), T(e->part.high[2]));
    Vec<T> const base = -x * (f.slope[2] + (T(0.5) * f.curve[2]) * x + f.curve[4] * z);
    Vec<T> const slope = -x * f.curve[5];
    for (int half = 0; half < 2; ++half) {
      T const y = T(half * kHalf - e->offset[1]);
      // A half without rows of this Gaussian may lie out of the range that was checked for overflow.
      bool const used = half ? e->lower : e->upper;
      store(e->lanes[half] + c, used ? keep<T>(inside, exp_lanes(base + slope * y)) : Vec<T>{});
    }
    store(e->down + c, keep<T>(inside, exp_lanes(slope)));
    store(e->deep + c, keep<T>(inside, exp_lanes(-x * f.curve[4])));
  }
}

// with_density: rows carry the density.
template <class T>
inline void prepare_rows(Entry<T>* e, T density) {
  const VoxelFrame<T>& f = e->frame;
  T const z = T(e->part.low[0] - e->offset[0]);
  for (int c = 0; c < kSide; c += kLanes<T>) {
    Vec<T> const lane = ramp(T(c)), y = lane - T(e->offset[1]);
    Mask<T> const inside = between<T>(lane, T(e->part.low[1]), T(e->part.high[1]));
    Vec<T> const exponent = -y * (f.slope[1] + (T(0.5) * f.curve[1]) * y + f.curve[3] * z);
    store(e->row + c, keep<T>(inside, exp_lanes(exponent) * density));
    store(e->row_deep + c, keep<T>(inside, exp_lanes(-y * f.curve[3])));
  }
  for (int c = 0; c < kDeep; c += kLanes<T>) {
    Vec<T> const n = ramp(T(c)) - T(e->offset[0]);
    store(e->plane + c, exp_lanes(f.start - n * (f.slope[0] + (T(0.5) * f.curve[0]) * n)));
  }
}

// Everything about Gaussian g in the tile; false if it does not reach into it.
template <class T>
inline bool make_entry(const VoxelizeCall& call, const VoxelGaussian<double>& g, const Tile& tile, bool with_density, Entry<T>* e) {
  if (!intersect(g.first, g.last, tile, &e->part)) return false;
  int low[3], high[3];
  for (int k = 0; k < 3; ++k) low[k] = tile.at[k] + e->part.low[k], high[k] = tile.at[k] + e->part.high[k];
  e->frame = frame_in_box<T>(call, g, low, high);
  for (int k = 0; k < 3; ++k) e->offset[k] = e->frame.at[k] - tile.at[k];
  e->upper = e->part.low[1] < kHalf, e->lower = e->part.high[1] >= kHalf;
  e->kind = classify(*e, T(call.support), &e->threshold);
  // A density so large that it could overflow a factor takes the careful path too.
  if (with_density && !(fabs(g.density) < 1e8)) e->kind = Kind::needle;
  if (e->kind != Kind::needle) {
    prepare_lanes(e);
    prepare_rows(e, with_density ? T(g.density) : T(1));
  }
  if (with_density) e->threshold *= T(fabs(g.density));
  return true;
}

// Exponents of row (z, y) at the lanes from c, -infinity outside the support; false if the whole row is negligible.
template <class T>
inline bool needle_row(const Entry<T>& e, T support, int z, int y, int c, Vec<T>* weights) {
  const VoxelFrame<T>& f = e.frame;
  T const nz = T(z - e.offset[0]), ny = T(y - e.offset[1]);
  T const constant = exponent_at(f, nz, ny, T(0)), slope = f.slope[2] + f.curve[4] * nz + f.curve[5] * ny;
  T const half = T(0.5) * f.curve[2];
  if (half > 0 && sizeof(T) == 4 && constant + slope * slope / (4 * half) < T(kNegligible)) return false;
  Vec<T> const lane = ramp(T(c)), x = lane - T(e.offset[2]);
  Vec<T> const exponent = constant - x * (slope + half * x);
  Mask<T> inside = between<T>(lane, T(e.part.low[2]), T(e.part.high[2]));
  if (support > 0) inside &= exponent >= -T(0.5) * support * support;
  *weights = keep<T>(inside, exp_lanes(exponent < T(0) ? exponent : Vec<T>{}));
  return true;
}

template <class T>
inline void render_needle(const Entry<T>& e, T support, T density, T* tile) {
  for (int z = e.part.low[0]; z <= e.part.high[0]; ++z) {
    for (int y = e.part.low[1]; y <= e.part.high[1]; ++y) {
      for (int c = 0; c < kSide; c += kLanes<T>) {
        Vec<T> weights;
        T* const to = tile + (z * kSide + y) * kSide + c;
        if (needle_row(e, support, z, y, c, &weights)) store(to, load(to) + weights * density);
      }
    }
  }
}

// Sums of weighted values over one Gaussian's part of a tile, over z and y; every lane is one x. `one` and `two` are the
// sums with y and y^2, or after Horner's rule with n + 1 and (n + 1)(n + 2) / 2, n the row from the first on.
template <class T>
struct Sums {
  Vec<T> count{}, one{}, two{}, z_count{}, z_one{}, zz_count{};
  void add_plane(T z, Vec<T> plane_count, Vec<T> plane_one, Vec<T> plane_two) {
    count += plane_count, one += plane_one, two += plane_two;
    z_count += z * plane_count, z_one += z * plane_one, zz_count += (z * z) * plane_count;
  }
};

// Horner's rule on rows [first, first + R) of the planes: S <- S e + c from the last row to the first, for the three sums.
template <class T, int R>
inline void sum_whole(const Entry<T>& e, int first, int c, const Values<T>& values, Sums<T>* sums) {
  Vec<T> lanes = load(e.lanes[first / kHalf] + c);
  Vec<T> const down = load(e.down + c), deep = load(e.deep + c);
  alignas(64) T row[R], scaled[R];
  memcpy(row, e.row + first, sizeof(row));
  for (int z = e.part.low[0]; z <= e.part.high[0]; ++z) {
    T const plane = e.plane[z];
    for (int y = 0; y < R; ++y) scaled[y] = row[y] * plane;
    for (int y = 0; y < R; ++y) row[y] *= e.row_deep[first + y];
    Vec<T> s0{}, s1{}, s2{};
#pragma GCC unroll 16
    for (int y = R - 1; y >= 0; --y) {
      s0 = s0 * down + load(values.at(z, first + y, c)) * scaled[y];
      s1 = s1 * down + s0;
      s2 = s2 * down + s1;
    }
    sums->add_plane(T(z - e.offset[0]), lanes * s0, lanes * s1, lanes * s2);
    lanes *= deep;
  }
}

// Adds the values of row y to the sums of a plane.
template <class T>
inline void add_row(T y, Vec<T> value, Vec<T>* count, Vec<T>* one, Vec<T>* two) {
  *count += value, *one += y * value, *two += (y * y) * value;
}

// The weights are formed one by one, and those below the threshold left out.
template <class T>
inline void sum_rows(const Entry<T>& e, int c, const Values<T>& values, Sums<T>* sums) {
  int const first = e.upper ? 0 : kHalf;
  Vec<T> start = load(e.lanes[first / kHalf] + c);
  Vec<T> const down = load(e.down + c), deep = load(e.deep + c);
  T row[kSide];
  memcpy(row, e.row, sizeof(row));
  for (int z = e.part.low[0]; z <= e.part.high[0]; ++z) {
    Vec<T> lanes = start, s0{}, s1{}, s2{};
    for (int y = first; y <= e.part.high[1]; ++y) {
      Vec<T> const weights = lanes * (row[y] * e.plane[z]);
      add_row(T(y - e.offset[1]), keep<T>(weights >= e.threshold, weights) * load(values.at(z, y, c)), &s0, &s1, &s2);
      lanes *= down;
    }
    sums->add_plane(T(z - e.offset[0]), s0, s1, s2);
    start *= deep;
    for (int y = 0; y < kSide; ++y) row[y] *= e.row_deep[y];
  }
}

template <class T>
inline void sum_needle(const Entry<T>& e, T support, int c, const Values<T>& values, Sums<T>* sums) {
  for (int z = e.part.low[0]; z <= e.part.high[0]; ++z) {
    Vec<T> s0{}, s1{}, s2{}, weights;
    for (int y = e.part.low[1]; y <= e.part.high[1]; ++y) {
      if (!needle_row(e, support, z, y, c, &weights)) continue;
      add_row(T(y - e.offset[1]), weights * load(values.at(z, y, c)), &s0, &s1, &s2);
    }
    sums->add_plane(T(z - e.offset[0]), s0, s1, s2);
  }
}

// The moments 1, (z y x), (zz yy xx zy zx yx) of the weighted values of a tile, over offsets from the frame's voxel.
template <class T>
inline void tile_moments(const Entry<T>& e, T support, const Values<T>& values, T* moments) {
  T raw[10] = {};
  int const first = e.upper ? 0 : kHalf;
  // Horner's rule counts rows from the edge of the tile, which costs digits where a Gaussian is but a voxel wide.
  bool const wide = e.frame.curve[0] + e.frame.curve[1] + e.frame.curve[2] < T(0.5);
  bool const horner = e.kind == Kind::whole && wide;
  for (int c = 0; c < kSide; c += kLanes<T>) {
    Sums<T> s;
    if (horner && e.upper && e.lower) sum_whole<T, kSide>(e, 0, c, values, &s);
    else if (horner) sum_whole<T, kHalf>(e, first, c, values, &s);
    else if (e.kind == Kind::needle) sum_needle(e, support, c, values, &s);
    else sum_rows(e, c, values, &s);
    Vec<T> const x = ramp(T(c)) - T(e.offset[2]);
    Vec<T> const terms[10] = {s.count,    s.z_count, s.one,       x * s.count,   s.zz_count,
                              s.two,      x * x * s.count, s.z_one, x * s.z_count, x * s.one};
    for (int k = 0; k < 10; ++k) raw[k] += sum<T>(terms[k]);
  }
  if (horner) {  // n + shift is y; from the sums with n + 1 and (n + 1)(n + 2) / 2 to those with y and y^2
    T const shift = T(first - e.offset[1]), one = raw[2] - raw[0], two = 2 * raw[5] - 3 * raw[2] + raw[0];
    raw[2] = one + shift * raw[0];
    raw[5] = two + 2 * shift * one + shift * shift * raw[0];
    raw[7] += (shift - 1) * raw[1];
    raw[9] += (shift - 1) * raw[3];
  }
  memcpy(moments, raw, sizeof(raw));
}

}  // namespace
}  // namespace medgmae
