// What programs of CUDA thread blocks share, for the device and, so that tests can run the same arithmetic without one, for the host.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define MEDGMAE_DEVICE static __device__ __forceinline__
#define MEDGMAE_MEMBER __device__ __forceinline__
#else
#define MEDGMAE_DEVICE static inline
#define MEDGMAE_MEMBER inline
#endif

namespace medgmae {

#ifndef MEDGMAE_POWER_OF_TWO
// 2^x; results below the least normal number are 0.
MEDGMAE_DEVICE float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
#endif
MEDGMAE_DEVICE double power_of_two(double x) { return exp2(x); }

// 1 / x for normal x, off by a unit in the last place.
MEDGMAE_DEVICE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}
MEDGMAE_DEVICE double reciprocal(double x) { return 1 / x; }

// exp(x) for x <= 0; below -126 log(2) it is 0. The product with log2(e) has a remainder, which counts where x is large.
MEDGMAE_DEVICE float shrink(float x) {
  x = x < -150.0f ? -150.0f : x;
  float const high = 1.44269504f * x, low = fmaf(1.44269504f, x, -high) + 1.92596299e-8f * x, power = power_of_two(high);
  return fmaf(power, low * 0.693147181f, power);
}
MEDGMAE_DEVICE double shrink(double x) { return exp(x); }

// log(1 + u) for u in [0, 1]: 2 atanh(u / (2 + u)) as a series.
MEDGMAE_DEVICE float log_of_one_and(float u) {
  float const s = u * reciprocal(u + 2), s2 = s * s;
  float p = fmaf(s2, 2.0f / 13, 2.0f / 11);
  p = fmaf(p, s2, 2.0f / 9);
  p = fmaf(p, s2, 2.0f / 7);
  p = fmaf(p, s2, 2.0f / 5);
  p = fmaf(p, s2, 2.0f / 3);
  return s * fmaf(p, s2, 2.0f);
}
MEDGMAE_DEVICE double log_of_one_and(double u) { return log1p(u); }

// log(1 + exp(x)), and x itself above 20, as torch has it.
template <class T>
MEDGMAE_DEVICE T softplus(T x) {
  T const rest = log_of_one_and(shrink(-fabs(x)));
  return x > T(20) ? x : x > T(0) ? x + rest : rest;
}

// 1 / (1 + exp(-x)).
template <class T>
MEDGMAE_DEVICE T sigmoid(T x) {
  T const e = shrink(-fabs(x)), inverse = reciprocal(1 + e);
  return x < T(0) ? e * inverse : inverse;
}

}  // namespace medgmae
