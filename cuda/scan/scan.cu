// The selective scan on CUDA: launches the programs of cuda/scan/blocks.h and cuda/scan/gradient_blocks.h.
#include "../cuda_common.cuh"
#include "gradient_blocks.h"

namespace medgmae {
namespace cuda {
namespace {

template <class Shared, class State>
using ScanDeviceBlock = DeviceBlock<Shared, State, 128>;

// Blocks of a kernel that a multiprocessor is to hold at least, for which it gives up registers; fewer in double precision, and
// where shared memory or registers hold fewer without spilling. How many it does hold is asked at run time.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kBackwardLeast = __CUDA_ARCH__ == 800 ? 3 : __CUDA_ARCH__ == 750 ? 1 : 2;
#else
constexpr int kBackwardLeast = 4;
#endif
template <class T>
constexpr int kForwardRoom = sizeof(T) == 4 ? 5 : 4;
template <class T>
constexpr int kBackwardRoom = sizeof(T) == 4 ? kBackwardLeast : 1;

template <class T, class IO, bool kBack>
__global__ void __launch_bounds__(kScanThreads<T>, kForwardRoom<T>) local_kernel(const ScanCall call, const ScanWork work) {
  __shared__ ScanShared<T, kForwardWide> shared;
  ScanDeviceBlock<ScanShared<T, kForwardWide>, ScanLane<T, kForwardWide>> block = {&shared, {}, int(threadIdx.x)};
  scan_local<T, IO, kBack>(call, work, int(blockIdx.x), block);
}

template <class T, bool kBack>
__global__ void combine_kernel(const ScanCall call, const ScanWork work) {
  combine_one<T, kBack>(call, work, item());
}

template <class T, class IO>
__global__ void __launch_bounds__(kScanThreads<T>, kForwardRoom<T>) output_kernel(const ScanCall call, const ScanWork work) {
  __shared__ ScanShared<T, kForwardWide> shared;
  ScanDeviceBlock<ScanShared<T, kForwardWide>, ScanLane<T, kForwardWide>> block = {&shared, {}, int(threadIdx.x)};
  scan_outputs<T, IO>(call, work, int(blockIdx.x), block);
}

template <class T, class IO>
__global__ void __launch_bounds__(kScanThreads<T>, kBackwardRoom<T>) gradient_kernel(const ScanCall call, const ScanWork work) {
  __shared__ GradientShared<T> shared;
  ScanDeviceBlock<GradientShared<T>, GradientLane<T>> block = {&shared, {}, int(threadIdx.x)};
  scan_gradients<T, IO>(call, work, int(blockIdx.x), block);
}

template <class T>
__global__ void sum_kernel(const ScanCall call, const ScanWork work) {
  sum_one<T>(work, item());
}

// The launches for 16 states.
template <class T, class IO>
void launch_piece(const ScanCall& call, const ScanWork& work, Launcher* run) {
  constexpr int threads = kScanThreads<T>;
  int64_t const wide = scan_blocks(call, work, kBlockChannels<T, kForwardWide>);
  int64_t const states = call.batch * kPieceStates * call.channels;
  bool const split = work.spans > 1;
  if (call.grad.at == nullptr) {
    if (split) run->blocks(wide, threads, local_kernel<T, IO, false>, call, work);
    if (split) run->items(states, 64, combine_kernel<T, false>, call, work);
    run->blocks(wide, threads, output_kernel<T, IO>, call, work);
  } else {
    if (split) run->blocks(wide, threads, local_kernel<T, IO, true>, call, work);
    if (split) run->items(states, 64, combine_kernel<T, true>, call, work);
    int64_t const narrow = scan_blocks(call, work, kBlockChannels<T, kBackwardWide>);
    run->blocks(narrow, threads, gradient_kernel<T, IO>, call, work);
  }
}

template <class T, class IO>
cudaError_t launch(const ScanCall& call, ScanWork work, cudaStream_t stream) {
  Launcher run = {stream};
  do {
    launch_piece<T, IO>(call, work, &run);
    work.first_state += kPieceStates;
  } while (work.first_state < call.states);
  int64_t numbers = 0;
  for (int64_t count : work.counts) numbers += count;
  if (work.spans != 1) run.items(numbers, 128, sum_kernel<T>, call, work);
  return run.error;
}

// Blocks that the current device holds at once, of every kernel of a pass that has one for a slab of channels and a span of time.
template <class T, class IO>
cudaError_t find_room(bool backward, int64_t* room) {
  const void* const forward_kernels[] = {function(local_kernel<T, IO, false>), function(output_kernel<T, IO>)};
  const void* const backward_kernels[] = {function(local_kernel<T, IO, true>), function(gradient_kernel<T, IO>)};
  *room = INT64_MAX;
  for (const void* kernel : backward ? backward_kernels : forward_kernels) {
    int64_t fitting = 0;
    cudaError_t const error = room_for(kernel, kScanThreads<T>, &fitting);
    if (error != cudaSuccess) return error;
    *room = fitting < *room ? fitting : *room;
  }
  return cudaSuccess;
}

// Calls body(zero, number, room) for the types of a call: that of the computation and that of its streams.
template <class Body>
cudaError_t with_room(DType dtype, StreamType type, const ScanCall& call, Body body) {
  cudaError_t error = cudaErrorInvalidValue;  // no kernel for these types
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    dispatch_streams<T>(type, [&](auto number) {
      int64_t room = 0;
      error = find_room<T, decltype(number)>(call.grad.at != nullptr, &room);
      if (error == cudaSuccess) error = body(zero, number, room);
    });
  });
  return error;
}

}  // namespace

int64_t selective_scan_slab(DType dtype) {
  return dtype == DType::float64 ? kBlockChannels<double, kBackwardWide> : kBlockChannels<float, kBackwardWide>;
}

Status selective_scan_workspace(DType dtype, StreamType type, const ScanCall& call, int64_t* bytes) {
  return status(with_room(dtype, type, call, [&](auto zero, auto, int64_t room) {
    *bytes = divide_scan_workspace<decltype(zero)>(call, call.grad.at != nullptr, room, nullptr).bytes;
    return cudaSuccess;
  }));
}

Status selective_scan(DType dtype, StreamType type, const ScanCall& call, void* workspace, void* stream) {
  bool const backward = call.grad.at != nullptr;
  if (!scan_is_small(call) || (backward && call.chunk > kLongestChunk)) return status(cudaErrorInvalidValue);
  return status(with_room(dtype, type, call, [&](auto zero, auto number, int64_t room) {
    using T = decltype(zero);
    ScanWork const work = divide_scan_workspace<T>(call, backward, room, workspace);
    return launch<T, decltype(number)>(call, work, static_cast<cudaStream_t>(stream));
  }));
}

}  // namespace cuda
}  // namespace medgmae
