// The selective scan on CUDA: launches the programs of cuda/scan/blocks.h and cuda/scan/gradient_blocks.h.
#include "../cuda_common.cuh"
#include "gradient_blocks.h"

namespace medgmae {
namespace cuda {
namespace {

template <class Shared, class State>
using ScanDeviceBlock = DeviceBlock<Shared, State, 128>;

// Blocks of a kernel that a multiprocessor should hold at once, for which it gives up registers; fewer in double precision.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kBackwardFew = __CUDA_ARCH__ == 800 ? 3 : __CUDA_ARCH__ == 750 ? 1 : 2;  // for shared memory, or registers
#else
constexpr int kBackwardFew = kBackwardBlocks;
#endif
template <class T>
constexpr int kForwardRoom = sizeof(T) == 4 ? kForwardBlocks : 4;
template <class T>
constexpr int kBackwardRoom = sizeof(T) == 4 ? kBackwardFew : 1;

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
    run->prefer_shared_memory(gradient_kernel<T, IO>);
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
