"""Line integrals of volumes in plain torch, with the adjoint written out.

Between two planes of voxel centres the trilinear interpolant is a polynomial of third degree along a ray, which two
points of Gauss and Legendre integrate exactly: (p -+ h / sqrt 3), each with weight h, h half the length of the piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from medgmae.ops.rays.inputs import RayInputs

# Corners of cells that are in memory at a time.
_CHUNK = 1 << 22
_APART = 1 / math.sqrt(3)


class _Corners(NamedTuple):
    """Of some rays of one view: rays (r,), numbers of voxels (r, n) and their weights in the integral (r, n)."""

    rays: Tensor
    voxels: Tensor
    weights: Tensor


def forward(inputs: RayInputs) -> Tensor:
    """See ``medgmae::project_volume``."""
    volume = inputs.volume
    rows, columns = inputs.size
    out = volume.new_zeros(len(volume), len(inputs.views), rows * columns)
    flat = volume.flatten(1)
    for view in range(len(inputs.views)):
        for found in _corners(inputs, view):
            values = flat[:, found.voxels] * found.weights.to(volume.dtype)
            out[:, view, found.rays] = values.sum(-1)
    return out.reshape(len(volume), len(inputs.views), rows, columns)


def backward(grad: Tensor, inputs: RayInputs) -> tuple[Tensor]:
    """See ``medgmae::project_volume_backward``."""
    volume = inputs.volume
    out = torch.zeros_like(volume, memory_format=torch.contiguous_format)
    flat, given = out.flatten(1), grad.flatten(2).to(volume.dtype)
    for view in range(len(inputs.views)):
        for found in _corners(inputs, view):
            values = given[:, view, found.rays].unsqueeze(-1) * found.weights.to(volume.dtype)
            flat.index_add_(1, found.voxels.flatten(), values.flatten(1))
    return (flat.reshape(volume.shape),)


def _corners(inputs: RayInputs, view: int) -> Iterator[_Corners]:
    """All voxels that the rays of a view touch, some rays at a time."""
    size = list(inputs.volume.shape[1:])
    rows, columns = inputs.size
    planes = sum(size)
    together = max(1, _CHUNK // (16 * planes))
    source, corner, column, row = inputs.views[view].unbind(0)
    number = torch.arange(rows * columns, device=inputs.volume.device)
    for rays in torch.split(number, together):
        pixel = corner + (rays % columns).double()[:, None] * column + (rays // columns).double()[:, None] * row
        along = source.expand_as(pixel) if inputs.parallel else pixel - source
        start = pixel if inputs.parallel else source.expand_as(pixel)
        yield _touched(rays, start, along, inputs.spacing, size)


def _touched(rays: Tensor, start: Tensor, along: Tensor, spacing: Tensor, size: list[int]) -> _Corners:
    """Rays (r, 3) through the cells between voxels 0 to n - 1 of every axis."""
    upper = torch.tensor(size, dtype=torch.float64, device=start.device) - 1
    still = along == 0
    safe = torch.where(still, 1.0, along)
    ends = torch.stack([-start / safe, (upper - start) / safe])
    outside = still & ((start < 0) | (start >= upper))
    first = torch.where(still, -math.inf, ends.amin(0)).amax(1)
    last = torch.where(still, math.inf, ends.amax(0)).amin(1)
    last = torch.where(outside.any(1), first, last).clamp(min=first)
    first, last = (torch.where(first.isfinite() & last.isfinite(), t, 0.0) for t in (first, last))
    crossings = [
        (torch.arange(n, device=start.device) - start[:, k, None]) / safe[:, k, None] for k, n in enumerate(size)
    ]
    t = torch.cat([torch.where(still[:, k, None], 0.0, c) for k, c in enumerate(crossings)], dim=1)
    t = t.clamp(first[:, None], last[:, None]).sort(dim=1).values
    half, middle = t.diff(dim=1) / 2, (t[:, 1:] + t[:, :-1]) / 2
    cell = start[:, None] + middle[..., None] * along[:, None]  # (r, n, 3)
    cell = cell.floor().clamp(torch.zeros_like(upper), (upper - 1).clamp(min=0))
    length = (along * spacing).norm(dim=1)
    voxels, weights = [], []
    for side in (-_APART, _APART):
        point = start[:, None] + (middle + side * half)[..., None] * along[:, None] - cell  # 0 to 1 in the cell
        for bits in range(8):
            offset = torch.tensor([bits >> 2 & 1, bits >> 1 & 1, bits & 1], device=start.device)
            weights.append(torch.where(offset > 0, point, 1 - point).prod(-1) * half * length[:, None])
            place = cell.long() + offset
            voxels.append((place[..., 0] * size[1] + place[..., 1]) * size[2] + place[..., 2])
    return _Corners(rays, torch.cat(voxels, 1), torch.cat(weights, 1))
