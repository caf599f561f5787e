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

// What can be known of a device without a context on it, which would take memory there.
struct DeviceInfo {
  char name[256];
  int major, minor;
};

// Counts the devices. Starts the driver, as all that follows does, so never call it before a fork is over.
Status count_devices(int* count);
Status describe_device(int device, DeviceInfo* info);
// Loads a kernel on the current device: fails where this module holds no code for it, or the driver is too old.
Status load_kernel();
// CUDA versions as 1000 major + 10 minor: the highest that the driver supports, 0 without a driver; that of the toolkit that
// compiled this.
int driver_version();
int toolkit_version();

// Bytes of device memory that voxelize needs for this call.
int64_t voxelize_workspace(const VoxelizeCall& call);
// Renders, or computes gradients if call.grad is set. Every address is on the device.
Status voxelize(DType dtype, const VoxelizeCall& call, void* workspace, void* stream);

// Bytes of device memory that project needs for this call.
int64_t project_workspace(DType dtype, const ProjectCall& call);
// Projects, or computes gradients if call.grad is set. Every address is on the device.
Status project(DType dtype, const ProjectCall& call, void* workspace, void* stream);

// Bytes of device memory that a scan needs on the current device.
Status selective_scan_workspace(DType dtype, StreamType type, const ScanCall& call, int64_t* bytes);
// Scans, or computes gradients if call.grad is there. Every address is on the device.
Status selective_scan(DType dtype, StreamType type, const ScanCall& call, void* workspace, void* stream);
// Channels of a group over which its backward sums the gradients of B and C.
int64_t selective_scan_slab(DType dtype);
// Convolves, or computes gradients if call.grad is there.
Status causal_conv1d(DType dtype, StreamType type, const ConvCall& call, void* stream);
// Steps over which its backward sums the gradients of weight and bias.
int64_t causal_conv1d_strip();

}  // namespace cuda
}  // namespace medgmae
