// Line integrals of volumes on the CPU: rays side by side, and of the adjoint slabs of planes side by side, each of which all rays
// go through in order. So no sum depends on the number of threads.
#pragma once

#include "rays.h"

namespace medgmae {
namespace {

template <class T>
inline double integral(const RaysCall& call, const T* volume, const Ray& ray) {
  int64_t const across = call.volume[2], plane = call.volume[1] * across;
  double sum = 0;
  walk(call, ray, 0, call.volume[0] - 1, [&](const int64_t* cell, double middle, double half) {
    double weights[8];
    corner_weights(ray, cell, middle, half, weights);
    const T* at = volume + cell[0] * plane + cell[1] * across + cell[2];
    sum += weights[0] * double(at[0]) + weights[1] * double(at[1]) + weights[2] * double(at[across]) + weights[3] * double(at[across + 1]);
    at += plane;
    sum += weights[4] * double(at[0]) + weights[5] * double(at[1]) + weights[6] * double(at[across]) + weights[7] * double(at[across + 1]);
  });
  return sum;
}

// Adds a pixel's value along its ray, to the voxels of a slab and to the plane behind it.
template <class T>
inline void spread(const RaysCall& call, T* volume, T* edge, int64_t low, int64_t high, const Ray& ray, double value) {
  int64_t const across = call.volume[2], plane = call.volume[1] * across;
  walk(call, ray, low, high, [&](const int64_t* cell, double middle, double half) {
    double weights[8];
    corner_weights(ray, cell, middle, half, weights);
    int64_t const inside = cell[1] * across + cell[2];
    T* near = volume + cell[0] * plane + inside;
    T* far = cell[0] + 1 == high ? edge + inside : near + plane;
    near[0] += T(value * weights[0]), near[1] += T(value * weights[1]);
    near[across] += T(value * weights[2]), near[across + 1] += T(value * weights[3]);
    far[0] += T(value * weights[4]), far[1] += T(value * weights[5]);
    far[across] += T(value * weights[6]), far[across + 1] += T(value * weights[7]);
  });
}

template <class T>
void rays_run(const RaysCall& call, int threads) {
  int64_t const plane = call.volume[1] * call.volume[2], voxels = call.volume[0] * plane, pixels = call.size[0] * call.size[1];
  T* const volumes = static_cast<T*>(call.voxels);
  T* const images = static_cast<T*>(call.projections);
  if (!call.adjoint) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < call.batch * call.views * call.size[0]; ++i) {
      int64_t const image = i / call.size[0], row = i % call.size[0];
      for (int64_t column = 0; column < call.size[1]; ++column) {
        Ray const ray = ray_of(call, image % call.views, row, column);
        images[i * call.size[1] + column] = T(integral(call, volumes + image / call.views * voxels, ray));
      }
    }
    return;
  }
  int64_t const cells = call.volume[0] - 1, slabs = (cells + call.slab - 1) / call.slab;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < call.batch * slabs; ++i) {
    int64_t const sample = i / slabs, low = i % slabs * call.slab, high = low + call.slab < cells ? low + call.slab : cells;
    T* const edge = static_cast<T*>(call.edges) + i * plane;
    for (int64_t view = 0; view < call.views; ++view) {
      const T* image = images + (sample * call.views + view) * pixels;
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        if (image[pixel] == 0) continue;
        Ray const ray = ray_of(call, view, pixel / call.size[1], pixel % call.size[1]);
        spread(call, volumes + sample * voxels, edge, low, high, ray, double(image[pixel]));
      }
    }
  }
}

}  // namespace
}  // namespace medgmae
