// Quaternions (w, x, y, z) and rotation matrices in row order, for host and device.
#pragma once

#include <math.h>

#include "common.h"

namespace medgmae {

template <class L>
MEDGMAE_HD void rotation_matrix(const L* q, L* r) {
  L const w = q[0], x = q[1], y = q[2], z = q[3];
  r[0] = 1.0 - 2.0 * (y * y + z * z), r[1] = 2.0 * (x * y - w * z), r[2] = 2.0 * (x * z + w * y);
  r[3] = 2.0 * (x * y + w * z), r[4] = 1.0 - 2.0 * (x * x + z * z), r[5] = 2.0 * (y * z - w * x);
  r[6] = 2.0 * (x * z - w * y), r[7] = 2.0 * (y * z + w * x), r[8] = 1.0 - 2.0 * (x * x + y * y);
}

// The quaternion's direction; returns its length, at least 1e-12.
template <class L, class T>
MEDGMAE_HD L normalize_quaternion(const T* raw, L* q) {
  L square = 0;
  for (int k = 0; k < 4; ++k) square += L(raw[k]) * L(raw[k]);
  L const root = sqrt(square), length = root > L(1e-12) ? root : L(1e-12);
  for (int k = 0; k < 4; ++k) q[k] = L(raw[k]) / length;
  return length;
}

// The gradient to a unit quaternion, from one to its rotation matrix; the quaternion's own direction is not taken out.
template <class L>
MEDGMAE_HD void unit_quaternion_gradient(const L* q, const L* d, L* out) {
  L const w = q[0], x = q[1], y = q[2], z = q[3];
  out[0] = 2.0 * (-z * d[1] + y * d[2] + z * d[3] - x * d[5] - y * d[6] + x * d[7]);
  out[1] = 2.0 * (y * d[1] + z * d[2] + y * d[3] - 2.0 * x * d[4] - w * d[5] + z * d[6] + w * d[7] - 2.0 * x * d[8]);
  out[2] = 2.0 * (-2.0 * y * d[0] + x * d[1] + w * d[2] + x * d[3] + z * d[5] - w * d[6] + z * d[7] - 2.0 * y * d[8]);
  out[3] = 2.0 * (-2.0 * z * d[0] - w * d[1] + x * d[2] + w * d[3] - 2.0 * z * d[4] + y * d[5] + x * d[6] + y * d[7]);
}

// The gradient to a quaternion of direction q and that length, from one to its rotation matrix.
MEDGMAE_HD void quaternion_gradient(const double* q, double length, const double* d, double* out) {
  unit_quaternion_gradient(q, d, out);
  double dot = 0;
  for (int k = 0; k < 4; ++k) dot += q[k] * out[k];
  if (!(length > 1e-12)) dot = 0;  // the length is the constant 1e-12 there
  for (int k = 0; k < 4; ++k) out[k] = (out[k] - q[k] * dot) / length;
}

}  // namespace medgmae
