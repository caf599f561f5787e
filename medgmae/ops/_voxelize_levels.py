"""Untruncated rendering in levels: wide Gaussians on coarse lattices, which are then interpolated.

A Gaussian with a standard deviation of 3 lattice steps or more is, to 1e-7, band-limited on that lattice: its values
between the lattice points follow from 10 neighbours per axis. So all wide Gaussians are summed on a lattice of every
4th voxel, those of medium width on one of every 2nd, and each lattice is interpolated once, whatever the number of
Gaussians. The backward is the adjoint: the gradient is gathered on the lattices first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from medgmae.ops._voxelize_reference import rotation_matrix

TAPS = 10
# Lattice steps per standard deviation from which on a Gaussian is rendered on that lattice.
WIDTH = 3.0
STRIDES = (4, 2)
# Gaussians per sample from which on a lattice pays.
WORTH = {4: 16, 2: 32}


class Lattice(NamedTuple):
    """Regular points, and which Gaussians are rendered on them.

    size: points per axis.
    origin, step: position of the first and distance of two, in units of the axis.
    widths: least (included) and limit (excluded) of a Gaussian's width: its least standard deviation along an axis,
        the other coordinates held, in steps.
    up: the matrices (voxels, points) that interpolate to the voxels, one per axis; empty for the voxels themselves.
    """

    size: tuple[int, ...]
    origin: tuple[float, ...]
    step: tuple[float, ...]
    widths: tuple[float, float] = (0.0, math.inf)
    up: tuple[Tensor, ...] = ()


@functools.cache
def voxels(size: tuple[int, ...]) -> Lattice:
    """The voxels, for every Gaussian."""
    return Lattice(size, (0.0,) * 3, tuple(1 / (n - 1) if n > 1 else 0.0 for n in size))


def strides(
    parameters: Sequence[Tensor], patches: Tensor, size: Sequence[int], patch_size: Sequence[int], support: float
) -> tuple[int, ...]:
    """The coarse lattices that pay for these means, scales and quaternions, widest first; none where nothing does.

    Interpolating a lattice costs as much as some ten Gaussians, so it is used for whole volumes in float32, and where
    enough Gaussians are wide enough.
    """
    means, scales, quats = parameters[:3]
    dense = patches.shape[1] == 1 and list(size) == list(patch_size)
    if not (math.isinf(support) and dense and means.dtype == torch.float32 and math.prod(size) >= 32**3):
        return ()
    precision = (rotation_matrix(quats) / scales.unsqueeze(-2)).square().sum(-1)  # (B, K, 3), the diagonal
    widths = (precision.sqrt() * torch.tensor(voxels(tuple(size)).step)).amax(-1).reciprocal()
    found: list[int] = []
    limit = math.inf
    for stride in STRIDES:
        if int(((widths >= WIDTH * stride) & (widths < limit)).sum()) >= len(means) * WORTH[stride]:
            found.append(stride)
            limit = WIDTH * stride
    return tuple(found)


@functools.lru_cache(maxsize=32)
def levels(size: tuple[int, ...], strides: tuple[int, ...]) -> list[Lattice]:
    """The voxels, then the lattices of these strides for a volume. Every Gaussian belongs to exactly one."""
    fine = voxels(size)
    found = [fine._replace(widths=(0.0, WIDTH * min(strides, default=math.inf)))]
    for coarser, stride in zip((math.inf, *strides), strides, strict=False):
        before, after = TAPS // 2 - 1, TAPS // 2
        points = tuple((n - 1) // stride + 1 + before + after if n > 1 else 1 for n in size)
        step = tuple(stride * s for s in fine.step)
        origin = tuple(-before * s for s in step)
        up = tuple(_interpolation(n, m, stride, before) for n, m in zip(size, points, strict=True))
        found.append(Lattice(points, origin, step, (WIDTH, WIDTH * coarser / stride), up))
    return found


def _interpolation(size: int, points: int, stride: int, before: int) -> Tensor:
    """Matrix (size, points) from values at the voxels (j - before) stride to those at every voxel."""
    matrix = torch.zeros(size, points, dtype=torch.float64)
    if size == 1:
        return torch.ones(1, 1)
    for phase in range(stride):
        taps = _taps(phase / stride)
        for i in range(phase, size, stride):
            matrix[i, i // stride : i // stride + TAPS] = taps[: points - i // stride]
    return matrix.float()


@functools.cache
def _taps(phase: float) -> Tensor:
    """Weights of TAPS neighbours (the 5th at or before the place, ``phase`` steps back) for the value at the place.

    Least squares over the frequencies of a Gaussian of 3 steps, each weighted by its amplitude.
    """
    frequency = torch.linspace(0, 3.0, 2048, dtype=torch.float64)
    weight = torch.exp(-0.5 * (WIDTH * frequency) ** 2).unsqueeze(1)
    place = torch.arange(TAPS, dtype=torch.float64) - (TAPS // 2 - 1)
    waves = torch.cat([torch.cos(frequency[:, None] * place), torch.sin(frequency[:, None] * place)])
    wanted = torch.cat([torch.cos(frequency * phase), torch.sin(frequency * phase)]).unsqueeze(1)
    weights = torch.cat([weight, weight])
    solution: Tensor = torch.linalg.lstsq(waves * weights, wanted * weights, driver="gelsd").solution
    return solution.squeeze(1)


def add_interpolated(lattice: Lattice, values: Tensor, out: Tensor) -> None:
    """Interpolate the values (B, *lattice.size) and add them to the voxels ``out`` (B, D, H, W), contiguous."""
    depth, height, width = lattice.up
    along = _along_width(values, width.T)  # (B, z, y, W)
    along = torch.matmul(height, along).flatten(2)  # (B, z, H W)
    out.flatten(2).baddbmm_(depth.expand(len(out), -1, -1), along)


def gathered(lattice: Lattice, grad: Tensor) -> Tensor:
    """The adjoint of :func:`add_interpolated`: (B, D, H, W) to (B, *lattice.size)."""
    depth, height, width = lattice.up
    along = torch.matmul(depth.T, grad.flatten(2)).reshape(len(grad), -1, *grad.shape[2:])  # (B, z, H, W)
    return _along_width(torch.matmul(height.T, along), width)


def _along_width(values: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the last axis of (B, z, y, x), plane by plane: one product of them all depends on the threads."""
    planes = values.flatten(0, 1)
    return torch.bmm(planes, matrix.expand(len(planes), -1, -1)).reshape(*values.shape[:3], matrix.shape[1])
