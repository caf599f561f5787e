// The CPU renderer: one Gaussian in one strip of tiles. cuda/voxel/strips.h walks over the strips.
//
// With n = (z, y, x) the offset from the frame's voxel, the weight is a product of factors of one or two axes. A row of
// voxels along x is a vector `lanes`; going down a row multiplies it by `down`, going down a plane by `deep`; the factors
// that are constant along x wait in the 16 numbers `row`, times one number per plane. So a weight costs one
// multiplication in the recurrence and one fused multiply-add into the volume.
#pragma once

#include "../simd.h"
#include "voxelize.h"

namespace medgmae {
namespace {

constexpr int kSide = 16;  // voxels of a tile along each axis
constexpr int kHalf = 8;   // rows that are summed in registers at a time
// Beyond this sum of cross exponents a factor could overflow.
constexpr float kSafeExponent = 60.0f;
// Rows of a needle below this exponent are left out: 3e-8 of the peak.
constexpr float kNegligible = -17.3f;

// A box of voxels of the volume: tiles in a row along x.
struct Strip {
  int at[3], extent[3];
};

// Values of a strip: whole tiles can be read.
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
  alignas(64) T row[kSide], row_deep[kSide], plane[kSide];
  T threshold;             // of a rim: weights below it are outside
  Kind kind;
  bool upper, lower;  // rows 0..7 and 8..15 are touched
  Part part;
  VoxelFrame<T> frame;
  int offset[3];  // of the frame's voxel in the strip
  T density;      // 1 in the backward
  bool in_tile(int x) const { return x + kSide > part.low[2] && x <= part.high[2]; }
};

// What changes along the strip and from plane to plane: one tile of an entry.
template <class T>
struct Lanes {
  alignas(64) T start[2][kSide];  // of the two halves, in the plane at hand
  alignas(64) T down[kSide], deep[kSide];
  alignas(64) T row[kSide], scaled[kSide];  // without and with the plane's number
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

template <class T>
inline void prepare_rows(Entry<T>* e) {
  const VoxelFrame<T>& f = e->frame;
  T const z = T(e->part.low[0] - e->offset[0]);
  for (int c = 0; c < kSide; c += kLanes<T>) {
    Vec<T> const lane = ramp(T(c)), y = lane - T(e->offset[1]), n = lane - T(e->offset[0]);
    Mask<T> const inside = between<T>(lane, T(e->part.low[1]), T(e->part.high[1]));
    Vec<T> const exponent = -y * (f.slope[1] + (T(0.5) * f.curve[1]) * y + f.curve[3] * z);
    store(e->row + c, keep<T>(inside, exp_lanes(exponent) * e->density));
    store(e->row_deep + c, keep<T>(inside, exp_lanes(-y * f.curve[3])));
    store(e->plane + c, exp_lanes(f.start - n * (f.slope[0] + (T(0.5) * f.curve[0]) * n)));
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
  if (e->kind == Kind::whole || e->kind == Kind::rim) prepare_rows(e);
}

// The entries of a Gaussian: one for the strip; one for each of its tiles where the whole strip is too long for the
// recurrence. Each is made in *e and handed to use(e), which says where the next one may be made.
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

// The part of an entry that lies in the tile that begins at x0.
template <class T>
inline Part tile_part(const Entry<T>& e, int x0) {
  Part part = e.part;
  if (x0 > part.low[2]) part.low[2] = x0;
  if (x0 + kSide - 1 < part.high[2]) part.high[2] = x0 + kSide - 1;
  return part;
}

// What a threshold does to the tile that begins at x0: the rim of a Gaussian lies in few of its tiles.
template <class T>
inline Kind kind_in_tile(const Entry<T>& e, T support, int x0) {
  if (e.kind != Kind::rim) return e.kind;
  Part const part = tile_part(e, x0);
  if (all_inside(e, part, support)) return Kind::whole;
  return all_outside(e, part, support) ? Kind::outside : Kind::rim;
}

// The lanes of the tile that begins at x0.
template <class T>
inline void make_lanes(const Entry<T>& e, int x0, Lanes<T>* l) {
  const VoxelFrame<T>& f = e.frame;
  T const z = T(e.part.low[0] - e.offset[0]);
  int const top = e.upper ? 0 : 1;
  T const y = T(top * kHalf - e.offset[1]), slope = f.slope[2] + f.curve[4] * z + f.curve[5] * y;
  for (int c = 0; c < kSide; c += kLanes<T>) {
    Vec<T> const lane = ramp(T(x0 + c)), x = lane - T(e.offset[2]);
    Mask<T> const inside = between<T>(lane, T(e.part.low[2]), T(e.part.high[2]));
    // Lanes outside are zeroed: a factor could overflow there.
    Vec<T> const down = keep<T>(inside, exp_lanes(-x * f.curve[5]));
    Vec<T> const start = keep<T>(inside, exp_lanes(-x * (slope + (T(0.5) * f.curve[2]) * x)));
    Vec<T> const two = down * down, four = two * two;
    store(l->start[top] + c, start);
    if (e.upper && e.lower) store(l->start[1] + c, start * (four * four));
    store(l->down + c, down);
    store(l->deep + c, keep<T>(inside, exp_lanes(-x * f.curve[4])));
  }
}

template <class T>
inline void first_rows(const Entry<T>& e, Lanes<T>* l) {
  for (int y = 0; y < kSide; y += kHalf) {
    Eight<T> row(e.row + y);
    row.store(l->row + y);
    row.v *= e.plane[e.part.low[0]];
    row.store(l->scaled + y);
  }
}

// From one plane to plane z, rows [y, y + 8).
template <class T>
inline void next_rows(const Entry<T>& e, int z, int y, Lanes<T>* l) {
  Eight<T> row(l->row + y);
  Eight<T> const deep(e.row_deep + y);
  row.v *= deep.v;
  row.store(l->row + y);
  row.v *= e.plane[z];
  row.store(l->scaled + y);
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

// Sums of weighted values over z and y; every lane is one x. `one` and `two` are the sums with y and y^2, or after
// Horner's rule with n + 1 and (n + 1)(n + 2) / 2, n the row from the first on.
template <class T>
struct Sums {
  Vec<T> count{}, one{}, two{}, z_count{}, z_one{}, zz_count{};
  void add_plane(T z, Vec<T> plane_count, Vec<T> plane_one, Vec<T> plane_two) {
    count += plane_count, one += plane_one, two += plane_two;
    z_count += z * plane_count, z_one += z * plane_one, zz_count += (z * z) * plane_count;
  }
};

// Horner's rule on rows [first, first + R) of the planes: S <- S e + c from the last row to the first, three times.
template <class T, int R>
inline void sum_whole(const Entry<T>& e, Lanes<T>& l, int first, int c, const Values<const T>& values, Sums<T>* sums) {
  Vec<T> lanes = load(l.start[first / kHalf] + c);
  Vec<T> const down = load(l.down + c), deep = load(l.deep + c);
  first_rows(e, &l);
  for (int z = e.part.low[0]; z <= e.part.high[0]; ++z) {
    const T* const scaled = l.scaled + first;
    for (int y = 0; y < R; y += kHalf) reload(l.scaled + first + y);
    Vec<T> s0{}, s1{}, s2{};
    const T* from = values.at(z, first, c);
#pragma GCC unroll 16
    for (int y = R - 1; y >= 0; --y) {
      s0 = s0 * down + load(from + y * values.row) * scaled[y];
      s1 = s1 * down + s0;
      s2 = s2 * down + s1;
    }
    if (z + 1 < kSide) {
      for (int y = 0; y < R; y += kHalf) next_rows(e, z + 1, first + y, &l);
    }
    sums->add_plane(T(z - e.offset[0]), lanes * s0, lanes * s1, lanes * s2);
    lanes *= deep;
  }
}

// The weights are formed one by one, and those below the threshold left out. The sums are Horner's, or with y and y^2.
template <class T>
inline void sum_rows(const Entry<T>& e, Lanes<T>& l, int c, const Values<const T>& values, bool horner, Sums<T>* sums) {
  int const first = e.upper ? 0 : kHalf;
  Vec<T> start = load(l.start[first / kHalf] + c);
  Vec<T> const down = load(l.down + c), deep = load(l.deep + c);
  first_rows(e, &l);
  for (int z = e.part.low[0]; z <= e.part.high[0]; ++z) {
    Vec<T> lanes = start, count{}, one{}, two{};
    for (int y = first; y <= e.part.high[1]; ++y) {
      Vec<T> const weights = lanes * l.scaled[y];
      Vec<T> const value = keep<T>(weights >= e.threshold, weights) * load(values.at(z, y, c));
      T const n = T(horner ? y - first + 1 : y - e.offset[1]);
      count += value, one += n * value, two += (horner ? T(0.5) * n * (n + 1) : n * n) * value;
      lanes *= down;
    }
    sums->add_plane(T(z - e.offset[0]), count, one, two);
    start *= deep;
    for (int y = 0; y < kSide && z + 1 < kSide; y += kHalf) next_rows(e, z + 1, y, &l);
  }
}

template <class T>
inline void sum_needle(const Entry<T>& e, T support, int x, const Values<const T>& values, Sums<T>* sums) {
  for (int z = e.part.low[0]; z <= e.part.high[0]; ++z) {
    Vec<T> count{}, one{}, two{}, weights;
    for (int y = e.part.low[1]; y <= e.part.high[1]; ++y) {
      if (!needle_row(e, support, z, y, x, &weights)) continue;
      Vec<T> const value = weights * load(values.at(z, y, x));
      T const n = T(y - e.offset[1]);
      count += value, one += n * value, two += n * n * value;
    }
    sums->add_plane(T(z - e.offset[0]), count, one, two);
  }
}

// The moments 1, (z y x), (zz yy xx zy zx yx) of the weighted values of a strip, over offsets from the frame's voxel.
template <class T>
inline void entry_moments(const Entry<T>& e, T support, const Values<const T>& values, T* moments) {
  int const first = e.upper ? 0 : kHalf;
  // Horner's rule counts rows from the edge of the tile, which costs digits where a Gaussian is but a voxel wide.
  bool const wide = e.frame.curve[0] + e.frame.curve[1] + e.frame.curve[2] < T(0.5);
  bool const horner = e.kind != Kind::needle && wide;
  Vec<T> sums[10] = {};
  Lanes<T> l;
  for (int x = e.part.low[2] / kSide * kSide; x <= e.part.high[2]; x += kSide) {
    Values<const T> const here = {values.at(0, 0, x), values.plane, values.row};
    Kind const kind = kind_in_tile(e, support, x);
    if (kind == Kind::outside) continue;
    if (kind != Kind::needle) make_lanes(e, x, &l);
    for (int c = 0; c < kSide; c += kLanes<T>) {
      Sums<T> s;
      if (kind == Kind::needle) sum_needle(e, support, x + c, values, &s);
      else if (kind == Kind::rim || !wide) sum_rows(e, l, c, here, wide, &s);
      else if (e.upper && e.lower) sum_whole<T, kSide>(e, l, 0, c, here, &s);
      else sum_whole<T, kHalf>(e, l, first, c, here, &s);
      Vec<T> const offset = ramp(T(x + c)) - T(e.offset[2]), x_count = offset * s.count;
      sums[0] += s.count, sums[1] += s.z_count, sums[2] += s.one, sums[3] += x_count, sums[4] += s.zz_count;
      sums[5] += s.two, sums[6] += offset * x_count, sums[7] += s.z_one;
      sums[8] += offset * s.z_count, sums[9] += offset * s.one;
    }
  }
  for (int k = 0; k < 10; ++k) moments[k] = sum<T>(sums[k]);
  if (horner) {  // n + shift is y; from the sums with n + 1 and (n + 1)(n + 2) / 2 to those with y and y^2
    T const shift = T(first - e.offset[1]), one = moments[2] - moments[0];
    T const two = 2 * moments[5] - 3 * moments[2] + moments[0];
    moments[2] = one + shift * moments[0];
    moments[5] = two + 2 * shift * one + shift * shift * moments[0];
    moments[7] += (shift - 1) * moments[1];
    moments[9] += (shift - 1) * moments[3];
  }
}

}  // namespace
}  // namespace medgmae
