// The selective scan on CUDA as programs of thread blocks, in the way of cuda/voxel/blocks.h: the forward, and what forward and
// backward share. cuda/scan/gradient_blocks.h has the backward.
//
// Four lanes compute the states of a few neighbouring channels, 4 states each: what they read of B and C serves all their
// channels, what they read of a channel all their states, and sums over states are two exchanges between lanes. A launch
// computes 16 states of every channel; more states take more launches, whose sums meet in memory.
//
// Time is cut into spans, so that a short batch of few channels fills the device:
//   local    what every span makes of a state of zero, and the sum of its steps: the span's decay is exp(A sum)
//   combine  the states that the spans start from, span by span
//   outputs  the scan proper, every span from its own start
// One span needs no more than the last. A span is read tile by tile; what belongs to one token and channel alone is computed
// when a tile is loaded and when it is finished, by one thread for each.
//
// Besides block.each (a phase with a barrier behind it) there are block.lanes (without), block.meet (only the barrier) and
// block.fold (an exchange inside a warp). No two threads write the same number, and every sum has its order.
#pragma once

#include "../half.h"
#include "work.h"

namespace medgmae {

constexpr double kLog2 = 0.69314718055994530942;

template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Pack {
  T v[kCount];
};

// A number of a stream, if it is there.
template <class T, class IO>
MEDGMAE_DEVICE T read(const IO* at, bool there) {
  IO number = {};
  if (there) number = *at;
  return T(widen(number));
}

// The size of a step, 0 where there is none. Not by a branch around the load: those of several steps are to be on their way at once.
template <class T, class IO>
MEDGMAE_DEVICE T step_size(const ScanCall& call, const IO* delta, T bias, bool there) {
  T const number = read<T>(delta, there), nothing = call.softplus ? T(-1000) : T(0), x = there ? number + bias : nothing;
  T const smooth = softplus(x);
  return call.softplus ? smooth : x;
}

// A channel of a stream, from one step on.
template <class IO>
MEDGMAE_DEVICE IO* column(const Stream& s, int b, int step, int channel) {
  return static_cast<IO*>(s.at) + b * s.batch + int64_t(step) * int(s.step) + channel;
}

template <class T>
MEDGMAE_DEVICE T parameter(const void* of_channels, int channel) {
  return of_channels == nullptr ? T(0) : static_cast<const T*>(of_channels)[channel];
}

// What every thread has of the states of its channels: numbers of the channels' own.
template <class T, int kWide>
struct ScanLane {
  T A[kWide][4];  // times log2(e)
  T h[kWide][4];
  T part[4];
  T sum;
};

template <class T, int kWide>
struct ScanShared {
  using Row = Pack<T, kWide>[kScanThreads<T> / 4];
  Row s[kTile], in[kTile], y[kTile], u[kTile], gate[kTile];
  Pack<T, 4> B[kTile][4], C[kTile][4];
};

// The thread's own number of an array (channels, states), and whether it has one.
template <class T, int kWide>
MEDGMAE_DEVICE bool own_state(const ScanCall& call, const ScanWork& work, const ScanPlace& p, int t, int w, int n, int* channel,
                              int* state) {
  int const c = t / 4 * kWide + w;
  *channel = p.first + c, *state = int(work.first_state) + t % 4 * 4 + n;
  return c < p.channels && *state < call.states;
}

// A such that a step's decay is a power of two; an infinite one such that a step of 0 still decays nothing.
template <class T>
MEDGMAE_DEVICE T decay_rate(T A) {
  T const lowest = sizeof(T) == 4 ? T(-3.4028234e38) : T(-1.7976931348623157e308), rate = T(double(A) * (1 / kLog2));
  return rate < lowest ? lowest : rate;
}

template <class T, int kWide, class Lane>
MEDGMAE_DEVICE void load_decays(const ScanCall& call, const ScanWork& work, const ScanPlace& p, int t, Lane* own) {
#pragma unroll
  for (int w = 0; w < kWide; ++w) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      int channel, state;
      bool const there = own_state<T, kWide>(call, work, p, t, w, n, &channel, &state);
      int64_t const at = int64_t(channel) * call.states + state;
      own->A[w][n] = there ? decay_rate(static_cast<const T*>(call.A)[at]) : T(0);
    }
  }
}

template <class T, int kWide>
MEDGMAE_DEVICE void clear_states(T (*states)[4]) {
#pragma unroll
  for (int w = 0; w < kWide; ++w) {
#pragma unroll
    for (int n = 0; n < 4; ++n) states[w][n] = 0;
  }
}

// A thread's part of a tile of B or C, which all channels of the block share; zero where there is none.
template <class T>
struct MatrixShare {
  static constexpr int kRows = kScanThreads<T> / kPieceStates, kCount = (kTile + kRows - 1) / kRows;
  T numbers[kCount];
  MEDGMAE_MEMBER void store(int t, Pack<T, 4> (*to)[4]) const {
    int const n = t % kPieceStates, row = t / kPieceStates;
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[row + i * kRows][n / 4].v[n % 4] = numbers[i];
  }
};
static_assert(kTile % MatrixShare<float>::kRows == 0 && kTile % MatrixShare<double>::kRows == 0, "a tile is whole rows of threads");

template <class T, class IO>
MEDGMAE_DEVICE MatrixShare<T> read_matrix(const ScanCall& call, const ScanWork& work, const ScanPlace& p, const ScanTile& tile,
                                          const ScanMatrix& m, int t) {
  using Share = MatrixShare<T>;
  int const n = t % kPieceStates, row = t / kPieceStates;
  int const count = work.first_state + n >= call.states ? 0 : tile.stop - tile.start;
  const IO* const at = static_cast<const IO*>(m.at) + (p.b * m.batch + p.group * m.of_group + work.first_state) +
                       (int64_t(tile.start + row) * int(m.step) + n);
  Share share;
#pragma unroll
  for (int i = 0; i < Share::kCount; ++i) share.numbers[i] = read<T>(at + int64_t(i * Share::kRows) * int(m.step), row + i * Share::kRows < count);
  return share;
}

// Where a state of a span, or of the end of a chunk, is: (batch, rows, width, channels).
MEDGMAE_DEVICE int64_t state_at(const ScanCall& call, int64_t b, int64_t rows, int64_t row, int64_t width, int64_t state, int64_t channel) {
  return ((b * rows + row) * width + state) * call.channels + channel;
}

// Copies the thread's numbers to or from an array (batch, rows, width, channels); reads zero where there is none.
template <class T, int kWide, bool kStore>
MEDGMAE_DEVICE void move_states(const ScanCall& call, const ScanWork& work, const ScanPlace& p, int t, T* array, int64_t rows,
                                int64_t row, bool whole, T (*own)[4]) {
  int const c = t / 4 * kWide, first = t % 4 * 4, states = int(call.states - work.first_state);
  int64_t const width = whole ? call.states : kPieceStates, state = whole ? work.first_state + first : first;
  T* at = array + state_at(call, p.b, rows, row, width, state, p.first + c);
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int w = 0; w < kWide; ++w) {
      bool const there = c + w < p.channels && first + n < states;
      if (kStore && there) at[w] = own[w][n];
      if (!kStore) own[w][n] = there ? at[w] : T(0);
    }
    at += call.channels;
  }
}

// Loads a tile: steps, and what drives the recurrence (s u forward; the gradient behind the gate backward). Zeros behind its
// end leave every state as it is.
template <class T, class IO, bool kBack, bool kGated>
MEDGMAE_DEVICE void load_local(const ScanCall& call, const ScanPlace& p, const ScanTile& tile, int t, ScanShared<T, kForwardWide>* shared,
                               ScanLane<T, kForwardWide>* own) {
  const Stream& driving = kBack ? call.grad : call.u;
  int const channel = p.first + t, count = t < p.channels ? tile.stop - tile.start : 0;
  bool const gated = kGated && call.z.at != nullptr;
  T const bias = t < p.channels ? parameter<T>(call.bias, channel) : T(0);
  const IO *u = column<IO>(driving, p.b, tile.start, channel), *delta = column<IO>(call.delta, p.b, tile.start, channel);
  const IO* z = column<IO>(call.z, p.b, tile.start, channel);
#pragma unroll(sizeof(T) == 4 ? 4 : 1)
  for (int k = 0; k < kTile; ++k) {
    T const in = read<T>(u, k < count), gate = kGated ? read<T>(z, gated && k < count) : T(0);
    T const s = step_size(call, delta, bias, k < count);
    T const open = gated ? gate * sigmoid(gate) : T(1);
    shared->s[k][t / 4].v[t % 4] = s;
    shared->in[k][t / 4].v[t % 4] = in * (kBack ? open : s);
    own->sum += s;
    u += int(driving.step), delta += int(call.delta.step), z += int(call.z.step);
    if (!kGated || kBack) continue;
    shared->u[k][t / 4].v[t % 4] = in;
    shared->gate[k][t / 4].v[t % 4] = open;
  }
}

// What a span makes of a state, or backward of a gradient, of zero.
template <class T, class IO, bool kBack, class Block>
MEDGMAE_DEVICE void scan_local(const ScanCall& call, const ScanWork& work, int index, Block& block) {
  using Lane = ScanLane<T, kForwardWide>;
  ScanShared<T, kForwardWide>& shared = *block.shared;
  ScanPlace const p = place_of_block<T, kForwardWide>(call, work, index);
  if (p.span == (kBack ? 0 : work.spans - 1)) return;  // nobody asks
  const ScanMatrix& m = kBack ? call.C : call.B;
  block.lanes([&](int t, Lane& own) {
    load_decays<T, kForwardWide>(call, work, p, t, &own);
    own.sum = 0;
    clear_states<T, kForwardWide>(own.h);
  });
  for (int done = 0; done < p.stop - p.start; done += kTile) {
    int const from = kBack ? p.stop - done - kTile : p.start + done;
    ScanTile const tile = {from < p.start ? p.start : from, kBack ? p.stop - done : from + kTile < p.stop ? from + kTile : p.stop};
    block.each([&](int t, Lane& own) {
      MatrixShare<T> const row = read_matrix<T, IO>(call, work, p, tile, m, t);
      load_local<T, IO, kBack, kBack>(call, p, tile, t, &shared, &own);
      row.store(t, shared.B);
    });
    block.each([&](int t, Lane& own) {
#pragma unroll(sizeof(T) == 4 ? 2 : 1)
      for (int i = 0; i < kTile; ++i) {
        int const k = kBack ? kTile - 1 - i : i;
        Pack<T, 4> const s = shared.s[k][t / 4], in = shared.in[k][t / 4], row = shared.B[k][t % 4];
#pragma unroll
        for (int w = 0; w < kForwardWide; ++w) {
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            T const a = power_of_two(s.v[w] * own.A[w][n]);
            T const drive = in.v[w] * row.v[n];
            own.h[w][n] = kBack ? a * (own.h[w][n] + drive) : a * own.h[w][n] + drive;
          }
        }
      }
    });
  }
  block.lanes([&](int t, Lane& own) {
    move_states<T, kForwardWide, true>(call, work, p, t, static_cast<T*>(work.ends), work.spans, p.span, false, own.h);
    if (t < p.channels) static_cast<T*>(work.sums)[(p.b * work.spans + p.span) * call.channels + p.first + t] = own.sum;
  });
}

// One thread to a state: what every span starts from.
template <class T, bool kBack>
MEDGMAE_DEVICE void combine_one(const ScanCall& call, const ScanWork& work, int64_t i) {
  int64_t const channel = i % call.channels, n = i / call.channels % kPieceStates, b = i / call.channels / kPieceStates;
  int64_t const state = work.first_state + n;
  if (b >= call.batch || state >= call.states) return;
  T const A = decay_rate(static_cast<const T*>(call.A)[channel * call.states + state]);
  T carry = 0;
  if (kBack && call.grad_state != nullptr) {
    carry = static_cast<const T*>(call.grad_state)[state_at(call, b, 1, 0, call.states, state, channel)];
  }
  T* const ends = static_cast<T*>(work.ends) + state_at(call, b, work.spans, 0, kPieceStates, n, channel);
  const T* const sums = static_cast<const T*>(work.sums) + b * work.spans * call.channels + channel;
  constexpr int kAhead = 8;  // spans whose numbers are on their way at a time
  for (int64_t first = 0; first < work.spans; first += kAhead) {
    T end[kAhead], decay[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      int64_t const span = kBack ? work.spans - 1 - first - k : first + k;
      bool const there = first + k < work.spans - 1;  // nothing follows the last
      end[k] = there ? ends[span * kPieceStates * call.channels] : T(0);
      decay[k] = there ? sums[span * call.channels] : T(0);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (first + k >= work.spans) break;
      int64_t const span = kBack ? work.spans - 1 - first - k : first + k;
      ends[span * kPieceStates * call.channels] = carry;
      // Nothing stays nothing, even if a growing state's factor has no number.
      carry = carry == T(0) ? end[k] : power_of_two(decay[k] * A) * carry + end[k];
    }
  }
}

// Adds up what the states give to each channel, and writes it.
template <class T, class Block>
MEDGMAE_DEVICE void walk_forward(Block& block) {
  using Lane = ScanLane<T, kForwardWide>;
  ScanShared<T, kForwardWide>& shared = *block.shared;
#pragma unroll(sizeof(T) == 4 ? 2 : 1)
  for (int k = 0; k < kTile; ++k) {
    block.lanes([&](int t, Lane& own) {
      Pack<T, 4> const s = shared.s[k][t / 4], in = shared.in[k][t / 4], b = shared.B[k][t % 4], c = shared.C[k][t % 4];
#pragma unroll
      for (int w = 0; w < kForwardWide; ++w) {
        own.part[w] = 0;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          T const a = power_of_two(s.v[w] * own.A[w][n]);
          own.h[w][n] = a * own.h[w][n] + in.v[w] * b.v[n];
          own.part[w] += own.h[w][n] * c.v[n];
        }
      }
    });
    block.template fold<4>(1, [](Lane& own) { return own.part; });
    block.template fold<2>(2, [](Lane& own) { return own.part; });
    block.lanes([&](int t, Lane& own) { shared.y[k][t / 4].v[t % 2 * 2 + t / 2 % 2] = own.part[0]; });
  }
  block.meet();
}

template <class T, class IO>
MEDGMAE_DEVICE void finish_outputs(const ScanCall& call, const ScanWork& work, const ScanPlace& p, const ScanTile& tile, int t,
                                   const ScanShared<T, kForwardWide>& shared) {
  int const channel = p.first + t, count = t < p.channels ? tile.stop - tile.start : 0;
  bool const first = work.first_state == 0, last = work.first_state + kPieceStates >= call.states;
  T const skip = t < p.channels ? parameter<T>(call.D, channel) : T(0);
  IO* out = column<IO>(call.out, p.b, tile.start, channel);
  T* total = static_cast<T*>(work.totals) + (p.b * call.length + tile.start) * call.channels + channel;
  if (first && last) {
#pragma unroll(sizeof(T) == 4 ? 4 : 1)
    for (int k = 0; k < kTile; ++k) {
      if (k < count) narrow((shared.y[k][t / 4].v[t % 4] + skip * shared.u[k][t / 4].v[t % 4]) * shared.gate[k][t / 4].v[t % 4], out);
      out += int(call.out.step);
    }
    return;
  }
  for (int k = 0; k < count; ++k) {
    T const y = shared.y[k][t / 4].v[t % 4] + (first ? T(0) : *total);
    if (last) {
      narrow((y + skip * shared.u[k][t / 4].v[t % 4]) * shared.gate[k][t / 4].v[t % 4], out);
    } else {
      *total = y;
    }
    out += call.out.step, total += call.channels;
  }
}

// Scans a span from where it starts.
template <class T, class IO, class Block>
MEDGMAE_DEVICE void scan_outputs(const ScanCall& call, const ScanWork& work, int index, Block& block) {
  using Lane = ScanLane<T, kForwardWide>;
  ScanShared<T, kForwardWide>& shared = *block.shared;
  ScanPlace const p = place_of_block<T, kForwardWide>(call, work, index);
  block.lanes([&](int t, Lane& own) {
    load_decays<T, kForwardWide>(call, work, p, t, &own);
    own.sum = 0;
    clear_states<T, kForwardWide>(own.h);
    if (p.span > 0) move_states<T, kForwardWide, false>(call, work, p, t, static_cast<T*>(work.ends), work.spans, p.span, false, own.h);
  });
  int chunk = p.start / int(call.chunk), chunk_stop = end_of_chunk(call, chunk * call.chunk);
  for (int start = p.start; start < p.stop;) {
    int const end = p.stop < chunk_stop ? p.stop : chunk_stop;
    ScanTile const tile = {start, end - start < kTile ? end : start + kTile};
    block.each([&](int t, Lane& own) {
      MatrixShare<T> const B = read_matrix<T, IO>(call, work, p, tile, call.B, t), C = read_matrix<T, IO>(call, work, p, tile, call.C, t);
      load_local<T, IO, false, true>(call, p, tile, t, &shared, &own);
      B.store(t, shared.B), C.store(t, shared.C);
    });
    walk_forward<T>(block);
    block.lanes([&](int t, Lane&) { finish_outputs<T, IO>(call, work, p, tile, t, shared); });
    start = tile.stop;
    if (start < chunk_stop) continue;
    T* const kept = static_cast<T*>(call.kept);
    block.lanes([&](int t, Lane& own) {
      move_states<T, kForwardWide, true>(call, work, p, t, kept, scan_chunks(call), chunk, true, own.h);
    });
    ++chunk, chunk_stop = end_of_chunk(call, chunk_stop);
  }
}

}  // namespace medgmae
