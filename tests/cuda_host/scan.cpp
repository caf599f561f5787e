// The programs of the CUDA scan and convolution on the host: every block in turn, and in it every phase, thread after thread.
// Built as a shared library by tests/test_scan_blocks.py. The arithmetic is that of the device but for its exponential, which
// is made as wrong as the device's may be.
#include "wrong_power.h"

#include "../../cuda/conv/blocks.h"
#include "../../cuda/scan/gradient_blocks.h"
#include "one_thread.h"
#include "scan_host.h"

namespace medgmae {
namespace {

struct OnHost {
  template <class T, class Shared, class State, class Program>
  void blocks(int64_t count, Program program) {
    run_blocks<Shared, State>(count, kScanThreads<T>, program);
  }
};

}  // namespace
}  // namespace medgmae

extern "C" int64_t medgmae_scan_call_size() { return sizeof(medgmae::ScanCall); }

// Runs a call as a device with room for so many blocks would. False for types that have no kernel, or without enough memory.
extern "C" bool medgmae_scan(int dtype, int stream_type, const void* scan_call, int64_t room) {
  using namespace medgmae;
  ScanCall const& call = *static_cast<const ScanCall*>(scan_call);
  bool done = false;
  dispatch(DType(dtype), [&](auto zero) {
    using T = decltype(zero);
    int64_t const bytes = divide_scan_workspace<T>(call, call.grad.at != nullptr, room, nullptr).bytes;
    void* const workspace = malloc(size_t(bytes > 0 ? bytes : 1));
    if (workspace == nullptr) return;
    memset(workspace, 0xff, size_t(bytes));
    ScanWork const work = divide_scan_workspace<T>(call, call.grad.at != nullptr, room, workspace);
    done = dispatch_streams<T>(StreamType(stream_type), [&](auto number) { run_scan<T, decltype(number)>(call, work, OnHost()); });
    free(workspace);
  });
  return done;
}

extern "C" void medgmae_widen(int stream_type, int64_t n, const uint16_t* from, float* to) {
  medgmae::dispatch_streams<float>(medgmae::StreamType(stream_type), [&](auto number) {
    for (int64_t i = 0; i < n; ++i) memcpy(&number, from + i, 2), to[i] = medgmae::widen(number);
  });
}

extern "C" void medgmae_narrow(int stream_type, int64_t n, const float* from, uint16_t* to) {
  medgmae::dispatch_streams<float>(medgmae::StreamType(stream_type), [&](auto number) {
    for (int64_t i = 0; i < n; ++i) medgmae::narrow(from[i], &number), memcpy(to + i, &number, 2);
  });
}

extern "C" int64_t medgmae_conv_call_size() { return sizeof(medgmae::ConvCall); }

// Runs a convolution or its backward. False for types that have no kernel.
extern "C" bool medgmae_conv(int dtype, int stream_type, const void* conv_call) {
  using namespace medgmae;
  ConvCall const& call = *static_cast<const ConvCall*>(conv_call);
  bool done = false;
  dispatch(DType(dtype), [&](auto zero) {
    using T = decltype(zero);
    done = dispatch_streams<T>(StreamType(stream_type), [&](auto number) { run_conv<T, decltype(number)>(call); });
  });
  return done;
}
