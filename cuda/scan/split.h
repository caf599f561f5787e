// Scans with fewer channels than threads have work for: time is split into segments as well.
//
// A segment turns what it is given into what it hands on by h -> decay h + own, with decay = exp(A sum of its steps). Every
// segment's own part is computed first, then the few products from segment to segment, then the segments themselves. That is up
// to twice the work, so it is done with many threads only; results then differ from those of few threads by rounding.
#pragma once

#include "gradient.h"

namespace medgmae {
namespace {

constexpr int64_t kLeastSegment = 256;  // steps

// Segments per piece of work: 1 unless there are at least `least` threads for each of them.
inline int64_t scan_segments(int64_t pieces, int64_t length, int threads, int least) {
  int64_t const by_threads = threads / (pieces > 1 ? pieces : 1), by_length = length / kLeastSegment;
  int64_t const segments = by_threads < by_length ? by_threads : by_length;
  return segments < least ? 1 : segments;
}

// What the segments of a piece hand on, per state and lane, and the sums of their steps, per lane.
template <class T>
struct Segments {
  int64_t count, per_state, per_block;
  ThreadMemory<T> memory;
  Segments(int64_t pieces, int64_t count, int64_t blocks, int64_t states)
      : count(count),
        per_state(blocks * states * kLanes<T>),
        per_block(blocks * kLanes<T>),
        memory(pieces * count * (per_state + per_block)) {}
  T* state(int64_t piece, int64_t segment) const { return memory.at + (piece * count + segment) * (per_state + per_block); }
  T* steps(int64_t piece, int64_t segment) const { return state(piece, segment) + per_state; }
};

// to = decay over a segment times `given`, plus the segment's own.
template <class T>
inline void hand_on(const ScanPiece<T>& piece, const T* own, const T* steps, const T* given, T* to) {
  constexpr int kWide = kLanes<T>;
  int64_t const states = piece.call.states;
  for (int64_t i = 0; i < piece.blocks * states; ++i) {
    Vec<T> const decay = decay_lanes(load(steps + i / states * kWide) * load(piece.A + i * kWide));
    store(to + i * kWide, decay * load(given + i * kWide) + load(own + i * kWide));
  }
}

// The state after steps [begin, end) of a piece that began with none, and the sum of the steps.
template <class T>
inline void segment_end(const ScanPiece<T>& piece, int64_t begin, int64_t end, T* state, T* sum, T* d, T* x) {
  constexpr int kWide = kLanes<T>;
  memset(state, 0, size_t(piece.blocks * piece.call.states * kWide) * sizeof(T));
  memset(sum, 0, size_t(piece.blocks * kWide) * sizeof(T));
  for (int64_t t = begin; t < end; t += kTileSteps) {
    int const steps = int(end - t < kTileSteps ? end - t : kTileSteps);
    scan_steps(piece, t, steps, kTileSteps, d, x);
    for (int k = 0; k < piece.blocks; ++k) {
      int64_t const at = int64_t(k) * kTileSteps * kWide;
      scan_any_block(piece, k, t, steps, d + at, x + at, x + at, state + k * piece.call.states * kWide);
      for (int i = 0; i < steps; ++i) store(sum + k * kWide, load(sum + k * kWide) + load(d + at + i * kWide));
    }
  }
}

template <class T>
bool scan_forward_split(const ScanCall& call, int threads, int64_t count) {
  constexpr int kWide = kLanes<T>;
  ScanBlocks const all(call, kWide);
  int64_t const tile = kTileSteps, packed = tile * kWide, length = (call.length + count * tile - 1) / (count * tile) * tile;
  auto const border = [&](int64_t segment) { return segment * length < call.length ? segment * length : call.length; };
  Segments<T> const segments(all.total, count, 1, call.states);
  bool enough_memory = segments.memory.at != nullptr;
#pragma omp parallel num_threads(threads)
  {
    FlushSubnormals flush;
    ThreadMemory<T> memory(2 * packed + 4 * call.states * kWide);
    if (memory.at == nullptr) {
#pragma omp atomic write
      enough_memory = false;
    }
#pragma omp barrier
    if (enough_memory) {
      T *const d = memory.at, *const x = d + packed, *const given = x + packed, *const constants = given + call.states * kWide;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < all.total * count; ++i) {
        int64_t const k = i % count;
        ScanPiece<T> const piece(call, all, i / count, 1, constants);
        segment_end(piece, border(k), border(k + 1), segments.state(i / count, k), segments.steps(i / count, k), d, x);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < all.total * count; ++i) {
        ScanPiece<T> const piece(call, all, i / count, 1, constants);
        memset(given, 0, size_t(call.states * kWide) * sizeof(T));
        for (int64_t k = 0; k < i % count; ++k) hand_on(piece, segments.state(i / count, k), segments.steps(i / count, k), given, given);
        scan_piece(piece, border(i % count), border(i % count + 1), given, d, x);
      }
    }
  }
  return enough_memory;
}

// What chunks [first, end) of a piece hand to the ones before them if nothing comes from behind, and the sum of their steps.
template <class T>
inline void segment_carry(const ScanPiece<T>& piece, GradientScratch<T>& my, int64_t first, int64_t end, T* carry, T* sum) {
  constexpr int kWide = kLanes<T>;
  const ScanCall& call = piece.call;
  memset(carry, 0, size_t(piece.blocks * call.states * kWide) * sizeof(T));
  memset(sum, 0, size_t(piece.blocks * kWide) * sizeof(T));
  for (int64_t c = end - 1; c >= first; --c) {
    GradientChunk<T> const at = gradient_chunk(piece, my, c);
    gradient_inputs(at);
    for (int64_t i = 0; i < piece.blocks * call.states; ++i) {
      int64_t const block = i / call.states, n = i % call.states, here = block * call.chunk * kWide;
      Vec<T> const A = load(piece.A + i * kWide);
      Vec<T> total = load(carry + i * kWide);
      for (int t = at.steps - 1; t >= 0; --t) {
        Vec<T> const C = call.C.constant ? load(piece.C + i * kWide) : splat(piece.row(call.C, at.t0 + t)[n]);
        total = decay_lanes(load(my.s + here + t * kWide) * A) * (total + C * load(my.dy + here + t * kWide));
      }
      store(carry + i * kWide, total);
    }
    for (int64_t i = 0; i < int64_t(piece.blocks) * at.steps; ++i) {
      int64_t const block = i / at.steps, t = i % at.steps;
      store(sum + block * kWide, load(sum + block * kWide) + load(my.s + (block * call.chunk + t) * kWide));
    }
  }
}

template <class T>
bool scan_gradient_split(const ScanCall& call, int threads, int64_t count) {
  ScanSlabs<T> const slabs(call);
  int64_t const chunks = scan_chunks(call), blocks = ScanSlabs<T>::kBlocks;
  auto const border = [&](int64_t segment) { return chunks * segment / count; };
  Segments<T> const segments(slabs.total, count, blocks, call.states);
  int64_t const sums_count = (3 * call.states + 2) * kScanSlab;
  ThreadMemory<double> sums(slabs.total * count * sums_count);
  bool enough_memory = segments.memory.at != nullptr && sums.at != nullptr;
#pragma omp parallel num_threads(threads)
  {
    FlushSubnormals flush;
    GradientScratch<T> my(call, blocks);
    if (!my.complete()) {
#pragma omp atomic write
      enough_memory = false;
    }
#pragma omp barrier
    if (enough_memory) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < slabs.total * count; ++i) {
        int64_t const slab = i / count, k = i % count;
        ScanPiece<T> const piece = slabs.piece(slab, slab + 1, my.constants);
        segment_carry(piece, my, border(k), border(k + 1), segments.state(slab, k), segments.steps(slab, k));
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < slabs.total * count; ++i) {
        int64_t const slab = i / count;
        ScanPiece<T> const piece = slabs.piece(slab, slab + 1, my.constants);
        gradient_start(piece, my.carry);
        for (int64_t k = count - 1; k > i % count; --k) hand_on(piece, segments.state(slab, k), segments.steps(slab, k), my.carry, my.carry);
        memset(my.sums.at, 0, size_t(sums_count) * sizeof(double));
        gradient_piece(piece, my, slab % slabs.per_group, border(i % count), border(i % count + 1));
        memcpy(sums.at + i * sums_count, my.sums.at, size_t(sums_count) * sizeof(double));
      }
#pragma omp for schedule(static)
      for (int64_t slab = 0; slab < slabs.total; ++slab) {
        memset(my.sums.at, 0, size_t(sums_count) * sizeof(double));
        for (int64_t i = 0; i < count * sums_count; ++i) my.sums.at[i % sums_count] += sums.at[slab * count * sums_count + i];
        gradient_totals(slabs.piece(slab, slab + 1, my.constants), my);
      }
    }
  }
  return enough_memory;
}

// A scan or its backward, with time split where that gives idle threads work.
template <class T>
bool scan_any(const ScanCall& call, int threads) {
  if (call.grad.at == nullptr) {
    int64_t const count = scan_segments(ScanBlocks(call, kLanes<T>).total, call.length, threads, 3);
    return count > 1 ? scan_forward_split<T>(call, threads, count) : scan_forward<T>(call, threads);
  }
  int64_t const count = scan_segments(ScanSlabs<T>(call).total, call.length, threads, 2);
  return count > 1 ? scan_gradient_split<T>(call, threads, count) : scan_gradient<T>(call, threads);
}

}  // namespace
}  // namespace medgmae
