// Turns the arguments of the scan's and the convolution's bindings into calls, with the checks that keep pointers valid.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <string>

#include "conv/conv.h"

namespace medgmae {
namespace {

using ScanSizes = std::map<std::string, int64_t>;
using ScanStreams = std::map<std::string, std::array<int64_t, 3>>;   // address, batch, step
using ScanMatrices = std::map<std::string, std::array<int64_t, 5>>;  // address, batch, step, of_group, constant
using ScanArrays = std::map<std::string, int64_t>;                   // address; what is absent is left out

template <class Value>
Value entry(const std::map<std::string, Value>& from, const char* name) {
  auto const found = from.find(name);
  if (found == from.end()) throw std::invalid_argument(std::string("the call lacks '") + name + "'");
  return found->second;
}

inline ScanStream scan_stream(const ScanStreams& streams, const char* name, bool needed) {
  if (!needed && streams.find(name) == streams.end()) return {};
  auto const s = entry(streams, name);
  return {reinterpret_cast<void*>(s[0]), s[1], s[2]};
}

inline ScanMatrix scan_matrix(const ScanMatrices& matrices, const char* name) {
  auto const m = entry(matrices, name);
  return {reinterpret_cast<void*>(m[0]), m[1], m[2], m[3], m[4] != 0};
}

inline void* scan_array(const ScanArrays& arrays, const char* name, bool needed) {
  if (!needed && arrays.find(name) == arrays.end()) return nullptr;
  return reinterpret_cast<void*>(entry(arrays, name));
}

// Sizes: batch, length, channels, states, groups, chunk, parts, softplus. A call with 'grad' among its streams is a backward.
inline ScanCall scan_call(const ScanSizes& sizes, const ScanStreams& streams, const ScanMatrices& matrices, const ScanArrays& arrays) {
  ScanCall call = {};
  call.batch = entry(sizes, "batch"), call.length = entry(sizes, "length"), call.channels = entry(sizes, "channels");
  call.states = entry(sizes, "states"), call.groups = entry(sizes, "groups"), call.chunk = entry(sizes, "chunk");
  call.parts = entry(sizes, "parts"), call.softplus = entry(sizes, "softplus") != 0;
  if (call.batch < 0 || call.length < 0 || call.channels < 0 || call.states < 0) throw std::invalid_argument("sizes must be 0 or more");
  if (call.groups < 1 || call.chunk < 1 || call.parts < 1 || call.channels % call.groups) {
    throw std::invalid_argument("groups, chunk and parts must be 1 or more, and groups must divide the channels");
  }
  bool const backward = streams.count("grad") > 0;
  call.u = scan_stream(streams, "u", true), call.delta = scan_stream(streams, "delta", true), call.z = scan_stream(streams, "z", false);
  call.B = scan_matrix(matrices, "B"), call.C = scan_matrix(matrices, "C");
  call.A = scan_array(arrays, "A", true), call.D = scan_array(arrays, "D", false), call.bias = scan_array(arrays, "bias", false);
  call.kept = scan_array(arrays, "kept", true);
  call.out = scan_stream(streams, "out", !backward);
  if (!backward) return call;
  call.grad = scan_stream(streams, "grad", true), call.du = scan_stream(streams, "du", true);
  call.ddelta = scan_stream(streams, "ddelta", true), call.dz = scan_stream(streams, "dz", call.z.at != nullptr);
  call.grad_state = scan_array(arrays, "grad_state", false);
  call.dA = scan_array(arrays, "dA", true), call.dB = scan_array(arrays, "dB", true), call.dC = scan_array(arrays, "dC", true);
  call.dD = scan_array(arrays, "dD", call.D != nullptr), call.dbias = scan_array(arrays, "dbias", call.bias != nullptr);
  return call;
}

// Sizes: batch, length, channels, width, silu. A call with 'grad' among its streams is a backward.
inline ConvCall conv_call(const ScanSizes& sizes, const ScanStreams& streams, const ScanArrays& arrays) {
  ConvCall call = {};
  call.batch = entry(sizes, "batch"), call.length = entry(sizes, "length"), call.channels = entry(sizes, "channels");
  call.width = entry(sizes, "width"), call.silu = entry(sizes, "silu") != 0;
  if (call.batch < 0 || call.length < 0 || call.channels < 0) throw std::invalid_argument("sizes must be 0 or more");
  if (call.width < 1) throw std::invalid_argument("width is " + std::to_string(call.width) + ": expected 1 or more");
  bool const backward = streams.count("grad") > 0;
  call.x = scan_stream(streams, "x", true), call.out = scan_stream(streams, "out", !backward);
  call.weight = scan_array(arrays, "weight", true), call.bias = scan_array(arrays, "bias", false);
  if (!backward) return call;
  call.grad = scan_stream(streams, "grad", true), call.dx = scan_stream(streams, "dx", true);
  call.sums = scan_array(arrays, "sums", true);
  return call;
}

}  // namespace
}  // namespace medgmae
