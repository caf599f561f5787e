// What the CUDA kernel files share.
#pragma once

#include <cuda_runtime.h>

#include <stdio.h>

#include "cuda_kernels.h"

namespace medgmae {
namespace cuda {

inline Status status(cudaError_t error) {
  Status result = {""};
  if (error != cudaSuccess) {
    snprintf(result.text, sizeof(result.text), "%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
  }
  return result;
}

// Blocks for n items, one grid-stride loop each; enough to fill any device, and under every limit of a grid.
inline unsigned blocks_for(int64_t n, int threads_per_block) {
  int64_t const blocks = (n + threads_per_block - 1) / threads_per_block;
  return static_cast<unsigned>(blocks < 65535 ? blocks : 65535);
}

}  // namespace cuda
}  // namespace medgmae
