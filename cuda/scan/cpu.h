// The selective scan on the CPU, forward. A vector holds neighbouring channels, so that B and C are broadcasts and nothing is
// summed across lanes. Time goes by in tiles: what depends on one token and channel alone (steps, gate) is computed row by row
// of memory, and packed block by block for the recurrence, which then reads cache lines in order.
#pragma once

#include "tiles.h"

namespace medgmae {
namespace {

constexpr int kTileSteps = 16;        // steps per tile
constexpr int kPieceChannels = 1024;  // most channels that a thread works on at a time: whole rows, where it can
constexpr int kHeldStates = 8;       // of a block, that are in registers at a time

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

// Neighbouring blocks of one batch entry and group. A: their decays times kDecayScale, [block][state][lane]. limit: the largest
// steps whose products with A need no clamping, [block][lane].
template <class T>
struct ScanPiece {
  static constexpr int kWide = kLanes<T>;
  const ScanCall& call;
  int64_t b, group, first;  // first: channel
  int blocks, width;        // width: channels
  T *A, *limit;

  ScanPiece(const ScanCall& call, const ScanBlocks& all, int64_t begin, int blocks, T* decays)
      : call(call),
        b(begin / (all.per_group * call.groups)),
        group(begin / all.per_group % call.groups),
        blocks(blocks),
        A(decays),
        limit(decays + int64_t(blocks) * call.states * kWide) {
    int64_t const inside = begin % all.per_group * kWide, left = all.group_width - inside;
    first = group * all.group_width + inside;
    width = int(left < int64_t(blocks) * kWide ? left : int64_t(blocks) * kWide);
    for (int64_t i = 0; i < int64_t(blocks) * kWide; ++i) {
      const T* row = static_cast<const T*>(call.A) + (first + i) * call.states;
      T most = 0;
      for (int64_t n = 0; n < call.states; ++n) {
        T const a = i < width ? row[n] * kDecayScale<T> : T(0);
        A[(i / kWide * call.states + n) * kWide + i % kWide] = a;
        most = isnan(a) ? a : a > most ? a : -a > most ? -a : most;
      }
      limit[i] = kLargestExponent<T> / most;
    }
  }

  // Numbers in A and limit.
  static int64_t decays(const ScanCall& call, int64_t blocks) { return blocks * (call.states + 1) * kWide; }

  int lanes(int block) const { return width - block * kWide < kWide ? width - block * kWide : kWide; }

  // Row of B or C for step t.
  const T* row(const ScanMatrix& m, int64_t t) const { return static_cast<const T*>(m.at) + b * m.batch + t * m.step + group * m.of_group; }

  // Steps [t0, t0 + steps) of a stream, which may be put into `room`.
  Tile<T> tile(const Stream& s, int64_t t0, int steps, T* room) const {
    return read_tile<T>(element<T>(s, b, t0, first), s, steps, width, room);
  }

  // Has `steps` steps of a block brought to the caches, if rows of memory in order do not do that.
  void prefetch(const Stream& s, int64_t t0, int steps, int block) const {
    if (s.apart == 1 || s.at == nullptr || t0 < 0 || t0 >= call.length) return;
    prefetch_tile<T>(element<T>(s, b, t0, first + block * kWide), s, steps, lanes(block));
  }
};

// Whether no product of steps [step][lane] with the decays of a block needs clamping: the usual case.
template <class T>
inline bool steps_are_bounded(const T* d, int steps, const T* limit) {
  Vec<T> const most = load(limit);
  Mask<T> good = most == most;
  for (int t = 0; t < steps; ++t) {
    Vec<T> const dt = load(d + t * kLanes<T>);
    good &= (dt <= most) & (dt >= -most);
  }
  return all_lanes<T>(good);
}

// States [n0, n0 + kGroup) of one block over `steps` steps: d (steps), x (steps times input) and y, all [step][lane]; the states,
// [state][lane], stay in registers. The first group writes y, the others add to it.
template <class T, int kGroup, bool kBounded>
inline void scan_states(const ScanPiece<T>& piece, int block, int64_t n0, int64_t t0, int steps, const T* d, const T* x, T* y, T* state) {
  constexpr int kWide = kLanes<T>;
  const T* const A = piece.A + (int64_t(block) * piece.call.states + n0) * kWide;
  const T *B = piece.row(piece.call.B, t0) + n0, *C = piece.row(piece.call.C, t0) + n0;
  int64_t const step_B = piece.call.B.step, step_C = piece.call.C.step;
  bool const more = n0 > 0;
  Vec<T> h[kGroup];
  for (int n = 0; n < kGroup; ++n) h[n] = load(state + n * kWide);
  for (int t = 0; t < steps; ++t, B += step_B, C += step_C) {
    Vec<T> const dt = load(d + t * kWide), xt = load(x + t * kWide);
    Vec<T> y2[2] = {more ? load(y + t * kWide) : Vec<T>{}, {}};  // two sums, so that an addition need not wait for the one before
#pragma GCC unroll 8
    for (int n = 0; n < kGroup; ++n) {
      h[n] = decay_lanes<kBounded>(dt * load(A + n * kWide)) * h[n] + xt * splat(B[n]);
      y2[n % 2] += h[n] * splat(C[n]);
    }
    store(y + t * kWide, y2[0] + y2[1]);
  }
  for (int n = 0; n < kGroup; ++n) store(state + n * kWide, h[n]);
}

template <class T, bool kBounded>
inline void scan_block(const ScanPiece<T>& piece, int block, int64_t t0, int steps, const T* d, const T* x, T* y, T* state) {
  int64_t n = 0;
  for (; n + kHeldStates <= piece.call.states; n += kHeldStates) {
    scan_states<T, kHeldStates, kBounded>(piece, block, n, t0, steps, d, x, y, state + n * kLanes<T>);
  }
  for (; n < piece.call.states; ++n) scan_states<T, 1, kBounded>(piece, block, n, t0, steps, d, x, y, state + n * kLanes<T>);
}

// Step sizes and their products with the input, packed: [block][step][lane], `room` steps per block.
template <class T>
inline void scan_steps(const ScanPiece<T>& piece, int steps, const Tile<T>& delta, const Tile<T>& u, int64_t room, T* d, T* x) {
  constexpr int kWide = kLanes<T>;
  const ScanCall& call = piece.call;
  const T* const bias = call.bias ? static_cast<const T*>(call.bias) + piece.first : nullptr;
  for (int t = 0; t < steps; ++t) {
    for (int k = 0; k < piece.blocks; ++k) {
      int const lanes = piece.lanes(k);
      Vec<T> s = delta.load(k, t, lanes);
      if (bias) s += load_part(bias + k * kWide, lanes);
      if (call.softplus) s = softplus_lanes<T>(s);
      int64_t const at = (k * room + t) * kWide;
      store(d + at, s);
      store(x + at, s * u.load(k, t, lanes));
    }
  }
}

// out = (y + D u) silu(z) from packed y.
template <class T>
inline void scan_outputs(const ScanPiece<T>& piece, int64_t t0, int steps, const Tile<T>& u, const Tile<T>& z, const T* y) {
  constexpr int kWide = kLanes<T>;
  const ScanCall& call = piece.call;
  const T* const D = call.D ? static_cast<const T*>(call.D) + piece.first : nullptr;
  for (int t = 0; t < steps; ++t) {
    T* const out = element<T>(call.out, piece.b, t0 + t, piece.first);
    for (int k = 0; k < piece.blocks; ++k) {
      int const lanes = piece.lanes(k);
      Vec<T> v = load(y + (int64_t(k) * kTileSteps + t) * kWide);
      if (D) v += load_part(D + k * kWide, lanes) * u.load(k, t, lanes);
      if (z.at) {
        Vec<T> const gate = z.load(k, t, lanes);
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

// One thread's memory for a forward. Packed: [block][step][lane]; turned: the same of streams that have to be turned round.
template <class T>
struct ScanScratch {
  int64_t packed, per_state;
  ThreadMemory<T> memory;
  T *d, *x, *y, *turned_u, *turned, *state, *decays;
  ScanScratch(const ScanCall& call, int64_t blocks)
      : packed(blocks * kTileSteps * kLanes<T>),
        per_state(blocks * call.states * kLanes<T>),
        memory(5 * packed + per_state + ScanPiece<T>::decays(call, blocks)) {
    T* next = memory.at;
    T** const by_step[] = {&d, &x, &y, &turned_u, &turned};
    for (T** one : by_step) *one = next, next += packed;
    state = next, decays = state + per_state;
  }
};

// Scans a piece from my.state, which it changes.
template <class T>
inline void scan_piece(const ScanPiece<T>& piece, ScanScratch<T>& my) {
  constexpr int kWide = kLanes<T>;
  const ScanCall& call = piece.call;
  const Stream* const inputs[] = {&call.u, &call.delta, &call.z};
  for (int64_t t = 0, next; t < call.length; t = next) {
    int64_t const border = (t / call.chunk + 1) * call.chunk;
    next = t + kTileSteps < border ? t + kTileSteps : border;
    next = next < call.length ? next : call.length;
    int const steps = int(next - t);
    Tile<T> const u = piece.tile(call.u, t, steps, my.turned_u);
    scan_steps(piece, steps, piece.tile(call.delta, t, steps, my.turned), u, kTileSteps, my.d, my.x);
    for (int k = 0; k < piece.blocks; ++k) {
      for (const Stream* s : inputs) piece.prefetch(*s, next, kTileSteps, k);
      int64_t const at = int64_t(k) * kTileSteps * kWide;
      T* const state = my.state + int64_t(k) * call.states * kWide;
      bool const bounded = steps_are_bounded(my.d + at, steps, piece.limit + k * kWide);
      auto const scan = bounded ? scan_block<T, true> : scan_block<T, false>;
      scan(piece, k, t, steps, my.d + at, my.x + at, my.y + at, state);
    }
    scan_outputs(piece, t, steps, u, call.z.at ? piece.tile(call.z, t, steps, my.turned) : Tile<T>{}, my.y);
    if (next == border || next == call.length) keep_states(piece, t / call.chunk, my.state);
  }
}

// Every thread scans a run of blocks; what a block gives does not depend on the threads.
template <class T>
bool scan_forward(const ScanCall& call, int threads) {
  constexpr int kWide = kLanes<T>;
  ScanBlocks const all(call, kWide);
  int64_t const most = kPieceChannels / kWide < all.per_group ? kPieceChannels / kWide : all.per_group;
  bool enough_memory = true;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int part = 0; part < threads; ++part) {
    FlushSubnormals flush;
    ScanScratch<T> my(call, most);
    if (my.memory.at == nullptr) {
#pragma omp atomic write
      enough_memory = false;
      continue;
    }
    int64_t const last = all.total * (part + 1) / threads;
    for (int64_t begin = all.total * part / threads, next; begin < last; begin = next) {
      next = (begin / all.per_group + 1) * all.per_group;
      next = next < last ? next : last;
      next = next < begin + most ? next : begin + most;
      ScanPiece<T> const piece(call, all, begin, int(next - begin), my.decays);
      memset(my.state, 0, size_t(my.per_state) * sizeof(T));
      scan_piece(piece, my);
    }
  }
  return enough_memory;
}

}  // namespace
}  // namespace medgmae
