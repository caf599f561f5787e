// The 16-bit numbers that CUDA kernels read and write: computation is in float. Written out in integers where a device or the
// host has no instruction for it.
#pragma once

#include "block_math.h"

namespace medgmae {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// What a stream holds: the type that is computed in, or 16 bits for float. Codes shared with medgmae/ops/streams.py; the first
// two are those of DType.
enum class StreamType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// Calls body(number()) for the type of the numbers; false where a computation in T has no kernel for them.
template <class T, class Body>
static bool dispatch_streams(StreamType type, Body body) {
  if (type == (sizeof(T) == sizeof(float) ? StreamType::float32 : StreamType::float64)) {
    body(T());
    return true;
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    if (type == StreamType::bfloat16) body(BFloat());
    if (type == StreamType::float16) body(Half());
    return type == StreamType::bfloat16 || type == StreamType::float16;
  }
  return false;
}

MEDGMAE_DEVICE float as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

MEDGMAE_DEVICE uint32_t as_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

MEDGMAE_DEVICE float widen(float x) { return x; }
MEDGMAE_DEVICE double widen(double x) { return x; }
MEDGMAE_DEVICE float widen(BFloat x) { return as_float(uint32_t(x.bits) << 16); }
MEDGMAE_DEVICE float widen(Half x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  // The exponent moves by 127 - 15; a subnormal number is normalised by the multiplication; infinity and NaN keep theirs.
  uint32_t const magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  if (magnitude >= 0x0f800000) return as_float(magnitude | 0x7f800000 | sign);
  return as_float(as_bits(as_float(magnitude) * 0x1p112f) | sign);
#endif
}

// To the nearest, ties to even.
MEDGMAE_DEVICE void narrow(float x, float* to) { *to = x; }
MEDGMAE_DEVICE void narrow(double x, double* to) { *to = x; }
MEDGMAE_DEVICE void narrow(float x, BFloat* to) {
  uint32_t const bits = as_bits(x);
  to->bits = uint16_t(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
MEDGMAE_DEVICE void narrow(float x, Half* to) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
  uint32_t const magnitude = as_bits(x) & 0x7fffffff, sign = as_bits(x) >> 16 & 0x8000;
  uint32_t bits;
  if (magnitude > 0x7f800000) {
    bits = 0x7fff;
  } else if (magnitude >= 0x477ff000) {  // what rounds to 65536 or more
    bits = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 1/2 puts the last bit where it belongs
    bits = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    bits = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  to->bits = uint16_t(bits | sign);
#endif
}

}  // namespace medgmae
