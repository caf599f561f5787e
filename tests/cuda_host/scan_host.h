// The launches of cuda/scan/scan.cu and cuda/conv/conv.cu in their order, for any way of running a block.
#pragma once

#include "../../cuda/conv/blocks.h"
#include "../../cuda/scan/gradient_blocks.h"

namespace medgmae {
namespace {

template <class T, class IO, class Run>
void run_piece(const ScanCall& call, const ScanWork& work, Run run) {
  using Shared = ScanShared<T, kForwardWide>;
  using Lane = ScanLane<T, kForwardWide>;
  int64_t const wide = scan_blocks(call, work, kBlockChannels<T, kForwardWide>);
  int64_t const narrow = scan_blocks(call, work, kBlockChannels<T, kBackwardWide>);
  int64_t const states = call.batch * kPieceStates * call.channels;
  if (call.grad.at == nullptr) {
    if (work.spans > 1) {
      run.template blocks<T, Shared, Lane>(wide, [&](int i, auto& b) { scan_local<T, IO, false>(call, work, i, b); });
      for (int64_t i = 0; i < states + 5; ++i) combine_one<T, false>(call, work, i);
    }
    run.template blocks<T, Shared, Lane>(wide, [&](int i, auto& b) { scan_outputs<T, IO>(call, work, i, b); });
    return;
  }
  if (work.spans > 1) {
    run.template blocks<T, Shared, Lane>(wide, [&](int i, auto& b) { scan_local<T, IO, true>(call, work, i, b); });
    for (int64_t i = 0; i < states + 5; ++i) combine_one<T, true>(call, work, i);
  }
  run.template blocks<T, GradientShared<T>, GradientLane<T>>(
      narrow, [&](int i, auto& b) { scan_gradients<T, IO>(call, work, i, b); });
}

template <class T, class IO, class Run>
void run_scan(const ScanCall& call, ScanWork work, Run run) {
  do {
    run_piece<T, IO>(call, work, run);
    work.first_state += kPieceStates;
  } while (work.first_state < call.states);
  int64_t numbers = 0;
  for (int64_t count : work.counts) numbers += count;
  if (work.spans != 1) {
    for (int64_t i = 0; i < numbers + 5; ++i) sum_one<T>(work, i);
  }
}

template <class T, class IO, int kWidth>
void run_conv_of(const ConvCall& call) {
  for (int64_t i = 0; i < conv_items(call) + 5; ++i) {
    if (call.grad.at == nullptr) {
      convolve_one<T, IO, kWidth>(call, i);
    } else {
      differentiate_one<T, IO, kWidth>(call, i);
    }
  }
}

template <class T, class IO>
void run_conv(const ConvCall& call) {
  if (call.width == kConvWidth) {
    run_conv_of<T, IO, kConvWidth>(call);
  } else {
    run_conv_of<T, IO, 0>(call);
  }
}

}  // namespace
}  // namespace medgmae
