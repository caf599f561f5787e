// Functions for vectors of channels. Unlike those of simd.h they keep NaN.
#pragma once

#include "simd.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace medgmae {
namespace {

// x, but at least low, or at most high. NaN stays NaN: the instructions give their second operand then.
inline Vec<float> at_least_lanes(Vec<float> x, float low) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(low), x);
#elif defined(__AVX2__)
  return _mm256_max_ps(_mm256_set1_ps(low), x);
#elif defined(__SSE2__)
  return _mm_max_ps(_mm_set1_ps(low), x);
#else
  return splat(low) > x ? splat(low) : x;
#endif
}

inline Vec<float> at_most_lanes(Vec<float> x, float high) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(high), x);
#elif defined(__AVX2__)
  return _mm256_min_ps(_mm256_set1_ps(high), x);
#elif defined(__SSE2__)
  return _mm_min_ps(_mm_set1_ps(high), x);
#else
  return splat(high) < x ? splat(high) : x;
#endif
}

// What A is multiplied by before the scan, so that decay() is one power of two.
template <class T>
constexpr T kDecayScale = T(1);
template <>
constexpr float kDecayScale<float> = 1.44269504088896341f;

// 2^n (1 + r q(r)) for shifted = 1.5 * 2^23 + n and |r| <= 1/2, to 1.4e-7. Of the polynomials it is the one with the least error
// over sqrt|r|, because slow decays, with small r, are multiplied most often.
inline Vec<float> power_from_parts(Vec<float> shifted, Vec<float> r) {
  Vec<float> p = splat(1.3266379246488214e-3f);
  p = p * r + 9.668998420238495e-3f;
  p = p * r + 5.550699681043625e-2f;
  p = p * r + 2.4022294580936432e-1f;
  p = p * r + 6.931470632553101e-1f;
  p = p * r + 1.0f;
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Vec<float>))));  // unsigned: exponents too low may overflow
  Bits power, bits;
  memcpy(&power, &shifted, sizeof(power));  // n is in its low bits
  memcpy(&bits, &p, sizeof(bits));
  bits += power << 23;
  memcpy(&p, &bits, sizeof(p));
  return p;
}

constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

// Has the product x rounded before anything is added to it. Fused, an exponent that is not clamped would differ in its last bit from
// one that is, and a channel's result would depend on what its neighbours in a vector need.
inline void round_product(Vec<float>& x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__SSE2__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#else
  __asm__("" : "+m"(x));
#endif
}

// Up to this |x| an exponent needs no clamping.
template <class T>
constexpr T kLargestExponent = T(125);

// exp(x / kDecayScale), to 2e-7. At 128, and so above it, exactly infinity.
template <bool kBounded>
inline Vec<float> decay_lanes(Vec<float> x) {
  round_product(x);
  if constexpr (!kBounded) x = at_most_lanes(at_least_lanes(x, -126.0f), 128.0f);
  Vec<float> const shifted = x + kRounding;
  return power_from_parts(shifted, x - (shifted - kRounding));
}

// exp(x) for x <= 0, to 2e-7; below -87 it is exactly 0, since SiLU multiplies it by numbers of any size.
inline Vec<float> shrink_lanes(Vec<float> x) {
  Mask<float> const gone = x < -87.0f;
  x = at_least_lanes(x, -87.0f);
  Vec<float> const shifted = x * 1.44269504088896341f + kRounding;
  return keep<float>(~gone, power_from_parts(shifted, x * 1.44269504088896341f - (shifted - kRounding) + x * 1.925963033e-8f));
}

inline Vec<double> shrink_lanes(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = exp(x[i]);
  return x;
}

template <bool kBounded>
inline Vec<double> decay_lanes(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = exp(x[i]);
  return x;
}

// log(1 + u) for u in [0, 1].
inline Vec<float> log1p_lanes(Vec<float> u) {
  Vec<float> const s = u / (u + 2.0f), s2 = s * s;  // 2 atanh(s)
  Vec<float> p = s2 * (2.0f / 13) + 2.0f / 11;
  p = p * s2 + 2.0f / 9;
  p = p * s2 + 2.0f / 7;
  p = p * s2 + 2.0f / 5;
  p = p * s2 + 2.0f / 3;
  p = p * s2 + 2.0f;
  return p * s;
}

inline Vec<double> log1p_lanes(Vec<double> u) {
  for (int i = 0; i < kLanes<double>; ++i) u[i] = log1p(u[i]);
  return u;
}

// -|x|: the sign bit set.
template <class T>
inline Vec<T> below_zero(Vec<T> x) {
  Mask<T> bits;
  memcpy(&bits, &x, sizeof(x));
  bits |= decltype(bits[0] + 0)(1) << (8 * sizeof(T) - 1);
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// log(1 + exp(x)), and x itself above 20, as torch has it.
template <class T>
inline Vec<T> softplus_lanes(Vec<T> x) {
  Vec<T> const positive = T(0) > x ? splat(T(0)) : x;
  return x > T(20) ? x : positive + log1p_lanes(shrink_lanes(below_zero<T>(x)));
}

// 1 / (1 + exp(-x)).
template <class T>
inline Vec<T> sigmoid_lanes(Vec<T> x) {
  Vec<T> const e = shrink_lanes(below_zero<T>(x));
  return (T(0) > x ? e : splat(T(1))) / (T(1) + e);
}

// Whether all lanes of a mask are set.
template <class T>
inline bool all_lanes(Mask<T> mask) {
  decltype(mask[0] + 0) all = -1;
  for (int i = 0; i < kLanes<T>; ++i) all &= mask[i];
  return all != 0;
}

// Lanes of two vectors, mixed: kHalf lanes of `a`, kHalf of `b`, and so on, from the first or the second kHalf of each pair.
template <class T, int kHalf>
inline Vec<T> mixed(Vec<T> a, Vec<T> b, int second) {
  Mask<T> index;
  for (int i = 0; i < kLanes<T>; ++i) {
    int const pair = i / (2 * kHalf), from_b = i / kHalf % 2;
    index[i] = from_b * kLanes<T> + pair * 2 * kHalf + second * kHalf + i % kHalf;
  }
#ifdef __clang__
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = index[i] < kLanes<T> ? a[index[i]] : b[index[i] - kLanes<T>];
  return v;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// v[0] becomes the vector of the sums of v[0], v[1], ..., always added in the same order.
template <class T, int kHalf = kLanes<T> / 2>
inline void sums(Vec<T>* v) {
  for (int i = 0; i < kHalf; ++i) v[i] = mixed<T, kHalf>(v[i], v[i + kHalf], 0) + mixed<T, kHalf>(v[i], v[i + kHalf], 1);
  if constexpr (kHalf > 1) sums<T, kHalf / 2>(v);
}

// The first `count` lanes from memory, zero behind them.
template <class T>
inline Vec<T> load_part(const T* from, int count) {
  if (count == kLanes<T>) return load(from);
  Vec<T> v = {};
  memcpy(&v, from, size_t(count) * sizeof(T));
  return v;
}

template <class T>
inline void store_part(T* to, Vec<T> v, int count) {
  if (count == kLanes<T>) return store(to, v);
  memcpy(to, &v, size_t(count) * sizeof(T));
}

}  // namespace
}  // namespace medgmae
