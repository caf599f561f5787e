// The backward of the CPU renderer: the moments of one Gaussian's weighted values in one strip.
#pragma once

#include "cpu.h"

namespace medgmae {
namespace {

// Sums of weighted values over planes and rows, times 1, y, z and so on; every lane is one x.
template <class T>
struct Sums {
  Vec<T> count, y, yy, z, zy, zz;
  void add_plane(T n, Vec<T> plane_count, Vec<T> plane_y, Vec<T> plane_yy) {
    count += plane_count, y += plane_y, yy += plane_yy;
    z += n * plane_count, zy += n * plane_y, zz += (n * n) * plane_count;
  }
};

// Horner's rule, thrice. S <- S step + value, from the last row or plane to the first, makes sum step^n value[n]; the same
// with the S of every step for the value makes the sum of those sums, and so on. Value n is in n + 1 of the first sums, and
// in 1 + 2 + ... + (n + 1) of the second ones:
//   zero = sum step^n value[n],  one = sum (n + 1) step^n value[n],  two = sum (n + 1) (n + 2) / 2 step^n value[n]
template <class T>
struct Horner {
  Vec<T> zero{}, one{}, two{};
};

// The sums with y = n + shift and y^2 for those of Horner's rule, out of
//   n = (n + 1) - 1,  n^2 = 2 (n + 1) (n + 2) / 2 - 3 (n + 1) + 1,  y^2 = n^2 + shift (2 n + shift)
template <class T>
inline void to_powers(const Horner<T>& h, T shift, Vec<T>* y, Vec<T>* yy) {
  Vec<T> const n = h.one - h.zero, nn = T(2) * h.two - T(3) * h.one + h.zero;
  *y = n + shift * h.zero, *yy = nn + shift * (T(2) * n + shift * h.zero);
}

// All of the part in kVectors vectors from x on: Horner's rule over the rows of a plane, then over the planes. Several
// vectors share the numbers of the table, and their chains of additions hide each other's latency.
template <class T, int kVectors>
inline void sum_whole(const Entry<T>& e, int x, const Values<const T>& values, Sums<T>* sums) {
  const Part& p = e.part;
  Lanes<T> l[kVectors];
  for (int v = 0; v < kVectors; ++v) make_lanes(e, x + v * kLanes<T>, p.low[1], &l[v]);
  Horner<T> planes[kVectors];               // of the rows' `zero`
  Vec<T> one[kVectors]{}, two[kVectors]{};  // sums of the rows' `one` and `two`
  Vec<T> z_one[kVectors]{};                 // of the rows' `one`, times the number of the plane + 1
  for (int z = p.high[0]; z >= p.low[0]; --z) {
    Horner<T> rows[kVectors];
    const T* from = values.at(z, p.high[1], x);
    for (int y = p.high[1]; y >= p.low[1]; --y, from -= values.row) {
      T const scaled = e.scaled[z][y];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        rows[v].zero = rows[v].zero * l[v].down + load(from + v * kLanes<T>) * scaled;
        rows[v].one = rows[v].one * l[v].down + rows[v].zero;
        rows[v].two = rows[v].two * l[v].down + rows[v].one;
      }
    }
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      planes[v].zero = planes[v].zero * l[v].deep + rows[v].zero;
      planes[v].one = planes[v].one * l[v].deep + planes[v].zero;
      planes[v].two = planes[v].two * l[v].deep + planes[v].one;
      one[v] = one[v] * l[v].deep + rows[v].one;
      z_one[v] = z_one[v] * l[v].deep + one[v];
      two[v] = two[v] * l[v].deep + rows[v].two;
    }
  }
  T const z0 = T(p.low[0] - e.offset[0]), y0 = T(p.low[1] - e.offset[1]);
  for (int v = 0; v < kVectors; ++v) {
    Sums<T>& s = sums[v];
    s.count = planes[v].zero;
    to_powers<T>(planes[v], z0, &s.z, &s.zz);
    to_powers<T>({planes[v].zero, one[v], two[v]}, y0, &s.y, &s.yy);
    // With plane m and row n: z (n + 1) is (m + 1) (n + 1) + (z0 - 1) (n + 1), and z y is z (n + 1) + (y0 - 1) z.
    s.zy = z_one[v] + (z0 - T(1)) * one[v] + (y0 - T(1)) * s.z;
    // What lies outside may be NaN.
    Mask<T> const inside = lanes_inside(e, x + v * kLanes<T>);
    Vec<T>* const all[6] = {&s.count, &s.y, &s.yy, &s.z, &s.zy, &s.zz};
    for (Vec<T>* sum : all) *sum = keep<T>(inside, *sum * l[v].start);
  }
}

// The weights are formed one by one, and those below the threshold left out.
template <class T>
inline Sums<T> sum_rim(const Entry<T>& e, int x, const Values<const T>& values) {
  Sums<T> sums = {};
  Lanes<T> l;
  make_lanes(e, x, e.part.low[1], &l);
  Mask<T> const inside = lanes_inside(e, x);
  for (int z = e.part.low[0]; z <= e.part.high[0]; ++z) {
    Vec<T> lanes = l.start, count{}, one{}, two{};
    for (int y = e.part.low[1]; y <= e.part.high[1]; ++y) {
      Vec<T> const weights = lanes * e.scaled[z][y];
      Vec<T> const value = keep<T>(inside & (weights >= e.threshold), weights * load(values.at(z, y, x)));
      T const n = T(y - e.offset[1]);
      count += value, one += n * value, two += (n * n) * value;
      lanes *= l.down;
    }
    sums.add_plane(T(z - e.offset[0]), count, one, two);
    l.start *= l.deep;
  }
  return sums;
}

template <class T>
inline Sums<T> sum_needle(const Entry<T>& e, T support, int x, const Values<const T>& values) {
  Sums<T> sums = {};
  Mask<T> const inside = lanes_inside(e, x);
  for (int z = e.part.low[0]; z <= e.part.high[0]; ++z) {
    Vec<T> count{}, one{}, two{}, weights;
    for (int y = e.part.low[1]; y <= e.part.high[1]; ++y) {
      if (!needle_row(e, support, z, y, x, &weights)) continue;
      Vec<T> const value = keep<T>(inside, weights * load(values.at(z, y, x)));
      T const n = T(y - e.offset[1]);
      count += value, one += n * value, two += (n * n) * value;
    }
    sums.add_plane(T(z - e.offset[0]), count, one, two);
  }
  return sums;
}

// The moments 1, (z y x), (zz yy xx zy zx yx) of the weighted values of a strip, over offsets from the frame's voxel.
template <class T>
inline void entry_moments(const Entry<T>& e, T support, const Values<const T>& values, T* moments) {
  // Horner's rule counts from the first row and plane, which costs digits where a Gaussian is but a voxel or two wide.
  bool const wide = e.frame.curve[0] + e.frame.curve[1] + e.frame.curve[2] < T(0.5);
  // Vectors begin at the part's own first voxel, so that most of their lanes count, but end inside the row.
  int left = (e.part.high[2] - e.part.low[2]) / kLanes<T> + 1;
  int const latest = int(values.row) - left * kLanes<T>;
  Vec<T> all[10] = {};
  for (int x = e.part.low[2] < latest ? e.part.low[2] : latest; left > 0;) {
    int const vectors = left == 3 || left > 4 ? 3 : left > 1 ? 2 : 1;
    Kind const kind = kind_in(e, support, x, vectors * kLanes<T>);
    Sums<T> sums[3];
    if (kind == Kind::whole && wide) {
      if (vectors == 3) sum_whole<T, 3>(e, x, values, sums);
      else if (vectors == 2) sum_whole<T, 2>(e, x, values, sums);
      else sum_whole<T, 1>(e, x, values, sums);
    }
    for (int v = 0; v < vectors; ++v, x += kLanes<T>) {
      if (kind == Kind::outside) continue;
      if (kind == Kind::needle) sums[v] = sum_needle(e, support, x, values);
      else if (kind == Kind::rim || !wide) sums[v] = sum_rim(e, x, values);
      const Sums<T>& s = sums[v];
      Vec<T> const n = ramp(T(x - e.offset[2])), n_count = n * s.count;
      all[0] += s.count, all[1] += s.z, all[2] += s.y, all[3] += n_count, all[4] += s.zz, all[5] += s.yy;
      all[6] += n * n_count, all[7] += s.zy, all[8] += n * s.z, all[9] += n * s.y;
    }
    left -= vectors;
  }
  for (int k = 0; k < 10; ++k) moments[k] = sum<T>(all[k]);
}

}  // namespace
}  // namespace medgmae
