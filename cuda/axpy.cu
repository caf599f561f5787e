#include "axpy.h"
#include "cuda_common.cuh"

namespace medgmae {
namespace cuda {
namespace {

template <class T>
__global__ void axpy_kernel(int64_t n, T a, const T* __restrict__ x, T* __restrict__ y) {
  int64_t const step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) y[i] = axpy_element(a, x[i], y[i]);
}

}  // namespace

Status axpy(DType dtype, int64_t n, double a, const void* x, void* y, void* stream) {
  if (n == 0) return status(cudaSuccess);  // a grid of no blocks is an error
  constexpr int threads = 256;
  bool const known = dispatch(dtype, [=](auto zero) {
    using T = decltype(zero);
    axpy_kernel<T><<<blocks_for(n, threads), threads, 0, static_cast<cudaStream_t>(stream)>>>(
        n, static_cast<T>(a), static_cast<const T*>(x), static_cast<T*>(y));
  });
  return status(known ? cudaGetLastError() : cudaErrorInvalidValue);
}

}  // namespace cuda
}  // namespace medgmae
