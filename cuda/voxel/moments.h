// The backward of the CUDA renderer: a block sums the moments of one Gaussian, or of its share of one, over the voxels that
// the Gaussian reaches; then a thread sums the shares of each and goes through the chain rule.
#pragma once

#include "blocks.h"

namespace medgmae {

// A part of the Gaussian's box that lies in one patch.
struct PatchPart {
  int64_t first;  // index of the patch's first voxel in the gradient
  int at[3];      // and where that voxel is in the volume
};

template <class T>
struct MomentShared {
  VoxelFrame<double> frame;
  bool safe;
  VoxelBox range;  // of the slab
  Slab<T> slab;
  // The slab's planes, those times the offset along z from the frame's voxel, and times its square.
  alignas(16) T plane[kPlanes], plane_one[kPlanes], plane_two[kPlanes];
  int hits[kThreads], found;
  PatchPart parts[kThreads];
  T sums[10][kThreads];
};

template <class T>
struct MomentThread {
  T sums[10];  // 1, (z y x), (zz yy xx zy zx yx) over offsets from the frame's voxel
  PatchPart part;
};

// Sums of one column over 1, z and z^2.
template <class T>
struct ColumnSums {
  T count, one, two;
};

// Two neighbouring columns, which share the factors of z and the address; the second may be missing.
template <class T, bool rim>
MEDGMAE_DEVICE void sum_pair(const MomentShared<T>& shared, const Column<T>* c, bool second, const T* grad, int64_t plane,
                             ColumnSums<T>* sums) {
  const Slab<T>& s = shared.slab;
#pragma unroll 1
  for (int run = 0; run <= s.high_plane; run += kRun) {
    T value[2] = {column_start(c[0], run), column_start(c[1], run)}, grads[2][kRun];
    if (run + kRun <= s.high_plane + 1) {
#pragma unroll
      for (int k = 0; k < kRun; ++k, grad += plane) grads[0][k] = grad[0], grads[1][k] = second ? grad[1] : T(0);
    } else {
#pragma unroll
      for (int k = 0; k < kRun; ++k, grad += plane) {
        bool const inside = run + k <= s.high_plane;
        grads[0][k] = inside ? grad[0] : T(0), grads[1][k] = inside && second ? grad[1] : T(0);
      }
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        T weighted = value[i] * grads[i][k];
        if (rim) weighted = value[i] * shared.plane[run + k] >= s.threshold ? weighted : T(0);
        sums[i].count += weighted * shared.plane[run + k];
        sums[i].one += weighted * shared.plane_one[run + k];
        sums[i].two += weighted * shared.plane_two[run + k];
        value[i] *= c[i].step;
      }
    }
  }
}

template <class T>
MEDGMAE_DEVICE ColumnSums<T> sum_exact_column(const VoxelizeCall& call, const ExactColumn<T>& c, int planes, int offset,
                                              const T* grad, int64_t plane) {
  T const least = least_exponent<T>(call);
  ColumnSums<T> sums = {};
#pragma unroll 1
  for (int k = 0; k < planes; ++k) {
    T const weighted = exact_weight(c, least, k) * grad[k * plane], n = T(k + offset);
    sums.count += weighted, sums.one += n * weighted, sums.two += n * n * weighted;
  }
  return sums;
}

template <class T>
MEDGMAE_DEVICE void add_column_sums(const ColumnSums<T>& c, T y, T x, T* sums) {
  sums[0] += c.count, sums[1] += c.one, sums[2] += y * c.count, sums[3] += x * c.count, sums[4] += c.two;
  sums[5] += y * y * c.count, sums[6] += x * x * c.count, sums[7] += y * c.one, sums[8] += x * c.one;
  sums[9] += y * x * c.count;
}

// The slab at the first planes of the range; thread t makes plane t.
template <class T>
MEDGMAE_DEVICE void build_moment_slab(const VoxelizeCall& call, const VoxelBox& range, int t, MomentShared<T>* shared) {
  if (t >= kPlanes) return;
  int const corner[3] = {range.first[0], shared->frame.at[1], shared->frame.at[2]};  // rows and lanes count from the frame
  Slab<T> slab;
  place_slab(shared->frame, range, corner, &slab);
  T const factor = plane_factor(slab, t), n = T(range.first[0] + t - shared->frame.at[0]);
  shared->plane[t] = factor, shared->plane_one[t] = n * factor, shared->plane_two[t] = n * n * factor;
  if (t > 0) return;
  T const least = least_exponent<T>(call);
  slab.kind = !shared->safe ? ColumnKind::exact : has_rim(slab, least) ? ColumnKind::rim : ColumnKind::whole;
  slab.threshold = power_of_two(least);
  shared->slab = slab, shared->range = range;
}

// Pairs of columns `first`, `first` + `stride`, ... of the slab's range, counted along x and then y.
template <class T>
MEDGMAE_DEVICE void sum_columns(const VoxelizeCall& call, const VoxelGaussian<double>& g, const MomentShared<T>& shared,
                                const PatchPart& part, int first, int stride, T* sums) {
  const VoxelBox& range = shared.range;
  int const pairs = (range.last[2] - range.first[2]) / 2 + 1, planes = range.last[0] - range.first[0] + 1;
  int const offset = range.first[0] - shared.frame.at[0];
  int64_t const plane = int64_t(call.patch[1]) * call.patch[2];
  const T* const grad = static_cast<const T*>(call.grad) + part.first + (range.first[0] - part.at[0]) * plane;
  int y = range.first[1] + first / pairs, pair = first % pairs;
  while (y <= range.last[1]) {
    int const x = range.first[2] + 2 * pair;
    bool const second = x < range.last[2];
    const T* const column = grad + int64_t(y - part.at[1]) * call.patch[2] + (x - part.at[2]);
    T const row = T(y - shared.frame.at[1]), lane = T(x - shared.frame.at[2]);
    ColumnSums<T> c[2] = {};
    if (shared.slab.kind == ColumnKind::exact) {
#pragma unroll 1
      for (int i = 0; i < 1 + second; ++i) {
        ExactColumn<T> const exact = exact_column<T>(call, g, range.first[0], planes, y, x + i);
        add_column_sums(sum_exact_column(call, exact, planes, offset, column + i, plane), row, lane + T(i), sums);
      }
    } else {
      Column<T> const columns[2] = {column_at(shared.slab, row, lane), column_at(shared.slab, row, lane + T(second))};
      if (shared.slab.kind == ColumnKind::rim) sum_pair<T, true>(shared, columns, second, column, plane, c);
      else sum_pair<T, false>(shared, columns, second, column, plane, c);
      add_column_sums(c[0], row, lane, sums);
      add_column_sums(c[1], row, lane + T(1), sums);
    }
    y += stride / pairs, pair += stride % pairs;
    if (pair >= pairs) pair -= pairs, ++y;
  }
}

// Puts those of the patches from number `first` on, every `stride`th, that the Gaussian reaches into shared.parts, in order.
template <class T, class Block>
MEDGMAE_DEVICE void find_parts(const VoxelizeCall& call, const VoxelGaussian<double>& g, int64_t sample, int first, int stride,
                               Block& block) {
  MomentShared<T>& shared = *block.shared;
  block.each([&](int t, MomentThread<T>& own) {
    int64_t const j = first + int64_t(t) * stride;
    int start[3];
    VoxelBox box, reach;
    for (int k = 0; k < 3; ++k) reach.first[k] = g.first[k], reach.last[k] = g.last[k];
    int64_t const patch = sample * call.patches + j;
    shared.hits[t] = j < call.patches && piece_box(call, patch, 0, patch_sides(call), start, &box) && overlap(box, reach);
    own.part.first = patch * patch_volume(call);
    for (int k = 0; k < 3; ++k) own.part.at[k] = shared.hits[t] ? box.first[k] : 0;
  });
  block.each([&](int t, MomentThread<T>& own) {
    int at = 0;
    for (int i = 0; i < t; ++i) at += shared.hits[i];
    if (shared.hits[t]) shared.parts[at] = own.part;
    if (t == kThreads - 1) shared.found = at + shared.hits[t];
  });
}

// Adds the tree of the threads' sums; the first thread's are then those of the block.
template <class T, class Block>
MEDGMAE_DEVICE void sum_block(Block& block) {
  MomentShared<T>& shared = *block.shared;
  block.each([&](int t, MomentThread<T>& own) {
    for (int k = 0; k < 10; ++k) shared.sums[k][t] = own.sums[k];
  });
  for (int half = kThreads / 2; half > 0; half /= 2) {
    block.each([&](int t, MomentThread<T>&) {
      for (int k = 0; k < 10 && t < half; ++k) shared.sums[k][t] += shared.sums[k][t + half];
    });
  }
}

// Moments of share `index % shares` of Gaussian `index / shares`. With many patches a share is every so many-th patch, else
// every so many-th group of pairs of columns.
template <class T, class Block>
MEDGMAE_DEVICE void sum_moments(const VoxelizeCall& call, const VoxelizeWork& work, int64_t index, Block& block) {
  MomentShared<T>& shared = *block.shared;
  int64_t const i = index / work.shares;
  int const share = int(index % work.shares);
  bool const by_patch = call.patches >= work.shares;
  int const step = by_patch ? work.shares : 1, patches = int(call.patches);
  int const first_pair = by_patch ? 0 : share * kThreads, pairs = by_patch ? kThreads : work.shares * kThreads;
  const VoxelGaussian<double>& g = work.gaussians[i];
  bool const reaches = g.first[0] <= g.last[0] && g.first[1] <= g.last[1] && g.first[2] <= g.last[2];
  block.each([&](int t, MomentThread<T>& own) {
    for (int k = 0; k < 10; ++k) own.sums[k] = 0;
    if (t > 0 || !reaches) return;
    VoxelBox reach;
    for (int k = 0; k < 3; ++k) reach.first[k] = g.first[k], reach.last[k] = g.last[k];
    shared.frame = frame_in_box<double>(call, g, g.first, g.last);
    shared.safe = factors_are_safe(shared.frame, reach, kPlanes);
  });
  for (int j = by_patch ? share : 0; reaches && j < patches; j += step * kThreads) {
    find_parts<T>(call, g, i / call.count, j, step, block);
    for (int p = 0; p < shared.found; ++p) {
      const PatchPart& part = shared.parts[p];
      VoxelBox patch;
      for (int k = 0; k < 3; ++k) patch.first[k] = part.at[k], patch.last[k] = part.at[k] + call.patch[k] - 1;
      VoxelBox range = intersection(g.first, g.last, patch);
      int const end = range.last[0];
      for (int z = range.first[0]; z <= end; z += kPlanes) {
        range.first[0] = z, range.last[0] = z + kPlanes - 1 < end ? z + kPlanes - 1 : end;
        block.each([&](int t, MomentThread<T>&) { build_moment_slab(call, range, t, &shared); });
        block.each([&](int t, MomentThread<T>& own) {
          sum_columns(call, g, shared, shared.parts[p], first_pair + t, pairs, own.sums);
        });
      }
    }
  }
  sum_block<T>(block);
  block.each([&](int t, MomentThread<T>&) {
    if (t < 10) work.moments[index * 10 + t] = double(shared.sums[t][0]);
  });
}

// One thread to a Gaussian: its gradients.
template <class T>
MEDGMAE_DEVICE void finish_one(const VoxelizeCall& call, const VoxelizeWork& work, int64_t i) {
  if (i >= call.batch * call.count) return;
  const VoxelGaussian<double>& g = work.gaussians[i];
  if (g.bad) nan_gradients<T>(call, i);
  if (g.bad || !g.active) return;
  double moments[10] = {}, total[10] = {};
  for (int share = 0; share < work.shares; ++share) {
    for (int k = 0; k < 10; ++k) moments[k] += work.moments[(i * work.shares + share) * 10 + k];
  }
  bool const reaches = g.first[0] <= g.last[0] && g.first[1] <= g.last[1] && g.first[2] <= g.last[2];
  if (reaches) add_moments(call, g, frame_in_box<double>(call, g, g.first, g.last).at, moments, total);
  parameter_gradients<T>(call, i, total);
}

}  // namespace medgmae
