"""Render 3D Gaussians into a volume: V[v] = Σ_i a_i exp(-½ (v - μ_i)ᵀ Σ_i⁻¹ (v - μ_i)), forward and backward.

The operators are ``medgmae::voxelize`` and ``medgmae::voxelize_backward``, with plain torch for every device and native
kernels for CPU and CUDA where ``medgmae._C`` has them. docs/renderer.md tells the whole story.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from medgmae.ops.register import Operator, register
from medgmae.ops.voxel import cuda, native, reference
from medgmae.ops.voxel.inputs import VoxelInputs

Support = Literal["box"] | float | None


def _fake(inputs: VoxelInputs) -> Tensor:
    return inputs.means.new_empty(*inputs.patches.shape, math.prod(inputs.patch_size))


_OP = register(Operator("voxelize", VoxelInputs, _fake, joins_batch=True), reference, native, cuda)
# The kernels count voxels of an axis in 32 bits, those of a volume in 64.
MOST_VOXELS_ALONG_AN_AXIS, MOST_VOXELS = 2**30, 2**63 - 1


def voxelize(
    means: Tensor,
    scales: Tensor,
    quats: Tensor,
    densities: Tensor,
    size: int | Sequence[int],
    *,
    support: Support = 4.0,
    patches: Tensor | None = None,
    patch_size: int | Sequence[int] | None = None,
) -> Tensor:
    """Sum Gaussians on a grid of voxels.

    Voxel i of an axis with n voxels sits at i / (n - 1), the only voxel of an axis of length 1 at 0. The covariance is
    R diag(s²) Rᵀ. Float32 and float64 are computed in their own precision, float16 and bfloat16 in float32; the result
    has the dtype of the computation. Two runs give the same bits, and so does any number of CPU threads.

    Args:
        means: (B, K, 3) centres, in units of the axis, ordered (d, h, w).
        scales: (B, K, 3) standard deviations along the Gaussian's own axes, in the same units.
        quats: (B, K, 4) rotations (w, x, y, z), of any length but taken as directions; 0 is no rotation.
        densities: (B, K) values at the centres.
        size: voxels (D, H, W), or one number for all three.
        support: where a Gaussian counts. A number k: inside its ellipsoid of k standard deviations. None: everywhere.
            "box": in MedGMAE's box of ±2 scales, which is not turned with the Gaussian. The support has no gradient.
        patches: (B, n) long, the patches to render, numbered in raster order over the grid of patches (what
            ``Masking`` numbers); None for the whole volume.
        patch_size: voxels of a patch, one number or (d, h, w), with ``patches`` only.

    Returns:
        (B, 1, D, H, W), or (B, n, prod(patch_size)) for the patches. A sample in which a parameter is NaN or infinite,
        or a scale s is so small that 1 / s² is not finite in the dtype of the computation (s of 0, or below 5.4e-20 in
        float32 and 7.5e-155 in float64), is NaN throughout, and so are the gradients of that Gaussian.

    Raises:
        ValueError: shapes, size, support or patches do not fit, or there are more than 2**30 voxels along an axis.
        TypeError: dtypes or devices are mixed, or are not floating point.
        NotImplementedError: the call is inside of torch.func.grad, vjp or jacrev, or a second-order gradient is asked
            for.
    """
    parameters = _check_parameters(means, scales, quats, densities)
    size = _triple(size, "size")
    code = support_code(support)
    if patches is None:
        if patch_size is not None:
            raise ValueError("patch_size came without patches; pass patches (B, n), or leave both out")
        whole = torch.zeros(means.shape[0], 1, dtype=torch.int64, device=means.device)
        volume: Tensor = _OP(*parameters, whole, size, size, code)
        return volume.reshape(means.shape[0], 1, *size)
    patch_size = _check_patches(patches, patch_size, size, means)
    rendered: Tensor = _OP(*parameters, patches, size, patch_size, code)
    return rendered


def _check_parameters(means: Tensor, scales: Tensor, quats: Tensor, densities: Tensor) -> list[Tensor]:
    named = {"means": (means, 3), "scales": (scales, 3), "quats": (quats, 4), "densities": (densities, 0)}
    lead = tuple(means.shape[:2])
    for name, (tensor, width) in named.items():
        expected = (*lead, width) if width else lead
        if tensor.shape != expected or len(lead) != 2:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: expected {f'(B, K, {width})' if width else '(B, K)'}"
                + (f" = {expected}, as means is {tuple(means.shape)}" if len(means.shape) == 3 else "")
            )
        if tensor.dtype != means.dtype or tensor.device != means.device or not tensor.is_floating_point():
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, means is {means.dtype} on {means.device}: expected one "
                "floating point dtype and one device for all"
            )
    wide = means.dtype if means.dtype == torch.float64 else torch.float32
    return [tensor.to(wide) for tensor, _ in named.values()]


def _triple(size: int | Sequence[int], what: str) -> list[int]:
    values = [size] * 3 if isinstance(size, int) else [int(s) for s in size]
    if len(values) != 3 or any(s < 1 for s in values):
        raise ValueError(f"{what} must be one or three positive numbers of voxels (d, h, w), got {tuple(values)}")
    if max(values) > MOST_VOXELS_ALONG_AN_AXIS or math.prod(values) > MOST_VOXELS:
        raise ValueError(
            f"{what} {tuple(values)} is too large: expected at most 2**30 voxels along an axis and less than 2**63 in "
            "all; render a part of the volume, with the means and scales in its units"
        )
    return values


def support_code(support: Support) -> float:
    """The number for the operators: 0 is the box, infinity is no truncation."""
    if support is None:
        return math.inf
    if support == "box":
        return 0.0
    if isinstance(support, (int, float)) and not isinstance(support, bool) and 0 < support < math.inf:
        return float(support)
    raise ValueError(f"support must be 'box', a number of standard deviations above 0, or None, got {support!r}")


def _check_patches(
    patches: Tensor, patch_size: int | Sequence[int] | None, size: list[int], means: Tensor
) -> list[int]:
    if patch_size is None:
        raise ValueError("patches came without patch_size; pass the voxels of a patch, a number or (d, h, w)")
    patch = _triple(patch_size, "patch_size")
    if any(s % p for s, p in zip(size, patch, strict=True)):
        raise ValueError(f"size {tuple(size)} is not a multiple of patch_size {tuple(patch)} along every axis")
    if patches.dim() != 2 or patches.shape[0] != means.shape[0] or patches.dtype != torch.int64:
        raise ValueError(
            f"patches is {tuple(patches.shape)} {patches.dtype}: expected (B, n) = ({means.shape[0]}, n) torch.int64"
        )
    if patches.device != means.device:
        raise TypeError(f"patches is on {patches.device}, means on {means.device}: expected one device")
    return patch
