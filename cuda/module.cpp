// medgmae._C: binds the kernels. Pointers are Python integers (Tensor.data_ptr()); medgmae/ops checks tensors before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common.h"
#include "cuda_kernels.h"

#ifdef _OPENMP
#include <omp.h>
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

void check(int64_t n, bool pointers, int threads) {
  if (n < 0) throw std::invalid_argument("n is " + std::to_string(n) + ": expected 0 or more");
  if (n > 0 && !pointers) throw std::invalid_argument("a null pointer came with n > 0");
  if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + ": expected 1 or more");
}

void check_dtype(bool known, int dtype) {
  if (!known) throw std::invalid_argument("dtype code " + std::to_string(dtype) + " has no kernel; float32 is 0, float64 is 1");
}

void axpy(int dtype, int64_t n, double a, uintptr_t x, uintptr_t y, int threads, const std::string& variant) {
  check(n, x != 0 && y != 0, threads);
  const CpuKernels& kernels = *find_variant(variant).kernels;
  bool known;
  {
    py::gil_scoped_release release;
    known = kernels.axpy(DType(dtype), n, a, reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), threads);
  }
  check_dtype(known, dtype);
}

#ifdef MEDGMAE_CUDA_ARCHITECTURES
void axpy_cuda(int dtype, int64_t n, double a, uintptr_t x, uintptr_t y, uintptr_t stream) {
  check(n, x != 0 && y != 0, 1);
  cuda::Status status;
  {
    py::gil_scoped_release release;
    status = cuda::axpy(DType(dtype), n, a, reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y),
                        reinterpret_cast<void*>(stream));
  }
  if (!status.ok()) throw std::runtime_error(std::string("axpy on CUDA: ") + status.text);
}
#endif

py::object cuda_info() {
#ifdef MEDGMAE_CUDA_ARCHITECTURES
  int const version = cuda::toolkit_version();
  py::dict info;
  info["version"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  info["architectures"] = py::str(MEDGMAE_CUDA_ARCHITECTURES).attr("split")();
  int count = 0;
  cuda::Status const status = cuda::count_devices(&count);
  info["devices"] = count;
  info["driver_error"] = status.ok() ? py::object(py::none()) : py::str(status.text);
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
  return info;
}

}  // namespace
}  // namespace medgmae

PYBIND11_MODULE(_C, module) {
  using namespace pybind11::literals;
  module.doc() = "Native kernels of medgmae. Private: medgmae.ops is the interface.";
  module.def("build_info", &medgmae::build_info, "How this module was compiled and what it finds here. Starts the CUDA driver.");
  module.def("axpy", &medgmae::axpy, "dtype"_a, "n"_a, "a"_a, "x"_a, "y"_a, "threads"_a, "variant"_a = "",
             "y += a x on the CPU, for n elements at the addresses x and y.");
#ifdef MEDGMAE_CUDA_ARCHITECTURES
  module.def("axpy_cuda", &medgmae::axpy_cuda, "dtype"_a, "n"_a, "a"_a, "x"_a, "y"_a, "stream"_a,
             "y += a x on the current CUDA device, for n elements at the device addresses x and y.");
#endif
}
