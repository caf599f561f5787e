// The programs of the CUDA scan with every thread of a block a thread of its own, a barrier after each phase and an exchange
// in each warp, as on the device, for ThreadSanitizer to watch; and with what AddressSanitizer sees of their memory.
// tests/cuda_host/run.sh builds it.
#include <stdio.h>

#include <random>
#include <vector>

#include "many_threads.h"
#include "scan_host.h"

namespace medgmae {
namespace {

struct InThreads {
  template <class T, class Shared, class State, class Program>
  void blocks(int64_t count, Program program) {
    run_blocks<Shared, State>(count, kScanThreads<T>, program);
  }
};

// Memory of exactly this size, so that a step beyond it is seen.
struct Buffers {
  std::mt19937& random;
  std::vector<void*> all;
  template <class T>
  T* take(int64_t n) {
    all.push_back(calloc(size_t(n), sizeof(T)));
    return static_cast<T*>(all.back());
  }
  template <class T>
  T* numbers(int64_t n, double low, double high) {
    T* const values = take<T>(n);
    std::uniform_real_distribution<double> draw(low, high);
    for (int64_t i = 0; i < n; ++i) values[i] = T(draw(random));
    return values;
  }
  ~Buffers() {
    for (void* buffer : all) free(buffer);
  }
};

template <class T>
ScanMatrix matrix(const ScanCall& call, Buffers* buffers) {
  int64_t const row = call.groups * call.states;
  return {buffers->numbers<T>(call.batch * call.length * row, -1, 1), call.length * row, row, call.states};
}

template <class T>
void run(unsigned seed) {
  std::mt19937 random(seed);
  auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  Buffers buffers = {random, {}};
  ScanCall call = {};
  call.groups = pick(1, 2), call.batch = pick(1, 2), call.length = pick(1, 90);
  call.channels = call.groups * pick(1, 150), call.states = pick(1, 20), call.chunk = pick(1, 64);
  call.softplus = seed % 2 == 0;
  int64_t const rows = call.batch * call.channels, tokens = rows * call.length;
  auto stream = [&](double low, double high) {
    return Stream{buffers.numbers<T>(tokens, low, high), call.length * call.channels, call.channels};
  };
  call.u = stream(-1, 1), call.delta = stream(0, 0.5), call.out = stream(0, 0);
  if (pick(0, 2)) call.z = stream(-2, 2);
  call.B = matrix<T>(call, &buffers), call.C = matrix<T>(call, &buffers);
  call.A = buffers.numbers<T>(call.channels * call.states, -2, 0);
  if (pick(0, 2)) call.D = buffers.numbers<T>(call.channels, -1, 1), call.bias = buffers.numbers<T>(call.channels, 0, 0.1);
  call.kept = buffers.take<T>(call.batch * scan_chunks(call) * call.states * call.channels);
  for (bool backward : {false, true}) {
    if (backward) {
      int64_t const slabs = channel_blocks(call, kBlockChannels<T, kBackwardWide>), row = call.groups * call.states;
      call.grad = stream(-1, 1), call.du = stream(0, 0), call.ddelta = stream(0, 0), call.dz = stream(0, 0);
      call.grad_state = pick(0, 1) ? buffers.numbers<T>(rows * call.states, -1, 1) : nullptr;
      call.dA = buffers.take<T>(rows * call.states), call.dD = buffers.take<T>(rows), call.dbias = buffers.take<T>(rows);
      call.dB = buffers.take<T>(slabs * call.batch * call.length * row);
      call.dC = buffers.take<T>(slabs * call.batch * call.length * row);
    }
    int const room = pick(0, 12);
    void* const workspace = buffers.take<char>(divide_scan_workspace<T>(call, backward, room, nullptr).bytes);
    run_scan<T, T>(call, divide_scan_workspace<T>(call, backward, room, workspace), InThreads());
  }
}

}  // namespace
}  // namespace medgmae

int main(int argc, char** argv) {
  int const cases = argc > 1 ? atoi(argv[1]) : 15;
  for (int seed = 0; seed < cases; ++seed) medgmae::run<float>(unsigned(seed)), medgmae::run<double>(unsigned(seed));
  printf("%d calls, no finding\n", 2 * cases);
  return 0;
}
