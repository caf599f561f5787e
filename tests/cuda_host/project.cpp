// The programs of the CUDA projector on the host: every block in turn, and in it every phase, thread after thread. Built as a
// shared library by tests/test_project_blocks.py. The arithmetic is that of the device but for its exponential, which is made as
// wrong as the device's may be.
#include "wrong_power.h"

#include "one_thread.h"
#include "project_host.h"

// Arguments as those of the binding in cuda/module.cpp; `flags` is parallel and affine. False without enough memory.
extern "C" bool medgmae_project_blocks(int dtype, const int64_t* counts, void* const* addresses, const int* size, double support,
                                       const bool* flags, bool backward) {
  using namespace medgmae;
  ProjectCall call = {};
  call.batch = counts[0], call.count = counts[1], call.views = counts[2], call.rows = size[0], call.columns = size[1];
  call.support = support, call.parallel = flags[0], call.affine = flags[1] && !flags[0];
  call.means = addresses[0], call.scales = addresses[1], call.quats = addresses[2], call.densities = addresses[3];
  call.geometry = static_cast<const double*>(addresses[4]);
  static const double nothing = 0;
  if (!backward) call.out = addresses[5];
  else {
    call.grad = addresses[5] != nullptr ? addresses[5] : &nothing;
    call.grad_means = addresses[6], call.grad_scales = addresses[7];
    call.grad_quats = addresses[8], call.grad_densities = addresses[9];
  }
  int64_t const element = dtype == int(DType::float32) ? 4 : 8, bytes = divide_project_workspace(call, element, nullptr).bytes;
  void* const workspace = malloc(size_t(bytes > 0 ? bytes : 1));
  if (workspace == nullptr) return false;
  memset(workspace, 0xff, size_t(bytes));
  ProjectWork const work = divide_project_workspace(call, element, workspace);
  bool const known = dispatch(DType(dtype), [&](auto zero) { run_project<decltype(zero)>(call, work); });
  free(workspace);
  return known;
}
