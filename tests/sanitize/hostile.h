// Random numbers for the drivers, hostile ones among them, and buffers of their exact size.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <memory>
#include <random>
#include <vector>

namespace hostile_input {

using Random = std::mt19937_64;

inline int pick(Random& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

inline double real(Random& random, double low, double high) { return std::uniform_real_distribution<double>(low, high)(random); }

// Mostly ordinary numbers, now and then one that should hurt.
inline double hostile(Random& random, double ordinary, int one_in) {
  static const double bad[] = {0.0,    -0.0,  1e-300, 1e300, -1e300, 1e-38, 3.4e38, 1e-20, 1e20, -1.0, 2147483648.0, 1e10,
                               INFINITY, -INFINITY, NAN};
  return pick(random, 1, one_in) == 1 ? bad[pick(random, 0, int(sizeof(bad) / sizeof(*bad)) - 1)] : ordinary;
}

template <class T>
struct Buffers {
  std::vector<std::unique_ptr<T[]>> owned;
  T* make(int64_t n) {
    owned.emplace_back(new T[size_t(n)]);
    return owned.back().get();
  }
};

template <class T>
void fill(Random& random, T* to, int64_t n, double low, double high, int one_in) {
  for (int64_t i = 0; i < n; ++i) to[i] = T(hostile(random, real(random, low, high), one_in));
}

}  // namespace hostile_input
