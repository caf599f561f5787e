// The causal convolution on CUDA: launches the programs of cuda/conv/blocks.h.
#include "../cuda_common.cuh"
#include "blocks.h"

namespace medgmae {
namespace cuda {
namespace {

template <class T, class IO, int kWidth>
__global__ void convolve_kernel(const ConvCall call) {
  convolve_one<T, IO, kWidth>(call, item());
}

template <class T, class IO, int kWidth>
__global__ void differentiate_kernel(const ConvCall call) {
  differentiate_one<T, IO, kWidth>(call, item());
}

template <class T, class IO>
cudaError_t launch(const ConvCall& call, cudaStream_t stream) {
  bool const usual = call.width == kConvWidth;
  auto const forward = usual ? convolve_kernel<T, IO, kConvWidth> : convolve_kernel<T, IO, 0>;
  auto const backward = usual ? differentiate_kernel<T, IO, kConvWidth> : differentiate_kernel<T, IO, 0>;
  Launcher run = {stream};
  run.items(conv_items(call), 128, call.grad.at == nullptr ? forward : backward, call);
  return run.error;
}

}  // namespace

// Here because all kernels are compiled for the same architectures, and these are the quickest to load.
Status load_kernel() {
  OutsideCapture const outside;
  cudaFuncAttributes attributes;
  return status(cudaFuncGetAttributes(&attributes, convolve_kernel<float, float, kConvWidth>));
}

int64_t causal_conv1d_strip() { return kConvStrip; }

Status causal_conv1d(DType dtype, StreamType type, const ConvCall& call, void* stream) {
  bool known = false;
  cudaError_t error = cudaSuccess;
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    known = dispatch_streams<T>(type, [&](auto number) { error = launch<T, decltype(number)>(call, static_cast<cudaStream_t>(stream)); });
  });
  return status(known ? error : cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace medgmae
