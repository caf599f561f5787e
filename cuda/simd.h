// Vectors of the widest registers that the instruction set of this compilation has; plain C++ operators work on them.
// Everything is in an anonymous namespace, see common.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
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

// Keeps the compiler from splitting an address into parts that it then holds in a register each.
template <class T>
inline T* one_register(T* address) {
  __asm__("" : "+r"(address));
  return address;
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

// x, but at least low and at most high; low for NaN.
inline Vec<float> between_lanes(Vec<float> x, float low, float high) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, _mm512_maskz_max_ps(0xffff, x, _mm512_set1_ps(low)), _mm512_set1_ps(high));
#elif defined(__AVX2__)
  return _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(low)), _mm256_set1_ps(high));
#elif defined(__SSE2__)
  return _mm_min_ps(_mm_max_ps(x, _mm_set1_ps(low)), _mm_set1_ps(high));
#else
  x = x > low ? x : splat(low);
  return x < high ? x : splat(high);
#endif
}

// exp(x) for x <= 88, to about 1 ulp; 0 below -87 and for NaN.
inline Vec<float> exp_lanes(Vec<float> x) {
  Mask<float> const seen = x >= -87.0f;
  x = between_lanes(x, -87.0f, 88.0f);
  Vec<float> const magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
  Vec<float> const shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = splat(1.9875691500e-4f);  // minimax polynomial of Cephes' expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Mask<float> exponent, bits;  // p 2^n is a normal number, so n is added to the exponent of p
  memcpy(&exponent, &shifted, sizeof(exponent));
  memcpy(&bits, &p, sizeof(bits));
  bits += exponent << 23;
  bits &= seen;
  memcpy(&p, &bits, sizeof(p));
  return p;
}

inline Vec<double> exp_lanes(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = x[i] >= -708 ? exp(x[i] < 700 ? x[i] : 700.0) : 0.0;
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
