// The programs of the CUDA renderer with every thread of a block a thread of its own and a barrier after each phase, as on
// the device, for ThreadSanitizer to watch; and with what AddressSanitizer sees of their memory. tests/cuda_host/run.sh builds it.
#include <stdio.h>

#include <random>
#include <vector>

#include "../../cuda/voxel/moments.h"
#include "many_threads.h"

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
void render_and_differentiate(VoxelizeCall call, Buffers* buffers) {
  int64_t const all = call.batch * call.count, voxels = call.batch * call.patches * patch_volume(call);
  T* const out = buffers->take<T>(voxels);
  call.out = out;
  for (bool backward : {false, true}) {
    if (backward) {
      call.grad = out;
      call.grad_means = buffers->take<T>(3 * all), call.grad_scales = buffers->take<T>(3 * all);
      call.grad_quats = buffers->take<T>(4 * all), call.grad_densities = buffers->take<T>(all);
    }
    void* const workspace = buffers->take<char>(divide_workspace(call, backward, nullptr).bytes);
    VoxelizeWork const work = divide_workspace(call, backward, workspace);
    for (int64_t i = 0; i < all; ++i) prepare_one<T>(call, work, i);
    if (backward) {
      run_blocks<MomentShared<T>, MomentThread<T>>(all * work.shares, kThreads, [&](int64_t i, auto& block) {
        sum_moments<T>(call, work, i, block);
      });
      for (int64_t i = 0; i < all; ++i) finish_one<T>(call, work, i);
    } else {
      int64_t const words = call.batch * call.patches * work.regions * work.words;
      for (int64_t i = 0; i < words; ++i) mask_one(call, work, i);
      int64_t const tiles = call.batch * call.patches * all_pieces(call, tile_sides());
      run_blocks<RenderShared<T>, RenderThread<T>>(
          tiles, kThreads, [&](int64_t i, auto& block) { render_tile<T>(call, work, i, block); });
    }
  }
}

template <class T>
void run(unsigned seed) {
  std::mt19937 random(seed);
  auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  auto uniform = [&] { return std::uniform_real_distribution<double>(-0.3, 1.3)(random); };
  VoxelizeCall call = {};
  bool const many = seed % 5 == 0;  // more Gaussians than one round of words
  call.batch = many ? 1 : pick(1, 2), call.count = many ? 2100 : pick(0, 40);
  for (int k = 0; k < 3; ++k) {
    int const pieces = many ? 1 : pick(1, 3);
    call.patch[k] = pick(1, many ? 4 : 20), call.size[k] = pieces * call.patch[k];
    call.step[k] = call.size[k] > 1 ? 1.0 / (call.size[k] - 1) : 0;
  }
  int const grid = call.size[0] / call.patch[0] * (call.size[1] / call.patch[1]) * (call.size[2] / call.patch[2]);
  call.patches = pick(1, many ? 1 : 4);
  call.support = seed % 3 == 0 ? 0 : seed % 3 == 1 ? 2.5 : double(INFINITY);
  call.limit_width = INFINITY;
  int64_t const all = call.batch * call.count;
  Buffers buffers;
  T *means = buffers.take<T>(3 * all), *scales = buffers.take<T>(3 * all), *quats = buffers.take<T>(4 * all);
  T* densities = buffers.take<T>(all);
  int64_t* index = buffers.take<int64_t>(call.batch * call.patches);
  double const width = exp(pick(-6, -1)), spread = seed % 4 == 0 ? 3 : 0.5;  // needles in every fourth
  for (int64_t i = 0; i < 3 * all; ++i) means[i] = T(uniform()), scales[i] = T(width * exp(spread * (uniform() - 0.5)));
  for (int64_t i = 0; i < 4 * all; ++i) quats[i] = T(uniform() - 0.5);
  for (int64_t i = 0; i < all; ++i) densities[i] = T(uniform());
  if (seed % 7 == 0 && all > 0) scales[0] = NAN;
  for (int64_t i = 0; i < call.batch * call.patches; ++i) index[i] = pick(0, 9) ? pick(0, grid - 1) : pick(-1, 1) * (int64_t(1) << 40);
  call.means = means, call.scales = scales, call.quats = quats, call.densities = densities, call.index = index;
  render_and_differentiate<T>(call, &buffers);
}

}  // namespace
}  // namespace medgmae

int main(int argc, char** argv) {
  int const cases = argc > 1 ? atoi(argv[1]) : 15;
  for (int seed = 0; seed < cases; ++seed) medgmae::run<float>(unsigned(seed)), medgmae::run<double>(unsigned(seed));
  printf("%d calls, no finding\n", 2 * cases);
  return 0;
}
