// The driver and the devices.
#include <map>
#include <mutex>
#include <utility>

#include "cuda_common.cuh"

namespace medgmae {
namespace cuda {

Status count_devices(int* count) {
  *count = 0;
  return status(cudaGetDeviceCount(count));
}

Status describe_device(int device, DeviceInfo* info) {
  cudaDeviceProp properties = {};
  cudaError_t const error = cudaGetDeviceProperties(&properties, device);
  snprintf(info->name, sizeof(info->name), "%s", properties.name);
  info->major = properties.major, info->minor = properties.minor;
  return status(error);
}

int driver_version() {
  int version = 0;
  status(cudaDriverGetVersion(&version));
  return version;
}

int toolkit_version() { return CUDART_VERSION; }

cudaError_t room_for(const void* kernel, int threads, int64_t* room) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int64_t> known;
  int device = 0, blocks = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  std::lock_guard<std::mutex> const lock(mutex);
  auto const at = known.find({device, kernel});
  if (at != known.end()) {
    *room = at->second;
    return cudaSuccess;
  }
  OutsideCapture const outside;
  // Shared memory rather than first cache, and before the question, whose answer depends on it.
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) known[{device, kernel}] = *room = int64_t(blocks) * multiprocessors;
  return error;
}

}  // namespace cuda
}  // namespace medgmae
