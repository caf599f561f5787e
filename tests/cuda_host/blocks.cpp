// The programs of the CUDA renderer on the host: every block in turn, and in it every phase, thread after thread. Built as a
// shared library by tests/test_voxelize_blocks.py. The arithmetic is that of the device but for its exponential, which is
// made as wrong as the device's may be.
#include "wrong_power.h"

#include "../../cuda/voxel/moments.h"
#include "one_thread.h"

namespace medgmae {
namespace {

template <class T>
void run(const VoxelizeCall& call, const VoxelizeWork& work) {
  int64_t const all = call.batch * call.count;
  for (int64_t i = 0; i < all + 5; ++i) prepare_one<T>(call, work, i);
  if (call.grad == nullptr) {
    int64_t const words = call.batch * call.patches * work.regions * work.words;
    for (int64_t i = 0; words > 0 && i < words + 5; ++i) mask_one(call, work, i);
    int64_t const tiles = call.batch * call.patches * all_pieces(call, tile_sides());
    run_blocks<RenderShared<T>, RenderThread<T>>(tiles, kThreads, [&](int64_t index, auto& block) {
      render_tile<T>(call, work, index, block);
    });
  } else {
    run_blocks<MomentShared<T>, MomentThread<T>>(all * work.shares, kThreads, [&](int64_t index, auto& block) {
      sum_moments<T>(call, work, index, block);
    });
    for (int64_t i = 0; i < all + 5; ++i) finish_one<T>(call, work, i);
  }
}

}  // namespace
}  // namespace medgmae

// Arguments as those of the binding in cuda/module.cpp; `ends` is origin and step. False without enough memory.
extern "C" bool medgmae_blocks(int dtype, const int64_t* counts, void* const* addresses, const int* size, const int* patch,
                               const double* ends, double support, const double* widths, bool backward) {
  using namespace medgmae;
  VoxelizeCall call = {};
  call.batch = counts[0], call.count = counts[1], call.patches = counts[2], call.support = support;
  call.least_width = widths[0], call.limit_width = widths[1];
  for (int k = 0; k < 3; ++k) {
    call.size[k] = size[k], call.patch[k] = patch[k], call.origin[k] = ends[k], call.step[k] = ends[3 + k];
  }
  call.means = addresses[0], call.scales = addresses[1], call.quats = addresses[2], call.densities = addresses[3];
  call.index = static_cast<const int64_t*>(addresses[4]);
  static const double nothing = 0;
  if (!backward) call.out = addresses[5];
  else {
    call.grad = addresses[5] != nullptr ? addresses[5] : &nothing;
    call.grad_means = addresses[6], call.grad_scales = addresses[7];
    call.grad_quats = addresses[8], call.grad_densities = addresses[9];
  }
  int64_t const bytes = divide_workspace(call, backward, nullptr).bytes;
  void* const workspace = malloc(size_t(bytes > 0 ? bytes : 1));
  if (workspace == nullptr) return false;
  memset(workspace, 0xff, size_t(bytes));
  VoxelizeWork const work = divide_workspace(call, backward, workspace);
  bool const known = dispatch(DType(dtype), [&](auto zero) { run<decltype(zero)>(call, work); });
  free(workspace);
  return known;
}
