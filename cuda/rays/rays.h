// Line integrals of a volume: what a call is, and the way of a ray through the cells between voxels.
#pragma once

#include <math.h>

#include "../common.h"

namespace medgmae {

// Volumes have a rim of zeros; views are in their indices (d, h, w). See medgmae/ops/rays/inputs.py.
struct RaysCall {
  int64_t batch, views, slab;
  int64_t volume[3], size[2];
  bool parallel, adjoint;
  const double* lines;    // (views, 4, 3)
  const double* spacing;  // (3), millimetres
  void* voxels;           // (batch, D, H, W), read, or written by the adjoint
  void* projections;      // (batch, views, rows, columns), written, or read by the adjoint
  void* edges;            // (batch, slabs, H, W) of the adjoint
};

// start + t along, over the length per t in millimetres.
struct Ray {
  double start[3], along[3], length;
};

MEDGMAE_HD Ray ray_of(const RaysCall& call, int64_t view, int64_t row, int64_t column) {
  const double* line = call.lines + view * 12;
  Ray ray;
  double square = 0;
  for (int k = 0; k < 3; ++k) {
    double const pixel = line[3 + k] + double(column) * line[6 + k] + double(row) * line[9 + k];
    ray.start[k] = call.parallel ? pixel : line[k];
    ray.along[k] = call.parallel ? line[k] : pixel - line[k];
    double const mm = ray.along[k] * call.spacing[k];
    square += mm * mm;
  }
  ray.length = sqrt(square);
  return ray;
}

// Narrows [first, last] to where an axis lies between two planes.
MEDGMAE_HD void clip(double start, double along, double low, double high, double* first, double* last) {
  if (along == 0) {
    if (!(start >= low && start < high)) *last = *first;  // of two slabs the second has the plane between them
    return;
  }
  double const a = (low - start) / along, b = (high - start) / along;
  double const enter = a < b ? a : b, leave = a < b ? b : a;
  if (enter > *first) *first = enter;
  if (leave < *last) *last = leave;
}

// Calls piece(cell, t, half) for the part of a ray in every cell with planes [low, high) of axis 0: from t - half to t + half.
template <class Piece>
MEDGMAE_HD void walk(const RaysCall& call, const Ray& ray, int64_t low, int64_t high, Piece piece) {
  double first = -INFINITY, last = INFINITY;
  for (int k = 0; k < 3; ++k) {
    clip(ray.start[k], ray.along[k], k ? 0.0 : double(low), k ? double(call.volume[k] - 1) : double(high), &first, &last);
    if (!(last > first)) return;
  }
  double next[3], plane[3], step[3], inverse[3];
  for (int k = 0; k < 3; ++k) {
    if (ray.along[k] == 0) {
      next[k] = INFINITY, plane[k] = step[k] = inverse[k] = 0;
      continue;
    }
    inverse[k] = 1 / ray.along[k], step[k] = ray.along[k] > 0 ? 1 : -1;
    double const at = ray.start[k] + first * ray.along[k];
    plane[k] = ray.along[k] > 0 ? floor(at) + 1 : ceil(at) - 1;
    next[k] = (plane[k] - ray.start[k]) * inverse[k];
  }
  for (double t = first; t < last;) {
    int const nearest = next[0] <= next[1] ? (next[0] <= next[2] ? 0 : 2) : (next[1] <= next[2] ? 1 : 2);
    double const end = next[nearest] < last ? next[nearest] : last;
    if (end > t) {
      double const half = (end - t) * 0.5, middle = t + half;
      int64_t cell[3];
      for (int k = 0; k < 3; ++k) {
        int64_t const at = int64_t(floor(ray.start[k] + middle * ray.along[k]));
        int64_t const least = k ? 0 : low, most = (k ? call.volume[k] - 1 : high) - 1;
        cell[k] = at < least ? least : at > most ? most : at;
      }
      piece(cell, middle, half);
      t = end;
    }
    plane[nearest] += step[nearest];
    next[nearest] = (plane[nearest] - ray.start[nearest]) * inverse[nearest];
  }
}

// Weights of the eight corners of a cell, (d, h, w) in bits from the highest, in the integral over a piece: two points of Gauss
// and Legendre, exact for the third degree that the interpolant has along a line.
MEDGMAE_HD void corner_weights(const Ray& ray, const int64_t* cell, double middle, double half, double* weights) {
  for (int i = 0; i < 8; ++i) weights[i] = 0;
  double const scale = half * ray.length;
  for (int side = -1; side < 2; side += 2) {
    double const t = middle + side * half * 0.57735026918962576451;
    double part[3][2];
    for (int k = 0; k < 3; ++k) {
      part[k][1] = ray.start[k] + t * ray.along[k] - double(cell[k]);
      part[k][0] = 1 - part[k][1];
    }
    for (int d = 0; d < 2; ++d) {
      for (int h = 0; h < 2; ++h) {
        double const plane = scale * part[0][d] * part[1][h];
        weights[4 * d + 2 * h] += plane * part[2][0];
        weights[4 * d + 2 * h + 1] += plane * part[2][1];
      }
    }
  }
}

}  // namespace medgmae
