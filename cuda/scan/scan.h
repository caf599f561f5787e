// The selective scan: what a call is, and the arithmetic of one channel and one step, written once for host and device.
//
//   s = softplus(delta + bias)   a = exp(s A)   h = a h + s u B   y = C . h + D u   out = y silu(z)
//
// u, delta, z, out and their gradients are streams.
#pragma once

#include "../streams.h"

namespace medgmae {

// B or C: (b, t, group, n) is at[b * batch + t * step + group * of_group + n]. Matrices that do not depend on time have no kernels.
struct ScanMatrix {
  void* at;
  int64_t batch, step, of_group;
};

// One scan of `length` steps, forward or backward. The dtype of the call is that of A, D and bias and of the computation; the
// streams and the matrices have it too, or on CUDA bfloat16 or float16. Null pointers stand for what is absent.
struct ScanCall {
  int64_t batch, length, channels, states, groups;
  int64_t chunk;  // steps between kept states
  bool softplus;
  Stream u, delta, z;
  ScanMatrix B, C;
  const void *A, *D, *bias;  // (channels, states), (channels), (channels)
  // Forward: written. Backward: read. The state after each chunk, (batch, chunks, states, channels).
  void* kept;
  Stream out;  // forward only
  // Backward only. grad is read, grad_state (batch, states, channels) too; the rest is written.
  Stream grad, du, ddelta, dz;
  const void* grad_state;
  void *dA, *dD, *dbias;  // per batch: (batch, channels, states), (batch, channels), (batch, channels); the caller sums them
  // Gradients of B and C, dense: (parts, batch, length, groups, states) of partial sums over slabs of channels, which the caller
  // adds up in order.
  void *dB, *dC;
};

// Channels of a group over which the CPU sums the gradients of B and C.
constexpr int kScanSlab = 64;
static inline int64_t scan_slabs(const ScanCall& call) { return (call.channels / call.groups + kScanSlab - 1) / kScanSlab; }

MEDGMAE_HD int64_t scan_chunks(const ScanCall& call) { return (call.length + call.chunk - 1) / call.chunk; }

}  // namespace medgmae
