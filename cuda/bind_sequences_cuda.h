// The bindings of the scan and the convolution on CUDA. Every address, the workspace's too, is on the current device.
#pragma once

#include <stdexcept>
#include <string>

#include "bind_sequences.h"
#include "cuda_kernels.h"

namespace medgmae {
namespace {

// Runs a call into CUDA without the GIL.
template <class Call>
void run_cuda(const char* what, Call call) {
  cuda::Status status;
  {
    py::gil_scoped_release release;
    status = call();
  }
  if (!status.ok()) throw std::runtime_error(std::string(what) + " on CUDA: " + status.text);
}

inline void check_workspace(uintptr_t workspace, int64_t has, int64_t needs) {
  if (has < needs || (needs > 0 && workspace == 0)) {
    throw std::invalid_argument("the workspace has " + std::to_string(has) + " bytes: expected " + std::to_string(needs) +
                                ", as the binding's _workspace says");
  }
}

int64_t selective_scan_cuda_workspace(int dtype, const CallSizes& sizes, const CallStreams& streams, const CallMatrices& matrices,
                                      const CallArrays& arrays, int stream_type) {
  check_streams(DType(dtype), StreamType(stream_type), true);
  ScanCall const call = scan_call(sizes, streams, matrices, arrays, cuda::selective_scan_slab(DType(dtype)));
  int64_t bytes = 0;
  run_cuda("selective_scan", [&] { return cuda::selective_scan_workspace(DType(dtype), StreamType(stream_type), call, &bytes); });
  return bytes;
}

void selective_scan_cuda(int dtype, const CallSizes& sizes, const CallStreams& streams, const CallMatrices& matrices,
                         const CallArrays& arrays, int stream_type, uintptr_t workspace, int64_t workspace_bytes, uintptr_t stream) {
  check_workspace(workspace, workspace_bytes, selective_scan_cuda_workspace(dtype, sizes, streams, matrices, arrays, stream_type));
  ScanCall const call = scan_call(sizes, streams, matrices, arrays, cuda::selective_scan_slab(DType(dtype)));
  run_cuda("selective_scan", [&] {
    return cuda::selective_scan(DType(dtype), StreamType(stream_type), call, reinterpret_cast<void*>(workspace),
                                reinterpret_cast<void*>(stream));
  });
}

void causal_conv1d_cuda(int dtype, const CallSizes& sizes, const CallStreams& streams, const CallArrays& arrays, int stream_type,
                        uintptr_t stream) {
  check_streams(DType(dtype), StreamType(stream_type), true);
  ConvCall const call = conv_call(sizes, streams, arrays, cuda::causal_conv1d_strip());
  run_cuda("causal_conv1d",
           [&] { return cuda::causal_conv1d(DType(dtype), StreamType(stream_type), call, reinterpret_cast<void*>(stream)); });
}

}  // namespace
}  // namespace medgmae
