// The backward of the selective scan on CUDA: what belongs to one token and channel alone, done by one thread when a tile is loaded
// and when it is finished. cuda/scan/gradient_blocks.h has the rest.
//
// Threads take the channels of a block side by side, and every so many rows of a tile (GradientShare); in shared memory:
//
//   thread          0  1  2  3 ...  kWidth-1 | kWidth ...        kWidth = kBlockChannels channels, kRows = threads / kWidth
//   channel         0  1  2  3 ...  kWidth-1 | 0  1  2 ...
//   rows of a tile  0, kRows, 2 kRows ...    | 1, kRows + 1 ...
//
//   s, in, dy, y, w, qA [row][channel / 2].v[channel % 2]     a row of the tile: the channels in pairs, as the lanes of walk_* read them
//   B, C [row][state / 4].v[state % 4]                        the same for all channels
#pragma once

#include "blocks.h"

namespace medgmae {

constexpr int kChunkTiles = kLongestChunk / kTile;
template <class T>
constexpr int kScanWarps = kScanThreads<T> / 32;

// What every thread has of its channels.
template <class T>
struct GradientLane {
  T A[kBackwardWide][4];  // times log2(e)
  T h[kBackwardWide][4], carry[kBackwardWide][4];
  T dA[kBackwardWide][4];
  T decayed[kTile][kBackwardWide][4];  // p of every step of the tile
  T part[4], of_states[4];             // to be added up over states, and over channels
};

template <class T>
struct GradientShared {
  ScanPlace place;  // here because registers are short
  static constexpr int kGroups = kScanThreads<T> / 4;
  using Row = Pack<T, kBackwardWide>[kGroups];
  Row s[kTile], in[kTile], dy[kTile];
  Row y[kTile], w[kTile], qA[kTile];
  Pack<T, 4> B[kTile][4], C[kTile][4];
  Pack<T, 4> starts[kChunkTiles - 1][kBackwardWide][kScanThreads<T>];  // states before each tile of the chunk but the first
  T sums[kTile][2][kScanWarps<T>][kPieceStates];                       // dC and dB, each over the channels of a warp; by lane
  T dD[kScanThreads<T>], dbias[kScanThreads<T>];                       // of the steps that a thread loads
};

// What of the tile a thread loads and finishes: one channel, every so many steps.
template <class T>
struct GradientShare {
  static constexpr int kWidth = kBlockChannels<T, kBackwardWide>, kRows = kScanThreads<T> / kWidth;
  int group, side, row, channel, step, count;
  MEDGMAE_MEMBER GradientShare(const ScanPlace& p, const ScanTile& tile, int t)
      : group(t % kWidth / kBackwardWide),
        side(t % kBackwardWide),
        row(t / kWidth),
        channel(p.first + t % kWidth),
        step(tile.start + row),
        count(t % kWidth < p.channels ? tile.stop - tile.start : 0) {}
};

// Loads a tile's steps and drives and, unless it is for the states alone, what the way back needs.
template <class T, class IO, bool kAll>
MEDGMAE_DEVICE void load_gradient_tile(const ScanCall& call, const ScanPlace& p, const ScanTile& tile, int t, GradientShared<T>* shared) {
  using Share = GradientShare<T>;
  Share const mine(p, tile, t);
  bool const gated = kAll && call.z.at != nullptr;
  T const bias = mine.count > 0 ? parameter<T>(call.bias, mine.channel) : T(0);
  const IO *u = column<IO>(call.u, p.b, mine.step, mine.channel), *delta = column<IO>(call.delta, p.b, mine.step, mine.channel);
  const IO *z = column<IO>(call.z, p.b, mine.step, mine.channel), *grad = column<IO>(call.grad, p.b, mine.step, mine.channel);
#pragma unroll
  for (int k = 0; k < kTile; k += Share::kRows) {
    int const row = mine.row + k;
    bool const inside = row < mine.count;
    T const in = read<T>(u, inside), s = step_size(call, delta, bias, inside);
    shared->s[row][mine.group].v[mine.side] = s;
    shared->in[row][mine.group].v[mine.side] = s * in;
    u += Share::kRows * int(call.u.step), delta += Share::kRows * int(call.delta.step);
    if (!kAll) continue;
    T const gate = read<T>(z, gated && inside), dy = read<T>(grad, inside);
    shared->dy[row][mine.group].v[mine.side] = dy * (gated ? gate * sigmoid(gate) : T(1));
    z += Share::kRows * int(call.z.step), grad += Share::kRows * int(call.grad.step);
  }
}

// What the tokens of a tile receive in one channel, once the sums over all states are there: y, w and q . A in powers of two.
// Everything is read before anything is written, so that all is on its way at once.
template <class T, class IO>
MEDGMAE_DEVICE void write_tokens(const ScanCall& call, const ScanPlace& p, const GradientShare<T>& mine, int t,
                                 GradientShared<T>* shared) {
  constexpr int rows = GradientShare<T>::kRows, count = kTile / rows;
  int const step = mine.step, channel = mine.channel;
  bool const gated = call.z.at != nullptr;
  T const skip = parameter<T>(call.D, channel), bias = parameter<T>(call.bias, channel);
  T u[count], x[count], z[count], grad[count];
  const IO *of_u = column<IO>(call.u, p.b, step, channel), *of_delta = column<IO>(call.delta, p.b, step, channel);
  const IO *of_z = column<IO>(call.z, p.b, step, channel), *of_grad = column<IO>(call.grad, p.b, step, channel);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    bool const inside = mine.row + i * rows < mine.count;
    u[i] = read<T>(of_u, inside), x[i] = read<T>(of_delta, inside) + bias;
    z[i] = read<T>(of_z, inside && gated), grad[i] = read<T>(of_grad, inside && gated);
    of_u += rows * int(call.u.step), of_delta += rows * int(call.delta.step);
    of_z += rows * int(call.z.step), of_grad += rows * int(call.grad.step);
  }
  IO *du = column<IO>(call.du, p.b, step, channel), *ddelta = column<IO>(call.ddelta, p.b, step, channel);
  IO* dz = column<IO>(call.dz, p.b, step, channel);
  T dD = 0, dbias = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    int const row = mine.row + i * rows;
    if (row >= mine.count) break;
    T const s = shared->s[row][mine.group].v[mine.side], dy = shared->dy[row][mine.group].v[mine.side];
    T const w = shared->w[row][mine.group].v[mine.side], qA = shared->qA[row][mine.group].v[mine.side] * T(kLog2);
    T const slope = sigmoid(x[i]), open = sigmoid(z[i]), y = shared->y[row][mine.group].v[mine.side] + skip * u[i];
    T const ds = (u[i] * w + qA) * (call.softplus && !(x[i] > T(20)) ? slope : T(1));
    narrow(skip * dy + s * w, du);
    narrow(ds, ddelta);
    if (gated) narrow(grad[i] * y * (open * (1 + z[i] * (1 - open))), dz);
    dD += dy * u[i], dbias += ds;
    du += rows * int(call.du.step), ddelta += rows * int(call.ddelta.step), dz += rows * int(call.dz.step);
  }
  shared->dD[t] += dD, shared->dbias[t] += dbias;
}

// Adds what earlier launches have summed over their states, or hands on the sums so far.
template <class T>
MEDGMAE_DEVICE void pass_totals(const ScanCall& call, const ScanWork& work, const ScanPlace& p, const GradientShare<T>& mine,
                                GradientShared<T>* shared) {
  bool const first = work.first_state == 0, last = work.first_state + kPieceStates >= call.states;
  int64_t const all = call.batch * call.length * call.channels;
  T* total = static_cast<T*>(work.totals) + (p.b * call.length + mine.step) * call.channels + mine.channel;
  for (int row = mine.row; row < mine.count; row += GradientShare<T>::kRows) {
    T* const sums[3] = {&shared->y[row][mine.group].v[mine.side], &shared->w[row][mine.group].v[mine.side],
                        &shared->qA[row][mine.group].v[mine.side]};
    for (int k = 0; k < 3; ++k) {
      if (!first) *sums[k] += total[k * all];
      if (!last) total[k * all] = *sums[k];
    }
    total += GradientShare<T>::kRows * call.channels;
  }
}

template <class T, class IO>
MEDGMAE_DEVICE void finish_tokens(const ScanCall& call, const ScanWork& work, const ScanPlace& p, const ScanTile& tile, int t,
                                  GradientShared<T>* shared) {
  GradientShare<T> const mine(p, tile, t);
  if (mine.row >= mine.count) return;
  if (call.states > kPieceStates) pass_totals<T>(call, work, p, mine, shared);
  if (work.first_state + kPieceStates >= call.states) write_tokens<T, IO>(call, p, mine, t, shared);
}

// Adds the warps' sums over channels to one for the block.
template <class T>
MEDGMAE_DEVICE void finish_matrices(const ScanCall& call, const ScanWork& work, const ScanPlace& p, const ScanTile& tile, int t,
                                    const GradientShared<T>& shared) {
  constexpr int rows = kScanThreads<T> / (2 * kPieceStates);
  int const n = t % kPieceStates, which = t / kPieceStates % 2, first = t / (2 * kPieceStates), state = int(work.first_state) + n;
  if (state >= call.states) return;
  int64_t const token = (int64_t(p.slab) * call.batch + p.b) * call.length + tile.start + first;
  int const lane = n / 4 + n / 2 % 2 * 4 + n % 2 * 8;  // where the folds of sum_over_channels() leave this state
  T* const to = static_cast<T*>(which == 0 ? call.dC : call.dB) + (token * call.groups + p.group) * call.states + state;
#pragma unroll
  for (int i = 0; i < kTile / rows; ++i) {
    if (first + i * rows >= tile.stop - tile.start) break;
    T sum = 0;
#pragma unroll
    for (int warp = 0; warp < kScanWarps<T>; ++warp) sum += shared.sums[first + i * rows][which][warp][lane];
    to[i * rows * call.groups * call.states] = sum;
  }
}

}  // namespace medgmae
