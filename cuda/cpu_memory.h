// Memory of the CPU kernels for sequences: their own, and the elements of a stream.
// Everything is in an anonymous namespace, see common.h.
#pragma once

#include <stdlib.h>

#include "streams.h"

namespace medgmae {
namespace {

// Memory for one thread, aligned for vectors.
template <class T>
struct ThreadMemory {
  T* at;
  explicit ThreadMemory(int64_t count) : at(static_cast<T*>(aligned_alloc(64, size_t(count * int64_t(sizeof(T)) + 63) / 64 * 64))) {}
  ~ThreadMemory() { free(at); }
  ThreadMemory(const ThreadMemory&) = delete;
  ThreadMemory& operator=(const ThreadMemory&) = delete;
};

template <class T>
inline T* element(const Stream& s, int64_t b, int64_t t, int64_t channel) {
  return static_cast<T*>(s.at) + b * s.batch + t * s.step + channel * s.apart;
}

}  // namespace
}  // namespace medgmae
