// The backward of the selective scan on CUDA; cuda/scan/blocks.h says how its programs are written, and has the first two passes:
// local and combine find what every span's last state receives from the spans behind it.
//
//   gradients  every span, chunk by chunk from the last: the states at the tiles of a chunk from the one kept before it, then
//              tile by tile from the last: the tile's states once more, kept in registers, and the way back through them
//   sum        adds up what the spans give to A, D and the bias
//
// With w = g . B, p[t] = a[t] h[t-1], q = g p:
//   dC = sum over channels of dy h    dB = sum over channels of g s u    du = D dy + s w
//   ds = u w + q . A                  dA = sum over time of q s          g[t-1] = C[t-1] dy[t-1] + a[t] g[t]
//
// What the lanes of a warp hold (4 lanes share kBackwardWide = 2 channels; a lane has 4 of the 16 states of both):
//
//   lane      0      1      2      3   |  4      5      6      7   | ...  31
//   channels  0, 1 ...................  |  2, 3 ...................  | ...  14, 15 of the warp's 16
//   states    0-3    4-7    8-11   12-15|  0-3    4-7    8-11   12-15| ...  12-15
//
//   A, h, carry, dA [channel][state of the lane]        decayed [step of the tile][channel][state]
//   sums over states   (y, w, q . A):  folds over lanes that differ in bits 0 and 1
//   sums over channels (dC, dB):       folds over lanes that differ in bits 2, 3 and 4; halving what each lane has to add,
//                                      they leave one state in each of the lanes 0-15 (finish_matrices knows which)
//
//   time of a span, chunk by chunk from the last:   find_starts      -> -> -> ->     states before every tile
//                                                   differentiate    <- tile by tile: walk_states -> , then walk_back <-
#pragma once

#include "gradient_tokens.h"

namespace medgmae {

// Steps whose code is written out: all, so that their states stay in registers; one in double precision, whose kernels are small
// instead of fast.
template <class T>
constexpr int kWritten = sizeof(T) == 4 ? kTile : 1;

// Adds own.of_states, four of them, over the channels of a warp; kWhich: 0 for dC, 1 for dB.
template <int kWhich, class Block>
MEDGMAE_DEVICE void sum_over_channels(int k, Block& block) {
  using Lane = typename Block::Lane;
  block.template fold<4>(4, [](Lane& own) { return own.of_states; });
  block.template fold<2>(8, [](Lane& own) { return own.of_states; });
  block.template fold<1>(16, [](Lane& own) { return own.of_states; });
  block.lanes([&](int t, Lane& own) {
    if ((t & 16) == 0) block.shared->sums[k][kWhich][t >> 5][t & 15] = own.of_states[0];
  });
}

// One step forward.
template <class T, bool kAll>
MEDGMAE_DEVICE void step_forward(const GradientShared<T>& shared, int t, int k, GradientLane<T>* own) {
  Pack<T, 2> const s = shared.s[k][t / 4], in = shared.in[k][t / 4];
  Pack<T, 4> const b = shared.B[k][t % 4];
#pragma unroll
  for (int w = 0; w < kBackwardWide; ++w) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      T const decayed = power_of_two(s.v[w] * own->A[w][n]) * own->h[w][n];
      own->h[w][n] = decayed + in.v[w] * b.v[n];
      if (kAll) own->decayed[k][w][n] = decayed;
    }
  }
}

// What the state gives to y and dC.
template <class T>
MEDGMAE_DEVICE void read_state(const GradientShared<T>& shared, int t, int k, GradientLane<T>* own) {
  Pack<T, 2> const dy = shared.dy[k][t / 4];
  Pack<T, 4> const c = shared.C[k][t % 4];
#pragma unroll
  for (int n = 0; n < 4; ++n) own->part[n] = own->of_states[n] = 0;
#pragma unroll
  for (int w = 0; w < kBackwardWide; ++w) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      own->part[w] += own->h[w][n] * c.v[n];
      own->of_states[n] += own->h[w][n] * dy.v[w];
    }
  }
}

// Through a tile forwards: its states, what A made of them, y and dC; or the last state alone.
template <class T, bool kAll, class Block>
MEDGMAE_DEVICE void walk_states(Block& block) {
  using Lane = GradientLane<T>;
  GradientShared<T>& shared = *block.shared;
#pragma unroll(kAll ? kWritten<T> : 1)
  for (int k = 0; k < kTile; ++k) {
    block.lanes([&](int t, Lane& own) { step_forward<T, kAll>(shared, t, k, &own); });
    if constexpr (kAll) {
      block.lanes([&](int t, Lane& own) { read_state<T>(shared, t, k, &own); });
      block.template fold<2>(1, [](Lane& own) { return own.part; });
      block.template fold<1>(2, [](Lane& own) { return own.part; });
      block.lanes([&](int t, Lane& own) {
        if ((t & 2) == 0) shared.y[k][t / 4].v[t & 1] = own.part[0];
      });
      sum_over_channels<0>(k, block);
    }
  }
}

// One step back: g from what the step behind it hands over, and all that is made of it.
template <class T>
MEDGMAE_DEVICE void step_back(const GradientShared<T>& shared, int t, int k, GradientLane<T>* own) {
  Pack<T, 2> const s = shared.s[k][t / 4], in = shared.in[k][t / 4], dy = shared.dy[k][t / 4];
  Pack<T, 4> const b = shared.B[k][t % 4], c = shared.C[k][t % 4];
#pragma unroll
  for (int n = 0; n < 4; ++n) own->part[n] = own->of_states[n] = 0;
#pragma unroll
  for (int w = 0; w < kBackwardWide; ++w) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      T const g = own->carry[w][n] + dy.v[w] * c.v[n];
      T const q = g * own->decayed[k][w][n];
      own->part[2 * w] += g * b.v[n];
      own->part[2 * w + 1] += q * own->A[w][n];
      own->dA[w][n] += q * s.v[w];
      own->of_states[n] += g * in.v[w];
      own->carry[w][n] = power_of_two(s.v[w] * own->A[w][n]) * g;
    }
  }
}

template <class T, class Block>
MEDGMAE_DEVICE void walk_back(Block& block) {
  using Lane = GradientLane<T>;
  GradientShared<T>& shared = *block.shared;
#pragma unroll(kWritten<T>)
  for (int i = 0; i < kTile; ++i) {
    int const k = kTile - 1 - i;
    block.lanes([&](int t, Lane& own) { step_back<T>(shared, t, k, &own); });
    block.template fold<4>(1, [](Lane& own) { return own.part; });
    block.template fold<2>(2, [](Lane& own) { return own.part; });
    block.lanes([&](int t, Lane& own) {
      auto& one = (t & 2) == 0 ? shared.w[k][t / 4] : shared.qA[k][t / 4];
      one.v[t & 1] = own.part[0];
    });
    sum_over_channels<1>(k, block);
  }
}

// The state before the chunk that begins at `start`.
template <class T>
MEDGMAE_DEVICE void load_kept(const ScanCall& call, const ScanWork& work, const ScanPlace& p, int start, int t, GradientLane<T>* own) {
  if (start == 0) {
    clear_states<T, kBackwardWide>(own->h);
  } else {
    T* const kept = static_cast<T*>(call.kept);
    move_states<T, kBackwardWide, false>(call, work, p, t, kept, scan_chunks(call), start / int(call.chunk) - 1, true, own->h);
  }
}

template <class T>
MEDGMAE_DEVICE void begin_gradients(const ScanCall& call, const ScanWork& work, const ScanPlace& p, int t, GradientLane<T>* own) {
  clear_states<T, kBackwardWide>(own->dA);
  if (work.spans > 1) {
    T* const ends = static_cast<T*>(work.ends);
    move_states<T, kBackwardWide, false>(call, work, p, t, ends, work.spans, p.span, false, own->carry);
  } else if (call.grad_state != nullptr) {
    T* const ends = static_cast<T*>(const_cast<void*>(call.grad_state));
    move_states<T, kBackwardWide, false>(call, work, p, t, ends, 1, 0, true, own->carry);
  } else {
    clear_states<T, kBackwardWide>(own->carry);
  }
}

// Writes the span's part of the gradient of A.
template <class T>
MEDGMAE_DEVICE void finish_states(const ScanCall& call, const ScanWork& work, const ScanPlace& p, int t, const GradientLane<T>& own) {
#pragma unroll
  for (int w = 0; w < kBackwardWide; ++w) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      int channel, state;
      if (!own_state<T, kBackwardWide>(call, work, p, t, w, n, &channel, &state)) continue;
      int64_t const at = ((int64_t(p.span) * call.batch + p.b) * call.channels + channel) * call.states + state;
      static_cast<T*>(work.parts[0])[at] = own.dA[w][n];
    }
  }
}

// The same of D and the bias.
template <class T>
MEDGMAE_DEVICE void finish_channels(const ScanCall& call, const ScanWork& work, const ScanPlace& p, int t, const GradientShared<T>& shared) {
  constexpr int width = kBlockChannels<T, kBackwardWide>;
  if (t >= p.channels) return;
  T dD = 0, dbias = 0;
#pragma unroll
  for (int of = t; of < kScanThreads<T>; of += width) dD += shared.dD[of], dbias += shared.dbias[of];
  int64_t const at = (int64_t(p.span) * call.batch + p.b) * call.channels + p.first + t;
  if (call.dD != nullptr) static_cast<T*>(work.parts[1])[at] = dD;
  if (call.dbias != nullptr) static_cast<T*>(work.parts[2])[at] = dbias;
}

// The states before the tiles of the chunk [start, stop) but the first.
template <class T, class IO, class Block>
MEDGMAE_DEVICE void find_starts(const ScanCall& call, const ScanWork& work, const ScanPlace& p, int start, int stop, Block& block) {
  using Lane = GradientLane<T>;
  GradientShared<T>& shared = *block.shared;
  block.lanes([&](int t, Lane& own) { load_kept<T>(call, work, p, start, t, &own); });
  for (int i = 0; start + (i + 1) * kTile < stop; ++i) {
    ScanTile const tile = {start + i * kTile, start + (i + 1) * kTile};
    block.each([&](int t, Lane&) {
      MatrixShare<T> const B = read_matrix<T, IO>(call, work, p, tile, call.B, t);
      load_gradient_tile<T, IO, false>(call, p, tile, t, &shared);
      B.store(t, shared.B);
    });
    walk_states<T, false>(block);
    block.each([&](int t, Lane& own) {
#pragma unroll
      for (int w = 0; w < kBackwardWide; ++w) {
#pragma unroll
        for (int n = 0; n < 4; ++n) shared.starts[i][w][t].v[n] = own.h[w][n];
      }
    });
  }
}

// One tile of the way back; number i of its chunk, which begins at `start`.
template <class T, class IO, class Block>
MEDGMAE_DEVICE void differentiate_tile(const ScanCall& call, const ScanWork& work, const ScanPlace& p, const ScanTile& tile, int start,
                                       int i, Block& block) {
  using Lane = GradientLane<T>;
  GradientShared<T>& shared = *block.shared;
  block.each([&](int t, Lane& own) {
    MatrixShare<T> const B = read_matrix<T, IO>(call, work, p, tile, call.B, t), C = read_matrix<T, IO>(call, work, p, tile, call.C, t);
    load_gradient_tile<T, IO, true>(call, p, tile, t, &shared);
    B.store(t, shared.B), C.store(t, shared.C);
    if (i == 0) return load_kept<T>(call, work, p, start, t, &own);
#pragma unroll
    for (int w = 0; w < kBackwardWide; ++w) {
#pragma unroll
      for (int n = 0; n < 4; ++n) own.h[w][n] = shared.starts[i - 1][w][t].v[n];
    }
  });
  walk_states<T, true>(block);
  walk_back<T>(block);
  block.meet();
  block.lanes([&](int t, Lane&) {
    finish_tokens<T, IO>(call, work, p, tile, t, &shared);
    finish_matrices<T>(call, work, p, tile, t, shared);
  });
}

// Every gradient of a span.
template <class T, class IO, class Block>
MEDGMAE_DEVICE void scan_gradients(const ScanCall& call, const ScanWork& work, int index, Block& block) {
  using Lane = GradientLane<T>;
  block.each([&](int t, Lane&) {
    if (t == 0) block.shared->place = place_of_block<T, kBackwardWide>(call, work, index);
  });
  const ScanPlace& p = block.shared->place;
  block.lanes([&](int t, Lane& own) {
    load_decays<T, kBackwardWide>(call, work, p, t, &own);
    begin_gradients<T>(call, work, p, t, &own);
    block.shared->dD[t] = block.shared->dbias[t] = 0;
  });
  for (int stop = p.stop; stop > p.start;) {
    int const start = (stop - 1) / int(call.chunk) * int(call.chunk);
    find_starts<T, IO>(call, work, p, start, stop, block);
    for (int i = (stop - start - 1) / kTile; i >= 0; --i) {
      int const from = start + i * kTile;
      ScanTile const tile = {from, from + kTile < stop ? from + kTile : stop};
      differentiate_tile<T, IO>(call, work, p, tile, start, i, block);
    }
    stop = start;
  }
  block.meet();
  block.lanes([&](int t, Lane& own) {
    finish_states<T>(call, work, p, t, own);
    if (work.first_state + kPieceStates >= call.states) finish_channels<T>(call, work, p, t, *block.shared);
  });
}

// One thread to a number of the results: the sum over the spans.
template <class T>
MEDGMAE_DEVICE void sum_one(const ScanWork& work, int64_t i) {
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    if (i >= 0 && i < work.counts[k]) {
      T sum = 0;
      for (int64_t span = 0; span < work.spans; ++span) sum += static_cast<const T*>(work.parts[k])[span * work.counts[k] + i];
      static_cast<T*>(work.results[k])[i] = sum;
    }
    i -= work.counts[k];
  }
}

}  // namespace medgmae
