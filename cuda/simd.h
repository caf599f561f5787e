// Vectors of the widest registers that the instruction set of this compilation has; plain C++ operators work on them.
// Everything is in an anonymous namespace, see common.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace medgmae {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename Vector<T>::type;
template <class T>
using Mask = typename Vector<T>::mask;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

// Eight numbers, whatever the width of the registers. They are no function's argument or result: those would have to be
// passed in registers that the processor may lack.
template <class T>
struct Eight {
  typedef T type __attribute__((vector_size(8 * sizeof(T))));
  type v;
  explicit Eight(const T* from) { memcpy(&v, from, sizeof(v)); }
  void store(T* to) const { memcpy(to, &v, sizeof(v)); }
};

// Makes the compiler read an array again that it has just written: a broadcast from memory costs nothing where a shuffle
// of the register would.
template <class T>
inline void reload(T* array) {
  __asm__("" : "+m"(*reinterpret_cast<T(*)[8]>(array)));
}

template <class T>
inline Vec<T> splat(T value) {
  return value - Vec<T>{};
}

template <class T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <class T>
inline void store(T* to, Vec<T> v) {
  memcpy(to, &v, sizeof(v));
}

// first, first + 1, ...
template <class T>
inline Vec<T> ramp(T first) {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = first + T(i);
  return v;
}

// Lanes in which the mask is set, zero elsewhere.
template <class T>
inline Vec<T> keep(Mask<T> mask, Vec<T> v) {
  Mask<T> bits;
  memcpy(&bits, &v, sizeof(v));
  bits &= mask;
  memcpy(&v, &bits, sizeof(v));
  return v;
}

template <class T>
inline Vec<T> magnitude(Vec<T> v) {
  return v < T(0) ? -v : v;
}

// The sum of all lanes, always in the same order.
template <class T>
inline T sum(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// exp(x) for x <= 88, to about 1 ulp; exp(-87) below -87.
inline Vec<float> exp_lanes(Vec<float> x) {
  x = x > -87.0f ? x : splat(-87.0f);
  x = x < 88.0f ? x : splat(88.0f);
  Vec<float> const magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec<float> const n = (x * 1.44269504088896341f + magic) - magic;
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);  // minimax polynomial of Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Mask<float> const exponent = (__builtin_convertvector(n, Mask<float>) + 127) << 23;
  Vec<float> power;
  memcpy(&power, &exponent, sizeof(power));
  return p * power;
}

inline Vec<double> exp_lanes(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = exp(x[i] < 700 ? x[i] : 700.0);
  return x;
}

// Treats subnormal numbers as zero while it lives: arithmetic on them is a hundred times slower.
struct FlushSubnormals {
#if defined(__SSE2__)
  unsigned const before = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(before | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before); }
#endif
};

}  // namespace
}  // namespace medgmae
