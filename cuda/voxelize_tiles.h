// The CPU renderer: the walk over tiles, forward and backward. Work is shared out so that no two threads write the same
// number and every sum has its order: the result does not depend on the number of threads.
#pragma once

#include <stdlib.h>

#include "voxelize_cpu.h"

namespace medgmae {
namespace {

constexpr int kTogether = 32;  // Gaussians whose rows are summed in registers before the tile is written
constexpr int kBlock = 64;     // Gaussians that share one pass over the volume in the backward

template <class T>
T* allocate(int64_t n) {
  int64_t const bytes = (n > 0 ? n : 1) * int64_t(sizeof(T));
  return static_cast<T*>(aligned_alloc(64, size_t((bytes + 63) / 64 * 64)));
}

// The patch j of sample b: its first voxel.
inline void patch_origin(const VoxelizeCall& call, int64_t b, int64_t j, int* at) {
  int64_t grid[3], index = call.index[b * call.patches + j];
  for (int k = 0; k < 3; ++k) grid[k] = call.size[k] / call.patch[k];
  at[0] = int(index / (grid[1] * grid[2])) * call.patch[0];
  at[1] = int(index / grid[2] % grid[1]) * call.patch[1];
  at[2] = int(index % grid[2]) * call.patch[2];
}

inline int tiles_along(const VoxelizeCall& call, int k) {
  int const side = k == 0 ? kDeep : kSide;
  return (call.patch[k] + side - 1) / side;
}

// Tile (i0, i1, i2) of the patch that begins at `at`.
inline Tile tile_of(const VoxelizeCall& call, const int* at, int i0, int i1, int i2) {
  int const ijk[3] = {i0, i1, i2};
  Tile tile;
  for (int k = 0; k < 3; ++k) {
    int const side = k == 0 ? kDeep : kSide, start = ijk[k] * side, left = call.patch[k] - start;
    tile.at[k] = at[k] + start;
    tile.extent[k] = left < side ? left : side;
  }
  return tile;
}

// Adds the entries that the list names to the rows [8 half, 8 half + 8) of the tile.
template <class T, bool rim>
void render_rows(Entry<T>* entries, const int* list, int count, int half, const Tile& tile, T* buffer) {
  Mask<T> magnitude = ~(Mask<T>{});
  for (int i = 0; i < kLanes<T>; ++i) magnitude[i] ^= decltype(+magnitude[0])(1) << (8 * sizeof(T) - 1);
  for (int z = 0; z < tile.extent[0]; ++z) {
    for (int c = 0; c < kSide; c += kLanes<T>) {
      T* const rows = buffer + (z * kSide + half * kHalf) * kSide + c;
      Vec<T> total[kHalf];
#pragma GCC unroll 8
      for (int y = 0; y < kHalf; ++y) total[y] = load(rows + y * kSide);
      for (int i = 0; i < count; ++i) {
        Entry<T>& e = entries[list[i]];
        if (z < e.part.low[0] || z > e.part.high[0]) continue;
        alignas(64) T row[kHalf];
        T* const from = e.row + half * kHalf;
        for (int y = 0; y < kHalf; ++y) row[y] = from[y] * e.plane[z];
        T* const state = e.lanes[half] + c;
        Vec<T> lanes = load(state);
        Vec<T> const down = load(e.down + c);
        store(state, lanes * load(e.deep + c));
#pragma GCC unroll 8
        for (int y = 0; y < kHalf; ++y) {
          if (rim) {
            Vec<T> const value = lanes * row[y];
            total[y] += keep<T>(keep<T>(magnitude, value) >= e.threshold, value);
          } else {
            total[y] += lanes * row[y];
          }
          lanes *= down;
        }
        if (c + kLanes<T> == kSide) {
          for (int y = 0; y < kHalf; ++y) from[y] *= e.row_deep[half * kHalf + y];
        }
      }
#pragma GCC unroll 8
      for (int y = 0; y < kHalf; ++y) store(rows + y * kSide, total[y]);
    }
  }
}

template <class T>
void render_entries(Entry<T>* entries, int count, T support, const VoxelGaussian<double>* gaussians, const Tile& tile, T* buffer) {
  int list[kTogether];
  for (int half = 0; half < 2; ++half) {
    for (int pass = 0; pass < 2; ++pass) {
      Kind const kind = pass ? Kind::rim : Kind::whole;
      int n = 0;
      for (int i = 0; i < count; ++i) {
        if (entries[i].kind == kind && (half ? entries[i].lower : entries[i].upper)) list[n++] = i;
      }
      if (n == 0) continue;
      if (pass) render_rows<T, true>(entries, list, n, half, tile, buffer);
      else render_rows<T, false>(entries, list, n, half, tile, buffer);
    }
  }
  for (int i = 0; i < count; ++i) {
    if (entries[i].kind == Kind::needle) render_needle(entries[i], support, T(gaussians[entries[i].index].density), buffer);
  }
}

// One strip of tiles along x: plane k0 and row k1 of the tiles of patch j.
template <class T>
void render_strip(const VoxelizeCall& call, const VoxelGaussian<double>* gaussians, int64_t b, int64_t j, int k0, int k1,
                  int* near, Entry<T>* entries) {
  int at[3];
  patch_origin(call, b, j, at);
  Tile strip = tile_of(call, at, k0, k1, 0);
  strip.extent[2] = call.patch[2];
  int close = 0;
  Part part;
  for (int64_t i = 0; i < call.count; ++i) {
    const VoxelGaussian<double>& g = gaussians[b * call.count + i];
    if (intersect(g.first, g.last, strip, &part)) near[close++] = int(i);
  }
  alignas(64) T buffer[kDeep * kSide * kSide];
  T* const out = static_cast<T*>(call.out) + (b * call.patches + j) * int64_t(call.patch[0]) * call.patch[1] * call.patch[2];
  for (int k2 = 0; k2 < tiles_along(call, 2); ++k2) {
    Tile const tile = tile_of(call, at, k0, k1, k2);
    memset(buffer, 0, sizeof(buffer));
    int n = 0;
    for (int i = 0; i < close; ++i) {
      int64_t const index = b * call.count + near[i];
      if (!make_entry(call, gaussians[index], tile, true, &entries[n])) continue;
      entries[n++].index = index;
      if (n == kTogether) render_entries(entries, n, T(call.support), gaussians, tile, buffer), n = 0;
    }
    render_entries(entries, n, T(call.support), gaussians, tile, buffer);
    for (int z = 0; z < tile.extent[0]; ++z) {
      for (int y = 0; y < tile.extent[1]; ++y) {
        int64_t const plane = tile.at[0] - at[0] + z, row = tile.at[1] - at[1] + y;
        memcpy(out + (plane * call.patch[1] + row) * call.patch[2] + tile.at[2] - at[2], buffer + (z * kSide + y) * kSide,
               size_t(tile.extent[2]) * sizeof(T));
      }
    }
  }
}

template <class T>
VoxelGaussian<double>* prepare_all(const VoxelizeCall& call, int threads) {
  int64_t const all = call.batch * call.count;
  auto* gaussians = allocate<VoxelGaussian<double>>(all);
  if (gaussians == nullptr) return nullptr;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < all; ++i) gaussians[i] = prepare_gaussian<T, double>(call, i);
  return gaussians;
}

// False if there is not enough memory.
template <class T>
bool voxelize_forward(const VoxelizeCall& call, int threads) {
  VoxelGaussian<double>* const gaussians = prepare_all<T>(call, threads);
  bool enough = gaussians != nullptr;
  int const planes = tiles_along(call, 0), rows = tiles_along(call, 1);
  int64_t const strips = enough ? call.batch * call.patches * planes * rows : 0;
#pragma omp parallel num_threads(threads)
  {
    FlushSubnormals flush;
    int* const near = allocate<int>(call.count);
    Entry<T>* const entries = allocate<Entry<T>>(kTogether);
    if (near == nullptr || entries == nullptr) {
#pragma omp atomic write
      enough = false;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t s = 0; s < strips; ++s) {
      int64_t const patch = s / (planes * rows);
      int const k0 = int(s / rows % planes), k1 = int(s % rows);
      if (near != nullptr && entries != nullptr) {
        render_strip(call, gaussians, patch / call.patches, patch % call.patches, k0, k1, near, entries);
      }
    }
    free(near);
    free(entries);
  }
  int64_t const voxels = call.patches * int64_t(call.patch[0]) * call.patch[1] * call.patch[2];
  for (int64_t b = 0; enough && b < call.batch; ++b) {
    bool bad = false;
    for (int64_t i = 0; i < call.count; ++i) bad = bad || gaussians[b * call.count + i].bad;
    T* const sample = static_cast<T*>(call.out) + b * voxels;
    for (int64_t v = 0; bad && v < voxels; ++v) sample[v] = T(NAN);
  }
  free(gaussians);
  return enough;
}

// The values of a tile where they lie, or copied into the buffer, padded with zeros, where rows of kSide cannot be read.
template <class T>
Values<T> tile_values(const VoxelizeCall& call, const T* patch, const int* at, const Tile& tile, T* buffer) {
  int64_t const row = call.patch[2], plane = row * call.patch[1];
  const T* first = patch + (tile.at[0] - at[0]) * plane + (tile.at[1] - at[1]) * row + tile.at[2] - at[2];
  // Rows at a multiple of 512 bytes would push each other out of the first-level cache.
  if (tile.extent[1] == kSide && tile.extent[2] == kSide && row * int64_t(sizeof(T)) % 512 != 0) return {first, plane, row};
  memset(buffer, 0, sizeof(T) * kDeep * kSide * kSide);
  for (int z = 0; z < tile.extent[0]; ++z) {
    for (int y = 0; y < tile.extent[1]; ++y) {
      memcpy(buffer + (z * kSide + y) * kSide, first + z * plane + y * row, size_t(tile.extent[2]) * sizeof(T));
    }
  }
  return {buffer, kSide * kSide, kSide};
}

// Gradients of Gaussians [start, end) of sample b.
template <class T>
void block_gradient(const VoxelizeCall& call, const VoxelGaussian<double>* gaussians, int64_t b, int64_t start, int64_t end) {
  double moments[kBlock][10] = {};
  alignas(64) T buffer[kDeep * kSide * kSide];
  Entry<T> entry;
  int64_t const voxels = int64_t(call.patch[0]) * call.patch[1] * call.patch[2];
  int const along[3] = {tiles_along(call, 0), tiles_along(call, 1), tiles_along(call, 2)};
  for (int64_t j = 0; j < call.patches; ++j) {
    const T* patch = static_cast<const T*>(call.grad) + (b * call.patches + j) * voxels;
    int at[3];
    patch_origin(call, b, j, at);
    for (int64_t t = 0; t < int64_t(along[0]) * along[1] * along[2]; ++t) {
      Tile const tile = tile_of(call, at, int(t / (along[1] * along[2])), int(t / along[2] % along[1]), int(t % along[2]));
      Values<T> values = {nullptr, 0, 0};
      for (int64_t i = start; i < end; ++i) {
        const VoxelGaussian<double>& g = gaussians[b * call.count + i];
        if (!make_entry(call, g, tile, false, &entry)) continue;
        if (values.first == nullptr) values = tile_values(call, patch, at, tile, buffer);
        T part[10];
        tile_moments(entry, T(call.support), values, part);
        add_moments(call, g, entry.frame.at, part, moments[i - start]);
      }
    }
  }
  for (int64_t i = start; i < end; ++i) {
    const VoxelGaussian<double>& g = gaussians[b * call.count + i];
    if (g.bad) finish_bad_gradient<T>(call, b * call.count + i);
    else if (g.active) finish_gradient<T>(call, b * call.count + i, moments[i - start]);
  }
}

// False if there is not enough memory.
template <class T>
bool voxelize_gradient(const VoxelizeCall& call, int threads) {
  VoxelGaussian<double>* const gaussians = prepare_all<T>(call, threads);
  if (gaussians == nullptr) return false;
  int64_t block = kBlock;  // smaller where there would be too few for the threads; the sums do not depend on it
  while (block > 4 && call.batch * ((call.count + block - 1) / block) < 4 * threads) block /= 2;
  int64_t const blocks = (call.count + block - 1) / block;
#pragma omp parallel num_threads(threads)
  {
    FlushSubnormals flush;
#pragma omp for schedule(dynamic, 1)
    for (int64_t k = 0; k < call.batch * blocks; ++k) {
      int64_t const start = k % blocks * block, end = start + block;
      block_gradient<T>(call, gaussians, k / blocks, start, end < call.count ? end : call.count);
    }
  }
  free(gaussians);
  return true;
}

}  // namespace
}  // namespace medgmae
