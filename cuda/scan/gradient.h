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

// One thread's memory for a backward. Packed: [block][step][lane]; per state: [block][state][lane]; the rest of one state group.
template <class T>
struct GradientScratch {
  static constexpr int kWide = kLanes<T>;
  int64_t packed, per_state, per_block, per_group, sums_count;
  ThreadMemory<T> memory;
  ThreadMemory<double> sums;
  T *s, *x, *dy, *y, *w, *q, *decays, *carry, *part_D, *part_bias, *decay, *state, *sum_B, *sum_C;
  double *dA, *dD, *dbias;

  GradientScratch(const ScanCall& call, int64_t blocks)
      : packed(blocks * call.chunk * kWide),
        per_state(blocks * call.states * kWide),
        per_block(blocks * kWide),
        per_group(call.chunk * kStateGroup * kWide),
        sums_count(per_state + 2 * per_block),
        memory(6 * packed + 2 * per_state + 2 * per_block + 4 * per_group + kStateGroup * kWide),
        sums(sums_count) {
    T* next = memory.at;
    T** const by_step[] = {&s, &x, &dy, &y, &w, &q};
    for (T** one : by_step) *one = next, next += packed;
    decays = next, carry = decays + per_state, part_D = carry + per_state, part_bias = part_D + per_block;
    next = part_bias + per_block;
    T** const by_group[] = {&decay, &state, &sum_B, &sum_C};
    for (T** one : by_group) *one = next, next += per_group + (one == &state) * kStateGroup * kWide;  // and the states before
    dA = sums.at, dD = dA + per_state, dbias = dD + per_block;
  }
  bool complete() const { return memory.at != nullptr && sums.at != nullptr; }
};

// Steps [t0, t0 + steps) of a piece, and the states before them (states, channels of the call), null for zeros.
template <class T>
struct GradientChunk {
  const ScanPiece<T>& piece;
  GradientScratch<T>& my;
  int64_t t0;
  int steps;
  const T* before;
};

template <class T>
inline void add_lanes(double* total, Vec<T> v) {
  for (int i = 0; i < kLanes<T>; ++i) total[i] += double(v[i]);
}

// States [n0, n0 + kGroup) of one block; kFirst: of the first block of its slab, with which the sums begin.
template <class T, int kGroup, bool kFirst>
inline void gradient_block(const GradientChunk<T>& at, int block, int64_t n0) {
  constexpr int kWide = kLanes<T>;
  const GradientScratch<T>& my = at.my;
  const ScanPiece<T>& piece = at.piece;
  const ScanCall& call = piece.call;
  int64_t const own = (int64_t(block) * call.states + n0) * kWide, here = int64_t(block) * call.chunk * kWide;
  // Everything that the loops use in variables of their own: a store could change what a reference leads to.
  int64_t const steps = at.steps, step_B = call.B.step, step_C = call.C.step;
  const T *const rows_B = piece.row(call.B, at.t0) + n0, *const rows_C = piece.row(call.C, at.t0) + n0;
  const T *const s = my.s + here, *const x = my.x + here, *const dy = my.dy + here;
  T *const y = my.y + here, *const w = my.w + here, *const q = my.q + here;
  T *const decay = my.decay, *const before = my.state, *const after = my.state + kGroup * kWide, *const sum_B = my.sum_B, *const sum_C = my.sum_C;
  bool const more = n0 > 0;
  Vec<T> A[kGroup], h[kGroup] = {};
  for (int i = 0; i < kGroup; ++i) {
    A[i] = load(piece.A + own + i * kWide);
    if (at.before) h[i] = load_part(at.before + (n0 + i) * call.channels + piece.first + block * kWide, piece.lanes(block));
    store(before + i * kWide, h[i]);
  }
  for (int64_t t = 0; t < steps; ++t) {
    Vec<T> const st = load(s + t * kWide), xt = load(x + t * kWide);
    Vec<T> yt = more ? load(y + t * kWide) : Vec<T>{};
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i) {
      Vec<T> const B = splat(rows_B[t * step_B + i]), C = splat(rows_C[t * step_C + i]);
      Vec<T> const a = decay_lanes(st * A[i]);
      h[i] = a * h[i] + xt * B;
      yt += h[i] * C;
      store(decay + (t * kGroup + i) * kWide, a);
      store(after + (t * kGroup + i) * kWide, h[i]);
    }
    store(y + t * kWide, yt);
  }
  Vec<T> carry[kGroup], dA[kGroup] = {};
  for (int i = 0; i < kGroup; ++i) carry[i] = load(my.carry + own + i * kWide);
  for (int64_t t = steps - 1; t >= 0; --t) {
    Vec<T> const st = load(s + t * kWide), xt = load(x + t * kWide), dyt = load(dy + t * kWide);
    Vec<T> wt = more ? load(w + t * kWide) : Vec<T>{}, qt = more ? load(q + t * kWide) : Vec<T>{};
#pragma GCC unroll 4
    for (int i = 0; i < kGroup; ++i) {
      Vec<T> const B = splat(rows_B[t * step_B + i]), C = splat(rows_C[t * step_C + i]);
      int64_t const k = (t * kGroup + i) * kWide;
      Vec<T> const g = carry[i] + C * dyt, to_C = h[i] * dyt;
      carry[i] = g * load(decay + k);
      h[i] = load(before + k);  // the state before step t
      Vec<T> const back = carry[i] * h[i];
      wt += g * B;
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
  const ScanCall& call = piece.call;
  scan_steps(piece, at.t0, at.steps, call.chunk, at.my.s, at.my.x);
  for (int t = 0; t < at.steps; ++t) {
    const T* const grad = element<T>(call.grad, piece.b, at.t0 + t, piece.first);
    const T* const z = call.z.at ? element<T>(call.z, piece.b, at.t0 + t, piece.first) : nullptr;
    for (int k = 0; k < piece.blocks; ++k) {
      Vec<T> v = load_part(grad + k * kWide, piece.lanes(k));
      if (z) {
        Vec<T> const gate = load_part(z + k * kWide, piece.lanes(k));
        v *= gate * sigmoid_lanes<T>(gate);
      }
      store(at.my.dy + (int64_t(k) * call.chunk + t) * kWide, v);
    }
  }
}

// du, ddelta and dz of a chunk, row by row, and its part of dD and dbias.
template <class T>
inline void gradient_outputs(const GradientChunk<T>& at) {
  constexpr int kWide = kLanes<T>;
  const ScanPiece<T>& piece = at.piece;
  const ScanCall& call = piece.call;
  const T* const D = call.D ? static_cast<const T*>(call.D) + piece.first : nullptr;
  const T* const bias = call.bias ? static_cast<const T*>(call.bias) + piece.first : nullptr;
  T *const part_D = at.my.part_D, *const part_bias = at.my.part_bias;
  memset(part_D, 0, size_t(2 * at.my.per_block) * sizeof(T));
  for (int t = 0; t < at.steps; ++t) {
    auto const row = [&](const Stream& stream) { return element<T>(stream, piece.b, at.t0 + t, piece.first); };
    for (int k = 0; k < piece.blocks; ++k) {
      int const lanes = piece.lanes(k);
      int64_t const packed = (int64_t(k) * call.chunk + t) * kWide, c = k * kWide;
      Vec<T> const u = load_part(row(call.u) + c, lanes), dy = load(at.my.dy + packed), w = load(at.my.w + packed);
      Vec<T> const skip = D ? load_part(D + c, lanes) : Vec<T>{};
      Vec<T> ds = u * w + load(at.my.q + packed) * (T(1) / kDecayScale<T>);
      if (call.softplus) {
        Vec<T> x = load_part(row(call.delta) + c, lanes);
        if (bias) x += load_part(bias + c, lanes);
        ds = x > T(20) ? ds : ds * sigmoid_lanes<T>(x);
      }
      store_part(row(call.du) + c, skip * dy + load(at.my.s + packed) * w, lanes);
      store_part(row(call.ddelta) + c, ds, lanes);
      store(part_D + c, load(part_D + c) + dy * u);
      store(part_bias + c, load(part_bias + c) + ds);
      if (call.z.at) {
        Vec<T> const z = load_part(row(call.z) + c, lanes), open = sigmoid_lanes<T>(z), grad = load_part(row(call.grad) + c, lanes);
        store_part(row(call.dz) + c, grad * (load(at.my.y + packed) + skip * u) * open * (T(1) + z * (T(1) - open)), lanes);
      }
    }
  }
  for (int64_t i = 0; i < at.my.per_block; ++i) at.my.dD[i] += double(part_D[i]), at.my.dbias[i] += double(part_bias[i]);
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

// Chunk c of a piece.
template <class T>
inline GradientChunk<T> gradient_chunk(const ScanPiece<T>& piece, GradientScratch<T>& my, int64_t c) {
  const ScanCall& call = piece.call;
  int64_t const left = call.length - c * call.chunk, kept = (piece.b * scan_chunks(call) + c - 1) * call.states * call.channels;
  const T* const before = c ? static_cast<const T*>(call.kept) + kept : nullptr;
  return {piece, my, c * call.chunk, int(left < call.chunk ? left : call.chunk), before};
}

// A piece, chunk by chunk from the last, whose first slab has the number `slab` in its group. Takes what comes from behind the
// sequence in my.carry, adds its sums over time to my.sums.
template <class T>
inline void gradient_piece(const ScanPiece<T>& piece, GradientScratch<T>& my, int64_t slab) {
  constexpr int kSlabBlocks = kScanSlab / kLanes<T>;
  int64_t const states = piece.call.states;
  for (int64_t c = scan_chunks(piece.call) - 1; c >= 0; --c) {
    GradientChunk<T> const at = gradient_chunk(piece, my, c);
    gradient_inputs(at);
    for (int k = 0; k < piece.blocks; k += kSlabBlocks) {
      int const behind = k + kSlabBlocks < piece.blocks ? k + kSlabBlocks : piece.blocks;
      int64_t n = 0;
      for (; n + kStateGroup <= states; n += kStateGroup) gradient_group<T, kStateGroup>(at, k, behind, slab + k / kSlabBlocks, n);
      for (; n < states; ++n) gradient_group<T, 1>(at, k, behind, slab + k / kSlabBlocks, n);
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
  int64_t const most = kPieceBlocks / ScanSlabs<T>::kBlocks;
  bool enough_memory = true;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int part = 0; part < threads; ++part) {
    FlushSubnormals flush;
    int64_t const begin = slabs.total * part / threads, end = slabs.total * (part + 1) / threads;
    if (begin == end) continue;
    GradientScratch<T> my(call, kPieceBlocks < slabs.all.per_group ? kPieceBlocks : slabs.all.per_group);
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
