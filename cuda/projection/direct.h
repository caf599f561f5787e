// One Gaussian whose support holds the source, or is cut by the plane through the source that is parallel to the detector, pixel
// after pixel in double: its shadow is no ellipse, and its centre may be projected far beyond the detector. For host and device.
//
// With a ray's direction w, b = A w and m = A (source - mean), the weight without |w| is sqrt(2 pi) / |b| exp(-|m x b|^2 / (2 |b|^2)).
// V is a double, or a vector of as many pixels.
#pragma once

#include "project.h"

namespace medgmae {

template <class V>
struct DirectPixel {
  V weight;           // 0 outside the support
  V nearest[3], b[3];  // y, the line's point that is nearest to the centre, where the Gaussian is the unit ball; b / |b|
};

// What is summed over pixels: 1, y, and y y' + b b' / |b|^2 as 00 01 02 11 12 22.
constexpr int kDirectMoments = 10;

template <class V>
MEDGMAE_HD DirectPixel<V> direct_pixel(const ProjectView& view, const ProjectGaussian<double>& g, double support, V u, double v) {
  double const d[3] = {view.origin[0] - g.mean[0], view.origin[1] - g.mean[1], view.origin[2] - g.mean[2]};
  double m[3], start[3], along[3], down[3];
  whitened(g, d, m), whitened(g, view.ray, start), whitened(g, view.column, along), whitened(g, view.row, down);
  DirectPixel<V> pixel;
  V b[3], moment[3];
  for (int k = 0; k < 3; ++k) b[k] = (start[k] + down[k] * v) + along[k] * u;
  cross3(m, b, moment);
  V const inverse = 1.0 / dot3(b, b), root = Arithmetic<V>::root(inverse), square = dot3(moment, moment) * inverse;
  cross3(b, moment, pixel.nearest);
  for (int k = 0; k < 3; ++k) pixel.nearest[k] = pixel.nearest[k] * inverse, pixel.b[k] = b[k] * root;
  V const weight = 2.5066282746310002 * root * Arithmetic<V>::exponential(-0.5 * square);
  pixel.weight = Arithmetic<V>::where_at_most(square, support * support, weight);
  return pixel;
}

// Adds a pixel with t = g weight to the moments.
template <class V>
MEDGMAE_HD void add_direct(const DirectPixel<V>& pixel, V t, V* moments) {
  const V *y = pixel.nearest, *b = pixel.b;
  moments[0] += t;
  int e = 4;
  for (int i = 0; i < 3; ++i) {
    moments[1 + i] += t * y[i];
    for (int j = i; j < 3; ++j) moments[e++] += t * (y[i] * y[j] + b[i] * b[j]);
  }
}

// Adds the gradients of a view to the totals: dL/dmean = A' M1 and dL/dA = -M2 A^-T, where row k of A^-T is A_k / |A_k|^2.
MEDGMAE_HD void direct_chain(const ProjectGaussian<double>& g, const double* moments, ProjectTotals<double>* totals) {
  const double* const s = moments + 4;
  double const square[3][3] = {{s[0], s[1], s[2]}, {s[1], s[3], s[4]}, {s[2], s[4], s[5]}};
  totals->density += moments[0];
  for (int k = 0; k < 3; ++k) {
    const double* const row = g.a + 3 * k;
    double const inverse = 1 / dot3(row, row);
    for (int j = 0; j < 3; ++j) {
      totals->mean[j] += row[j] * moments[1 + k];
      for (int i = 0; i < 3; ++i) totals->a[3 * i + j] -= square[i][k] * row[j] * inverse;
    }
  }
}

}  // namespace medgmae
