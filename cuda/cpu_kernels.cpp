// CPU kernels. setup.py compiles this file once for each instruction set, with MEDGMAE_VARIANT naming it.
#include "axpy.h"
#include "voxel/banded.h"
#include "common.h"
#include "conv/cpu.h"
#include "scan/split.h"
#include "voxel/strips.h"

namespace medgmae {
namespace {

template <class T>
void axpy_loop(int64_t n, T a, const T* x, T* y, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) y[i] = axpy_element(a, x[i], y[i]);
}

bool axpy(DType dtype, int64_t n, double a, const void* x, void* y, int threads) {
  return dispatch(dtype, [=](auto zero) {
    using T = decltype(zero);
    axpy_loop(n, static_cast<T>(a), static_cast<const T*>(x), static_cast<T*>(y), threads);
  });
}

bool voxelize(DType dtype, const VoxelizeCall& call, int threads, bool* enough_memory) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    *enough_memory = call.grad == nullptr ? voxelize_forward<T>(call, threads) : voxelize_gradient<T>(call, threads);
  });
}

bool scan(DType dtype, const ScanCall& call, int threads, bool* enough_memory) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    *enough_memory = scan_any<T>(call, threads);
  });
}

bool conv(DType dtype, const ConvCall& call, int threads, bool* enough_memory) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (call.grad.at == nullptr) conv_forward<T>(call, threads);
    else *enough_memory = conv_gradient<T>(call, threads);
  });
}

void banded(const BandedCall& call, int threads) { banded_product(call, threads); }

}  // namespace

namespace MEDGMAE_VARIANT {
extern const CpuKernels kernels = {axpy, voxelize, banded, scan, conv};
}

}  // namespace medgmae
