// The renderer on CUDA: launches the programs of cuda/voxel/blocks.h and cuda/voxel/moments.h.
#include "../cuda_common.cuh"
#include "moments.h"

namespace medgmae {
namespace cuda {
namespace {

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

template <class T>
cudaError_t launch(const VoxelizeCall& call, const VoxelizeWork& work, cudaStream_t stream) {
  Launcher run = {stream};
  int64_t const all = call.batch * call.count;
  // Double precision in few threads: small blocks spread over more of the device.
  run.items(all, 32, prepare_kernel<T>, call, work);
  if (call.grad == nullptr) {
    run.items(call.batch * call.patches * work.regions * work.words, kThreads, mask_kernel, call, work);
    run.blocks(call.batch * call.patches * all_pieces(call, tile_sides()), kThreads, render_kernel<T>, call, work);
  } else {
    run.blocks(all * work.shares, kThreads, moment_kernel<T>, call, work);
    run.items(all, 32, finish_kernel<T>, call, work);
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
