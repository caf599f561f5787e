// The programs of the CUDA projector with every thread of a block a thread of its own and a barrier after each phase, as on the
// device, for ThreadSanitizer to watch; and with what AddressSanitizer sees of their memory. tests/cuda_host/run.sh builds it.
#include <stdio.h>

#include <random>
#include <vector>

#include "../../cuda/projection/gradient_blocks.h"
#include "many_threads.h"
#include "project_host.h"

namespace medgmae {
namespace {

// Memory of exactly this size, so that a step beyond it is seen.
struct Buffers {
  std::vector<void*> all;
  template <class T>
  T* take(int64_t n) {
    all.push_back(calloc(size_t(n), sizeof(T)));
    return static_cast<T*>(all.back());
  }
  ~Buffers() {
    for (void* buffer : all) free(buffer);
  }
};

template <class T>
void run(unsigned seed) {
  std::mt19937 random(seed);
  auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  auto uniform = [&](double low, double high) { return std::uniform_real_distribution<double>(low, high)(random); };
  ProjectCall call = {};
  bool const many = seed % 5 == 0;  // more Gaussians than one round of words
  call.batch = many ? 1 : pick(1, 2), call.count = many ? 4200 : pick(0, 40), call.views = many ? 1 : pick(1, 3);
  call.rows = pick(1, many ? 4 : 70), call.columns = pick(1, many ? 9 : 70);
  call.support = seed % 2 == 0 ? 2.5 : double(INFINITY), call.parallel = seed % 3 == 0, call.affine = seed % 3 == 1;
  int64_t const all = call.batch * call.count, pixels = call.batch * call.views * call.rows * call.columns;
  Buffers buffers;
  T *means = buffers.take<T>(3 * all), *scales = buffers.take<T>(3 * all), *quats = buffers.take<T>(4 * all);
  T *densities = buffers.take<T>(all), *out = buffers.take<T>(pixels);
  double* geometry = buffers.take<double>(12 * call.batch * call.views);
  double const width = exp(uniform(-1, 5)), spread = seed % 4 == 0 ? 3 : 0.5;  // needles in every fourth
  for (int64_t i = 0; i < 3 * all; ++i) means[i] = T(uniform(-90, 90)), scales[i] = T(width * exp(spread * uniform(-1, 1)));
  for (int64_t i = 0; i < 4 * all; ++i) quats[i] = T(uniform(-1, 1));
  for (int64_t i = 0; i < all; ++i) densities[i] = T(uniform(-1, 1));
  if (seed % 7 == 0 && all > 0) scales[0] = NAN;
  for (int64_t v = 0; v < call.batch * call.views; ++v) {
    double const view[12] = {100, uniform(-9, 9), 5, -100, -70, -60, uniform(-1, 1), 2, 0.1, 0, 0.2, seed % 11 == 0 ? 0.0 : 2.0};
    for (int k = 0; k < 12; ++k) geometry[12 * v + k] = view[k];
  }
  call.means = means, call.scales = scales, call.quats = quats, call.densities = densities, call.geometry = geometry, call.out = out;
  for (bool backward : {false, true}) {
    if (backward) {
      call.grad = out;
      call.grad_means = buffers.take<T>(3 * all), call.grad_scales = buffers.take<T>(3 * all);
      call.grad_quats = buffers.take<T>(4 * all), call.grad_densities = buffers.take<T>(all);
    }
    void* const workspace = buffers.take<char>(divide_project_workspace(call, sizeof(T), nullptr).bytes);
    run_project<T>(call, divide_project_workspace(call, sizeof(T), workspace));
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
