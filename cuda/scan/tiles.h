// Tiles of a stream for the CPU kernels: some steps of some neighbouring channels. They are read where they lie if the channels of a
// token lie side by side; if the steps of a channel do, as in a contiguous (batch, channels, length), they are turned round first.
#pragma once

#include "../cpu_memory.h"
#include "../lanes.h"
#include "scan.h"

namespace medgmae {
namespace {

// Step t of block k (a vector of channels) is at[k * block + t * step]. Null: no such stream.
template <class T>
struct Tile {
  const T* at;
  int64_t step, block;
  Vec<T> load(int k, int t, int lanes) const { return load_part(at + k * block + t * step, lanes); }
};

// Rows become columns.
template <class T, int kHalf = kLanes<T> / 2>
inline void transpose(Vec<T>* v) {
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & kHalf) continue;
    Vec<T> const a = v[i], b = v[i + kHalf];
    v[i] = mixed<T, kHalf>(a, b, 0), v[i + kHalf] = mixed<T, kHalf>(a, b, 1);
  }
  if constexpr (kHalf > 1) transpose<T, kHalf / 2>(v);
}

// Channels whose steps lie side by side, to `room` as [block][step][lane], `steps` per block.
template <class T>
inline void turn_tile(const T* from, int64_t apart, bool backwards, int steps, int channels, T* room) {
  constexpr int kWide = kLanes<T>;
  for (int c = 0; c < channels; c += kWide, room += steps * kWide) {
    int const lanes = channels - c < kWide ? channels - c : kWide;
    for (int t = 0; t < steps; t += kWide) {
      int const count = steps - t < kWide ? steps - t : kWide;
      Vec<T> v[kWide];
      for (int i = 0; i < kWide; ++i) v[i] = i < lanes ? load_part(from + (c + i) * apart + t, count) : Vec<T>{};
      transpose<T>(v);
      for (int i = 0; i < count; ++i) store(room + (backwards ? steps - 1 - t - i : t + i) * kWide, v[i]);
    }
  }
}

// Some steps of `channels` channels of a stream, from `at` on.
template <class T>
inline Tile<T> read_tile(const T* at, const Stream& s, int steps, int channels, T* room) {
  constexpr int kWide = kLanes<T>;
  if (s.apart == 1) return {at, s.step, kWide};
  turn_tile<T>(s.step < 0 ? at - (steps - 1) : at, s.apart, s.step < 0, steps, channels, room);
  return {room, kWide, int64_t(steps) * kWide};
}

// Asks for the memory of a tile whose steps lie side by side; what is behind the end of the stream does no harm.
template <class T>
inline void prefetch_tile(const T* at, const Stream& s, int steps, int channels) {
  constexpr int kLine = 64 / int(sizeof(T));
  for (int i = 0; i < channels; ++i) {
    for (int t = 0; t < steps; t += kLine) __builtin_prefetch(at + i * s.apart + t * s.step);
  }
}

}  // namespace
}  // namespace medgmae
