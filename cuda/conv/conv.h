// The causal convolution of one filter per channel: what a call is.
//
//   out[t] = act(bias + sum over k < width of weight[k] x[t - (width - 1) + k])
//
// x, out and their gradients are streams.
#pragma once

#include "../streams.h"

namespace medgmae {

// Steps over which the gradients of weight and bias are summed at a time.
constexpr int kConvSegment = 256;

// The dtype of the call is that of weight and bias and of the computation; the streams have it too, or on CUDA bfloat16 or float16.
struct ConvCall {
  int64_t batch, length, channels, width;
  bool silu;
  Stream x, out;
  const void *weight, *bias;  // (width, channels), channels side by side; (channels) or null
  // Backward, if grad.at is set: grad is read, dx written, and `sums`, (batch, segments, width + 1, channels), gets the gradients
  // of the weight and, last, of the bias, per segment of time; the caller adds them up in order.
  Stream grad, dx;
  void* sums;
};

static inline int64_t conv_segments(const ConvCall& call) { return (call.length + kConvSegment - 1) / kConvSegment; }

}  // namespace medgmae
