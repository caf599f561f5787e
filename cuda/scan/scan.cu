// The selective scan on CUDA: launches the programs of cuda/scan/blocks.h and cuda/scan/gradient_blocks.h.
#include "../cuda_common.cuh"
#include "gradient_blocks.h"

namespace medgmae {
namespace cuda {
namespace {

// A block of the device, as the programs see it.
template <class Shared, class State>
struct DeviceBlock {
  using Lane = State;
  Shared* shared;
  State state;
  int thread;
  template <class Phase>
  __device__ __forceinline__ void lanes(Phase phase) {
    phase(thread, state);
  }
  template <class Phase>
  __device__ __forceinline__ void each(Phase phase) {
    phase(thread, state);
    meet();
  }
  // The number of the thread is read anew, so that nothing that is made of it occupies a register from phase to phase.
  __device__ __forceinline__ void meet() {
    __syncthreads();
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    __builtin_assume(thread >= 0 && thread < 128);
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

__device__ __forceinline__ int64_t item() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// Blocks of a kernel that a multiprocessor should hold at once, for which it gives up registers; in the general kernels fewer.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kBackwardFew = __CUDA_ARCH__ == 800 ? 3 : __CUDA_ARCH__ == 750 ? 1 : 2;  // for shared memory, or registers
#else
constexpr int kBackwardFew = kBackwardBlocks;
#endif
template <class T, bool kConstant>
constexpr int kForwardRoom = sizeof(T) == 4 && !kConstant ? kForwardBlocks : 4;
template <class T, bool kConstant>
constexpr int kBackwardRoom = sizeof(T) == 4 && !kConstant ? kBackwardFew : 1;

template <class T, class IO, bool kConstant, bool kBack>
__global__ void __launch_bounds__(kScanThreads<T>, kForwardRoom<T, kConstant>) local_kernel(const ScanCall call, const ScanWork work) {
  __shared__ ScanShared<T, kForwardWide> shared;
  DeviceBlock<ScanShared<T, kForwardWide>, ScanLane<T, kForwardWide>> block = {&shared, {}, int(threadIdx.x)};
  scan_local<T, IO, kConstant, kBack>(call, work, int(blockIdx.x), block);
}

template <class T, bool kBack>
__global__ void combine_kernel(const ScanCall call, const ScanWork work) {
  combine_one<T, kBack>(call, work, item());
}

template <class T, class IO, bool kConstant>
__global__ void __launch_bounds__(kScanThreads<T>, kForwardRoom<T, kConstant>) output_kernel(const ScanCall call, const ScanWork work) {
  __shared__ ScanShared<T, kForwardWide> shared;
  DeviceBlock<ScanShared<T, kForwardWide>, ScanLane<T, kForwardWide>> block = {&shared, {}, int(threadIdx.x)};
  scan_outputs<T, IO, kConstant>(call, work, int(blockIdx.x), block);
}

template <class T, class IO, bool kConstant>
__global__ void __launch_bounds__(kScanThreads<T>, kBackwardRoom<T, kConstant>) gradient_kernel(const ScanCall call, const ScanWork work) {
  __shared__ GradientShared<T> shared;
  DeviceBlock<GradientShared<T>, GradientLane<T>> block = {&shared, {}, int(threadIdx.x)};
  scan_gradients<T, IO, kConstant>(call, work, int(blockIdx.x), block);
}

template <class T>
__global__ void sum_kernel(const ScanCall call, const ScanWork work) {
  sum_one<T>(work, item());
}

using Kernel = void (*)(ScanCall, ScanWork);

// Launches `blocks` blocks, if the grid can have so many; keeps the first error.
struct Launcher {
  const ScanCall& call;
  ScanWork work;
  cudaStream_t stream;
  cudaError_t error;
  void blocks(Kernel kernel, int64_t blocks, int threads) {
    if (blocks == 0 || error != cudaSuccess) return;
    if (blocks > INT32_MAX) {
      error = cudaErrorInvalidConfiguration;
      return;
    }
    kernel<<<unsigned(blocks), threads, 0, stream>>>(call, work);
    error = cudaGetLastError();
  }
  // Rather than first cache: as many blocks as fit are to be there at once.
  void prefer_shared_memory(Kernel kernel) {
    if (error != cudaSuccess) return;
    const void* const function = reinterpret_cast<const void*>(kernel);
    error = cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  void items(Kernel kernel, int64_t items, int threads) { blocks(kernel, (items + threads - 1) / threads, threads); }
};

// The launches for 16 states.
template <class T, class IO, bool kConstant>
void launch_piece(const ScanCall& call, Launcher* run) {
  int64_t const wide = scan_blocks(call, run->work, kBlockChannels<T, kForwardWide>);
  int64_t const states = call.batch * kPieceStates * call.channels;
  bool const split = run->work.spans > 1;
  if (call.grad.at == nullptr) {
    if (split) run->blocks(local_kernel<T, IO, kConstant, false>, wide, kScanThreads<T>);
    if (split) run->items(combine_kernel<T, false>, states, 64);
    run->blocks(output_kernel<T, IO, kConstant>, wide, kScanThreads<T>);
  } else {
    if (split) run->blocks(local_kernel<T, IO, kConstant, true>, wide, kScanThreads<T>);
    if (split) run->items(combine_kernel<T, true>, states, 64);
    int64_t const narrow = scan_blocks(call, run->work, kBlockChannels<T, kBackwardWide>);
    run->prefer_shared_memory(gradient_kernel<T, IO, kConstant>);
    run->blocks(gradient_kernel<T, IO, kConstant>, narrow, kScanThreads<T>);
  }
}

template <class T, class IO>
cudaError_t launch(const ScanCall& call, const ScanWork& work, cudaStream_t stream) {
  Launcher run = {call, work, stream, cudaSuccess};
  bool const constant = call.B.constant || call.C.constant;
  if (constant && sizeof(IO) != sizeof(T)) return cudaErrorInvalidValue;  // Python widens the streams
  do {
    // Double precision has the general kernels only, 16 bits those without constants only: fewer to compile.
    if constexpr (sizeof(IO) == sizeof(T)) {
      if (constant || sizeof(T) == 8) launch_piece<T, IO, true>(call, &run);
    }
    if constexpr (sizeof(T) == 4) {
      if (!constant) launch_piece<T, IO, false>(call, &run);
    }
    run.work.first_state += kPieceStates;
  } while (run.work.first_state < call.states);
  int64_t numbers = 0;
  for (int64_t count : work.counts) numbers += count;
  if (work.spans != 1) run.items(sum_kernel<T>, numbers, 128);
  return run.error;
}

// Blocks that the current device holds at once; asking does not wait for it.
template <class T>
cudaError_t find_room(bool backward, int64_t* room) {
  int device = 0, multiprocessors = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  int const system = 1024;  // of each block
  int const needed = system + int(backward ? sizeof(GradientShared<T>) : sizeof(ScanShared<T, kForwardWide>));
  int const most = backward ? kBackwardBlocks : kForwardBlocks, fitting = bytes / needed;
  *room = int64_t(multiprocessors) * (fitting < most ? fitting : most);
  return error;
}

}  // namespace

Status selective_scan_workspace(DType dtype, const ScanCall& call, int64_t* bytes) {
  bool const backward = call.grad.at != nullptr;
  cudaError_t error = cudaSuccess;
  bool const known = dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t room = 0;
    error = find_room<T>(backward, &room);
    *bytes = divide_scan_workspace<T>(call, backward, room, nullptr).bytes;
  });
  return status(known ? error : cudaErrorInvalidValue);
}

Status selective_scan(DType dtype, StreamType type, const ScanCall& call, void* workspace, void* stream) {
  bool const backward = call.grad.at != nullptr;
  if (!scan_is_small(call) || (backward && call.chunk > kLongestChunk)) return status(cudaErrorInvalidValue);
  bool known = false;
  cudaError_t error = cudaSuccess;
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t room = 0;
    error = find_room<T>(backward, &room);
    if (error != cudaSuccess) return;
    ScanWork const work = divide_scan_workspace<T>(call, backward, room, workspace);
    known = dispatch_streams<T>(type, [&](auto number) {
      error = launch<T, decltype(number)>(call, work, static_cast<cudaStream_t>(stream));
    });
  });
  return status(known || error != cudaSuccess ? error : cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace medgmae
