// CPU kernels. setup.py compiles this file once for each instruction set, with MEDGMAE_VARIANT naming it.
#include "common.h"
#include "conv/cpu.h"
#include "projection/walk.h"
#include "rays/cpu.h"
#include "scan/gradient.h"
#include "voxel/banded.h"
#include "voxel/strips.h"

namespace medgmae {
namespace {

bool voxelize(DType dtype, const VoxelizeCall& call, int threads, bool* enough_memory) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    *enough_memory = call.grad == nullptr ? voxelize_forward<T>(call, threads) : voxelize_gradient<T>(call, threads);
  });
}

bool scan(DType dtype, const ScanCall& call, int threads, bool* enough_memory) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    *enough_memory = call.grad.at == nullptr ? scan_forward<T>(call, threads) : scan_gradient<T>(call, threads);
  });
}

bool conv(DType dtype, const ConvCall& call, int threads, bool* enough_memory) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (call.grad.at == nullptr) conv_forward<T>(call, threads);
    else *enough_memory = conv_gradient<T>(call, threads);
  });
}

bool project(DType dtype, const ProjectCall& call, int threads, bool* enough_memory) {
  return dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    *enough_memory = call.grad == nullptr ? project_forward<T>(call, threads) : project_gradient<T>(call, threads);
  });
}

bool rays(DType dtype, const RaysCall& call, int threads, bool*) {
  return dispatch(dtype, [&](auto zero) { rays_run<decltype(zero)>(call, threads); });
}

void banded(const BandedCall& call, int threads) { banded_product(call, threads); }

}  // namespace

namespace MEDGMAE_VARIANT {
extern const CpuKernels kernels = {voxelize, project, banded, scan, conv, rays};
}

}  // namespace medgmae
