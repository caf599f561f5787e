// The published way to sum Gaussians on a GPU, rebuilt from its description for a comparison of speed: one thread for one
// Gaussian, which walks alone over the voxels of its box and adds every value with an atomic; the backward walks the same
// way and adds thirteen atomics to the Gaussian's gradients at every voxel. renderer_cuda.py compiles it with nvcc.
//
// Kinder than the original: no allocation, no upload of constants and no synchronisation around a launch.
#include <cuda_runtime.h>

namespace {

struct Box {
  int low[3], high[3];
};

__device__ Box box_of(const float* center, const float* scale, int3 n) {
  int const size[3] = {n.x, n.y, n.z};
  Box box;
  for (int k = 0; k < 3; ++k) {
    float const extent = float(size[k]) * (scale[k] + scale[k]);
    int const low = int(fmaf(float(size[k]), center[k], -extent)), high = int(fmaf(float(size[k]), center[k], extent));
    box.low[k] = max(0, low), box.high[k] = min(size[k] - 1, high);
  }
  return box;
}

// grid: (voxels, 3) positions, read from memory at every pair; precision: (count, 9).
__global__ void scatter(int count, int3 n, const float* centers, const float* scales, const float* precision,
                        const float* densities, const float* grid, float* volume) {
  int const i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float *c = centers + 3 * i, *p = precision + 9 * i;
  Box const box = box_of(c, scales + 3 * i, n);
  for (int z = box.low[0]; z <= box.high[0]; ++z) {
    for (int y = box.low[1]; y <= box.high[1]; ++y) {
      for (int x = box.low[2]; x <= box.high[2]; ++x) {
        int const v = (z * n.y + y) * n.z + x;
        float const d[3] = {grid[3 * v] - c[0], grid[3 * v + 1] - c[1], grid[3 * v + 2] - c[2]};
        float power = 0;
        for (int a = 0; a < 3; ++a) {
          for (int b = 0; b < 3; ++b) power += d[a] * p[3 * a + b] * d[b];
        }
        atomicAdd(volume + v, densities[i] * __expf(-0.5f * power));
      }
    }
  }
}

__global__ void gather(int count, int3 n, const float* centers, const float* scales, const float* precision,
                       const float* densities, const float* grid, const float* cotangent, float* center_grad,
                       float* precision_grad, float* density_grad) {
  int const i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float *c = centers + 3 * i, *p = precision + 9 * i;
  Box const box = box_of(c, scales + 3 * i, n);
  for (int z = box.low[0]; z <= box.high[0]; ++z) {
    for (int y = box.low[1]; y <= box.high[1]; ++y) {
      for (int x = box.low[2]; x <= box.high[2]; ++x) {
        int const v = (z * n.y + y) * n.z + x;
        float const d[3] = {grid[3 * v] - c[0], grid[3 * v + 1] - c[1], grid[3 * v + 2] - c[2]};
        float power = 0;
        for (int a = 0; a < 3; ++a) {
          for (int b = 0; b < 3; ++b) power += d[a] * p[3 * a + b] * d[b];
        }
        float const weight = cotangent[v] * __expf(-0.5f * power), value = weight * densities[i];
        for (int a = 0; a < 3; ++a) {
          float slope = 0;
          for (int b = 0; b < 3; ++b) {
            slope += (p[3 * a + b] + p[3 * b + a]) * d[b];
            atomicAdd(precision_grad + 9 * i + 3 * a + b, -0.5f * value * d[a] * d[b]);
          }
          atomicAdd(center_grad + 3 * i + a, 0.5f * value * slope);
        }
        atomicAdd(density_grad + i, weight);
      }
    }
  }
}

constexpr int kThreads = 256;

}  // namespace

// One sample; a batch is a loop, as published. Addresses are of device memory, the outputs zeroed. Returns the CUDA error.
extern "C" int published_forward(int count, int d, int h, int w, const float* centers, const float* scales, const float* precision,
                                 const float* densities, const float* grid, float* volume, void* stream) {
  scatter<<<(count + kThreads - 1) / kThreads, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      count, make_int3(d, h, w), centers, scales, precision, densities, grid, volume);
  return int(cudaGetLastError());
}

extern "C" int published_backward(int count, int d, int h, int w, const float* centers, const float* scales, const float* precision,
                                  const float* densities, const float* grid, const float* cotangent, float* center_grad,
                                  float* precision_grad, float* density_grad, void* stream) {
  gather<<<(count + kThreads - 1) / kThreads, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      count, make_int3(d, h, w), centers, scales, precision, densities, grid, cotangent, center_grad, precision_grad,
      density_grad);
  return int(cudaGetLastError());
}
