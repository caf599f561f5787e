// medgmae._C: binds the kernels. Pointers are Python integers (Tensor.data_ptr()); medgmae/ops checks tensors before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_sequences.h"
#ifdef MEDGMAE_CUDA_ARCHITECTURES
#include "bind_sequences_cuda.h"
#endif
#include "common.h"
#include "cuda_kernels.h"
#include "projection/project.h"
#include "rays/rays.h"
#include "voxel/banded.h"
#include "voxel/voxelize.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace medgmae {

namespace generic {
extern const CpuKernels kernels;
}
#ifdef MEDGMAE_AVX2
namespace avx2 {
extern const CpuKernels kernels;
}
#endif
#ifdef MEDGMAE_AVX512
namespace avx512 {
extern const CpuKernels kernels;
}
#endif

namespace {

struct Variant {
  std::string name;
  const CpuKernels* kernels;
  bool runs_here;
};

// The compiled instruction sets, best last.
const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = {
      {"generic", &generic::kernels, true},
#ifdef MEDGMAE_AVX2
      {"avx2", &avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
#ifdef MEDGMAE_AVX512
      {"avx512", &avx512::kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma")},
#endif
  };
  return all;
}

// The variant of that name, or for "" the best that this processor runs.
const Variant& find_variant(const std::string& name) {
  const Variant* best = nullptr;
  for (const Variant& variant : variants()) {
    if (variant.name == name && !variant.runs_here) {
      throw std::invalid_argument("this processor cannot run the CPU variant '" + name + "'; pass '' for the best that it can");
    }
    if (variant.runs_here && (name.empty() || variant.name == name)) best = &variant;
  }
  if (best == nullptr) throw std::invalid_argument("no CPU variant '" + name + "'; build_info()['cpu_variants'] lists them");
  return *best;
}

void check_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + ": expected 1 or more");
}

void check_dtype(bool known, int dtype) {
  if (!known) throw std::invalid_argument("dtype code " + std::to_string(dtype) + " has no kernel; float32 is 0, float64 is 1");
}

// Runs one kernel of the table on a call without the GIL.
template <class Call>
void run_kernel(bool (*CpuKernels::*kernel)(DType, const Call&, int, bool*), int dtype, const Call& call, int threads,
                const std::string& variant) {
  check_threads(threads);
  const CpuKernels& kernels = *find_variant(variant).kernels;
  bool known, enough_memory = true;
  {
    py::gil_scoped_release release;
    known = (kernels.*kernel)(DType(dtype), call, threads, &enough_memory);
  }
  check_dtype(known, dtype);
  if (!enough_memory) throw std::bad_alloc();
}

using Sizes = std::array<int, 3>;
using Positions = std::array<double, 3>;

// Addresses: means, scales, quats, densities, index, and out, or grad and the four gradients.
VoxelizeCall voxelize_call(int64_t batch, int64_t count, int64_t patches, const std::vector<uintptr_t>& addresses, const Sizes& size,
                           const Sizes& patch, const Positions& origin, const Positions& step, double support,
                           const std::array<double, 2>& widths) {
  if (batch < 0 || count < 0 || patches < 0) throw std::invalid_argument("batch, count and patches must be 0 or more");
  if (addresses.size() != 6 && addresses.size() != 10) throw std::invalid_argument("expected 6 or 10 addresses");
  VoxelizeCall call = {};
  call.batch = batch, call.count = count, call.patches = patches, call.support = support;
  call.least_width = widths[0], call.limit_width = widths[1];
  for (int k = 0; k < 3; ++k) {
    if (size[k] < 1 || patch[k] < 1 || size[k] % patch[k]) throw std::invalid_argument("size must be a multiple of patch");
    call.size[k] = size[k], call.patch[k] = patch[k], call.origin[k] = origin[k], call.step[k] = step[k];
  }
  const void* pointers[10] = {};
  for (size_t i = 0; i < addresses.size(); ++i) pointers[i] = reinterpret_cast<const void*>(addresses[i]);
  call.means = pointers[0], call.scales = pointers[1], call.quats = pointers[2], call.densities = pointers[3];
  call.index = static_cast<const int64_t*>(pointers[4]);
  if (addresses.size() == 6) {
    call.out = const_cast<void*>(pointers[5]);
    return call;
  }
  // An empty tensor may have no address, and tells the backward from the forward by having one.
  static const double nothing = 0;
  call.grad = pointers[5] != nullptr ? pointers[5] : &nothing;
  call.grad_means = const_cast<void*>(pointers[6]), call.grad_scales = const_cast<void*>(pointers[7]);
  call.grad_quats = const_cast<void*>(pointers[8]), call.grad_densities = const_cast<void*>(pointers[9]);
  return call;
}

void voxelize(int dtype, int64_t batch, int64_t count, int64_t patches, const std::vector<uintptr_t>& addresses, const Sizes& size,
              const Sizes& patch, const Positions& origin, const Positions& step, double support,
              const std::array<double, 2>& widths, int threads, const std::string& variant) {
  VoxelizeCall const call = voxelize_call(batch, count, patches, addresses, size, patch, origin, step, support, widths);
  run_kernel(&CpuKernels::voxelize, dtype, call, threads, variant);
}

// Addresses: means, scales, quats, densities, views, and out, or grad and the four gradients.
ProjectCall project_call(int64_t batch, int64_t count, int64_t views, const std::vector<uintptr_t>& addresses,
                         const std::array<int, 2>& size, double support, bool parallel, bool affine) {
  if (batch < 0 || count < 0 || views < 0) throw std::invalid_argument("batch, count and views must be 0 or more");
  if (addresses.size() != 6 && addresses.size() != 10) throw std::invalid_argument("expected 6 or 10 addresses");
  if (size[0] < 1 || size[1] < 1 || size[0] > 1 << 24 || size[1] > 1 << 24) throw std::invalid_argument("size must be 1 to 2^24");
  ProjectCall call = {};
  call.batch = batch, call.count = count, call.views = views, call.rows = size[0], call.columns = size[1];
  call.support = support, call.parallel = parallel, call.affine = affine && !parallel;
  const void* pointers[10] = {};
  for (size_t i = 0; i < addresses.size(); ++i) pointers[i] = reinterpret_cast<const void*>(addresses[i]);
  call.means = pointers[0], call.scales = pointers[1], call.quats = pointers[2], call.densities = pointers[3];
  call.geometry = static_cast<const double*>(pointers[4]);
  if (addresses.size() == 6) {
    call.out = const_cast<void*>(pointers[5]);
    return call;
  }
  // As above: an empty tensor may have no address.
  static const double nothing = 0;
  call.grad = pointers[5] != nullptr ? pointers[5] : &nothing;
  call.grad_means = const_cast<void*>(pointers[6]), call.grad_scales = const_cast<void*>(pointers[7]);
  call.grad_quats = const_cast<void*>(pointers[8]), call.grad_densities = const_cast<void*>(pointers[9]);
  return call;
}

// False, with nothing computed, if one of a forward's views is no detector.
bool project(int dtype, int64_t batch, int64_t count, int64_t views, const std::vector<uintptr_t>& addresses,
             const std::array<int, 2>& size, double support, bool parallel, bool affine, int threads, const std::string& variant) {
  ProjectCall const call = project_call(batch, count, views, addresses, size, support, parallel, affine);
  for (int64_t i = 0; call.out != nullptr && i < batch * views; ++i) {
    if (is_no_detector(project_view(call, i))) return false;
  }
  run_kernel(&CpuKernels::project, dtype, call, threads, variant);
  return true;
}

void banded(int64_t stack, int64_t rows_in, int64_t rows_out, int64_t length, int64_t taps, uintptr_t first, uintptr_t weights,
            uintptr_t in, uintptr_t out, bool add, int threads, const std::string& variant) {
  check_threads(threads);
  if (stack < 0 || rows_in < 0 || rows_out < 0 || length < 0 || taps < 0) throw std::invalid_argument("sizes must be 0 or more");
  bool const empty = stack * rows_in * rows_out * length * taps == 0;
  if (!empty && !(first && weights && in && out)) throw std::invalid_argument("a null pointer came with numbers to compute");
  BandedCall const call = {stack, rows_in, rows_out, length, taps, reinterpret_cast<const int64_t*>(first),
                           reinterpret_cast<const float*>(weights), reinterpret_cast<const float*>(in),
                           reinterpret_cast<float*>(out), add};
  const CpuKernels& kernels = *find_variant(variant).kernels;
  py::gil_scoped_release release;
  kernels.banded(call, threads);
}

// Asks for large pages under memory that is about to be written for the first time: a large tensor comes as address space, and
// most of the time of writing it goes into the fault of every small page.
void prefer_large_pages(uintptr_t address, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  uintptr_t const begin = (address + kPage - 1) / kPage * kPage, end = (address + uintptr_t(bytes)) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: nothing depends on it
#else
  (void)address, (void)bytes;
#endif
}

void selective_scan(int dtype, const CallSizes& sizes, const CallStreams& streams, const CallMatrices& matrices, const CallArrays& arrays,
                    int stream_type, int threads, const std::string& variant) {
  check_streams(DType(dtype), StreamType(stream_type), false);
  run_kernel(&CpuKernels::scan, dtype, scan_call(sizes, streams, matrices, arrays, kScanSlab), threads, variant);
}

void causal_conv1d(int dtype, const CallSizes& sizes, const CallStreams& streams, const CallArrays& arrays, int stream_type, int threads,
                   const std::string& variant) {
  check_streams(DType(dtype), StreamType(stream_type), false);
  run_kernel(&CpuKernels::conv, dtype, conv_call(sizes, streams, arrays, kConvSegment), threads, variant);
}

// Addresses: views, spacing, volume, projections, and of the adjoint the edges of its slabs.
void project_volume(int dtype, const std::array<int64_t, 4>& volume, int64_t views, const std::array<int64_t, 2>& size,
                    const std::vector<uintptr_t>& addresses, bool parallel, int64_t slab, bool adjoint, int threads,
                    const std::string& variant) {
  if (volume[0] < 0 || views < 0 || size[0] < 1 || size[1] < 1 || slab < 1) throw std::invalid_argument("sizes must be positive");
  for (int k = 1; k < 4; ++k) {
    if (volume[k] < 2) throw std::invalid_argument("a volume has two voxels or more along every axis, its rim");
  }
  if (addresses.size() != (adjoint ? 5 : 4)) throw std::invalid_argument("expected 4 addresses, or 5 of the adjoint");
  RaysCall call = {};
  call.batch = volume[0], call.views = views, call.slab = slab, call.parallel = parallel, call.adjoint = adjoint;
  for (int k = 0; k < 3; ++k) call.volume[k] = volume[size_t(k) + 1];
  call.size[0] = size[0], call.size[1] = size[1];
  call.lines = reinterpret_cast<const double*>(addresses[0]), call.spacing = reinterpret_cast<const double*>(addresses[1]);
  call.projections = reinterpret_cast<void*>(addresses[adjoint ? 2 : 3]), call.voxels = reinterpret_cast<void*>(addresses[adjoint ? 3 : 2]);
  if (adjoint) call.edges = reinterpret_cast<void*>(addresses[4]);
  if (volume[0] * views == 0) return;
  run_kernel(&CpuKernels::rays, dtype, call, threads, variant);
}

#ifdef MEDGMAE_CUDA_ARCHITECTURES
int64_t voxelize_cuda_workspace(int64_t batch, int64_t count, int64_t patches, const Sizes& size, const Sizes& patch, bool backward) {
  std::vector<uintptr_t> const addresses(backward ? 10 : 6);
  return cuda::voxelize_workspace(voxelize_call(batch, count, patches, addresses, size, patch, {}, {}, 0, {}));
}

void voxelize_cuda(int dtype, int64_t batch, int64_t count, int64_t patches, const std::vector<uintptr_t>& addresses,
                   const Sizes& size, const Sizes& patch, const Positions& origin, const Positions& step, double support,
                   const std::array<double, 2>& widths, uintptr_t workspace, int64_t workspace_bytes, uintptr_t stream) {
  VoxelizeCall const call = voxelize_call(batch, count, patches, addresses, size, patch, origin, step, support, widths);
  check_workspace(workspace, workspace_bytes, cuda::voxelize_workspace(call));
  check_dtype(dtype == int(DType::float32) || dtype == int(DType::float64), dtype);
  run_cuda("voxelize", [&] {
    return cuda::voxelize(DType(dtype), call, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream));
  });
}

int64_t project_cuda_workspace(int dtype, int64_t batch, int64_t count, int64_t views, const std::array<int, 2>& size, bool backward) {
  std::vector<uintptr_t> const addresses(backward ? 10 : 6);
  return cuda::project_workspace(DType(dtype), project_call(batch, count, views, addresses, size, 0, false, false));
}

void project_cuda(int dtype, int64_t batch, int64_t count, int64_t views, const std::vector<uintptr_t>& addresses,
                  const std::array<int, 2>& size, double support, bool parallel, bool affine, uintptr_t workspace,
                  int64_t workspace_bytes, uintptr_t stream) {
  ProjectCall const call = project_call(batch, count, views, addresses, size, support, parallel, affine);
  check_dtype(dtype == int(DType::float32) || dtype == int(DType::float64), dtype);
  check_workspace(workspace, workspace_bytes, cuda::project_workspace(DType(dtype), call));
  run_cuda("project", [&] {
    return cuda::project(DType(dtype), call, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream));
  });
}
#endif

#ifdef MEDGMAE_CUDA_ARCHITECTURES
std::string version_text(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

// A string, or None for a call that went well.
py::object error_text(const cuda::Status& status) { return status.ok() ? py::object(py::none()) : py::str(status.text); }

// Nothing here makes a context on a device: medgmae.ops tries kernels where it is asked to, and says so under 'usable' and 'reason'.
py::dict cuda_device(int index) {
  cuda::DeviceInfo found = {};
  cuda::Status const status = cuda::describe_device(index, &found);
  py::dict info;
  info["name"] = found.name;
  info["capability"] = std::to_string(found.major) + "." + std::to_string(found.minor);
  info["usable"] = py::none();
  info["reason"] = error_text(status);
  return info;
}

py::object cuda_problem() {
  cuda::Status status;
  {
    py::gil_scoped_release release;
    status = cuda::load_kernel();
  }
  return error_text(status);
}
#endif

py::object cuda_info() {
#ifdef MEDGMAE_CUDA_ARCHITECTURES
  int count = 0, driver = 0;
  cuda::Status status;
  {
    py::gil_scoped_release release;
    status = cuda::count_devices(&count);
    driver = cuda::driver_version();
  }
  py::list devices;
  for (int index = 0; index < count; ++index) devices.append(cuda_device(index));
  py::dict info;
  info["version"] = version_text(cuda::toolkit_version());
  info["architectures"] = py::str(MEDGMAE_CUDA_ARCHITECTURES).attr("split")();
  info["driver"] = driver > 0 ? py::object(py::str(version_text(driver))) : py::none();
  info["devices"] = devices;
  info["driver_error"] = error_text(status);
  return std::move(info);
#else
  return py::none();
#endif
}

py::dict build_info() {
  py::dict info, compiled;
  for (const Variant& variant : variants()) compiled[py::str(variant.name)] = variant.runs_here;
  info["version"] = MEDGMAE_VERSION;
#ifdef __VERSION__
  info["compiler"] = __VERSION__;
#endif
  info["cpp_standard"] = static_cast<long>(__cplusplus);
  info["cpu_variants"] = compiled;
  info["cpu_variant"] = find_variant("").name;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  info["cuda"] = cuda_info();
#ifdef MEDGMAE_CUDA_MISSING
  info["cuda_missing"] = MEDGMAE_CUDA_MISSING;  // setup.py says why
#else
  info["cuda_missing"] = py::none();
#endif
  return info;
}

}  // namespace
}  // namespace medgmae

PYBIND11_MODULE(_C, module) {
  using namespace pybind11::literals;
  module.doc() = "Native kernels of medgmae. Private: medgmae.ops is the interface.";
  // INTERFACE of medgmae/ops/native.py, which takes no other: raise both with every change of what a binding takes or writes.
  module.attr("interface") = 4;
  module.def("build_info", &medgmae::build_info, "How this module was compiled and what it finds here. Starts the CUDA driver.");
  module.def("voxelize", &medgmae::voxelize, "dtype"_a, "batch"_a, "count"_a, "patches"_a, "addresses"_a, "size"_a, "patch"_a,
             "origin"_a, "step"_a, "support"_a, "widths"_a, "threads"_a, "variant"_a = "",
             "Renders Gaussians on the CPU (6 addresses), or computes their gradients (10).");
  module.def("project", &medgmae::project, "dtype"_a, "batch"_a, "count"_a, "views"_a, "addresses"_a, "size"_a, "support"_a,
             "parallel"_a, "affine"_a, "threads"_a, "variant"_a = "",
             "Projects Gaussians on the CPU (6 addresses), or computes their gradients (10).");
  module.def("banded", &medgmae::banded, "stack"_a, "rows_in"_a, "rows_out"_a, "length"_a, "taps"_a, "first"_a, "weights"_a,
             "input"_a, "out"_a, "add"_a, "threads"_a, "variant"_a = "",
             "Multiplies a stack of float32 matrices by a banded matrix from the left, on the CPU.");
  module.def("prefer_large_pages", &medgmae::prefer_large_pages, "address"_a, "bytes"_a, "Advises the system, where it takes advice.");
  module.def("selective_scan", &medgmae::selective_scan, "dtype"_a, "sizes"_a, "streams"_a, "matrices"_a, "arrays"_a,
             "stream_type"_a, "threads"_a, "variant"_a = "", "Runs a selective scan on the CPU, or its backward if there is a stream 'grad'.");
  module.def("causal_conv1d", &medgmae::causal_conv1d, "dtype"_a, "sizes"_a, "streams"_a, "arrays"_a, "stream_type"_a, "threads"_a, "variant"_a = "",
             "Runs a causal convolution on the CPU, or its backward if there is a stream 'grad'.");
  module.def("project_volume", &medgmae::project_volume, "dtype"_a, "volume"_a, "views"_a, "size"_a, "addresses"_a, "parallel"_a,
             "slab"_a, "adjoint"_a, "threads"_a, "variant"_a = "", "Integrates a volume along rays on the CPU, or the adjoint of that.");
#ifdef MEDGMAE_CUDA_ARCHITECTURES
  module.def("cuda_problem", &medgmae::cuda_problem, "Why the current device cannot load the kernels, in CUDA's words, or None.");
  module.def("voxelize_cuda_workspace", &medgmae::voxelize_cuda_workspace, "batch"_a, "count"_a, "patches"_a, "size"_a, "patch"_a,
             "backward"_a, "Bytes of device memory that voxelize_cuda needs.");
  module.def("voxelize_cuda", &medgmae::voxelize_cuda, "dtype"_a, "batch"_a, "count"_a, "patches"_a, "addresses"_a, "size"_a,
             "patch"_a, "origin"_a, "step"_a, "support"_a, "widths"_a, "workspace"_a, "workspace_bytes"_a, "stream"_a,
             "voxelize on the current CUDA device; the workspace, like every address, is on the device.");
  module.def("project_cuda_workspace", &medgmae::project_cuda_workspace, "dtype"_a, "batch"_a, "count"_a, "views"_a, "size"_a,
             "backward"_a, "Bytes of device memory that project_cuda needs.");
  module.def("project_cuda", &medgmae::project_cuda, "dtype"_a, "batch"_a, "count"_a, "views"_a, "addresses"_a, "size"_a, "support"_a,
             "parallel"_a, "affine"_a, "workspace"_a, "workspace_bytes"_a, "stream"_a,
             "project on the current CUDA device; the workspace, like every address, is on the device.");
  module.def("selective_scan_cuda_workspace", &medgmae::selective_scan_cuda_workspace, "dtype"_a, "sizes"_a, "streams"_a,
             "matrices"_a, "arrays"_a, "stream_type"_a, "Bytes of device memory that selective_scan_cuda needs.");
  module.def("selective_scan_cuda", &medgmae::selective_scan_cuda, "dtype"_a, "sizes"_a, "streams"_a, "matrices"_a, "arrays"_a,
             "stream_type"_a, "workspace"_a, "workspace_bytes"_a, "stream"_a, "selective_scan on the current CUDA device.");
  module.def("causal_conv1d_cuda", &medgmae::causal_conv1d_cuda, "dtype"_a, "sizes"_a, "streams"_a, "arrays"_a, "stream_type"_a,
             "stream"_a, "causal_conv1d on the current CUDA device.");
#endif
}
