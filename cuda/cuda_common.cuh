// What the CUDA kernel files share: blocks as the programs see them, launches, errors.
#pragma once

#include <cuda_runtime.h>

#include <stdio.h>

#include "cuda_kernels.h"

namespace medgmae {
namespace cuda {

// The status of a call. The runtime also keeps its last error: it is taken from there, or a later launch would report it.
inline Status status(cudaError_t error) {
  Status result = {""};
  if (error != cudaSuccess) {
    cudaGetLastError();
    snprintf(result.text, sizeof(result.text), "%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
  }
  return result;
}

// While it lives, this thread may load kernels though it captures a graph: nothing of that belongs into the graph.
class OutsideCapture {
 public:
  OutsideCapture() { status(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~OutsideCapture() { status(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  OutsideCapture(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Number of this thread in the grid.
__device__ __forceinline__ int64_t item() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// A block of the device, as the programs see it. Where kMostThreads is not 0, the number of the thread, which is below it, is read
// anew after every phase, so that nothing that is made of it occupies a register from phase to phase.
template <class Shared, class State, int kMostThreads = 0>
struct DeviceBlock {
  using Lane = State;
  Shared* shared;
  State state;
  int thread;  // where it is kept, the number of this thread
  template <class Phase>
  __device__ __forceinline__ void lanes(Phase phase) {
    phase(kMostThreads > 0 ? thread : int(threadIdx.x), state);
  }
  template <class Phase>
  __device__ __forceinline__ void each(Phase phase) {
    lanes(phase);
    meet();
  }
  __device__ __forceinline__ void meet() {
    __syncthreads();
    if constexpr (kMostThreads > 0) {
      asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
      __builtin_assume(thread >= 0 && thread < kMostThreads);
    }
  }
  // Of kCount numbers each lane keeps the sums of the lower half, or where its number has the bit, of the upper half.
  template <int kCount, class Values>
  __device__ __forceinline__ void fold(int mask, Values values) {
    auto* const v = values(state);
    constexpr int half = kCount > 1 ? kCount / 2 : 0;
    bool const upper = (threadIdx.x & mask) != 0;
#pragma unroll
    for (int i = 0; i < (kCount + 1) / 2; ++i) {
      auto const sent = upper ? v[i] : v[half + i], kept = upper ? v[half + i] : v[i];
      v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, mask);
    }
  }
};

// A kernel as the runtime's functions take it.
template <class... Arguments>
const void* function(void (*kernel)(Arguments...)) {
  return reinterpret_cast<const void*>(kernel);
}

// Readies a kernel that lives on shared memory for the current device: blocks of so many threads that it holds at once. The driver
// is asked once for each device.
cudaError_t room_for(const void* kernel, int threads, int64_t* room);

// Launches kernels into a stream; keeps the first error.
struct Launcher {
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;
  // So many blocks, if the grid can have them.
  template <class... Arguments>
  void blocks(int64_t blocks, int threads, void (*kernel)(Arguments...), const Arguments&... arguments) {
    if (blocks == 0 || error != cudaSuccess) return;
    if (blocks > INT32_MAX) {
      error = cudaErrorInvalidConfiguration;
      return;
    }
    kernel<<<unsigned(blocks), threads, 0, stream>>>(arguments...);
    error = cudaGetLastError();
  }
  // A thread for each item.
  template <class... Arguments>
  void items(int64_t items, int threads, void (*kernel)(Arguments...), const Arguments&... arguments) {
    blocks((items + threads - 1) / threads, threads, kernel, arguments...);
  }
};

}  // namespace cuda
}  // namespace medgmae
