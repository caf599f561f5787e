// Drives the CPU scan and convolution of one instruction set over random and hostile calls. Every buffer is an allocation of
// its exact size; results must not depend on the threads, nor on what the buffers held before. See run.sh.
#include <string.h>

#include "../../cuda/conv/conv.h"
#include "../../cuda/scan/scan.h"
#include "hostile.h"

namespace medgmae {
namespace MEDGMAE_VARIANT {
extern const CpuKernels kernels;
}
}  // namespace medgmae

namespace {

using medgmae::ConvCall;
using medgmae::DType;
using medgmae::ScanCall;
using medgmae::ScanMatrix;
using medgmae::Stream;
using namespace hostile_input;

template <class T>
constexpr DType kDType = sizeof(T) == 4 ? DType::float32 : DType::float64;

// What a kernel writes: all of it if it was not zero before, or sums into zeros.
struct Output {
  void* at;
  int64_t bytes;
  bool zeroed;
};

template <class T>
struct Case {
  Random& random;
  int one_in;  // a hostile number in so many
  bool reverse;
  int64_t batch, length, channels;
  Buffers<T> buffers;
  std::vector<Output> outputs;

  T* filled(int64_t n, double low, double high) {
    T* at = buffers.make(n);
    fill(random, at, n, low, high, one_in);
    return at;
  }

  T* output(int64_t n, bool zeroed) {
    outputs.push_back({buffers.make(n), n * int64_t(sizeof(T)), zeroed});
    return static_cast<T*>(outputs.back().at);
  }

  // Rows of `width` elements with a gap between them, one row per token, seen from the first scanned one.
  Stream rows(T* at, int64_t stride) const {
    if (reverse && length) at += (length - 1) * stride;
    return {at, length * stride, reverse ? -stride : stride};
  }

  Stream input(int64_t width, double low, double high) {
    int64_t const stride = width + (pick(random, 0, 1) ? 0 : pick(random, 1, 40)), count = batch * length;
    return rows(filled(count ? (count - 1) * stride + width : 0, low, high), stride);
  }

  // The same, or with the steps of a channel side by side.
  Stream read(int64_t width, double low, double high) {
    if (pick(random, 0, 2)) return input(width, low, high);
    int64_t const apart = length + (pick(random, 0, 1) ? 0 : pick(random, 1, 40)), count = batch * width;
    T* at = filled(count ? (count - 1) * apart + length : 0, low, high);
    if (reverse && length) at += length - 1;
    return {at, width * apart, reverse ? -1 : 1, apart};
  }

  Stream written() { return rows(output(batch * length * channels, false), channels); }

  ScanMatrix matrix(int64_t groups, int64_t states) {
    bool const shared = pick(random, 0, 2) == 0;  // one group for all
    Stream const s = input((shared ? 1 : groups) * states, -1, 1);
    return {s.at, s.batch, s.step, shared ? 0 : states};
  }
};

// Everything that was written, after the outputs held `before`.
template <class T, class Run>
std::vector<unsigned char> results(const Case<T>& c, int before, Run run) {
  for (const Output& o : c.outputs) memset(o.at, o.zeroed ? 0 : before, size_t(o.bytes));
  bool enough = true;
  if (!run(&enough) || !enough) {
    fprintf(stderr, "a kernel refused\n");
    exit(2);
  }
  std::vector<unsigned char> all;
  for (const Output& o : c.outputs) {
    const unsigned char* at = static_cast<const unsigned char*>(o.at);
    all.insert(all.end(), at, at + o.bytes);
  }
  return all;
}

template <class T>
void compare(const Case<T>& c, const std::vector<unsigned char>& one, const std::vector<unsigned char>& other, uint64_t seed, const char* what) {
  for (size_t i = 0; i < one.size(); i += sizeof(T)) {
    T a, b;
    memcpy(&a, &one[i], sizeof(T)), memcpy(&b, &other[i], sizeof(T));
    bool const same = memcmp(&a, &b, sizeof(T)) == 0 || (isnan(a) && isnan(b));
    if (same && (isfinite(a) || c.one_in < (1 << 30))) continue;
    fprintf(stderr, "%s, seed %llu, %zu bytes, value %zu of %zu: %.17g, then %.17g\n", what,
            static_cast<unsigned long long>(seed), sizeof(T), i / sizeof(T), one.size() / sizeof(T), double(a), double(b));
    exit(3);
  }
}

template <class T>
Case<T> random_case(Random& random, int64_t most_channels) {
  Case<T> c = {random, pick(random, 0, 2) ? 1 << 30 : 20, pick(random, 0, 1) == 1, pick(random, 0, 3), 0, 0, {}, {}};
  c.length = pick(random, 0, 3) ? pick(random, 0, 40) : pick(random, 60, 300);
  c.channels = pick(random, 0, 3) ? pick(random, 0, 40) : pick(random, 60, int(most_channels));
  return c;
}

template <class T>
void run_scan(uint64_t seed) {
  Random random(seed);
  Case<T> c = random_case<T>(random, 150);
  ScanCall call = {};
  call.groups = pick(random, 0, 1) ? 1 : pick(random, 2, 4);
  c.channels = c.channels / call.groups * call.groups;
  call.batch = c.batch, call.length = c.length, call.channels = c.channels;
  call.states = pick(random, 0, 2) ? 16 : pick(random, 1, 40);
  call.chunk = pick(random, 0, 1) ? 64 : pick(random, 1, 64), call.softplus = pick(random, 0, 1) == 1;
  int64_t const D = call.channels, N = call.states;
  call.u = c.read(D, -2, 2), call.delta = c.read(D, call.softplus ? -30 : 0, call.softplus ? 2 : 1);
  if (pick(random, 0, 1)) call.z = c.read(D, -100, 100);
  call.B = c.matrix(call.groups, N), call.C = c.matrix(call.groups, N);
  call.A = c.filled(D * N, pick(random, 0, 1) ? -1 : -200, 0);
  if (pick(random, 0, 1)) call.D = c.filled(D, -1, 1);
  if (pick(random, 0, 1) && call.softplus) call.bias = c.filled(D, -1, 1);
  ScanCall back = call;
  call.out = c.written();
  call.kept = back.kept = c.output(c.batch * medgmae::scan_chunks(call) * N * D, false);
  back.grad = c.read(D, -1, 1);
  if (pick(random, 0, 1)) back.grad_state = c.filled(c.batch * N * D, -1, 1);
  back.du = c.written(), back.ddelta = c.written();
  if (call.z.at) back.dz = c.written();
  back.dA = c.output(c.batch * D * N, true), back.dD = c.output(c.batch * D, true), back.dbias = c.output(c.batch * D, true);
  int64_t const by_time = medgmae::scan_slabs(call) * c.batch * c.length * call.groups * N;
  back.dB = c.output(by_time, true), back.dC = c.output(by_time, true);
  auto const& scan = medgmae::MEDGMAE_VARIANT::kernels.scan;
  auto const run = [&](int threads) {
    return [&, threads](bool* enough) {
      if (!(c.batch && c.length && D)) return true;  // what the binding's callers leave out
      return scan(kDType<T>, call, threads, enough) && *enough && scan(kDType<T>, back, threads, enough);
    };
  };
  std::vector<unsigned char> const one = results(c, 0x7f, run(1));
  if (c.batch && c.length && D) compare(c, one, results(c, 0x11, run(3)), seed, "scan");
}

template <class T>
void run_conv(uint64_t seed) {
  Random random(seed);
  Case<T> c = random_case<T>(random, 150);
  if (pick(random, 0, 5) == 0) c.length = pick(random, 250, 800);
  ConvCall call = {};
  call.batch = c.batch, call.length = c.length, call.channels = c.channels;
  call.width = pick(random, 0, 1) ? 4 : pick(random, 1, 12), call.silu = pick(random, 0, 1) == 1;
  call.x = c.input(c.channels, -3, 3), call.weight = c.filled(call.width * c.channels, -1, 1);
  if (pick(random, 0, 1)) call.bias = c.filled(c.channels, -1, 1);
  ConvCall back = call;
  call.out = c.written();
  back.grad = c.input(c.channels, -1, 1), back.dx = c.written();
  back.sums = c.output(c.batch * medgmae::conv_segments(call) * (call.width + 1) * c.channels, true);
  auto const& conv = medgmae::MEDGMAE_VARIANT::kernels.conv;
  auto const run = [&](int threads) {
    return [&, threads](bool* enough) {
      if (!(c.batch && c.length && c.channels)) return true;
      return conv(kDType<T>, call, threads, enough) && *enough && conv(kDType<T>, back, threads, enough);
    };
  };
  std::vector<unsigned char> const one = results(c, 0x7f, run(1));
  if (c.batch && c.length && c.channels) compare(c, one, results(c, 0x11, run(3)), seed, "convolution");
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t const cases = argc > 1 ? strtoull(argv[1], nullptr, 10) : 300;
  uint64_t const first = argc > 2 ? strtoull(argv[2], nullptr, 10) : 0;
  for (uint64_t seed = first; seed < first + cases; ++seed) {
    run_scan<float>(seed), run_scan<double>(seed), run_conv<float>(seed), run_conv<double>(seed);
  }
  printf("%llu calls of the scan and the convolution, no finding\n", static_cast<unsigned long long>(4 * cases));
  return 0;
}
