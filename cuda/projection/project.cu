// The projector on CUDA: launches the programs of cuda/projection/blocks.h and cuda/projection/gradient_blocks.h.
#include "../cuda_common.cuh"
#include "gradient_blocks.h"

namespace medgmae {
namespace cuda {
namespace {

template <class T>
__global__ void whiten_kernel(const ProjectCall call, const ProjectWork work) {
  whiten_one<T>(call, work, item());
}

template <class T>
__global__ void box_kernel(const ProjectCall call, const ProjectWork work) {
  box_one<T>(call, work, item());
}

__global__ void mask_project_kernel(const ProjectCall call, const ProjectWork work) { mask_project_one(call, work, item()); }

template <class T>
__global__ void weigh_kernel(const ProjectCall call, const ProjectWork work) {
  weigh_one<T>(call, work, item());
}

template <class T>
__global__ void __launch_bounds__(kTileThreads) tile_kernel(const ProjectCall call, const ProjectWork work) {
  __shared__ TileShared<T> shared;
  DeviceBlock<TileShared<T>, TileThread<T>> block = {&shared, {}};
  project_onto_tile<T>(call, work, blockIdx.x, block);
}

template <class T>
__global__ void __launch_bounds__(kMomentThreads) project_moment_kernel(const ProjectCall call, const ProjectWork work) {
  __shared__ ProjectMomentShared<T> shared;
  DeviceBlock<ProjectMomentShared<T>, ProjectMomentThread<T>> block = {&shared, {}};
  sum_project_moments<T>(call, work, blockIdx.x, block);
}

template <class T>
__global__ void finish_project_kernel(const ProjectCall call, const ProjectWork work) {
  finish_project_one<T>(call, work, item());
}

template <class T>
cudaError_t launch(const ProjectCall& call, const ProjectWork& work, cudaStream_t stream) {
  Launcher run = {stream};
  int64_t const gaussians = call.batch * call.count, views = call.batch * call.views, shadows = views * call.count;
  // Double precision in few threads: small blocks spread over more of the device.
  run.items(gaussians, 32, whiten_kernel<T>, call, work);
  run.items(shadows, 32, box_kernel<T>, call, work);
  if (call.grad == nullptr) {
    run.items(views * work.regions * work.words, kTileThreads, mask_project_kernel, call, work);
    run.blocks(views * all_tiles(call, kTileSide), kTileThreads, tile_kernel<T>, call, work);
  } else {
    run.items(views * call.rows * call.columns, 256, weigh_kernel<T>, call, work);
    run.blocks(shadows, kMomentThreads, project_moment_kernel<T>, call, work);
    run.items(gaussians, 32, finish_project_kernel<T>, call, work);
  }
  return run.error;
}

int64_t element_of(DType dtype) { return dtype == DType::float32 ? 4 : 8; }

}  // namespace

int64_t project_workspace(DType dtype, const ProjectCall& call) {
  return divide_project_workspace(call, element_of(dtype), nullptr).bytes;
}

Status project(DType dtype, const ProjectCall& call, void* workspace, void* stream) {
  ProjectWork const work = divide_project_workspace(call, element_of(dtype), workspace);
  cudaError_t error = cudaErrorInvalidValue;
  // The programs count Gaussians of a set in 32 bits.
  if (call.count > INT32_MAX / 2) return status(cudaErrorInvalidConfiguration);
  dispatch(dtype, [&](auto zero) { error = launch<decltype(zero)>(call, work, static_cast<cudaStream_t>(stream)); });
  return status(error);
}

}  // namespace cuda
}  // namespace medgmae
