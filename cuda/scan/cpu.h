// The selective scan on the CPU, forward. A vector holds neighbouring channels, so that B and C are broadcasts and nothing is
// summed across lanes. Time goes by in tiles: what depends on one token and channel alone (steps, gate) is computed row by row
// of memory, and packed block by block for the recurrence, which then reads cache lines in order.
#pragma once

#include "../cpu_memory.h"
#include "../lanes.h"
#include "scan.h"

namespace medgmae {
namespace {

constexpr int kTileSteps = 32;    // steps per tile
constexpr int kPieceBlocks = 64;  // most vectors of channels that a thread works on at a time: whole rows, where it can

// Vectors of channels, none of which holds channels of two groups.
struct ScanBlocks {
  int64_t per_group, total;
  int lanes;
  int64_t group_width;
  ScanBlocks(const ScanCall& call, int lanes)
      : per_group((call.channels / call.groups + lanes - 1) / lanes),
        total(call.batch * call.groups * per_group),
        lanes(lanes),
        group_width(call.channels / call.groups) {}
};

// Neighbouring blocks of one batch entry and group, and their decays: A, times kDecayScale, as [block][state][lane].
template <class T>
struct ScanPiece {
  static constexpr int kWide = kLanes<T>;
  const ScanCall& call;
  int64_t b, group, first;  // first: channel
  int blocks, width;        // width: channels
  T* A;

  ScanPiece(const ScanCall& call, const ScanBlocks& all, int64_t begin, int blocks, T* decays)
      : call(call), b(begin / (all.per_group * call.groups)), group(begin / all.per_group % call.groups), blocks(blocks), A(decays) {
    int64_t const inside = begin % all.per_group * kWide, left = all.group_width - inside;
    first = group * all.group_width + inside;
    width = int(left < int64_t(blocks) * kWide ? left : int64_t(blocks) * kWide);
    for (int64_t i = 0; i < int64_t(blocks) * kWide; ++i) {
      const T* row = static_cast<const T*>(call.A) + (first + i) * call.states;
      for (int64_t n = 0; n < call.states; ++n) A[(i / kWide * call.states + n) * kWide + i % kWide] = i < width ? row[n] * kDecayScale<T> : T(0);
    }
  }

  int lanes(int block) const { return width - block * kWide < kWide ? width - block * kWide : kWide; }

  // Row of B or C for step t.
  const T* row(const ScanMatrix& m, int64_t t) const { return static_cast<const T*>(m.at) + b * m.batch + t * m.step + group * m.of_group; }
};

// The recurrence of one block over `steps` steps: d (steps), x (steps times input) and y, all [step][lane]; h [state][lane].
// kStates: the number of states if it is known, so that they stay in registers, else 0.
template <class T, int kStates>
inline void scan_block(const ScanPiece<T>& piece, int block, int64_t t0, int steps, const T* d, const T* x, T* y, T* state) {
  constexpr int kWide = kLanes<T>;
  int64_t const states = kStates ? kStates : piece.call.states;
  const T* const A = piece.A + int64_t(block) * piece.call.states * kWide;
  Vec<T> held[kStates ? kStates : 1];
  for (int n = 0; n < kStates; ++n) held[n] = load(state + n * kWide);
  for (int t = 0; t < steps; ++t) {
    const T *const B = piece.row(piece.call.B, t0 + t), *const C = piece.row(piece.call.C, t0 + t);
    Vec<T> const dt = load(d + t * kWide), xt = load(x + t * kWide);
    Vec<T> y2[2] = {};  // two sums, so that an addition need not wait for the one before
#pragma GCC unroll 16
    for (int64_t n = 0; n < states; ++n) {
      Vec<T> const before = kStates ? held[kStates ? n : 0] : load(state + n * kWide);
      Vec<T> const h = decay_lanes(dt * load(A + n * kWide)) * before + xt * splat(B[n]);
      if constexpr (kStates) held[n] = h;
      else store(state + n * kWide, h);
      y2[n % 2] += h * splat(C[n]);
    }
    store(y + t * kWide, y2[0] + y2[1]);
  }
  for (int n = 0; n < kStates; ++n) store(state + n * kWide, held[n]);
}

template <class T>
inline void scan_any_block(const ScanPiece<T>& piece, int block, int64_t t0, int steps, const T* d, const T* x, T* y, T* state) {
  if (piece.call.states == 16) return scan_block<T, 16>(piece, block, t0, steps, d, x, y, state);
  scan_block<T, 0>(piece, block, t0, steps, d, x, y, state);
}

// Step sizes and their products with the input, packed: [block][step][lane], `room` steps per block.
template <class T>
inline void scan_steps(const ScanPiece<T>& piece, int64_t t0, int steps, int64_t room, T* d, T* x) {
  constexpr int kWide = kLanes<T>;
  const ScanCall& call = piece.call;
  const T* const bias = call.bias ? static_cast<const T*>(call.bias) + piece.first : nullptr;
  for (int t = 0; t < steps; ++t) {
    const T* const delta = element<T>(call.delta, piece.b, t0 + t, piece.first);
    const T* const u = element<T>(call.u, piece.b, t0 + t, piece.first);
    for (int k = 0; k < piece.blocks; ++k) {
      int const lanes = piece.lanes(k);
      Vec<T> s = load_part(delta + k * kWide, lanes);
      if (bias) s += load_part(bias + k * kWide, lanes);
      if (call.softplus) s = softplus_lanes<T>(s);
      int64_t const at = (k * room + t) * kWide;
      store(d + at, s);
      store(x + at, s * load_part(u + k * kWide, lanes));
    }
  }
}

// out = (y + D u) silu(z) from packed y.
template <class T>
inline void scan_outputs(const ScanPiece<T>& piece, int64_t t0, int steps, const T* y) {
  constexpr int kWide = kLanes<T>;
  const ScanCall& call = piece.call;
  const T* const D = call.D ? static_cast<const T*>(call.D) + piece.first : nullptr;
  for (int t = 0; t < steps; ++t) {
    const T* const u = element<T>(call.u, piece.b, t0 + t, piece.first);
    const T* const z = call.z.at ? element<T>(call.z, piece.b, t0 + t, piece.first) : nullptr;
    T* const out = element<T>(call.out, piece.b, t0 + t, piece.first);
    for (int k = 0; k < piece.blocks; ++k) {
      int const lanes = piece.lanes(k);
      Vec<T> v = load(y + (int64_t(k) * kTileSteps + t) * kWide);
      if (D) v += load_part(D + k * kWide, lanes) * load_part(u + k * kWide, lanes);
      if (z) {
        Vec<T> const gate = load_part(z + k * kWide, lanes);
        v *= gate * sigmoid_lanes<T>(gate);
      }
      store_part(out + k * kWide, v, lanes);
    }
  }
}

// Keeps the packed states of a piece as the states after chunk c: (batch, chunks, states, channels).
template <class T>
inline void keep_states(const ScanPiece<T>& piece, int64_t c, const T* state) {
  const ScanCall& call = piece.call;
  T* const to = static_cast<T*>(call.kept) + (piece.b * scan_chunks(call) + c) * call.states * call.channels + piece.first;
  for (int k = 0; k < piece.blocks; ++k) {
    for (int64_t n = 0; n < call.states; ++n) {
      Vec<T> const v = load(state + (int64_t(k) * call.states + n) * kLanes<T>);
      store_part(to + n * call.channels + k * kLanes<T>, v, piece.lanes(k));
    }
  }
}

// Scans a piece from `state`, which it changes.
template <class T>
inline void scan_piece(const ScanPiece<T>& piece, T* state, T* d, T* x) {
  constexpr int kWide = kLanes<T>;
  const ScanCall& call = piece.call;
  for (int64_t t = 0, next; t < call.length; t = next) {
    int64_t const border = (t / call.chunk + 1) * call.chunk;
    next = t + kTileSteps < border ? t + kTileSteps : border;
    next = next < call.length ? next : call.length;
    int const steps = int(next - t);
    scan_steps(piece, t, steps, kTileSteps, d, x);
    for (int k = 0; k < piece.blocks; ++k) {
      int64_t const at = int64_t(k) * kTileSteps * kWide;
      scan_any_block(piece, k, t, steps, d + at, x + at, x + at, state + int64_t(k) * call.states * kWide);  // y takes the place of x
    }
    scan_outputs(piece, t, steps, x);
    if (next == border || next == call.length) keep_states(piece, t / call.chunk, state);
  }
}

// Every thread scans a run of blocks; what a block gives does not depend on the threads.
template <class T>
bool scan_forward(const ScanCall& call, int threads) {
  constexpr int kWide = kLanes<T>;
  ScanBlocks const all(call, kWide);
  bool enough_memory = true;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int part = 0; part < threads; ++part) {
    FlushSubnormals flush;
    int64_t const packed = int64_t(kPieceBlocks) * kTileSteps * kWide, kept = int64_t(kPieceBlocks) * call.states * kWide;
    ThreadMemory<T> memory(2 * packed + 2 * kept);
    if (memory.at == nullptr) {
#pragma omp atomic write
      enough_memory = false;
      continue;
    }
    T *const d = memory.at, *const x = d + packed, *const state = x + packed, *const decays = state + kept;
    int64_t const last = all.total * (part + 1) / threads;
    for (int64_t begin = all.total * part / threads, next; begin < last; begin = next) {
      next = (begin / all.per_group + 1) * all.per_group;
      next = next < last ? next : last;
      next = next < begin + kPieceBlocks ? next : begin + kPieceBlocks;
      ScanPiece<T> const piece(call, all, begin, int(next - begin), decays);
      memset(state, 0, size_t(kept) * sizeof(T));
      scan_piece(piece, state, d, x);
    }
  }
  return enough_memory;
}

}  // namespace
}  // namespace medgmae
