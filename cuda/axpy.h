// y += a x: the smallest operator that takes the whole native path, used to prove an installation (medgmae.ops.self_test).
#pragma once

#include "common.h"

namespace medgmae {

template <class T>
MEDGMAE_HD T axpy_element(T a, T x, T y) {
  return a * x + y;
}

}  // namespace medgmae
