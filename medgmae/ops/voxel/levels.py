"""Untruncated rendering in levels: wide Gaussians on coarse lattices, which are then interpolated.

A Gaussian with a standard deviation of 3 lattice steps or more is, to 1e-7, band-limited on that lattice: its values
between the lattice points follow from 9 neighbours per axis. So all wide Gaussians are summed on a lattice of every
4th voxel, those of medium width on one of every 2nd, and each lattice is interpolated once, whatever the number of
Gaussians. The backward is the adjoint: the gradient is gathered on the lattices first.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from medgmae.ops.native import _C
from medgmae.ops.rotations import rotation_matrix
from medgmae.ops.voxel.inputs import VoxelInputs

TAPS = 9
# Lattice steps per standard deviation from which on a Gaussian is rendered on that lattice.
WIDTH = 3.0
STRIDES = (4, 2)
# Gaussians per sample from which on a lattice pays.
WORTH = {4: 16, 2: 32}


class Band(NamedTuple):
    """A matrix with few numbers in a row.

    matrix: (rows, columns).
    first: (groups,) int64, where the numbers of four rows begin.
    weights: (groups, taps, 4), these numbers from there on.
    """

    matrix: Tensor
    first: Tensor
    weights: Tensor


class Interpolation(NamedTuple):
    """From the points of an axis to its voxels, and the adjoint."""

    up: Band
    down: Band


class Lattice(NamedTuple):
    """Regular points, and which Gaussians are rendered on them.

    size: points per axis.
    origin, step: position of the first and distance of two, in units of the axis.
    widths: least (included) and limit (excluded) of a Gaussian's width: its least standard deviation along an axis,
        the other coordinates held, in steps.
    up: what interpolates to the voxels along each axis; empty for the voxels themselves.
    """

    size: tuple[int, ...]
    origin: tuple[float, ...]
    step: tuple[float, ...]
    widths: tuple[float, float] = (0.0, math.inf)
    up: tuple[Interpolation, ...] = ()


@functools.cache
def voxels(size: tuple[int, ...]) -> Lattice:
    """The voxels, for every Gaussian."""
    return Lattice(size, (0.0,) * 3, tuple(1 / (n - 1) if n > 1 else 0.0 for n in size))


def strides(inputs: VoxelInputs) -> tuple[int, ...]:
    """The coarse lattices that pay for these Gaussians, widest first; none where nothing does.

    Interpolating a lattice costs as much as some ten Gaussians, so it is used for whole volumes in float32, and where
    enough Gaussians are wide enough.
    """
    means, scales, quats, _, patches, size, patch_size, support = inputs
    dense = patches.shape[1] == 1 and list(size) == list(patch_size)
    if not (math.isinf(support) and dense and means.dtype == torch.float32 and math.prod(size) >= 32**3):
        return ()
    precision = (rotation_matrix(quats) / scales.unsqueeze(-2)).square().sum(-1)  # (B, K, 3), the diagonal
    widths = (precision.sqrt() * torch.tensor(voxels(tuple(size)).step)).amax(-1).reciprocal()
    chosen: list[int] = []
    limit = math.inf
    for stride in STRIDES:
        if int(((widths >= WIDTH * stride) & (widths < limit)).sum()) >= len(means) * WORTH[stride]:
            chosen.append(stride)
            limit = WIDTH * stride
    return tuple(chosen)


@functools.lru_cache(maxsize=32)
def levels(size: tuple[int, ...], strides: tuple[int, ...]) -> list[Lattice]:
    """The voxels, then the lattices of these strides for a volume. Every Gaussian belongs to exactly one."""
    fine = voxels(size)
    lattices = [fine._replace(widths=(0.0, WIDTH * min(strides, default=math.inf)))]
    for coarser, stride in zip((math.inf, *strides), strides, strict=False):
        before, after = (TAPS - 1) // 2, TAPS // 2
        points = tuple((n - 1) // stride + 1 + before + after if n > 1 else 1 for n in size)
        step = tuple(stride * s for s in fine.step)
        origin = tuple(-before * s for s in step)
        matrices = [_interpolation(n, m, stride, before) for n, m in zip(size, points, strict=True)]
        up = tuple(Interpolation(_band(matrix), _band(matrix.T.contiguous())) for matrix in matrices)
        lattices.append(Lattice(points, origin, step, (WIDTH, WIDTH * coarser / stride), up))
    return lattices


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
    place = torch.arange(TAPS, dtype=torch.float64) - ((TAPS - 1) // 2)
    waves = torch.cat([torch.cos(frequency[:, None] * place), torch.sin(frequency[:, None] * place)])
    wanted = torch.cat([torch.cos(frequency * phase), torch.sin(frequency * phase)]).unsqueeze(1)
    weights = torch.cat([weight, weight])
    solution: Tensor = torch.linalg.lstsq(waves * weights, wanted * weights, driver="gelsd").solution
    return solution.squeeze(1)


def _band(matrix: Tensor) -> Band:
    rows, columns = matrix.shape
    padded = torch.cat([matrix, matrix.new_zeros(-rows % 4, columns)]).unflatten(0, (-1, 4))  # type: ignore[no-untyped-call]
    nonzero = (padded != 0).any(1).int()  # (groups, columns)
    first = nonzero.argmax(1)
    last = columns - 1 - nonzero.flip(1).argmax(1)
    place = first.unsqueeze(1) + torch.arange(int((last - first).max()) + 1)
    weights = padded.transpose(1, 2).gather(1, place.clamp(max=columns - 1).unsqueeze(2).expand(-1, -1, 4))
    return Band(matrix, first, (weights * (place < columns).unsqueeze(2)).contiguous())


def add_interpolated(lattice: Lattice, values: Tensor, out: Tensor, threads: int, variant: str = "") -> None:
    """Interpolate the values (B, *lattice.size) and add them to the voxels ``out`` (B, D, H, W), contiguous float32."""
    depth, height, width = (axis.up for axis in lattice.up)
    along = _along_width(values, width)  # (B, z, y, W)
    batch, points = along.shape[:2]
    rows = out.new_empty(batch * points, out.shape[2], out.shape[3])  # (B z, H, W)
    _multiply(height, along.flatten(0, 1), rows, False, threads, variant)
    _multiply(depth, rows.view(batch, points, -1), out.flatten(2), True, threads, variant)


def gathered(lattice: Lattice, grad: Tensor, threads: int, variant: str = "") -> Tensor:
    """The adjoint of :func:`add_interpolated`: (B, D, H, W) to (B, *lattice.size)."""
    depth, height, width = (axis.down for axis in lattice.up)
    batch, points = len(grad), len(depth.matrix)
    planes = grad.new_empty(batch, points, grad.shape[2] * grad.shape[3])
    _multiply(depth, grad.flatten(2), planes, False, threads, variant)
    rows = grad.new_empty(batch * points, len(height.matrix), grad.shape[3])
    _multiply(height, planes.view(batch * points, *grad.shape[2:]), rows, False, threads, variant)
    return _along_width(rows.view(batch, points, *rows.shape[1:]), width)


def _multiply(band: Band, stack: Tensor, out: Tensor, add: bool, threads: int, variant: str) -> None:
    """``out`` (S, rows, L) becomes, or grows by, the matrix times each of the stack (S, columns, L)."""
    assert _C is not None
    sizes = (stack.shape[0], stack.shape[1], out.shape[1], stack.shape[2], band.weights.shape[1])
    pointers = [tensor.data_ptr() for tensor in (band.first, band.weights, stack, out)]
    _C.banded(*sizes, *pointers, add, threads, variant)


def _along_width(values: Tensor, band: Band) -> Tensor:
    """Multiply along the last axis of (B, z, y, x), plane by plane: one product of them all depends on the threads."""
    planes = values.flatten(0, 1)
    product = torch.bmm(planes, band.matrix.T.expand(len(planes), -1, -1))
    return product.reshape(*values.shape[:3], len(band.matrix))
