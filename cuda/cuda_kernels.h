// The CUDA half as module.cpp sees it: plain C++, no CUDA header. A launch goes to the device that is current in the calling thread.
#pragma once

#include "common.h"
#include "half.h"

namespace medgmae {

struct ConvCall;
struct ScanCall;

namespace cuda {

// The result of a call into CUDA: empty if it went well, else the error's name and text.
struct Status {
  char text[256];
  bool ok() const { return text[0] == '\0'; }
};

// Counts the devices. Starts the driver, so never call it before a fork is over.
Status count_devices(int* count);
// The CUDA version of the toolkit that compiled this, as 1000 major + 10 minor.
int toolkit_version();

// Bytes of device memory that voxelize needs for this call.
int64_t voxelize_workspace(const VoxelizeCall& call);
// Renders, or computes gradients if call.grad is set. Every address is on the device.
Status voxelize(DType dtype, const VoxelizeCall& call, void* workspace, void* stream);

// Bytes of device memory that a scan needs on the current device.
Status selective_scan_workspace(DType dtype, const ScanCall& call, int64_t* bytes);
// Scans, or computes gradients if call.grad is there. Every address is on the device.
Status selective_scan(DType dtype, StreamType type, const ScanCall& call, void* workspace, void* stream);
// Convolves, or computes gradients if call.grad is there; its `sums` are per strip of kConvStrip steps (cuda/conv/blocks.h).
Status causal_conv1d(DType dtype, StreamType type, const ConvCall& call, void* stream);

}  // namespace cuda
}  // namespace medgmae
