"""The sum of 3D Gaussians on a grid in plain torch: what the native kernels of :func:`medgmae.ops.voxelize` must equal.

Written to be read. It computes every Gaussian at every voxel, in chunks that bound the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medgmae.ops.rotations import rotation_gradient, rotation_matrix
from medgmae.ops.voxel.inputs import VoxelInputs

# Weights below exp(-80) are 0: exp of less is many times slower on a CPU. They are not left at exp(-80), because the
# gradient of a tiny Gaussian multiplies them by numbers as large.
LOWEST_EXPONENT = -80.0
# Values of one temporary array.
CHUNK_VALUES = 1 << 22
# How values along one axis (..., p) broadcast against a block (..., p0, p1, p2).
ALONG = [(..., slice(None), None, None), (..., None, slice(None), None), (..., None, None, slice(None))]


@dataclass
class Blocks:
    """The voxels to compute, as boxes of the size of a patch.

    index: three (B, n, patch_k) float64 tensors, the voxel index along axis k.
    position: the same voxels' positions i / (size_k - 1), in units of the axis.
    """

    index: list[Tensor]
    position: list[Tensor]


def precision_matrix(scales: Tensor, quats: Tensor) -> Tensor:
    """Inverse covariance R diag(1 / s²) Rᵀ, (..., 3, 3), of scales (..., 3) and quaternions (..., 4)."""
    rotation = rotation_matrix(quats)
    return (rotation / scales.unsqueeze(-2).square()) @ rotation.transpose(-1, -2)


def box_bounds(means: Tensor, scales: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """First and last voxel index of the published support, (B, N, 3) float64 each; empty where last < first.

    Per axis max(0, trunc(n c - e)) and min(n - 1, trunc(n c + e)) with e = n (s + s), in float32, one rounding for
    n c ± e, truncation toward zero (MedGMAE, utils/discretize_grid.cu). The box is not turned with the Gaussian.
    """
    n = torch.tensor([float(s) for s in size], dtype=torch.float64, device=means.device)
    center, scale = means.float(), scales.float()
    extent = (n.float() * (scale + scale)).double()
    exact = n * center.double()  # float32 times a size: exact in float64, so the sum below is rounded once to float32
    first, last = (exact - extent).float().trunc().double(), (exact + extent).float().trunc().double()
    return first.clamp(min=0), torch.minimum(last, n - 1)


def blocks(patches: Tensor, size: Sequence[int], patch_size: Sequence[int]) -> Blocks:
    """The voxels of patches (B, n), numbered in raster order over the grid of patches."""
    grid = [s // p for s, p in zip(size, patch_size, strict=True)]
    corners = [patches // (grid[1] * grid[2]), patches // grid[2] % grid[1], patches % grid[2]]
    index = [
        (corner * p).unsqueeze(-1).double() + torch.arange(p, dtype=torch.float64, device=patches.device)
        for corner, p in zip(corners, patch_size, strict=True)
    ]
    return Blocks(index, [i / max(s - 1, 1) for i, s in zip(index, size, strict=True)])


def is_bad(means: Tensor, scales: Tensor, precision: Tensor, densities: Tensor) -> Tensor:
    """Gaussians (B, N) that cannot be rendered: a parameter is NaN or infinite, or 1 / s² of a scale is."""
    finite = means.isfinite().all(-1) & scales.isfinite().all(-1) & densities.isfinite()
    finite &= scales.square().reciprocal().isfinite().all(-1)
    return ~(finite & precision.flatten(-2).isfinite().all(-1))


def _chunks(count: int, voxels: int) -> Iterator[slice]:
    step = max(1, CHUNK_VALUES // max(voxels, 1))
    for start in range(0, count, step):
        yield slice(start, start + step)


def _weights(
    means: Tensor, scales: Tensor, precision: Tensor, voxels: Blocks, size: Sequence[int], support: float
) -> tuple[Tensor, list[Tensor]]:
    """exp(-½ dᵀ P d) inside the support, (B, N, n, p0, p1, p2), and d along each axis, (B, N, n, patch_k)."""
    distance = [p.unsqueeze(1).to(means) - means[..., k, None, None] for k, p in enumerate(voxels.position)]
    d = [values[axis] for values, axis in zip(distance, ALONG, strict=True)]
    p = precision[..., None, None, None, None]
    quadratic = p[:, :, 0, 0] * d[0] ** 2 + p[:, :, 1, 1] * d[1] ** 2 + p[:, :, 2, 2] * d[2] ** 2
    quadratic = quadratic + 2 * (
        p[:, :, 0, 1] * (d[0] * d[1]) + p[:, :, 0, 2] * (d[0] * d[2]) + p[:, :, 1, 2] * (d[1] * d[2])
    )
    exponent = -0.5 * quadratic
    weights = exponent.clamp(min=LOWEST_EXPONENT, max=0).exp() * (exponent > LOWEST_EXPONENT)
    if support == 0:
        first, last = box_bounds(means, scales, size)
        for k, axis in enumerate(ALONG):
            i = voxels.index[k].unsqueeze(1)
            inside = (i >= first[..., k, None, None]) & (i <= last[..., k, None, None])
            weights = weights * inside[axis]
    elif math.isfinite(support):
        weights = weights * (quadratic <= support**2)
    return weights, distance


def forward(inputs: VoxelInputs) -> Tensor:
    """See ``medgmae::voxelize``: (B, n, prod(patch_size))."""
    means, scales, quats, densities, patches, size, patch_size, support = inputs
    precision = precision_matrix(scales, quats)
    bad = is_bad(means, scales, precision, densities)
    means, scales, precision, densities = _harmless(bad, means, scales, precision, densities)
    voxels = blocks(patches, size, patch_size)
    out = means.new_zeros(*patches.shape, *patch_size)
    for part in _chunks(means.shape[1], out.numel()):
        weights, _ = _weights(means[:, part], scales[:, part], precision[:, part], voxels, size, support)
        out += torch.einsum("bk,bknzyx->bnzyx", densities[:, part], weights)
    return torch.where(bad.any(1)[:, None, None], math.nan, out.flatten(2))


def backward(grad: Tensor, inputs: VoxelInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to means, scales, quats and densities; the support carries none.

    With w the weight, g the gradient at a voxel and a the density, the moments M0 = Σ g w, M1 = Σ g w d and
    M2 = Σ g w d dᵀ give dL/da = M0, dL/dμ = a P M1, dL/dP = -½ a M2; the rest is the chain rule through P.
    """
    means, scales, quats, densities, patches, size, patch_size, support = inputs
    precision = precision_matrix(scales, quats)
    bad = is_bad(means, scales, precision, densities)
    safe_means, safe_scales, precision, amplitude = _harmless(bad, means, scales, precision, densities)
    voxels = blocks(patches, size, patch_size)
    grad = grad.reshape(*patches.shape, *patch_size)
    m0, m1 = torch.empty_like(densities), torch.empty_like(means)
    m2 = torch.empty_like(precision)
    for part in _chunks(means.shape[1], grad.numel()):
        weights, d = _weights(safe_means[:, part], safe_scales[:, part], precision[:, part], voxels, size, support)
        m0[:, part], m1[:, part], m2[:, part] = _moments(grad.unsqueeze(1) * weights, d)
    grad_means = amplitude[..., None] * (precision @ m1.unsqueeze(-1)).squeeze(-1)
    grad_scales, grad_quats = _through_precision(-0.5 * amplitude[..., None, None] * m2, scales, quats)
    rows = bad.unsqueeze(-1)
    return (
        torch.where(rows, math.nan, grad_means),
        torch.where(rows, math.nan, grad_scales),
        torch.where(rows, math.nan, grad_quats),
        torch.where(bad, math.nan, m0),
    )


def _through_precision(grad: Tensor, scales: Tensor, quats: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to scales and quaternions from a symmetric one to the precision matrix (..., 3, 3).

    Written out: an operator runs below torch's autograd, which records nothing there. With P = R diag(1 / s²) Rᵀ,
    dL/ds_k = -2 / s_k³ (Rᵀ G R)_kk and dL/dR = 2 G R diag(1 / s²).
    """
    rotation = rotation_matrix(quats)
    turned = grad @ rotation
    grad_scales = -2 * (rotation * turned).sum(-2) / scales.square() / scales  # a cube could be 0
    grad_quats = rotation_gradient(2 * turned / scales.unsqueeze(-2).square(), quats)
    return grad_scales, grad_quats


def _moments(t: Tensor, d: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Σ t, Σ t d and Σ t d dᵀ over the voxels of t (B, N, n, p0, p1, p2): (B, N), (B, N, 3), (B, N, 3, 3)."""
    zy, zx, yx = t.sum(5), t.sum(4), t.sum(3)  # (B, N, n, p, p)
    along = [zy.sum(4), zy.sum(3), zx.sum(3)]  # (B, N, n, p)
    first = [(line * distance).sum((2, 3)) for line, distance in zip(along, d, strict=True)]
    square = [(line * distance**2).sum((2, 3)) for line, distance in zip(along, d, strict=True)]
    planes = {(0, 1): zy, (0, 2): zx, (1, 2): yx}
    cross = {key: torch.einsum("bknij,bkni,bknj->bk", plane, d[key[0]], d[key[1]]) for key, plane in planes.items()}
    second = [[square[i] if i == j else cross[min(i, j), max(i, j)] for j in range(3)] for i in range(3)]
    return along[0].sum((2, 3)), torch.stack(first, -1), torch.stack([torch.stack(row, -1) for row in second], -2)


def _harmless(
    bad: Tensor, means: Tensor, scales: Tensor, precision: Tensor, densities: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parameters with the bad Gaussians turned into ordinary ones of density 0."""
    identity = torch.eye(3, dtype=means.dtype, device=means.device)
    return (
        means.masked_fill(bad[..., None], 0.5),
        scales.masked_fill(bad[..., None], 1.0),
        torch.where(bad[..., None, None], identity, precision),
        densities.masked_fill(bad, 0.0),
    )
