// The CPU projector for shadows that are at most two vectors of pixels wide, in any view: all rows begin at the same column.
//
// So no row has a geometry of its own: what depends on the column is found once, a row costs its pixels alone, and a pixel is inside
// the support where its exponent says so.
// Everything is in an anonymous namespace, see common.h.
#pragma once

#include "rows.h"

namespace medgmae {
namespace {

// One Gaussian: weights as those of a Profile, with L = 1 + l0 du + l1 dv + l2 du^2 + l3 du dv + l4 dv^2.
template <class T>
struct Patch {
  double v;
  T du, gamma, curve, fall, l[5], amplitude, least;  // du: of the first column; fall: times dv^2; least: exponent of the edge
  int column, vectors, right[2];  // right: first and last row of the second vector
};

template <class T>
inline Patch<T> patch_of(const Group& g, int i, double support) {
  Patch<T> p;
  double const unit = -0.5 * double(kExponentUnit<T>);
  p.column = g.column[i], p.vectors = g.vectors[i], p.right[0] = g.right[0][i], p.right[1] = g.right[1][i];
  p.v = lane(g.v, i), p.du = T(p.column - lane(g.u, i)), p.gamma = T(lane(g.gamma, i)), p.curve = T(unit * lane(g.k00, i));
  p.fall = T(unit * lane(g.kappa, i)), p.amplitude = T(lane(g.amplitude, i)), p.least = T(unit * support * support);
  for (int k = 0; k < 5; ++k) p.l[k] = T(lane(g.l[k], i));
  return p;
}

// What all rows of a vector of columns share: du, L where dv is 0, and its slope there.
template <class T>
struct PatchColumns {
  Vec<T> du, level, tilt;
};

template <class T>
inline PatchColumns<T> patch_columns(const Patch<T>& p, int vector) {
  PatchColumns<T> c;
  c.du = ramp(T(vector * kLanes<T>)) + p.du;
  c.level = c.du * (c.du * p.l[2] + p.l[0]) + T(1), c.tilt = c.du * p.l[3] + p.l[1];
  return c;
}

// The weights of a vector of columns in rows dv[0], dv[1], ...; where an exponent is below the least they mean nothing.
template <class T, Shape shape>
inline PixelLanes<T> patch_pixels(const Patch<T>& p, const PatchColumns<T>& c, const T* dv) {
  PixelLanes<T> out;
  Vec<T> root[kRowsTogether];
  for_rows([&](int k) { out.x[k] = c.du - p.gamma * dv[k]; });
  for_rows([&](int k) { out.exponent[k] = (out.x[k] * p.curve) * out.x[k] + p.fall * dv[k] * dv[k]; });
  if constexpr (shape == Shape::cone) {
    for_rows([&](int k) { root[k] = dv[k] * (c.tilt + p.l[4] * dv[k]) + c.level; });
    for_rows([&](int k) { root[k] = inverse_root(root[k]); });
    for_rows([&](int k) { out.inverse[k] = root[k] * root[k]; });
    for_rows([&](int k) { out.exponent[k] = out.exponent[k] * out.inverse[k]; });
  }
  for_rows([&](int k) { out.weight[k] = power_lanes(out.exponent[k]); });
  if constexpr (shape == Shape::cone) for_rows([&](int k) { out.weight[k] = out.weight[k] * root[k]; });
  return out;
}

// Adds a Gaussian to the rows [first, last] of an image that begins with row `top`; the row behind them is written too.
template <class T, Shape shape>
MEDGMAE_ALONE void add_patch(const Patch<T>& p, int first, int last, T* image, int top, int64_t stride) {
  for (int vector = 0; vector < p.vectors; ++vector) {
    PatchColumns<T> const columns = patch_columns(p, vector);
    int const begin = vector > 0 && p.right[0] > first ? p.right[0] : first, end = vector > 0 && p.right[1] < last ? p.right[1] : last;
    T* at = image + int64_t(begin - top) * stride + p.column + vector * kLanes<T>;
    for (int row = begin; row <= end; row += kRowsTogether, at += kRowsTogether * stride) {
      T dv[kRowsTogether];
      for_rows([&](int k) { dv[k] = T(row + k - p.v); });  // the same whatever row is the first
      PixelLanes<T> const pixels = patch_pixels<T, shape>(p, columns, dv);
      for_rows([&](int k) {
        T* const to = at + k * stride;
        store(to, load(to) + keep<T>(pixels.exponent[k] >= p.least, pixels.weight[k] * p.amplitude));
      });
    }
  }
}

// Sums over dv^0, dv^1 and dv^2, for a column each.
template <class T>
struct ColumnSums {
  Vec<T> of[3];
  inline void add(Vec<T> value, T dv) {
    Vec<T> const first = value * dv;
    of[0] += value, of[1] += first, of[2] += first * dv;
  }
};

// Moments of a Gaussian over the rows [first, last] of an image, with a row behind them that may be read.
template <class T, Shape shape>
MEDGMAE_ALONE void sum_patch(const Patch<T>& p, int first, int last, const T* image, int64_t stride, double* moments) {
  constexpr bool cone = shape == Shape::cone;
  MomentSums<T> total = {};
  for (int vector = 0; vector < p.vectors; ++vector) {
    PatchColumns<T> const columns = patch_columns(p, vector);
    int const begin = vector > 0 ? p.right[0] : first, end = vector > 0 ? p.right[1] : last;
    const T* at = image + int64_t(begin) * stride + p.column + vector * kLanes<T>;
    Vec<T> t_sum = {};
    ColumnSums<T> q_sums = {}, r_sums = {};
    for (int row = begin; row <= end; row += kRowsTogether, at += kRowsTogether * stride) {
      T dv[kRowsTogether];
      for_rows([&](int k) { dv[k] = T(row + k - p.v); });
      PixelLanes<T> const pixels = patch_pixels<T, shape>(p, columns, dv);
      for_rows([&](int k) {
        Vec<T> const t = keep<T>(pixels.exponent[k] >= p.least, load(at + k * stride) * pixels.weight[k]);
        Vec<T> const q = cone ? t * pixels.inverse[k] : t;
        t_sum += t, q_sums.add(q, dv[k]);
        if constexpr (cone) r_sums.add(q * (pixels.exponent[k] * T(-1 / kExponentUnit<T>) - T(0.5)), dv[k]);
      });
    }
    Vec<T> const du = columns.du;
    total.of[0] += t_sum;
    Vec<T>* to = total.of + 1;
    auto const spread = [&](const ColumnSums<T>& sums) {
      Vec<T> const first_du = sums.of[0] * du;
      to[0] += first_du, to[1] += sums.of[1], to[2] += first_du * du, to[3] += sums.of[1] * du, to[4] += sums.of[2];
    };
    spread(q_sums);
    if constexpr (cone) to += 6, total.of[6] += r_sums.of[0], spread(r_sums);
  }
  T totals[16];
  total_sums(total, totals);
  for (int k = 0; k < kProjectMoments; ++k) moments[k] = double(totals[k]);
  shear_moments(double(p.gamma), moments + 1), shear_moments(double(p.gamma), moments + 7);
}

}  // namespace
}  // namespace medgmae
