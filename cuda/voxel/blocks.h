// The CUDA renderer as programs of thread blocks: forward prepare, mask, render; backward prepare, moments, finish.
//
// A program is a sequence of phases, block.each([&](int thread, State& own) { ... }), with a barrier after each. What
// passes from one phase to the next is in block.shared or in the thread's own state. The device runs the threads of a phase
// side by side; a test on the host runs them one after the other. No two threads write the same number, and every sum has
// its order, so two runs give the same bits.
#pragma once

#include "columns.h"

namespace medgmae {

constexpr int kThreads = 64;
constexpr int kDepth = 16, kWidth = 8;  // a block of the forward renders 16 x 8 x 8 voxels: a column of 16 to a thread
constexpr int kRegion = 32;             // voxels along each axis that share a list of Gaussians: whole tiles
constexpr int kPlanes = 32;             // voxels of a column at a time in the backward
constexpr int kMostShares = 16;         // blocks that share one Gaussian in the backward
constexpr int64_t kEnoughBlocks = 8192;

// Voxels of a piece of a patch along the axes.
struct Sides {
  int of[3];
};
MEDGMAE_HD Sides tile_sides() { return {{kDepth, kWidth, kWidth}}; }
MEDGMAE_HD Sides region_sides() { return {{kRegion, kRegion, kRegion}}; }
MEDGMAE_HD Sides patch_sides(const VoxelizeCall& call) { return {{call.patch[0], call.patch[1], call.patch[2]}}; }

// The workspace of a call.
struct VoxelizeWork {
  VoxelGaussian<double>* gaussians;  // (batch, count)
  VoxelBox* reach;                   // (batch, count); of a Gaussian that cannot be rendered: everything
  uint32_t* mask;                    // (batch, patches, regions, words): bit i of word w is Gaussian 32 w + i
  double* moments;                   // (batch, count, shares, 10)
  int64_t regions, words;            // regions of a patch
  int shares;
  int64_t bytes;
};

MEDGMAE_HD int64_t pieces(const VoxelizeCall& call, int k, const Sides& side) {
  return (call.patch[k] + side.of[k] - 1) / side.of[k];
}

MEDGMAE_HD int64_t all_pieces(const VoxelizeCall& call, const Sides& side) {
  return pieces(call, 0, side) * pieces(call, 1, side) * pieces(call, 2, side);
}

MEDGMAE_HD int64_t patch_volume(const VoxelizeCall& call) { return int64_t(call.patch[0]) * call.patch[1] * call.patch[2]; }

// How the workspace at `base` is divided; .bytes says how large it must be.
inline VoxelizeWork divide_workspace(const VoxelizeCall& call, bool backward, void* base) {
  VoxelizeWork work = {};
  auto take = [&](int64_t bytes) {
    int64_t const at = work.bytes;
    work.bytes += (bytes + 255) / 256 * 256;
    return static_cast<char*>(base) + at;
  };
  int64_t const all = call.batch * call.count;
  work.regions = all_pieces(call, region_sides()), work.words = (call.count + 31) / 32;
  int64_t const shares = kEnoughBlocks / (all > 0 ? all : 1);
  work.shares = int(shares < 1 ? 1 : shares < kMostShares ? shares : kMostShares);
  work.gaussians = reinterpret_cast<VoxelGaussian<double>*>(take(all * int64_t(sizeof(VoxelGaussian<double>))));
  if (backward) {
    work.moments = reinterpret_cast<double*>(take(all * work.shares * 10 * int64_t(sizeof(double))));
  } else {
    work.reach = reinterpret_cast<VoxelBox*>(take(all * int64_t(sizeof(VoxelBox))));
    int64_t const words = call.batch * call.patches * work.regions * work.words;
    work.mask = reinterpret_cast<uint32_t*>(take(words * int64_t(sizeof(uint32_t))));
  }
  return work;
}

// The voxels of piece number `piece` of patch j (counted over all samples), in the volume; false if there is no such patch.
MEDGMAE_DEVICE bool piece_box(const VoxelizeCall& call, int64_t j, int64_t piece, const Sides& side, int* start, VoxelBox* box) {
  int64_t const down = pieces(call, 1, side), along = pieces(call, 2, side);
  int64_t const number[3] = {piece / (down * along), piece / along % down, piece % along};
  int64_t const rows = call.size[1] / call.patch[1], lanes = call.size[2] / call.patch[2], index = call.index[j];
  int64_t const corner[3] = {index / (rows * lanes), index / lanes % rows, index % lanes};
  for (int k = 0; k < 3; ++k) {
    start[k] = int(number[k]) * side.of[k];
    int const left = call.patch[k] - start[k];
    box->first[k] = int(corner[k] * call.patch[k]) + start[k];
    box->last[k] = box->first[k] + (left < side.of[k] ? left : side.of[k]) - 1;
  }
  return index >= 0 && corner[0] < call.size[0] / call.patch[0];
}

// One thread to a Gaussian.
template <class T>
MEDGMAE_DEVICE void prepare_one(const VoxelizeCall& call, const VoxelizeWork& work, int64_t i) {
  if (i >= call.batch * call.count) return;
  VoxelGaussian<double> const g = prepare_gaussian<T, double>(call, i);
  work.gaussians[i] = g;
  if (work.reach == nullptr) return;
  for (int k = 0; k < 3; ++k) {
    work.reach[i].first[k] = g.bad ? -1 : g.first[k];
    work.reach[i].last[k] = g.bad ? INT32_MAX : g.last[k];
  }
}

// One thread to a word of the mask; neighbours read the same Gaussians for neighbouring regions.
MEDGMAE_DEVICE void mask_one(const VoxelizeCall& call, const VoxelizeWork& work, int64_t i) {
  int64_t const regions = call.patches * work.regions, region = i % regions, word = i / regions % work.words;
  int64_t const sample = i / regions / work.words;
  if (sample >= call.batch) return;
  int64_t const patch = sample * call.patches + region / work.regions;
  int start[3];
  VoxelBox box;
  uint32_t bits = 0;
  if (piece_box(call, patch, region % work.regions, region_sides(), start, &box)) {
    const VoxelBox* const reach = work.reach + sample * call.count + word * 32;
    int64_t const left = call.count - word * 32;
    for (int b = 0; b < 32 && b < left; ++b) bits |= overlap(reach[b], box) ? uint32_t(1) << b : 0;
  }
  work.mask[(patch * work.regions + region % work.regions) * work.words + word] = bits;
}

// The tile of a block.
struct Tile {
  int64_t sample, patch, region;
  int start[3];  // in the patch
  VoxelBox box;
  bool exists;
};

template <class T>
struct RenderShared {
  Tile tile;
  alignas(16) T planes[kThreads][kDepth];
  Slab<T> slabs[kThreads];
  uint16_t list[32 * kThreads];  // Gaussians of the words at hand that reach the tile, in order
  int counts[kThreads], total;
};

template <class T>
struct RenderThread {
  T sums[kDepth];
  uint32_t hits;
};

MEDGMAE_DEVICE Tile tile_of_block(const VoxelizeCall& call, const VoxelizeWork& work, int64_t block) {
  Tile tile;
  int64_t const tiles = all_pieces(call, tile_sides());
  tile.patch = block / tiles, tile.sample = tile.patch / call.patches;
  tile.exists = piece_box(call, tile.patch, block % tiles, tile_sides(), tile.start, &tile.box);
  if (!tile.exists) return tile;
  int64_t region = 0;
  for (int k = 0; k < 3; ++k) region = region * pieces(call, k, region_sides()) + tile.start[k] / kRegion;
  tile.region = tile.patch * work.regions + region;
  return tile;
}

MEDGMAE_DEVICE int lowest_bit(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __ffs(int(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
}

// Gaussians of one word that reach the tile.
MEDGMAE_DEVICE uint32_t find_hits(const VoxelizeCall& call, const VoxelizeWork& work, const Tile& tile, int64_t word) {
  uint32_t hits = 0;
  const VoxelBox* const reach = work.reach + tile.sample * call.count + word * 32;
  for (uint32_t left = work.mask[tile.region * work.words + word]; left != 0; left &= left - 1) {
    int const b = lowest_bit(left);
    if (overlap(reach[b], tile.box)) hits |= uint32_t(1) << b;
  }
  return hits;
}

template <class T>
MEDGMAE_DEVICE void build_slab(const VoxelizeCall& call, const VoxelizeWork& work, const Tile& tile, int gaussian, Slab<T>* s,
                               T* planes) {
  const VoxelGaussian<double>& g = work.gaussians[tile.sample * call.count + gaussian];
  // A Gaussian that cannot be rendered is NaN in the whole tile.
  VoxelBox const range = g.bad ? tile.box : intersection(g.first, g.last, tile.box);
  VoxelFrame<double> frame = {};
  if (!g.bad) frame = frame_in_box<double>(call, g, range.first, range.last);
  place_slab(frame, range, tile.box.first, s);
  T const density = T(g.density), least = least_exponent<T>(call);
  // A density so large could overflow a factor.
  bool const safe = g.bad || (factors_are_safe(frame, range, kDepth) && fabs(density) < T(1e8));
  s->kind = !safe ? ColumnKind::exact : !g.bad && has_rim(*s, least) ? ColumnKind::rim : ColumnKind::whole;
  s->gaussian = gaussian;
  s->threshold = power_of_two(least) * fabs(density);
#pragma unroll 1
  for (int k = 0; k < kDepth; ++k) planes[k] = g.bad ? T(NAN) : density * plane_factor(*s, k);
}

template <class T, bool rim>
MEDGMAE_DEVICE void add_column(const Slab<T>& s, const T* planes, const Column<T>& c, T* sums) {
#pragma unroll
  for (int run = 0; run < kDepth; run += kRun) {
    if (run > s.high_plane || run + kRun <= s.low_plane) continue;
    T value = column_start(c, run);
#pragma unroll
    for (int k = run; k < run + kRun; ++k) {
      if (rim) {
        T const weighted = value * planes[k];
        sums[k] += fabs(weighted) >= s.threshold ? weighted : T(0);
      } else {
        sums[k] += value * planes[k];
      }
      value *= c.step;
    }
  }
}

template <class T>
MEDGMAE_DEVICE void add_exact_column(const VoxelizeCall& call, const VoxelizeWork& work, const Tile& tile, const Slab<T>& s,
                                     int row, int lane, T* sums) {
  const VoxelGaussian<double>& g = work.gaussians[tile.sample * call.count + s.gaussian];
  const int* const at = tile.box.first;
  ExactColumn<T> const c = exact_column<T>(call, g, at[0], kDepth, at[1] + row, at[2] + lane);
  T const density = T(g.density), least = least_exponent<T>(call);
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    if (k >= s.low_plane && k <= s.high_plane) sums[k] += density * exact_weight(c, least, k);
  }
}

// Adds the slabs to a thread's column.
template <class T>
MEDGMAE_DEVICE void add_slabs(const VoxelizeCall& call, const VoxelizeWork& work, const RenderShared<T>& shared, int count, int t,
                              RenderThread<T>* own) {
  T const row = T(t / kWidth), lane = T(t % kWidth);
  for (int i = 0; i < count; ++i) {
    const Slab<T>& s = shared.slabs[i];
    if ((row < s.low[0]) | (row > s.high[0]) | (lane < s.low[1]) | (lane > s.high[1])) continue;
    if (s.kind == ColumnKind::exact) {
      add_exact_column(call, work, shared.tile, s, t / kWidth, t % kWidth, own->sums);
    } else if (s.kind == ColumnKind::rim) {
      add_column<T, true>(s, shared.planes[i], column_at(s, row, lane), own->sums);
    } else {
      add_column<T, false>(s, shared.planes[i], column_at(s, row, lane), own->sums);
    }
  }
}

template <class T>
MEDGMAE_DEVICE void write_column(const VoxelizeCall& call, const Tile& tile, int t, const RenderThread<T>& own) {
  int const y = tile.start[1] + t / kWidth, x = tile.start[2] + t % kWidth;
  if (y >= call.patch[1] || x >= call.patch[2]) return;
  int64_t const plane = int64_t(call.patch[1]) * call.patch[2];
  int64_t const first = tile.patch * patch_volume(call) + tile.start[0] * plane + int64_t(y) * call.patch[2] + x;
  T* const out = static_cast<T*>(call.out) + first;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    if (tile.start[0] + k < call.patch[0]) out[k * plane] = tile.exists ? own.sums[k] : T(NAN);
  }
}

// Renders the tile of a block.
template <class T, class Block>
MEDGMAE_DEVICE void render_tile(const VoxelizeCall& call, const VoxelizeWork& work, int64_t index, Block& block) {
  RenderShared<T>& shared = *block.shared;
  const Tile& tile = shared.tile;
  block.each([&](int t, RenderThread<T>& own) {
    if (t == 0) shared.tile = tile_of_block(call, work, index);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) own.sums[k] = 0;
  });
  int const all_words = int(work.words);
  for (int word = 0; tile.exists && word < all_words; word += kThreads) {
    int const words = all_words - word < kThreads ? all_words - word : kThreads;
    block.each([&](int t, RenderThread<T>& own) {
      own.hits = t < words ? find_hits(call, work, tile, word + t) : 0;
      int count = 0;
      for (uint32_t left = own.hits; left != 0; left &= left - 1) ++count;
      shared.counts[t] = count;
    });
    block.each([&](int t, RenderThread<T>& own) {
      int at = 0;
      for (int i = 0; i < t && i < words; ++i) at += shared.counts[i];
      for (uint32_t left = own.hits; left != 0; left &= left - 1) shared.list[at++] = uint16_t(32 * t + lowest_bit(left));
      if (t == kThreads - 1) shared.total = at;
    });
    for (int first = 0; first < shared.total; first += kThreads) {
      int const count = shared.total - first < kThreads ? shared.total - first : kThreads;
      block.each([&](int t, RenderThread<T>&) {
        if (t < count) build_slab(call, work, tile, 32 * word + shared.list[first + t], &shared.slabs[t], shared.planes[t]);
      });
      block.each([&](int t, RenderThread<T>& own) { add_slabs(call, work, shared, count, t, &own); });
    }
  }
  block.each([&](int t, RenderThread<T>& own) { write_column(call, tile, t, own); });
}

}  // namespace medgmae
