// The fp32 peak of one thread: chains of fused multiply-adds that never leave the registers. Twelve chains of the widest
// vectors keep two FMA ports with a latency of four cycles busy. Compiled by renderer.py.
#include <time.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define CHAINS 12

typedef float vec __attribute__((vector_size(BYTES)));

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// GFLOP/s (a fused multiply-add is two) of the best of `tries` runs of `steps` steps.
double fma_peak(long steps, int tries, float* sink) {
  double best = 0;
  vec const factor = (vec){} + 0.999f, term = (vec){} + 1e-3f;
  for (int t = 0; t < tries; ++t) {
    vec chain[CHAINS];
    for (int i = 0; i < CHAINS; ++i) chain[i] = (vec){} + (float)i;
    double const start = now();
    for (long s = 0; s < steps; ++s) {
#pragma GCC unroll 12
      for (int i = 0; i < CHAINS; ++i) chain[i] = chain[i] * factor + term;
    }
    double const seconds = now() - start;
    for (int i = 0; i < CHAINS; ++i) *sink += chain[i][0];
    double const rate = 2e-9 * steps * CHAINS * (BYTES / 4) / seconds;
    if (rate > best) best = rate;
  }
  return best;
}
