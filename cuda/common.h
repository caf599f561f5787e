// What every kernel file shares. The module knows no torch: pointers, sizes and a dtype code come in, torch owns every buffer.
//
// A new operator "foo" is
//   foo.h           the arithmetic of one element, written once for host and device (MEDGMAE_HD)
//   cpu_kernels.cpp its CPU loop, compiled once for each instruction set, and its entry in CpuKernels
//   foo.cu          its CUDA kernel and launcher
//   module.cpp      its binding
#pragma once

#include <stdint.h>

// Arithmetic is static: cpu_kernels.cpp is compiled several times with other instruction sets, and a function with external
// linkage would be merged by the linker into whichever copy comes first, perhaps one that this processor cannot run.
// For the same reason that file includes C headers only.
#ifdef __CUDACC__
#define MEDGMAE_HD static __host__ __device__ __forceinline__
#else
#define MEDGMAE_HD static inline
#endif

namespace medgmae {

// Codes shared with medgmae/ops/_native.py.
enum class DType : int { float32 = 0, float64 = 1 };

// Calls body(T()) for the C++ type of a dtype code; false for a code that has none.
template <class Body>
static bool dispatch(DType dtype, Body body) {
  switch (dtype) {
    case DType::float32:
      body(float());
      return true;
    case DType::float64:
      body(double());
      return true;
  }
  return false;
}

struct VoxelizeCall;
struct BandedCall;
struct ScanCall;
struct ConvCall;

// The CPU kernels of one instruction set. Each returns false for a dtype that it does not have.
struct CpuKernels {
  bool (*axpy)(DType dtype, int64_t n, double a, const void* x, void* y, int threads);
  bool (*voxelize)(DType dtype, const VoxelizeCall& call, int threads, bool* enough_memory);  // backward if call.grad
  void (*banded)(const BandedCall& call, int threads);
  bool (*scan)(DType dtype, const ScanCall& call, int threads, bool* enough_memory);  // backward if call.grad
  bool (*conv)(DType dtype, const ConvCall& call, int threads, bool* enough_memory);  // backward if call.grad
};

}  // namespace medgmae
