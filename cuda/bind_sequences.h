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

namespace py = pybind11;

namespace medgmae {
namespace {

using CallSizes = std::map<std::string, int64_t>;
using CallStreams = std::map<std::string, std::array<int64_t, 4>>;   // address, batch, step, apart
using CallMatrices = std::map<std::string, std::array<int64_t, 4>>;  // address, batch, step, of_group
using CallArrays = std::map<std::string, std::array<int64_t, 2>>;    // address, numbers; what is absent is left out

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

// How many numbers an array has follows from the call: one of another length was made with another idea of what the kernels write.
inline void* array_of(const CallArrays& arrays, const char* name, bool needed, int64_t numbers) {
  if (!needed && arrays.find(name) == arrays.end()) return nullptr;
  auto const a = entry(arrays, name);
  if (a[1] != numbers) {
    throw std::invalid_argument(std::string("'") + name + "' has " + std::to_string(a[1]) + " numbers: expected " +
                                std::to_string(numbers) + "; if medgmae._C is older than the Python files, rebuild it");
  }
  return reinterpret_cast<void*>(a[0]);
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

inline int64_t pieces_of(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

// Sizes: batch, length, channels, states, groups, chunk, softplus. A call with 'grad' among its streams is a backward, whose kernel
// sums the gradients of B and C over `slab` channels of a group.
inline ScanCall scan_call(const CallSizes& sizes, const CallStreams& streams, const CallMatrices& matrices, const CallArrays& arrays,
                          int64_t slab) {
  ScanCall call = {};
  call.batch = entry(sizes, "batch"), call.length = entry(sizes, "length"), call.channels = entry(sizes, "channels");
  call.states = entry(sizes, "states"), call.groups = entry(sizes, "groups"), call.chunk = entry(sizes, "chunk");
  call.softplus = entry(sizes, "softplus") != 0;
  if (call.batch < 0 || call.length < 0 || call.channels < 0 || call.states < 0) throw std::invalid_argument("sizes must be 0 or more");
  if (call.groups < 1 || call.chunk < 1 || call.channels % call.groups) {
    throw std::invalid_argument("groups and chunk must be 1 or more, and groups must divide the channels");
  }
  int64_t const all = call.batch * call.channels, state = call.channels * call.states, parts = pieces_of(call.channels / call.groups, slab);
  int64_t const matrix = parts * call.batch * call.length * call.groups * call.states;
  bool const backward = streams.count("grad") > 0;
  call.u = stream_of(streams, "u", true), call.delta = stream_of(streams, "delta", true), call.z = stream_of(streams, "z", false);
  call.B = matrix_of(matrices, "B"), call.C = matrix_of(matrices, "C");
  call.A = array_of(arrays, "A", true, state);
  call.D = array_of(arrays, "D", false, call.channels), call.bias = array_of(arrays, "bias", false, call.channels);
  call.kept = array_of(arrays, "kept", true, call.batch * scan_chunks(call) * state);
  call.out = stream_of(streams, "out", !backward);
  if (!backward) return call;
  call.grad = stream_of(streams, "grad", true), call.du = stream_of(streams, "du", true);
  call.ddelta = stream_of(streams, "ddelta", true), call.dz = stream_of(streams, "dz", call.z.at != nullptr);
  call.grad_state = array_of(arrays, "grad_state", false, call.batch * state);
  call.dA = array_of(arrays, "dA", true, call.batch * state);
  call.dB = array_of(arrays, "dB", true, matrix), call.dC = array_of(arrays, "dC", true, matrix);
  call.dD = array_of(arrays, "dD", call.D != nullptr, all), call.dbias = array_of(arrays, "dbias", call.bias != nullptr, all);
  return call;
}

// Sizes: batch, length, channels, width, silu. A call with 'grad' among its streams is a backward, whose kernel sums the gradients
// of weight and bias over so many `steps`.
inline ConvCall conv_call(const CallSizes& sizes, const CallStreams& streams, const CallArrays& arrays, int64_t steps) {
  ConvCall call = {};
  call.batch = entry(sizes, "batch"), call.length = entry(sizes, "length"), call.channels = entry(sizes, "channels");
  call.width = entry(sizes, "width"), call.silu = entry(sizes, "silu") != 0;
  if (call.batch < 0 || call.length < 0 || call.channels < 0) throw std::invalid_argument("sizes must be 0 or more");
  if (call.width < 1) throw std::invalid_argument("width is " + std::to_string(call.width) + ": expected 1 or more");
  bool const backward = streams.count("grad") > 0;
  call.x = stream_of(streams, "x", true), call.out = stream_of(streams, "out", !backward);
  call.weight = array_of(arrays, "weight", true, call.width * call.channels), call.bias = array_of(arrays, "bias", false, call.channels);
  if (!backward) return call;
  call.grad = stream_of(streams, "grad", true), call.dx = stream_of(streams, "dx", true);
  call.sums = array_of(arrays, "sums", true, call.batch * pieces_of(call.length, steps) * (call.width + 1) * call.channels);
  return call;
}

}  // namespace
}  // namespace medgmae
