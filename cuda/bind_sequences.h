// Turns the arguments of the scan's and the convolution's bindings into calls, with the checks that keep pointers valid.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <string>

#include "conv/conv.h"
#include "half.h"
#include "scan/scan.h"

namespace medgmae {
namespace {

using CallSizes = std::map<std::string, int64_t>;
using CallStreams = std::map<std::string, std::array<int64_t, 4>>;  // address, batch, step, apart
using CallMatrices = std::map<std::string, std::array<int64_t, 4>>;  // address, batch, step, of_group
using CallArrays = std::map<std::string, int64_t>;                   // address; what is absent is left out

template <class Value>
Value entry(const std::map<std::string, Value>& from, const char* name) {
  auto const at = from.find(name);
  if (at == from.end()) throw std::invalid_argument(std::string("the call lacks '") + name + "'");
  return at->second;
}

inline Stream stream_of(const CallStreams& streams, const char* name, bool needed) {
  if (!needed && streams.find(name) == streams.end()) return {};
  auto const s = entry(streams, name);
  return {reinterpret_cast<void*>(s[0]), s[1], s[2], s[3]};
}

inline ScanMatrix matrix_of(const CallMatrices& matrices, const char* name) {
  auto const m = entry(matrices, name);
  return {reinterpret_cast<void*>(m[0]), m[1], m[2], m[3]};
}

inline void* array_of(const CallArrays& arrays, const char* name, bool needed) {
  if (!needed && arrays.find(name) == arrays.end()) return nullptr;
  return reinterpret_cast<void*>(entry(arrays, name));
}

// Refuses streams whose numbers the kernels would read as others.
inline void check_streams(DType dtype, StreamType streams, bool half) {
  bool const is_float = dtype == DType::float32, is_half = streams == StreamType::bfloat16 || streams == StreamType::float16;
  if (int(streams) == int(dtype) || (half && is_float && is_half)) return;
  static const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
  bool const known = int(streams) >= 0 && int(streams) < 4;
  throw std::invalid_argument(std::string("the streams are ") + (known ? names[int(streams)] : "of an unknown type") +
                              ", but the computation is in " + (is_float ? "float32" : "float64") + ": expected " +
                              (is_float ? half ? "float32, bfloat16 or float16" : "float32" : "float64"));
}

// Sizes: batch, length, channels, states, groups, chunk, parts, softplus. A call with 'grad' among its streams is a backward.
inline ScanCall scan_call(const CallSizes& sizes, const CallStreams& streams, const CallMatrices& matrices, const CallArrays& arrays) {
  ScanCall call = {};
  call.batch = entry(sizes, "batch"), call.length = entry(sizes, "length"), call.channels = entry(sizes, "channels");
  call.states = entry(sizes, "states"), call.groups = entry(sizes, "groups"), call.chunk = entry(sizes, "chunk");
  call.parts = entry(sizes, "parts"), call.softplus = entry(sizes, "softplus") != 0;
  if (call.batch < 0 || call.length < 0 || call.channels < 0 || call.states < 0) throw std::invalid_argument("sizes must be 0 or more");
  if (call.groups < 1 || call.chunk < 1 || call.parts < 1 || call.channels % call.groups) {
    throw std::invalid_argument("groups, chunk and parts must be 1 or more, and groups must divide the channels");
  }
  bool const backward = streams.count("grad") > 0;
  call.u = stream_of(streams, "u", true), call.delta = stream_of(streams, "delta", true), call.z = stream_of(streams, "z", false);
  call.B = matrix_of(matrices, "B"), call.C = matrix_of(matrices, "C");
  call.A = array_of(arrays, "A", true), call.D = array_of(arrays, "D", false), call.bias = array_of(arrays, "bias", false);
  call.kept = array_of(arrays, "kept", true);
  call.out = stream_of(streams, "out", !backward);
  if (!backward) return call;
  call.grad = stream_of(streams, "grad", true), call.du = stream_of(streams, "du", true);
  call.ddelta = stream_of(streams, "ddelta", true), call.dz = stream_of(streams, "dz", call.z.at != nullptr);
  call.grad_state = array_of(arrays, "grad_state", false);
  call.dA = array_of(arrays, "dA", true), call.dB = array_of(arrays, "dB", true), call.dC = array_of(arrays, "dC", true);
  call.dD = array_of(arrays, "dD", call.D != nullptr), call.dbias = array_of(arrays, "dbias", call.bias != nullptr);
  return call;
}

// Sizes: batch, length, channels, width, silu. A call with 'grad' among its streams is a backward.
inline ConvCall conv_call(const CallSizes& sizes, const CallStreams& streams, const CallArrays& arrays) {
  ConvCall call = {};
  call.batch = entry(sizes, "batch"), call.length = entry(sizes, "length"), call.channels = entry(sizes, "channels");
  call.width = entry(sizes, "width"), call.silu = entry(sizes, "silu") != 0;
  if (call.batch < 0 || call.length < 0 || call.channels < 0) throw std::invalid_argument("sizes must be 0 or more");
  if (call.width < 1) throw std::invalid_argument("width is " + std::to_string(call.width) + ": expected 1 or more");
  bool const backward = streams.count("grad") > 0;
  call.x = stream_of(streams, "x", true), call.out = stream_of(streams, "out", !backward);
  call.weight = array_of(arrays, "weight", true), call.bias = array_of(arrays, "bias", false);
  if (!backward) return call;
  call.grad = stream_of(streams, "grad", true), call.dx = stream_of(streams, "dx", true);
  call.sums = array_of(arrays, "sums", true);
  return call;
}

}  // namespace
}  // namespace medgmae
