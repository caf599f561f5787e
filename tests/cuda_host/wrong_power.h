// An exponential as wrong as the device's may be, for the programs of CUDA thread blocks on the host.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace medgmae {

// 2^x off by up to 2 units in the last place, 0 for subnormal results, and 1 for 0: what ex2.approx.ftz guarantees.
static inline float power_of_two(float x) {
  float y = exp2f(x);
  if (x == 0) return y;
  if (!(y >= 1.1754944e-38f) || isinf(y)) return y < 1.1754944e-38f ? 0.0f : y;
  uint32_t bits;
  memcpy(&bits, &y, sizeof(bits));
  bits = (bits & ~uint32_t(3)) + 2;
  memcpy(&y, &bits, sizeof(y));
  return y;
}

}  // namespace medgmae

#define MEDGMAE_POWER_OF_TWO
