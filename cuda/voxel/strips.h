// The CPU renderer: the walk over strips, forward and backward. Work is shared out so that no two threads write
// the same number and every sum has its order: the result does not depend on the number of threads.
#pragma once

#include <stdlib.h>

#include "sums.h"

namespace medgmae {
namespace {

constexpr int kTogether = 32;  // Gaussians whose rows are summed in registers before the strip is written: bits of a word
constexpr int kBlock = 64;     // Gaussians that share one pass over the volume in the backward

template <class T>
T* allocate(int64_t n) {
  int64_t const bytes = (n > 0 ? n : 1) * int64_t(sizeof(T));
  return static_cast<T*>(aligned_alloc(64, size_t((bytes + 63) / 64 * 64)));
}

// The first voxel of patch j of sample b.
inline void patch_origin(const VoxelizeCall& call, int64_t b, int64_t j, int* at) {
  int64_t grid[3], index = call.index[b * call.patches + j];
  for (int k = 0; k < 3; ++k) grid[k] = call.size[k] / call.patch[k];
  at[0] = int(index / (grid[1] * grid[2])) * call.patch[0];
  at[1] = int(index / grid[2] % grid[1]) * call.patch[1];
  at[2] = int(index % grid[2]) * call.patch[2];
}

inline int strips_along(const VoxelizeCall& call, int k) { return (call.patch[k] + kSide - 1) / kSide; }

// A row of a strip's buffer: whole tiles.
inline int64_t buffer_row(const VoxelizeCall& call) { return int64_t(strips_along(call, 2)) * kSide; }

inline int64_t patch_voxels(const VoxelizeCall& call) { return int64_t(call.patch[0]) * call.patch[1] * call.patch[2]; }

// Strip number s of all samples, where it lies in its patch, and the patch's values in an array of all.
struct StripPlace {
  int64_t sample, patch;  // the patch is counted over all samples
  int plane, row;         // first of the strip, in the patch
  Strip strip;
};

inline int64_t strips_per_patch(const VoxelizeCall& call) { return int64_t(strips_along(call, 0)) * strips_along(call, 1); }

inline StripPlace strip_place(const VoxelizeCall& call, int64_t s) {
  StripPlace place;
  int const rows = strips_along(call, 1);
  int64_t const within = s % strips_per_patch(call);
  place.patch = s / strips_per_patch(call), place.sample = place.patch / call.patches;
  place.plane = int(within / rows) * kSide, place.row = int(within % rows) * kSide;
  int const start[3] = {place.plane, place.row, 0};
  int at[3];
  patch_origin(call, place.sample, place.patch % call.patches, at);
  for (int k = 0; k < 3; ++k) {
    int const left = call.patch[k] - start[k];
    place.strip.at[k] = at[k] + start[k];
    place.strip.extent[k] = left < kSide || k == 2 ? left : kSide;
  }
  return place;
}

// Several entries of a strip, one bit of a word to each, and their factors in the tile at hand: kSide planes and rows,
// one vector along x.
template <class T>
struct Batch {
  Entry<T> entries[kTogether];
  Lanes<T> lanes[2][kTogether];  // from rows 0 and 8 on, in the plane at hand
  int count;
};

// Adds the entries of the bits to the rows [8 half, 8 half + 8) of a tile; `reaching` has the entries of each plane.
template <class T, bool rim>
void render_rows(Batch<T>* batch, uint32_t bits, const uint32_t* reaching, int half, const Values<T>& tile) {
  Lanes<T>* const lanes = batch->lanes[half];
  for (int z = 0; z < kSide; ++z) {
    uint32_t left = bits & reaching[z];
    if (left == 0) continue;
    T* const rows = tile.at(z, half * kHalf, 0);
    Vec<T> total[kHalf];
#pragma GCC unroll 8
    for (int y = 0; y < kHalf; ++y) total[y] = load(rows + y * tile.row);
    for (; left != 0; left &= left - 1) {
      uint32_t const i = uint32_t(__builtin_ctz(left));
      const Entry<T>& e = batch->entries[i];
      Lanes<T>& l = *one_register(lanes + i);
      const T* const scaled = one_register(e.scaled[z] + half * kHalf);
      // Two chains of products, over the even and the odd rows.
      Vec<T> value[2] = {l.start, l.start * l.down};
      Vec<T> const two = l.down * l.down;
      l.start *= l.deep;
#pragma GCC unroll 8
      for (int y = 0; y < kHalf; ++y) {
        Vec<T> const weighted = value[y % 2] * scaled[y];
        total[y] += rim ? keep<T>(magnitude<T>(weighted) >= e.threshold, weighted) : weighted;
        value[y % 2] *= two;
      }
    }
#pragma GCC unroll 8
    for (int y = 0; y < kHalf; ++y) store(rows + y * tile.row, total[y]);
  }
}

// Adds the entries to the strip, tile by tile.
template <class T>
void render_batch(const VoxelizeCall& call, Batch<T>* batch, const Values<T>& strip) {
  T const support = T(call.support);
  uint32_t reaching[kSide] = {};
  for (int i = 0; i < batch->count; ++i) {
    const Entry<T>& e = batch->entries[i];
    for (int z = e.part.low[0]; z <= e.part.high[0]; ++z) reaching[z] |= uint32_t(1) << i;
  }
  for (int x = 0; x < call.patch[2]; x += kLanes<T>) {
    Values<T> const tile = {strip.at(0, 0, x), strip.plane, strip.row};
    uint32_t bits[2][2] = {};  // of the whole and of the rims, in the upper and in the lower rows
    for (int i = 0; i < batch->count; ++i) {
      const Entry<T>& e = batch->entries[i];
      Kind const kind = kind_in(e, support, x, kLanes<T>);
      if (kind != Kind::whole && kind != Kind::rim) continue;
      Lanes<T> l;
      make_lanes(e, x, e.upper ? 0 : kHalf, &l);
      batch->lanes[0][i] = l;
      Vec<T> const two = l.down * l.down, four = two * two;
      if (e.upper) l.start *= four * four;
      batch->lanes[1][i] = l;
      if (e.upper) bits[kind == Kind::rim][0] |= uint32_t(1) << i;
      if (e.lower) bits[kind == Kind::rim][1] |= uint32_t(1) << i;
    }
    for (int half = 0; half < 2; ++half) {
      render_rows<T, false>(batch, bits[0][half], reaching, half, tile);
      render_rows<T, true>(batch, bits[1][half], reaching, half, tile);
    }
  }
  for (int i = 0; i < batch->count; ++i) {
    if (batch->entries[i].kind == Kind::needle) render_needle(batch->entries[i], support, strip);
  }
  batch->count = 0;
}

// What one thread works with.
template <class T>
struct Scratch {
  Batch<T>* batch;
  T* buffer;  // a strip
  explicit Scratch(const VoxelizeCall& call) : batch(allocate<Batch<T>>(1)), buffer(allocate<T>(kSide * kSide * buffer_row(call))) {
    if (batch != nullptr) batch->count = 0;
  }
  ~Scratch() { free(batch), free(buffer); }
  bool complete() const { return batch != nullptr && buffer != nullptr; }
};

template <class T>
void render_strip(const VoxelizeCall& call, const VoxelGaussian<double>* gaussians, int64_t s, Scratch<T>* scratch) {
  StripPlace const place = strip_place(call, s);
  int64_t const row = buffer_row(call);
  Values<T> const values = {scratch->buffer, kSide * row, row};
  memset(values.first, 0, size_t(kSide * kSide * row) * sizeof(T));
  Batch<T>& batch = *scratch->batch;
  for (int64_t i = 0; i < call.count; ++i) {
    for_entries(call, gaussians[place.sample * call.count + i], place.strip, &batch.entries[batch.count], [&](Entry<T>*) {
      if (++batch.count == kTogether) render_batch(call, &batch, values);
      return &batch.entries[batch.count];
    });
  }
  render_batch(call, &batch, values);
  T* const out = static_cast<T*>(call.out) + place.patch * patch_voxels(call);
  for (int z = 0; z < place.strip.extent[0]; ++z) {
    for (int y = 0; y < place.strip.extent[1]; ++y) {
      int64_t const to = (int64_t(place.plane + z) * call.patch[1] + place.row + y) * call.patch[2];
      memcpy(out + to, values.at(z, y, 0), size_t(call.patch[2]) * sizeof(T));
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

// Fills with NaN the samples that have a Gaussian which cannot be rendered.
template <class T>
void spoil_bad_samples(const VoxelizeCall& call, const VoxelGaussian<double>* gaussians) {
  int64_t const voxels = call.patches * patch_voxels(call);
  for (int64_t b = 0; b < call.batch; ++b) {
    bool bad = false;
    for (int64_t i = 0; i < call.count; ++i) bad = bad || gaussians[b * call.count + i].bad;
    T* const sample = static_cast<T*>(call.out) + b * voxels;
    for (int64_t v = 0; bad && v < voxels; ++v) sample[v] = T(NAN);
  }
}

// False if there is not enough memory.
template <class T>
bool voxelize_forward(const VoxelizeCall& call, int threads) {
  VoxelGaussian<double>* const gaussians = prepare_all<T>(call, threads);
  if (gaussians == nullptr) return false;
  bool enough = true;
  int64_t const strips = call.batch * call.patches * strips_per_patch(call);
#pragma omp parallel num_threads(threads)
  {
    FlushSubnormals flush;
    Scratch<T> scratch(call);
    if (!scratch.complete()) {
#pragma omp atomic write
      enough = false;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t s = 0; s < strips; ++s) {
      if (scratch.complete()) render_strip(call, gaussians, s, &scratch);
    }
  }
  if (enough) spoil_bad_samples<T>(call, gaussians);
  free(gaussians);
  return enough;
}

// The values of a strip where they lie, or copied into the buffer, padded with zeros, where whole tiles cannot be read.
template <class T>
Values<const T> strip_values(const VoxelizeCall& call, const StripPlace& place, T* buffer) {
  int64_t const row = call.patch[2], plane = row * call.patch[1];
  const T* first = static_cast<const T*>(call.grad) + place.patch * patch_voxels(call) + place.plane * plane + place.row * row;
  // Rows at a multiple of 512 bytes would push each other out of the first-level cache.
  bool const in_place = place.strip.extent[1] == kSide && row % kSide == 0 && row * int64_t(sizeof(T)) % 512 != 0;
  if (in_place) return {first, plane, row};
  int64_t const padded = buffer_row(call);
  memset(buffer, 0, size_t(kSide * kSide * padded) * sizeof(T));
  for (int z = 0; z < place.strip.extent[0]; ++z) {
    for (int y = 0; y < place.strip.extent[1]; ++y) {
      memcpy(buffer + (z * kSide + y) * padded, first + z * plane + y * row, size_t(row) * sizeof(T));
    }
  }
  return {buffer, kSide * padded, padded};
}

// Gradients of Gaussians [start, end) of a sample.
template <class T>
void block_gradient(const VoxelizeCall& call, const VoxelGaussian<double>* gaussians, int64_t sample, int64_t start, int64_t end, T* buffer) {
  double moments[kBlock][10] = {};
  Entry<T> entry;
  int64_t const strips = call.patches * strips_per_patch(call);
  for (int64_t s = sample * strips; s < (sample + 1) * strips; ++s) {
    StripPlace const place = strip_place(call, s);
    Values<const T> values = {nullptr, 0, 0};
    for (int64_t i = start; i < end; ++i) {
      const VoxelGaussian<double>& g = gaussians[sample * call.count + i];
      for_entries(call, g, place.strip, &entry, [&](Entry<T>* e) {
        if (values.first == nullptr) values = strip_values(call, place, buffer);
        T part[10];
        entry_moments(*e, T(call.support), values, part);
        add_moments(call, g, e->frame.at, part, moments[i - start]);
        return e;
      });
    }
  }
  for (int64_t i = start; i < end; ++i) {
    const VoxelGaussian<double>& g = gaussians[sample * call.count + i];
    if (g.bad) nan_gradients<T>(call, sample * call.count + i);
    else if (g.active) parameter_gradients<T>(call, sample * call.count + i, moments[i - start]);
  }
}

// False if there is not enough memory.
template <class T>
bool voxelize_gradient(const VoxelizeCall& call, int threads) {
  VoxelGaussian<double>* const gaussians = prepare_all<T>(call, threads);
  if (gaussians == nullptr) return false;
  bool enough = true;
  int64_t block = kBlock;  // smaller where there would be too few for the threads; the sums do not depend on it
  while (block > 4 && call.batch * ((call.count + block - 1) / block) < 4 * threads) block /= 2;
  int64_t const blocks = (call.count + block - 1) / block;
#pragma omp parallel num_threads(threads)
  {
    FlushSubnormals flush;
    T* const buffer = allocate<T>(kSide * kSide * buffer_row(call));
    if (buffer == nullptr) {
#pragma omp atomic write
      enough = false;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t k = 0; k < call.batch * blocks; ++k) {
      int64_t const start = k % blocks * block, end = start + block < call.count ? start + block : call.count;
      if (buffer != nullptr) block_gradient<T>(call, gaussians, k / blocks, start, end, buffer);
    }
    free(buffer);
  }
  free(gaussians);
  return enough;
}

}  // namespace
}  // namespace medgmae
