// Drives the CPU projector of one instruction set over random and hostile calls; see driver.cpp.
#include <string.h>

#include "../../cuda/projection/project.h"
#include "hostile.h"

namespace medgmae {
namespace MEDGMAE_VARIANT {
extern const CpuKernels kernels;
}
}  // namespace medgmae

namespace {

using medgmae::DType;
using medgmae::ProjectCall;
using namespace hostile_input;

template <class T>
struct Case {
  ProjectCall call = {};
  Buffers<T> buffers;
  Buffers<double> views;
  int64_t pixels = 0, all = 0;
};

// Views without a malformed one: medgmae.ops refuses those.
template <class T>
void describe(Random& random, Case<T>* c) {
  ProjectCall& call = c->call;
  call.batch = pick(random, 0, 2), call.views = pick(random, 0, 3);
  call.count = pick(random, 0, 3) ? pick(random, 0, 19) : pick(random, 60, 140);
  call.rows = pick(random, 1, pick(random, 0, 3) ? 24 : 150), call.columns = pick(random, 1, pick(random, 0, 3) ? 24 : 150);
  static const double supports[] = {2.5, 4, 0.01, 30, INFINITY};
  call.support = supports[pick(random, 0, 4)], call.parallel = pick(random, 0, 2) == 0, call.affine = !call.parallel && pick(random, 0, 2) == 0;
  double* const views = c->views.make(12 * call.batch * call.views);
  for (int64_t v = 0; v < call.batch * call.views; ++v) {
    double const size = real(random, 0.3, 30), far = call.parallel ? 1 : real(random, 60, 900);
    double const view[12] = {far, real(random, -9, 9) * (call.parallel ? 0.01 : 1), 0, call.parallel ? 0 : -far, -size * call.columns / 2,
                             -size * call.rows / 2, real(random, -0.1, 0.1), size, real(random, -0.1, 0.1), 0, real(random, -0.1, 0.1), size};
    for (int k = 0; k < 12; ++k) views[12 * v + k] = view[k];
  }
  call.geometry = views;
  c->all = call.batch * call.count, c->pixels = call.batch * call.views * call.rows * call.columns;
}

// Buffers of exact size. Scales cover points, needles and what is larger than the way to the source.
template <class T>
void allocate(Random& random, Case<T>* c, int one_in) {
  ProjectCall& call = c->call;
  T *means = c->buffers.make(3 * c->all), *scales = c->buffers.make(3 * c->all);
  T *quats = c->buffers.make(4 * c->all), *densities = c->buffers.make(c->all), *grad = c->buffers.make(c->pixels);
  double const reach = pick(random, 0, 3) ? 60 : 2000, low = pick(random, 0, 1) ? log(1e-4) : log(1.0), high = pick(random, 0, 3) ? log(60.0) : log(1e4);
  fill(random, means, 3 * c->all, -reach, reach, one_in);
  for (int64_t i = 0; i < 3 * c->all; ++i) scales[i] = T(hostile(random, exp(real(random, low, high)), one_in));
  fill(random, quats, 4 * c->all, -1, 1, one_in);
  fill(random, densities, c->all, -2, 2, one_in);
  fill(random, grad, c->pixels, -1, 1, 1 << 30);
  call.means = means, call.scales = scales, call.quats = quats, call.densities = densities;
  call.out = c->buffers.make(c->pixels);
  call.grad_means = c->buffers.make(3 * c->all), call.grad_scales = c->buffers.make(3 * c->all);
  call.grad_quats = c->buffers.make(4 * c->all), call.grad_densities = c->buffers.make(c->all);
  memset(call.out, 0x7f, size_t(c->pixels) * sizeof(T));
  call.grad = grad;
}

template <class T>
std::vector<T> results(const Case<T>& c, int threads) {
  ProjectCall call = c.call;
  DType const dtype = sizeof(T) == 4 ? DType::float32 : DType::float64;
  bool enough = true;
  bool ran = medgmae::MEDGMAE_VARIANT::kernels.project(dtype, call, threads, &enough);
  call.grad = nullptr;
  ran = medgmae::MEDGMAE_VARIANT::kernels.project(dtype, call, threads, &enough) && ran;
  if (!ran || !enough) {
    fprintf(stderr, "a kernel refused\n");
    exit(2);
  }
  std::vector<T> all;
  auto append = [&all](const void* from, int64_t n) {
    const T* values = static_cast<const T*>(from);
    all.insert(all.end(), values, values + n);
  };
  append(call.out, c.pixels);
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
    fprintf(stderr, "seed %llu, %zu bytes, value %zu of %zu (%lld pixels, %lld Gaussians, support %g, parallel %d, affine %d): %.17g with 1 thread, %.17g with 3\n",
            static_cast<unsigned long long>(seed), sizeof(T), i, one.size(), static_cast<long long>(c.pixels), static_cast<long long>(c.all),
            c.call.support, c.call.parallel, c.call.affine, double(one[i]), double(three[i]));
    exit(3);
  }
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t const cases = argc > 1 ? strtoull(argv[1], nullptr, 10) : 300;
  uint64_t const first = argc > 2 ? strtoull(argv[2], nullptr, 10) : 0;
  for (uint64_t seed = first; seed < first + cases; ++seed) run<float>(seed), run<double>(seed);
  printf("%llu calls, no finding\n", static_cast<unsigned long long>(2 * cases));
  return 0;
}
