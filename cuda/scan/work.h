// How a selective scan is divided among the thread blocks of CUDA: blocks of channels, spans of time, tiles of steps.
//
// Cost. What bounds the kernels is the issue of instructions, not memory. Counted in the machine code for sm_90, float32, a warp
// takes for one step of 32 channels and 16 states: 130 instructions in the local pass (155 backward), 214 in the outputs (20 of
// them exponentials or reciprocals, of which a scheduler starts one in 8 cycles), and for 16 channels: 390 in the gradients. With
// 132 x 4 schedulers at 1.755 GHz (H100) and batch 1, 768 channels, 16,000 steps that is 143 us forward and 387 us backward if
// every cycle issues one, against 66 us and 115 us to move 197 and 344 MB at 3 TB/s.
#pragma once

#include "../block_math.h"
#include "scan.h"

namespace medgmae {

constexpr int kTile = 8;          // steps of a tile
constexpr int kPieceStates = 16;  // states of a launch
constexpr int kForwardWide = 4;   // channels of a thread
constexpr int kBackwardWide = 2;
constexpr int kLongestChunk = 64;  // that the backward takes
constexpr int kLeastSpan = 2 * kTile;
template <class T>
constexpr int kScanThreads = 512 / int(sizeof(T));
template <class T, int kWide>
constexpr int kBlockChannels = kScanThreads<T> / 4 * kWide;

// How a call is divided, and its workspace.
struct ScanWork {
  int64_t spans, span_steps;
  int64_t group_channels;
  int64_t first_state;  // of the launch at hand
  void* ends;           // (batch, spans, 16, channels): what a span makes of zero; combine puts there what it starts from
  void* sums;           // (batch, spans, channels): of the steps
  void* totals;         // (1 forward, 3 backward, batch, length, channels): sums over the states of earlier launches
  void* parts[3];       // backward: dA, dD and dbias of each span, or, of a single span, the results themselves
  void* results[3];
  int64_t counts[3];    // numbers in each
  int64_t bytes;
};

// The span and the channels of a block.
struct ScanPlace {
  int b, span, start, stop;           // start, stop: steps
  int group, slab, first, channels;  // slab: of the group's channels; first: channel
};

inline int64_t channel_blocks(const ScanCall& call, int block_channels) {
  return (call.channels / call.groups + block_channels - 1) / block_channels;
}

inline int64_t scan_blocks(const ScanCall& call, const ScanWork& work, int block_channels) {
  return call.batch * work.spans * call.groups * channel_blocks(call, block_channels);
}

// Steps of a span, such that all blocks are among the `room` that the device holds at once. Cutting time up costs a forward about as much again,
// a backward a quarter.
template <class T>
int64_t scan_span(const ScanCall& call, bool backward, int64_t room) {
  int const block_channels = backward ? kBlockChannels<T, kBackwardWide> : kBlockChannels<T, kForwardWide>;
  int64_t const whole = call.batch * call.groups * channel_blocks(call, block_channels);
  int64_t const wanted = whole > 0 ? room / whole : 1, unit = backward ? call.chunk : kTile;
  if (wanted < (backward ? 2 : 3)) return call.length;
  int64_t const steps = (call.length + wanted - 1) / wanted, least = steps > kLeastSpan ? steps : kLeastSpan;
  return (least + unit - 1) / unit * unit;
}

// Whether every step, channel and distance between tokens has a number that is an int.
inline bool scan_is_small(const ScanCall& call) {
  int64_t const most = INT32_MAX - kLongestChunk;
  int64_t const steps[] = {call.u.step,    call.delta.step, call.z.step,      call.out.step, call.grad.step,
                           call.du.step,   call.ddelta.step, call.dz.step,    call.B.step,   call.C.step};
  for (int64_t step : steps) {
    if (step > most / kTile || step < -most / kTile) return false;
  }
  return call.batch < most && call.length < most && call.channels < most && call.states < most && call.chunk < most;
}

// How the workspace at `base` is divided; .bytes says how large it must be.
template <class T>
ScanWork divide_scan_workspace(const ScanCall& call, bool backward, int64_t room, void* base) {
  ScanWork work = {};
  auto take = [&](int64_t count) -> void* {
    int64_t const at = work.bytes;
    work.bytes += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return static_cast<char*>(base) + at;
  };
  work.group_channels = call.channels / call.groups;
  work.span_steps = scan_span<T>(call, backward, room);
  work.spans = work.span_steps > 0 ? (call.length + work.span_steps - 1) / work.span_steps : 0;
  int64_t const rows = call.batch * work.spans * call.channels, all = call.batch * call.channels;
  if (work.spans > 1) work.ends = take(rows * kPieceStates), work.sums = take(rows);
  if (call.states > kPieceStates) work.totals = take((backward ? 3 : 1) * call.batch * call.length * call.channels);
  if (!backward) return work;
  void* const results[3] = {call.dA, call.dD, call.dbias};
  for (int k = 0; k < 3; ++k) {
    work.counts[k] = results[k] == nullptr ? 0 : k == 0 ? all * call.states : all;
    work.results[k] = results[k];
    work.parts[k] = work.spans > 1 ? take(work.spans * work.counts[k]) : results[k];
  }
  return work;
}

// Block number `index`, each with the channels of kWide for every four lanes.
template <class T, int kWide>
MEDGMAE_DEVICE ScanPlace place_of_block(const ScanCall& call, const ScanWork& work, int index) {
  ScanPlace p;
  int const slabs = int((work.group_channels + kBlockChannels<T, kWide> - 1) / kBlockChannels<T, kWide>);
  int const groups = int(call.groups), spans = int(work.spans);
  p.slab = index % slabs, p.group = index / slabs % groups;
  p.span = index / slabs / groups % spans, p.b = index / slabs / groups / spans;
  p.start = int(p.span * work.span_steps);
  p.stop = int(call.length - p.start < work.span_steps ? call.length : p.start + work.span_steps);
  int64_t const inside = p.slab * kBlockChannels<T, kWide>, left = work.group_channels - inside;
  p.first = int(p.group * work.group_channels + inside);
  p.channels = int(left < kBlockChannels<T, kWide> ? left : kBlockChannels<T, kWide>);
  return p;
}

// A tile: steps [start, stop).
struct ScanTile {
  int start, stop;
};

// The end of the chunk that begins at `start`.
MEDGMAE_DEVICE int end_of_chunk(const ScanCall& call, int64_t start) {
  return int(call.length - start < call.chunk ? call.length : start + call.chunk);
}

}  // namespace medgmae
