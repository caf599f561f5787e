// What every kernel file shares. The module knows no torch: pointers, sizes and a dtype code come in, torch owns every buffer.
//
// A new operator "foo" is
//   foo/foo.h       what a call is, and what host and device compute alike (MEDGMAE_HD)
//   foo/cpu.h       its CPU kernels, compiled once for each instruction set by cpu_kernels.cpp, with an entry in CpuKernels
//   foo/blocks.h    its programs of CUDA thread blocks, which tests run on the host
//   foo/foo.cu      its CUDA kernels and launches
//   module.cpp      its binding, and there and in medgmae/ops/native.py the next number of the interface
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

// Codes shared with medgmae/ops/native.py.
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
struct ProjectCall;
struct BandedCall;
struct ScanCall;
struct ConvCall;
struct RaysCall;

// The CPU kernels of one instruction set. Each returns false for a dtype that it does not have.
struct CpuKernels {
  bool (*voxelize)(DType dtype, const VoxelizeCall& call, int threads, bool* enough_memory);  // backward if call.grad
  bool (*project)(DType dtype, const ProjectCall& call, int threads, bool* enough_memory);  // backward if call.grad
  void (*banded)(const BandedCall& call, int threads);
  bool (*scan)(DType dtype, const ScanCall& call, int threads, bool* enough_memory);  // backward if call.grad
  bool (*conv)(DType dtype, const ConvCall& call, int threads, bool* enough_memory);  // backward if call.grad
  bool (*rays)(DType dtype, const RaysCall& call, int threads, bool* enough_memory);
};

}  // namespace medgmae
