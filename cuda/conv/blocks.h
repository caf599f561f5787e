// The causal convolution on CUDA: a thread has one channel for a strip of steps, neighbouring threads have neighbouring channels.
// Written for the device and, so that tests can run the same arithmetic without one, for the host.
#pragma once

#include "../half.h"
#include "conv.h"

namespace medgmae {

constexpr int kConvStrip = 32;  // steps of a thread
constexpr int kConvGroup = 8;   // steps whose numbers are on their way at a time
constexpr int kConvWidth = 4;   // the width of the published models, which has a kernel of its own

MEDGMAE_HD int64_t conv_items(const ConvCall& call) {
  return call.batch * ((call.length + kConvStrip - 1) / kConvStrip) * call.channels;
}

// The channel and the steps [start, stop) of a thread.
struct ConvStrip {
  int64_t b, strip, start, stop, channel;
  MEDGMAE_MEMBER ConvStrip(const ConvCall& call, int64_t item) {
    int64_t const strips = (call.length + kConvStrip - 1) / kConvStrip;
    channel = item % call.channels, strip = item / call.channels % strips, b = item / call.channels / strips;
    start = strip * kConvStrip;
    stop = call.length - start < kConvStrip ? call.length : start + kConvStrip;
  }
};

// A channel of a stream in one sample; zero before its first step and behind its last.
template <class T, class IO>
struct ConvColumn {
  const IO* at;
  int64_t step, length;
  MEDGMAE_MEMBER ConvColumn(const ConvCall& call, const Stream& s, const ConvStrip& mine)
      : at(static_cast<const IO*>(s.at) + mine.b * s.batch + mine.channel), step(s.step), length(call.length) {}
  MEDGMAE_MEMBER T operator()(int64_t t) const { return t >= 0 && t < length ? T(widen(at[t * step])) : T(0); }
};

// The taps of a channel: in registers for kWidth of them, read when needed for any number (kWidth = 0).
template <class T, int kWidth>
struct ConvTaps {
  const T* at;
  int64_t stride;
  int width;
  T taps[kWidth > 0 ? kWidth : 1];
  MEDGMAE_MEMBER ConvTaps(const ConvCall& call, int64_t channel)
      : at(static_cast<const T*>(call.weight) + channel), stride(call.channels), width(int(call.width)) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) taps[k] = at[k * stride];
  }
  MEDGMAE_MEMBER T operator[](int k) const { return kWidth > 0 ? taps[k] : at[k * stride]; }
};

// The gradient before the activation, whose input is y.
template <class T>
MEDGMAE_DEVICE T before_silu(T grad, T y) {
  T const open = sigmoid(y);
  return grad * (open * (1 + y * (1 - open)));
}

template <class T>
MEDGMAE_DEVICE T conv_bias(const ConvCall& call, int64_t channel) {
  return call.bias == nullptr ? T(0) : static_cast<const T*>(call.bias)[channel];
}

template <class T, class IO, int kWidth>
MEDGMAE_DEVICE void convolve_one(const ConvCall& call, int64_t item) {
  if (item >= conv_items(call)) return;
  ConvStrip const mine(call, item);
  ConvColumn<T, IO> const x(call, call.x, mine);
  ConvTaps<T, kWidth> const taps(call, mine.channel);
  T const bias = conv_bias<T>(call, mine.channel);
  IO* out = static_cast<IO*>(call.out.at) + mine.b * call.out.batch + mine.start * call.out.step + mine.channel;
  T window[kConvGroup + kWidth];
#pragma unroll
  for (int k = 0; k < kWidth - 1; ++k) window[k] = x(mine.start - (kWidth - 1) + k);
  for (int64_t t = mine.start; t < mine.stop; t += kConvGroup) {
#pragma unroll
    for (int i = 0; kWidth > 0 && i < kConvGroup; ++i) window[kWidth - 1 + i] = x(t + i);
#pragma unroll
    for (int i = 0; i < kConvGroup; ++i) {
      if (t + i >= mine.stop) break;
      T y = bias;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) y += taps[k] * window[i + k];
      for (int k = 0; kWidth == 0 && k < taps.width; ++k) y += taps[k] * x(t + i - (taps.width - 1) + k);
      narrow(call.silu ? y * sigmoid(y) : y, out);
      out += call.out.step;
    }
#pragma unroll
    for (int k = 0; k < kWidth - 1; ++k) window[k] = window[kConvGroup + k];
  }
}

// The convolution at one step.
template <class T, class IO>
MEDGMAE_DEVICE T filtered_at(const ConvColumn<T, IO>& x, const ConvTaps<T, 0>& taps, T bias, int64_t t) {
  T y = bias;
  for (int k = 0; k < taps.width; ++k) y += taps[k] * x(t - (taps.width - 1) + k);
  return y;
}

// Gradients for any width: taps and gradients are computed anew wherever they are needed.
template <class T, class IO>
MEDGMAE_DEVICE void conv_gradient_any(const ConvCall& call, const ConvStrip& mine, T* sums) {
  ConvColumn<T, IO> const x(call, call.x, mine), grad(call, call.grad, mine);
  ConvTaps<T, 0> const taps(call, mine.channel);
  T const bias = conv_bias<T>(call, mine.channel);
  auto gradient = [&](int64_t t) { return call.silu && t < call.length ? before_silu(grad(t), filtered_at(x, taps, bias, t)) : grad(t); };
  IO* const dx = static_cast<IO*>(call.dx.at) + mine.b * call.dx.batch + mine.channel;
  for (int k = 0; k <= taps.width; ++k) {
    T sum = 0;
    for (int64_t t = mine.start; t < mine.stop; ++t) sum += gradient(t) * (k < taps.width ? x(t - (taps.width - 1) + k) : T(1));
    sums[k * call.channels] = sum;
  }
  for (int64_t t = mine.start; t < mine.stop; ++t) {
    T sum = 0;
    for (int k = 0; k < taps.width; ++k) sum += taps[k] * gradient(t + (taps.width - 1) - k);
    narrow(sum, dx + t * call.dx.step);
  }
}

// Gradients for kWidth taps: dx[t] is written kWidth - 1 steps late, when all that it needs is there.
template <class T, class IO, int kWidth>
MEDGMAE_DEVICE void conv_gradient_of(const ConvCall& call, const ConvStrip& mine, T* sums) {
  constexpr int kLate = kWidth - 1;
  ConvColumn<T, IO> const x(call, call.x, mine), grad(call, call.grad, mine);
  ConvTaps<T, kWidth> const taps(call, mine.channel);
  T const bias = conv_bias<T>(call, mine.channel);
  IO* const dx = static_cast<IO*>(call.dx.at) + mine.b * call.dx.batch + mine.channel;
  T window[kConvGroup + kLate], g[kConvGroup + kLate], dw[kWidth + 1] = {};
#pragma unroll
  for (int k = 0; k < kLate; ++k) window[k] = x(mine.start - kLate + k), g[k] = 0;
  for (int64_t t = mine.start; t < mine.stop + kLate; t += kConvGroup) {
#pragma unroll
    for (int i = 0; i < kConvGroup; ++i) window[kLate + i] = x(t + i), g[kLate + i] = t + i < mine.stop + kLate ? grad(t + i) : T(0);
#pragma unroll
    for (int i = 0; i < kConvGroup; ++i) {
      T y = bias, back = 0;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) y += taps[k] * window[i + k];
      if (call.silu && t + i < call.length) g[kLate + i] = before_silu(g[kLate + i], y);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) back += taps[k] * g[kLate + i - k];
      int64_t const late = t + i - kLate;
      if (late >= mine.start && late < mine.stop) narrow(back, dx + late * call.dx.step);
      if (t + i >= mine.stop) continue;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) dw[k] += g[kLate + i] * window[i + k];
      dw[kWidth] += g[kLate + i];
    }
#pragma unroll
    for (int k = 0; k < kLate; ++k) window[k] = window[kConvGroup + k], g[k] = g[kConvGroup + k];
  }
#pragma unroll
  for (int k = 0; k <= kWidth; ++k) sums[k * call.channels] = dw[k];
}

template <class T, class IO, int kWidth>
MEDGMAE_DEVICE void differentiate_one(const ConvCall& call, int64_t item) {
  if (item >= conv_items(call)) return;
  ConvStrip const mine(call, item);
  int64_t const strips = (call.length + kConvStrip - 1) / kConvStrip;
  T* const sums = static_cast<T*>(call.sums) + (mine.b * strips + mine.strip) * (call.width + 1) * call.channels + mine.channel;
  if constexpr (kWidth > 0) {
    conv_gradient_of<T, IO, kWidth>(call, mine, sums);
  } else {
    conv_gradient_any<T, IO>(call, mine, sums);
  }
}

}  // namespace medgmae
