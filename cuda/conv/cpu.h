// The causal convolution on the CPU: rows of memory in order, vectors of channels.
#pragma once

#include "../cpu_memory.h"
#include "../lanes.h"
#include "conv.h"

namespace medgmae {
namespace {

constexpr int kConvTile = 16;  // rows whose gradients before the activation are in memory at a time

// One vector of channels of a call.
template <class T>
struct ConvColumn {
  const ConvCall& call;
  int64_t channel;
  int lanes;

  Vec<T> weight(int64_t k) const { return load_part(static_cast<const T*>(call.weight) + k * call.channels + channel, lanes); }
  Vec<T> bias() const { return call.bias ? load_part(static_cast<const T*>(call.bias) + channel, lanes) : Vec<T>{}; }
  Vec<T> at(const Stream& stream, int64_t b, int64_t t) const { return load_part(element<T>(stream, b, t, channel), lanes); }
  // The filtered value at step t.
  Vec<T> filtered(int64_t b, int64_t t) const {
    Vec<T> y = bias();
    for (int64_t k = t < call.width - 1 ? call.width - 1 - t : 0; k < call.width; ++k) y += weight(k) * at(call.x, b, t - (call.width - 1) + k);
    return y;
  }
};

template <class T>
void conv_forward(const ConvCall& call, int threads) {
  constexpr int kWide = kLanes<T>;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < call.batch * call.length; ++row) {
    int64_t const b = row / call.length, t = row % call.length;
    for (int64_t c = 0; c < call.channels; c += kWide) {
      ConvColumn<T> const column = {call, c, int(call.channels - c < kWide ? call.channels - c : kWide)};
      Vec<T> const y = column.filtered(b, t);
      store_part(element<T>(call.out, b, t, c), call.silu ? y * sigmoid_lanes<T>(y) : y, column.lanes);
    }
  }
}

// Gradients before the activation of the rows [begin, end), to `rows` (one after the other, `apart` elements apart).
template <class T>
inline void conv_inner(const ConvColumn<T>& column, int64_t b, int64_t begin, int64_t end, T* rows, int64_t apart) {
  for (int64_t t = begin; t < end; ++t, rows += apart) {
    Vec<T> g = column.at(column.call.grad, b, t);
    if (column.call.silu) {
      Vec<T> const y = column.filtered(b, t), open = sigmoid_lanes<T>(y);
      g *= open * (T(1) + y * (T(1) - open));
    }
    store(rows, g);
  }
}

// One vector of channels of a tile [t0, t1) of a segment; rows[t - t0] holds the inner gradient of step t.
template <class T>
inline void conv_tile(const ConvColumn<T>& column, int64_t b, int64_t t0, int64_t t1, const T* rows, int64_t apart, T* sums) {
  const ConvCall& call = column.call;
  Vec<T> bias = load(sums + call.width * apart);
  for (int64_t t = t0; t < t1; ++t) bias += load(rows + (t - t0) * apart);
  store(sums + call.width * apart, bias);
  for (int64_t k = 0; k < call.width; ++k) {
    Vec<T> total = load(sums + k * apart);
    int64_t const back = call.width - 1 - k;
    for (int64_t t = t0 < back ? back : t0; t < t1; ++t) total += load(rows + (t - t0) * apart) * column.at(call.x, b, t - back);
    store(sums + k * apart, total);
  }
  for (int64_t t = t0; t < t1; ++t) {
    Vec<T> dx = {};
    for (int64_t k = call.width - 1; k >= 0 && t + call.width - 1 - k < call.length; --k) {
      dx += column.weight(k) * load(rows + (t + call.width - 1 - k - t0) * apart);
    }
    store_part(element<T>(call.dx, b, t, column.channel), dx, column.lanes);
  }
}

// One segment of time: rows of inner gradients are made once, but for the few behind its end.
template <class T>
inline void conv_segment(const ConvCall& call, int64_t b, int64_t segment, T* rows, T* sums, int64_t apart) {
  constexpr int kWide = kLanes<T>;
  int64_t const begin = segment * kConvSegment, behind = call.width - 1;
  int64_t const end = begin + kConvSegment < call.length ? begin + kConvSegment : call.length;
  memset(sums, 0, size_t((call.width + 1) * apart) * sizeof(T));
  for (int64_t t0 = begin, known = begin, t1; t0 < end; t0 = t1) {
    t1 = t0 + kConvTile < end ? t0 + kConvTile : end;
    int64_t const last = t1 + behind < call.length ? t1 + behind : call.length;
    for (int64_t c = 0; c < call.channels; c += kWide) {
      ConvColumn<T> const column = {call, c, int(call.channels - c < kWide ? call.channels - c : kWide)};
      conv_inner(column, b, known, last, rows + (known - t0) * apart + c, apart);
      conv_tile(column, b, t0, t1, rows + c, apart, sums + c);
    }
    known = last;
    memmove(rows, rows + (t1 - t0) * apart, size_t((known - t1) * apart) * sizeof(T));
  }
  T* const to = static_cast<T*>(call.sums) + (b * conv_segments(call) + segment) * (call.width + 1) * call.channels;
  for (int64_t k = 0; k <= call.width; ++k) memcpy(to + k * call.channels, sums + k * apart, size_t(call.channels) * sizeof(T));
}

template <class T>
bool conv_gradient(const ConvCall& call, int threads) {
  constexpr int kWide = kLanes<T>;
  int64_t const apart = (call.channels + kWide - 1) / kWide * kWide, segments = conv_segments(call);
  int64_t const rows = (kConvTile + call.width) * apart;
  bool enough_memory = true;
#pragma omp parallel num_threads(threads)
  {
    ThreadMemory<T> memory(rows + (call.width + 1) * apart);
    if (memory.at == nullptr) {
#pragma omp atomic write
      enough_memory = false;
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < call.batch * segments; ++i) {
      if (memory.at != nullptr) conv_segment(call, i / segments, i % segments, memory.at, memory.at + rows, apart);
    }
  }
  return enough_memory;
}

}  // namespace
}  // namespace medgmae
