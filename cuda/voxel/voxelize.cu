// The renderer on CUDA: launches the programs of cuda/voxel/blocks.h and cuda/voxel/moments.h.
#include "../cuda_common.cuh"
#include "moments.h"

namespace medgmae {
namespace cuda {
namespace {

// A block of the device, as the programs see it.
template <class Shared, class State>
struct DeviceBlock {
  Shared* shared;
  State state;
  template <class Phase>
  __device__ __forceinline__ void each(Phase phase) {
    phase(int(threadIdx.x), state);
    __syncthreads();
  }
};

__device__ __forceinline__ int64_t item() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

template <class T>
__global__ void prepare_kernel(const VoxelizeCall call, const VoxelizeWork work) {
  prepare_one<T>(call, work, item());
}

__global__ void mask_kernel(const VoxelizeCall call, const VoxelizeWork work) { mask_one(call, work, item()); }

// Blocks of a kernel that a multiprocessor holds at once: as many as the registers allow in float32 without spilling.
template <class T>
constexpr int kRenderBlocks = sizeof(T) == 4 ? 12 : 7;
template <class T>
constexpr int kMomentBlocks = sizeof(T) == 4 ? 8 : 5;

template <class T>
__global__ void __launch_bounds__(kThreads, kRenderBlocks<T>) render_kernel(const VoxelizeCall call, const VoxelizeWork work) {
  __shared__ RenderShared<T> shared;
  DeviceBlock<RenderShared<T>, RenderThread<T>> block = {&shared, {}};
  render_tile<T>(call, work, blockIdx.x, block);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kMomentBlocks<T>) moment_kernel(const VoxelizeCall call, const VoxelizeWork work) {
  __shared__ MomentShared<T> shared;
  DeviceBlock<MomentShared<T>, MomentThread<T>> block = {&shared, {}};
  sum_moments<T>(call, work, blockIdx.x, block);
}

template <class T>
__global__ void finish_kernel(const VoxelizeCall call, const VoxelizeWork work) {
  finish_one<T>(call, work, item());
}

using Kernel = void (*)(VoxelizeCall, VoxelizeWork);

// Launches `blocks` blocks, if the grid can have so many; keeps the first error.
struct Launcher {
  const VoxelizeCall& call;
  const VoxelizeWork& work;
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
  void items(Kernel kernel, int64_t items, int threads) { blocks(kernel, (items + threads - 1) / threads, threads); }
};

template <class T>
cudaError_t launch(const VoxelizeCall& call, const VoxelizeWork& work, cudaStream_t stream) {
  Launcher run = {call, work, stream, cudaSuccess};
  int64_t const all = call.batch * call.count;
  // Double precision in few threads: small blocks spread over more of the device.
  run.items(prepare_kernel<T>, all, 32);
  if (call.grad == nullptr) {
    run.items(mask_kernel, call.batch * call.patches * work.regions * work.words, kThreads);
    run.blocks(render_kernel<T>, call.batch * call.patches * all_pieces(call, tile_sides()), kThreads);
  } else {
    run.blocks(moment_kernel<T>, all * work.shares, kThreads);
    run.items(finish_kernel<T>, all, 32);
  }
  return run.error;
}

}  // namespace

int64_t voxelize_workspace(const VoxelizeCall& call) { return divide_workspace(call, call.grad != nullptr, nullptr).bytes; }

Status voxelize(DType dtype, const VoxelizeCall& call, void* workspace, void* stream) {
  VoxelizeWork const work = divide_workspace(call, call.grad != nullptr, workspace);
  cudaError_t error = cudaErrorInvalidValue;
  // The programs count Gaussians and patches of a sample in 32 bits.
  if (call.count > INT32_MAX / 2 || call.patches > INT32_MAX / 2) return status(cudaErrorInvalidConfiguration);
  dispatch(dtype, [&](auto zero) { error = launch<decltype(zero)>(call, work, static_cast<cudaStream_t>(stream)); });
  return status(error);
}

}  // namespace cuda
}  // namespace medgmae
