// The selective scan on the CPU, backward. Chunks of time are taken from the last to the first: the states inside a chunk are
// computed again from the ones kept before it, and the gradient walks back over them.
//
//   g = C dy + a' g'    w = g . B    q = (a g) (h before)      a', g': those of the step after
//   du = D dy + s w     ds = u w + q . A     dA = sum q s     dB = sum over channels of g s u     dC = sum over channels of h dy
//
// States go in small groups, and channels in slabs: what a group keeps of a chunk, and its sums for B and C over a slab, stay in
// the first cache. Sums over time are made per chunk and added up in double precision; sums over slabs are left to the caller.
#pragma once

#include "cpu.h"

namespace medgmae {
namespace {

constexpr int kStateGroup = 4;

// One thread's memory for a backward. Packed: [block][step][lane], the turned ones for streams that have to be turned round; per
// state: [block][state][lane]; the rest of one state group of a block: [step][state][lane].
template <class T>
struct GradientScratch {
  static constexpr int kWide = kLanes<T>;
  int64_t packed, per_state, per_block, per_group, sums_count;
  ThreadMemory<T> memory;
  ThreadMemory<double> sums;
  T *s, *x, *dy, *y, *w, *q, *turned_u, *turned_delta, *turned_z, *turned_grad;
  T *decay, *state, *sum_B, *sum_C, *part_D, *part_bias, *carry, *decays;
  double *dA, *dD, *dbias;

  GradientScratch(const ScanCall& call, int64_t blocks)
      : packed(blocks * call.chunk * kWide),
        per_state(blocks * call.states * kWide),
        per_block(blocks * kWide),
        per_group(call.chunk * kStateGroup * kWide),
        sums_count(per_state + 2 * per_block),
        memory(10 * packed + 4 * per_group + kStateGroup * kWide + 2 * per_block + per_state + ScanPiece<T>::decays(call, blocks)),
        sums(sums_count) {
    T* next = memory.at;
    T** const by_step[] = {&s, &x, &dy, &y, &w, &q, &turned_u, &turned_delta, &turned_z, &turned_grad};
    T** const by_group[] = {&decay, &state, &sum_B, &sum_C};
    for (T** one : by_step) *one = next, next += packed;
    for (T** one : by_group) *one = next, next += per_group + (one == &state) * kStateGroup * kWide;  // and the states before
    part_D = next, part_bias = part_D + per_block, carry = part_bias + per_block, decays = carry + per_state;
    dA = sums.at, dD = dA + per_state, dbias = dD + per_block;
  }
  bool complete() const { return memory.at != nullptr && sums.at != nullptr; }
};

// Chunk c of a piece: steps [t0, t0 + steps), and the states before them (states, channels of the call), null for zeros.
template <class T>
struct GradientChunk {
  const ScanPiece<T>& piece;
  const GradientScratch<T>& my;
  int64_t t0;
  int steps;
  const T* before;
  Tile<T> u, delta, z, grad;

  GradientChunk(const ScanPiece<T>& piece, const GradientScratch<T>& my, int64_t c) : piece(piece), my(my), t0(c * piece.call.chunk) {
    const ScanCall& call = piece.call;
    int64_t const left = call.length - t0, kept = (piece.b * scan_chunks(call) + c - 1) * call.states * call.channels;
    steps = int(left < call.chunk ? left : call.chunk);
    before = c ? static_cast<const T*>(call.kept) + kept : nullptr;
    u = piece.tile(call.u, t0, steps, my.turned_u), delta = piece.tile(call.delta, t0, steps, my.turned_delta);
    z = call.z.at ? piece.tile(call.z, t0, steps, my.turned_z) : Tile<T>{};
    grad = piece.tile(call.grad, t0, steps, my.turned_grad);
  }
};

template <class T>
inline void add_lanes(double* total, Vec<T> v) {
  for (int i = 0; i < kLanes<T>; ++i) total[i] += double(v[i]);
}

// The way there of states [n0, n0 + kGroup) of one block: decays, states and what they add to y.
template <class T, int kGroup, bool kBounded>
inline void gradient_there(const GradientChunk<T>& at, int block, int64_t n0, Vec<T>* h) {
  constexpr int kWide = kLanes<T>;
  const GradientScratch<T>& my = at.my;
  const ScanPiece<T>& piece = at.piece;
  const ScanCall& call = piece.call;
  int64_t const here = int64_t(block) * call.chunk * kWide, step_B = call.B.step, step_C = call.C.step;
  const T *B = piece.row(call.B, at.t0) + n0, *C = piece.row(call.C, at.t0) + n0;
  const T *const s = my.s + here, *const x = my.x + here;
  T *const y = my.y + here, *const decay = my.decay, *const after = my.state + kGroup * kWide;
  int const steps = at.steps;
  bool const more = n0 > 0;
  Vec<T> A[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    A[i] = load(piece.A + (block * call.states + n0 + i) * kWide);
    h[i] = at.before ? load_part(at.before + (n0 + i) * call.channels + piece.first + block * kWide, piece.lanes(block)) : Vec<T>{};
    store(my.state + i * kWide, h[i]);
  }
  for (int t = 0; t < steps; ++t, B += step_B, C += step_C) {
    Vec<T> const st = load(s + t * kWide), xt = load(x + t * kWide);
    Vec<T> yt = more ? load(y + t * kWide) : Vec<T>{};
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i) {
      Vec<T> const a = decay_lanes<kBounded>(st * A[i]);
      h[i] = a * h[i] + xt * splat(B[i]);
      yt += h[i] * splat(C[i]);
      store(decay + (t * kGroup + i) * kWide, a);
      store(after + (t * kGroup + i) * kWide, h[i]);
    }
    store(y + t * kWide, yt);
  }
}

// The way back, from the states after the last step; kFirst: of the first block of its slab, with which the sums of B and C begin.
template <class T, int kGroup, bool kFirst>
inline void gradient_back(const GradientChunk<T>& at, int block, int64_t n0, Vec<T>* h) {
  constexpr int kWide = kLanes<T>;
  const GradientScratch<T>& my = at.my;
  const ScanPiece<T>& piece = at.piece;
  const ScanCall& call = piece.call;
  int64_t const own = (block * call.states + n0) * kWide;
  int64_t const here = int64_t(block) * call.chunk * kWide, step_B = call.B.step, step_C = call.C.step;
  const T *B = piece.row(call.B, at.t0 + at.steps - 1) + n0, *C = piece.row(call.C, at.t0 + at.steps - 1) + n0;
  const T *const s = my.s + here, *const x = my.x + here, *const dy = my.dy + here, *const decay = my.decay, *const before = my.state;
  T *const w = my.w + here, *const q = my.q + here, *const sum_B = my.sum_B, *const sum_C = my.sum_C;
  bool const more = n0 > 0;
  Vec<T> A[kGroup], carry[kGroup], dA[kGroup] = {};
  for (int i = 0; i < kGroup; ++i) A[i] = load(piece.A + own + i * kWide), carry[i] = load(my.carry + own + i * kWide);
  for (int t = at.steps - 1; t >= 0; --t, B -= step_B, C -= step_C) {
    Vec<T> const st = load(s + t * kWide), xt = load(x + t * kWide), dyt = load(dy + t * kWide);
    Vec<T> wt = more ? load(w + t * kWide) : Vec<T>{}, qt = more ? load(q + t * kWide) : Vec<T>{};
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i) {
      int64_t const k = (t * kGroup + i) * kWide;
      Vec<T> const g = carry[i] + splat(C[i]) * dyt, to_C = h[i] * dyt;
      carry[i] = g * load(decay + k);
      h[i] = load(before + k);  // the state before step t
      Vec<T> const back = carry[i] * h[i];
      wt += g * splat(B[i]);
      qt += back * A[i];
      dA[i] += back * st;
      store(sum_B + k, kFirst ? g * xt : load(sum_B + k) + g * xt);
      store(sum_C + k, kFirst ? to_C : load(sum_C + k) + to_C);
    }
    store(w + t * kWide, wt);
    store(q + t * kWide, qt);
  }
  for (int i = 0; i < kGroup; ++i) {
    store(my.carry + own + i * kWide, carry[i]);
    add_lanes<T>(my.dA + own + i * kWide, dA[i]);
  }
}

template <class T, int kGroup, bool kFirst>
inline void gradient_block(const GradientChunk<T>& at, int block, int64_t n0) {
  Vec<T> h[kGroup];
  if (steps_are_bounded(at.my.s + int64_t(block) * at.piece.call.chunk * kLanes<T>, at.steps, at.piece.limit + block * kLanes<T>)) {
    gradient_there<T, kGroup, true>(at, block, n0, h);
  } else {
    gradient_there<T, kGroup, false>(at, block, n0, h);
  }
  gradient_back<T, kGroup, kFirst>(at, block, n0, h);
}

// Sums over the lanes of vectors [step][state of the group]: to[step * apart + state].
template <class T, int kGroup>
inline void gradient_sums(const T* vectors, int steps, T* to, int64_t apart) {
  constexpr int kWide = kLanes<T>, kRun = kGroup < kWide ? kGroup : kWide;  // powers of two: a run never ends inside a vector
  for (int first = 0; first < steps * kGroup; first += kWide) {
    int const left = steps * kGroup - first, count = left < kWide ? left : kWide;
    Vec<T> v[kWide];
    for (int i = 0; i < kWide; ++i) v[i] = i < count ? load(vectors + (first + i) * kWide) : Vec<T>{};
    sums<T>(v);
    T lanes[kWide];
    store(lanes, v[0]);
    for (int i = 0; i < count; i += kRun) memcpy(to + (first + i) / kGroup * apart + (first + i) % kGroup, lanes + i, kRun * sizeof(T));
  }
}

// Has what blocks [begin, end) read of the chunk before this one brought to the caches.
template <class T>
inline void gradient_prefetch(const GradientChunk<T>& at, int begin, int end) {
  const ScanCall& call = at.piece.call;
  const Stream* const inputs[] = {&call.u, &call.delta, &call.z, &call.grad};
  for (const Stream* s : inputs) {
    for (int k = begin; k < end; ++k) at.piece.prefetch(*s, at.t0 - call.chunk, int(call.chunk), k);
  }
}

// A group of states of a slab: blocks [begin, end), whose partial sums of B and C have the number `part`.
template <class T, int kGroup>
inline void gradient_group(const GradientChunk<T>& at, int begin, int end, int64_t part, int64_t n0) {
  const ScanCall& call = at.piece.call;
  gradient_block<T, kGroup, true>(at, begin, n0);
  for (int k = begin + 1; k < end; ++k) gradient_block<T, kGroup, false>(at, k, n0);
  int64_t const apart = call.groups * call.states;
  int64_t const row = (((part * call.batch + at.piece.b) * call.length + at.t0) * call.groups + at.piece.group) * call.states + n0;
  gradient_sums<T, kGroup>(at.my.sum_B, at.steps, static_cast<T*>(call.dB) + row, apart);
  gradient_sums<T, kGroup>(at.my.sum_C, at.steps, static_cast<T*>(call.dC) + row, apart);
}

// s, x and dy of a chunk, packed, row by row.
template <class T>
inline void gradient_inputs(const GradientChunk<T>& at) {
  constexpr int kWide = kLanes<T>;
  const ScanPiece<T>& piece = at.piece;
  scan_steps(piece, at.steps, at.delta, at.u, piece.call.chunk, at.my.s, at.my.x);
  for (int t = 0; t < at.steps; ++t) {
    for (int k = 0; k < piece.blocks; ++k) {
      int const lanes = piece.lanes(k);
      Vec<T> v = at.grad.load(k, t, lanes);
      if (at.z.at) {
        Vec<T> const gate = at.z.load(k, t, lanes);
        v *= gate * sigmoid_lanes<T>(gate);
      }
      store(at.my.dy + (int64_t(k) * piece.call.chunk + t) * kWide, v);
    }
  }
}

// du, ddelta and dz of a chunk, row by row, and its part of dD and dbias.
template <class T>
inline void gradient_outputs(const GradientChunk<T>& at) {
  constexpr int kWide = kLanes<T>;
  const ScanPiece<T>& piece = at.piece;
  const ScanCall& call = piece.call;
  const GradientScratch<T>& my = at.my;
  const T* const D = call.D ? static_cast<const T*>(call.D) + piece.first : nullptr;
  const T* const bias = call.bias ? static_cast<const T*>(call.bias) + piece.first : nullptr;
  memset(my.part_D, 0, size_t(2 * my.per_block) * sizeof(T));
  for (int t = 0; t < at.steps; ++t) {
    auto const row = [&](const Stream& stream) { return element<T>(stream, piece.b, at.t0 + t, piece.first); };
    for (int k = 0; k < piece.blocks; ++k) {
      int const lanes = piece.lanes(k);
      int64_t const packed = (int64_t(k) * call.chunk + t) * kWide, c = k * kWide;
      Vec<T> const u = at.u.load(k, t, lanes), dy = load(my.dy + packed), w = load(my.w + packed);
      Vec<T> const skip = D ? load_part(D + c, lanes) : Vec<T>{};
      Vec<T> ds = u * w + load(my.q + packed) * (T(1) / kDecayScale<T>);
      if (call.softplus) {
        Vec<T> x = at.delta.load(k, t, lanes);
        if (bias) x += load_part(bias + c, lanes);
        ds = x > T(20) ? ds : ds * sigmoid_lanes<T>(x);
      }
      store_part(row(call.du) + c, skip * dy + load(my.s + packed) * w, lanes);
      store_part(row(call.ddelta) + c, ds, lanes);
      store(my.part_D + c, load(my.part_D + c) + dy * u);
      store(my.part_bias + c, load(my.part_bias + c) + ds);
      if (at.z.at) {
        Vec<T> const z = at.z.load(k, t, lanes), open = sigmoid_lanes<T>(z), grad = at.grad.load(k, t, lanes);
        store_part(row(call.dz) + c, grad * (load(my.y + packed) + skip * u) * open * (T(1) + z * (T(1) - open)), lanes);
      }
    }
  }
  for (int64_t i = 0; i < my.per_block; ++i) my.dD[i] += double(my.part_D[i]), my.dbias[i] += double(my.part_bias[i]);
}

// Writes the sums over time of a piece: (batch, channels, states) and (batch, channels).
template <class T>
inline void gradient_totals(const ScanPiece<T>& piece, const GradientScratch<T>& my) {
  constexpr int kWide = kLanes<T>;
  const ScanCall& call = piece.call;
  int64_t const channel = piece.b * call.channels + piece.first;
  for (int64_t i = 0; i < piece.width; ++i) {
    for (int64_t n = 0; n < call.states; ++n) {
      int64_t const from = (i / kWide * call.states + n) * kWide + i % kWide, to = (channel + i) * call.states + n;
      static_cast<T*>(call.dA)[to] = T(my.dA[from]);
    }
    if (call.dD) static_cast<T*>(call.dD)[channel + i] = T(my.dD[i]);
    if (call.dbias) static_cast<T*>(call.dbias)[channel + i] = T(my.dbias[i]);
  }
}

// What the states of a piece get from behind the last step: nothing, or the gradient of the last state.
template <class T>
inline void gradient_start(const ScanPiece<T>& piece, T* carry) {
  constexpr int kWide = kLanes<T>;
  const ScanCall& call = piece.call;
  const T* const later = call.grad_state ? static_cast<const T*>(call.grad_state) + piece.b * call.states * call.channels : nullptr;
  for (int64_t i = 0; i < int64_t(piece.blocks) * call.states; ++i) {
    int const block = int(i / call.states);
    const T* const from = later + i % call.states * call.channels + piece.first + block * kWide;
    store(carry + i * kWide, later ? load_part(from, piece.lanes(block)) : Vec<T>{});
  }
}

// A piece, chunk by chunk from the last, whose first slab has the number `number` in its group. Takes what comes from behind the
// sequence in my.carry, adds its sums over time to my.sums.
template <class T>
inline void gradient_piece(const ScanPiece<T>& piece, const GradientScratch<T>& my, int64_t number) {
  constexpr int kSlabBlocks = kScanSlab / kLanes<T>;
  int64_t const states = piece.call.states;
  for (int64_t c = scan_chunks(piece.call) - 1; c >= 0; --c) {
    GradientChunk<T> const at(piece, my, c);
    gradient_inputs(at);
    for (int k = 0; k < piece.blocks; k += kSlabBlocks) {
      int const behind = k + kSlabBlocks < piece.blocks ? k + kSlabBlocks : piece.blocks;
      int64_t n = 0;
      for (; n + kStateGroup <= states; n += kStateGroup) gradient_group<T, kStateGroup>(at, k, behind, number + k / kSlabBlocks, n);
      for (; n < states; ++n) gradient_group<T, 1>(at, k, behind, number + k / kSlabBlocks, n);
      gradient_prefetch(at, k, behind);
    }
    gradient_outputs(at);
  }
}

// Slabs of all batch entries and groups, numbered through.
template <class T>
struct ScanSlabs {
  static constexpr int kBlocks = kScanSlab / kLanes<T>;
  const ScanCall& call;
  ScanBlocks all;
  int64_t per_group, total;
  explicit ScanSlabs(const ScanCall& call)
      : call(call), all(call, kLanes<T>), per_group(scan_slabs(call)), total(call.batch * call.groups * per_group) {}

  // Slabs [begin, end), all of one group.
  ScanPiece<T> piece(int64_t begin, int64_t end, T* decays) const {
    int64_t const first = begin % per_group * kBlocks, left = all.per_group - first, blocks = (end - begin) * kBlocks;
    return ScanPiece<T>(call, all, begin / per_group * all.per_group + first, int(blocks < left ? blocks : left), decays);
  }
};

// Every thread takes a run of slabs; what a slab gives does not depend on the threads.
template <class T>
bool scan_gradient(const ScanCall& call, int threads) {
  ScanSlabs<T> const slabs(call);
  int64_t const most = kPieceChannels / kScanSlab;
  bool enough_memory = true;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int part = 0; part < threads; ++part) {
    FlushSubnormals flush;
    int64_t const begin = slabs.total * part / threads, end = slabs.total * (part + 1) / threads;
    if (begin == end) continue;
    int64_t const blocks = kPieceChannels / kLanes<T>;
    GradientScratch<T> const my(call, blocks < slabs.all.per_group ? blocks : slabs.all.per_group);
    if (!my.complete()) {
#pragma omp atomic write
      enough_memory = false;
      continue;
    }
    for (int64_t slab = begin, next; slab < end; slab = next) {
      next = (slab / slabs.per_group + 1) * slabs.per_group;
      next = next < end ? next : end;
      next = next < slab + most ? next : slab + most;
      ScanPiece<T> const piece = slabs.piece(slab, next, my.decays);
      gradient_start(piece, my.carry);
      memset(my.sums.at, 0, size_t(my.sums_count) * sizeof(double));
      gradient_piece(piece, my, slab % slabs.per_group);
      gradient_totals(piece, my);
    }
  }
  return enough_memory;
}

}  // namespace
}  // namespace medgmae
