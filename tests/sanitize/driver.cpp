// Drives the CPU renderer of one instruction set over random and hostile calls. Every buffer is an allocation of its exact
// size, so that AddressSanitizer sees one element too far; run.sh compiles it together with cuda/cpu_kernels.cpp.
#include <string.h>

#include <limits>

#include "../../cuda/voxel/banded.h"
#include "../../cuda/voxel/voxelize.h"
#include "hostile.h"

namespace medgmae {
namespace MEDGMAE_VARIANT {
extern const CpuKernels kernels;
}
}  // namespace medgmae

namespace {

using medgmae::DType;
using medgmae::VoxelizeCall;
using namespace hostile_input;

template <class T>
struct Case {
  VoxelizeCall call = {};
  Buffers<T> buffers;
  std::unique_ptr<int64_t[]> index;
  int64_t voxels = 0, all = 0;
};

template <class T>
void describe(Random& random, Case<T>* c) {
  VoxelizeCall& call = c->call;
  bool const dense = pick(random, 0, 1) == 0;
  int const limit = pick(random, 0, 3) ? 24 : 70;
  int64_t grid = 1;
  call.batch = pick(random, 0, 2), call.count = pick(random, 0, 3) ? pick(random, 0, 9) : pick(random, 60, 140);
  for (int k = 0; k < 3; ++k) {
    int const patches = dense ? 1 : pick(random, 1, 4);
    call.patch[k] = pick(random, 1, dense ? limit : 19), call.size[k] = patches * call.patch[k], grid *= patches;
    call.origin[k] = 0, call.step[k] = call.size[k] > 1 ? 1.0 / (call.size[k] - 1) : 0;
  }
  call.patches = dense ? 1 : pick(random, 0, 5);
  static const double supports[] = {0, 2.5, 4, 0.01, 30, std::numeric_limits<double>::infinity()};
  call.support = supports[pick(random, 0, 5)];
  call.least_width = 0, call.limit_width = std::numeric_limits<double>::infinity();
  c->index.reset(new int64_t[size_t(call.batch * call.patches)]);
  for (int64_t i = 0; i < call.batch * call.patches; ++i) c->index[size_t(i)] = dense ? 0 : pick(random, 0, int(grid) - 1);
  call.index = c->index.get();
  c->all = call.batch * call.count;
  c->voxels = call.batch * call.patches * call.patch[0] * call.patch[1] * call.patch[2];
}

// Buffers of exact size. Scales cover needles and points: from 1e-4 to 10, each axis for itself.
template <class T>
void allocate(Random& random, Case<T>* c, int one_in) {
  VoxelizeCall& call = c->call;
  T *means = c->buffers.make(3 * c->all), *scales = c->buffers.make(3 * c->all);
  T *quats = c->buffers.make(4 * c->all), *densities = c->buffers.make(c->all), *grad = c->buffers.make(c->voxels);
  double const reach = pick(random, 0, 3) ? 0.2 : 5.0, low = pick(random, 0, 1) ? log(1e-4) : log(0.05);
  fill(random, means, 3 * c->all, -reach, 1 + reach, one_in);
  for (int64_t i = 0; i < 3 * c->all; ++i) scales[i] = T(hostile(random, exp(real(random, low, log(10.0))), one_in));
  fill(random, quats, 4 * c->all, -1, 1, one_in);
  fill(random, densities, c->all, -2, 2, one_in);
  fill(random, grad, c->voxels, -1, 1, 1 << 30);
  call.means = means, call.scales = scales, call.quats = quats, call.densities = densities;
  call.out = c->buffers.make(c->voxels);
  call.grad_means = c->buffers.make(3 * c->all), call.grad_scales = c->buffers.make(3 * c->all);
  call.grad_quats = c->buffers.make(4 * c->all), call.grad_densities = c->buffers.make(c->all);
  memset(call.out, 0x7f, size_t(c->voxels) * sizeof(T));
  call.grad = grad;
}

template <class T>
std::vector<T> results(const Case<T>& c, int threads) {
  VoxelizeCall call = c.call;
  bool enough = true;
  bool ran = medgmae::MEDGMAE_VARIANT::kernels.voxelize(sizeof(T) == 4 ? DType::float32 : DType::float64, call, threads, &enough);
  call.grad = nullptr;
  ran = medgmae::MEDGMAE_VARIANT::kernels.voxelize(sizeof(T) == 4 ? DType::float32 : DType::float64, call, threads, &enough) && ran;
  if (!ran || !enough) {
    fprintf(stderr, "a kernel refused\n");
    exit(2);
  }
  std::vector<T> all;
  auto append = [&all](const void* from, int64_t n) {
    const T* values = static_cast<const T*>(from);
    all.insert(all.end(), values, values + n);
  };
  append(call.out, c.voxels);
  append(call.grad_means, 3 * c.all), append(call.grad_scales, 3 * c.all);
  append(call.grad_quats, 4 * c.all), append(call.grad_densities, c.all);
  return all;
}

template <class T>
void run(uint64_t seed) {
  Random random(seed);
  Case<T> c;
  describe(random, &c);
  bool const ordinary = pick(random, 0, 2) != 0;
  allocate(random, &c, ordinary ? 1 << 30 : 20);
  std::vector<T> const one = results(c, 1), three = results(c, 3);
  for (size_t i = 0; i < one.size(); ++i) {
    bool const same = memcmp(&one[i], &three[i], sizeof(T)) == 0;
    if (same && (isfinite(one[i]) || !ordinary)) continue;
    fprintf(stderr, "seed %llu, %zu bytes, value %zu of %zu (%lld voxels, %lld Gaussians, support %g): %.17g with 1 thread, %.17g with 3\n",
            static_cast<unsigned long long>(seed), sizeof(T), i, one.size(), static_cast<long long>(c.voxels),
            static_cast<long long>(c.all), c.call.support, double(one[i]), double(three[i]));
    exit(3);
  }
}

// Products of banded matrices; a band may pass the last row.
void run_banded(uint64_t seed) {
  Random random(seed);
  medgmae::BandedCall call = {};
  call.stack = pick(random, 0, 3), call.rows_in = pick(random, 1, 40), call.rows_out = pick(random, 0, 40);
  call.length = pick(random, 0, 100), call.taps = pick(random, 1, 20), call.add = pick(random, 0, 1) == 1;
  int64_t const groups = (call.rows_out + medgmae::kBandRows - 1) / medgmae::kBandRows;
  std::unique_ptr<int64_t[]> const first(new int64_t[size_t(groups)]);
  for (int64_t g = 0; g < groups; ++g) first[g] = pick(random, 0, int(call.rows_in) - 1);
  auto const filled = [&](int64_t n) {
    std::unique_ptr<float[]> values(new float[size_t(n)]);
    for (int64_t i = 0; i < n; ++i) values[i] = float(hostile(random, real(random, -1, 1), 50));
    return values;
  };
  auto const weights = filled(groups * call.taps * medgmae::kBandRows), in = filled(call.stack * call.rows_in * call.length);
  auto const out = filled(call.stack * call.rows_out * call.length);
  call.first = first.get(), call.weights = weights.get(), call.in = in.get(), call.out = out.get();
  medgmae::MEDGMAE_VARIANT::kernels.banded(call, pick(random, 1, 3));
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t const cases = argc > 1 ? strtoull(argv[1], nullptr, 10) : 300;
  uint64_t const first = argc > 2 ? strtoull(argv[2], nullptr, 10) : 0;
  for (uint64_t seed = first; seed < first + cases; ++seed) run<float>(seed), run<double>(seed), run_banded(seed);
  printf("%llu calls, no finding\n", static_cast<unsigned long long>(3 * cases));
  return 0;
}
