// A sequence of tokens, as the scan and the convolution read and write it: the channels of a token lie side by side. A reversed
// call is one that walks from the last token with negative strides, so that no kernel knows about it.
#pragma once

#include "common.h"

namespace medgmae {

// Element (batch b, step t, channel d) is at[b * batch + t * step + d * apart], in elements. All kernels take apart = 1; the CPU's
// scan reads streams of any other too, if the steps of a channel lie side by side (step = 1 or -1).
struct Stream {
  void* at;
  int64_t batch, step, apart = 1;
};

}  // namespace medgmae
