// The bindings of the scan and the convolution on CUDA. Every address, the workspace's too, is on the current device.
#pragma once

#include <stdexcept>
#include <string>

#include "bind_sequences.h"
#include "cuda_kernels.h"

namespace medgmae {
namespace {

inline void check_status(const char* what, const cuda::Status& status) {
  if (!status.ok()) throw std::runtime_error(std::string(what) + " on CUDA: " + status.text);
}

int64_t selective_scan_cuda_workspace(int dtype, const CallSizes& sizes, const CallStreams& streams, const CallMatrices& matrices,
                                      const CallArrays& arrays) {
  int64_t bytes = 0;
  check_status("selective_scan", cuda::selective_scan_workspace(DType(dtype), scan_call(sizes, streams, matrices, arrays), &bytes));
  return bytes;
}

void selective_scan_cuda(int dtype, const CallSizes& sizes, const CallStreams& streams, const CallMatrices& matrices,
                         const CallArrays& arrays, int stream_type, uintptr_t workspace, int64_t workspace_bytes, uintptr_t stream) {
  check_streams(DType(dtype), StreamType(stream_type), true);
  ScanCall const call = scan_call(sizes, streams, matrices, arrays);
  int64_t bytes = 0;
  check_status("selective_scan", cuda::selective_scan_workspace(DType(dtype), call, &bytes));
  if (workspace_bytes < bytes || (bytes > 0 && workspace == 0)) {
    throw std::invalid_argument("the workspace has " + std::to_string(workspace_bytes) + " bytes: expected " + std::to_string(bytes) +
                                ", as selective_scan_cuda_workspace says");
  }
  check_status("selective_scan", cuda::selective_scan(DType(dtype), StreamType(stream_type), call, reinterpret_cast<void*>(workspace),
                                                      reinterpret_cast<void*>(stream)));
}

void causal_conv1d_cuda(int dtype, const CallSizes& sizes, const CallStreams& streams, const CallArrays& arrays, int stream_type,
                        uintptr_t stream) {
  check_streams(DType(dtype), StreamType(stream_type), true);
  ConvCall const call = conv_call(sizes, streams, arrays);
  check_status("causal_conv1d", cuda::causal_conv1d(DType(dtype), StreamType(stream_type), call, reinterpret_cast<void*>(stream)));
}

}  // namespace
}  // namespace medgmae
