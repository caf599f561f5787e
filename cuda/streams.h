// A sequence of tokens, as the scan and the convolution read and write it: the channels of a token lie side by side. A reversed
// call is one that walks from the last token with negative strides, so that no kernel knows about it.
#pragma once

#include "common.h"

namespace medgmae {

// Element (batch b, step t, channel d) is at[b * batch + t * step + d], in elements.
struct Stream {
  void* at;
  int64_t batch, step;
};

}  // namespace medgmae
