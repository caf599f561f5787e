// Runs thread blocks of CUDA programs in one thread of the host.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace medgmae {
namespace {

// A block whose threads run one after the other, backwards in every second phase: a phase must not depend on their order.
template <class Shared, class State>
struct HostBlock {
  using Lane = State;
  Shared* shared;
  State* states;
  int threads;
  bool backwards = false;
  template <class Phase>
  void lanes(Phase phase) {
    for (int i = 0; i < threads; ++i) {
      int const t = backwards ? threads - 1 - i : i;
      phase(t, states[t]);
    }
    backwards = !backwards;
  }
  template <class Phase>
  void each(Phase phase) {
    lanes(phase);
  }
  void meet() {}
  template <int kCount, class Values>
  void fold(int mask, Values values) {
    for (int t = 0; t < threads; ++t) {
      if (t & mask) continue;
      auto *low = values(states[t]), *high = values(states[t | mask]);
      constexpr int half = kCount > 1 ? kCount / 2 : 0;
      for (int i = 0; i < (kCount + 1) / 2; ++i) {
        auto const first = low[i] + high[i], second = high[half + i] + low[half + i];
        low[i] = first, high[i] = second;
      }
    }
  }
};

// Runs the program once for each block, on memory that holds no number to begin with.
template <class Shared, class State, class Program>
void run_blocks(int64_t blocks, int threads, Program program) {
  for (int64_t index = 0; index < blocks; ++index) {
    auto* const shared = static_cast<Shared*>(aligned_alloc(64, (sizeof(Shared) + 63) / 64 * 64));
    auto* const states = static_cast<State*>(aligned_alloc(64, (sizeof(State) * threads + 63) / 64 * 64));
    memset(static_cast<void*>(shared), 0xff, sizeof(Shared));
    memset(static_cast<void*>(states), 0xff, sizeof(State) * threads);
    HostBlock<Shared, State> block = {shared, states, threads};
    program(index, block);
    free(shared), free(states);
  }
}

}  // namespace
}  // namespace medgmae
