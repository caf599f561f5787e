#include "cuda_common.cuh"

namespace medgmae {
namespace cuda {

Status count_devices(int* count) {
  *count = 0;
  return status(cudaGetDeviceCount(count));
}

int toolkit_version() { return CUDART_VERSION; }

}  // namespace cuda
}  // namespace medgmae
