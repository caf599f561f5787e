// Runs thread blocks of CUDA programs with every thread a thread of its own, a barrier after each phase and an exchange in each
// warp, as on the device, for ThreadSanitizer to watch.
#pragma once

#include <pthread.h>
#include <stdint.h>

#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace medgmae {
namespace {

// What the threads of a block share beside its memory.
struct Meeting {
  pthread_barrier_t block, warps[4];
  double exchanged[128][4];
};

template <class Shared, class State>
struct ThreadBlock {
  using Lane = State;
  Shared* shared;
  Meeting* meeting;
  int thread;
  State state;
  template <class Phase>
  void lanes(Phase phase) {
    phase(thread, state);
  }
  template <class Phase>
  void each(Phase phase) {
    phase(thread, state);
    meet();
  }
  void meet() { pthread_barrier_wait(&meeting->block); }
  template <int kCount, class Values>
  void fold(int mask, Values values) {
    auto* const v = values(state);
    constexpr int half = kCount > 1 ? kCount / 2 : 0, count = (kCount + 1) / 2;
    bool const upper = (thread & mask) != 0;
    pthread_barrier_t* const warp = &meeting->warps[thread / 32];
    for (int i = 0; i < count; ++i) meeting->exchanged[thread][i] = double(upper ? v[i] : v[half + i]);
    pthread_barrier_wait(warp);
    for (int i = 0; i < count; ++i) {
      using T = std::decay_t<decltype(v[0])>;
      v[i] = (upper ? v[half + i] : v[i]) + T(meeting->exchanged[thread ^ mask][i]);
    }
    pthread_barrier_wait(warp);
  }
};

// Some of the blocks: threads that meet after every phase take their time.
template <class Shared, class State, class Program>
void run_blocks(int64_t blocks, int threads, Program program) {
  for (int64_t index = 0; index < blocks; index += 1 + blocks / 4) {
    auto const shared = std::make_unique<Shared>();
    auto const meeting = std::make_unique<Meeting>();
    pthread_barrier_init(&meeting->block, nullptr, threads);
    for (pthread_barrier_t& warp : meeting->warps) pthread_barrier_init(&warp, nullptr, 32);
    std::vector<std::thread> running;
    for (int t = 0; t < threads; ++t) {
      running.emplace_back([&, t] {
        auto const block = std::make_unique<ThreadBlock<Shared, State>>();
        block->shared = shared.get(), block->meeting = meeting.get(), block->thread = t;
        program(index, *block);
      });
    }
    for (std::thread& thread : running) thread.join();
    pthread_barrier_destroy(&meeting->block);
    for (pthread_barrier_t& warp : meeting->warps) pthread_barrier_destroy(&warp);
  }
}

}  // namespace
}  // namespace medgmae
