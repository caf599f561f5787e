"""Where voxels lie: a regular grid in patient space, and the index map between two grids.

Convention: array axes are (d, h, w), as SimpleITK's arrays give them (z, y, x). World coordinates are LPS millimetres
(x, y, z), as in DICOM and SimpleITK; NIfTI's RAS+ differs by the sign of the first two. ``world = origin + direction
@ (spacing * index)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Origin = Literal["centered", "first_voxel"]

_SIDES = ("RL", "AP", "IS")  # per world axis (x, y, z) in LPS: the side of the negative and of the positive direction
_HAIR = np.eye(3) + 1e-5 * np.array([[0, -3, 2], [3, 0, -1], [-2, 1, 0]])
_ORTHONORMAL = 1e-3  # DICOM gives cosines with as few as 4 digits
_SNAP = 1e-4  # voxels: positions this close to a voxel centre are that voxel (NIfTI stores geometry in float32)


class VolumeError(ValueError):
    """A scan cannot be read, written or brought into the form that is asked for."""


def _triple(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    numbers = tuple(float(v) for v in values)
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise VolumeError(f"{name} is {list(numbers)}; expected three finite numbers")
    return numbers


def _rotation(matrix: Any) -> Floats:
    direction = np.array(matrix, dtype=np.float64)
    if direction.shape != (3, 3) or not np.isfinite(direction).all():
        raise VolumeError(f"direction is {direction.tolist()}; expected a 3x3 matrix of finite numbers")
    if np.abs(direction.T @ direction - np.eye(3)).max() > _ORTHONORMAL:
        raise VolumeError(
            f"direction is {direction.round(4).tolist()}; expected orthonormal columns (sheared axes have no spacing)"
        )
    direction[np.abs(direction) < 1e-12] = 0.0  # SimpleITK turns subnormal cosines into NaN
    direction.flags.writeable = False
    return direction


@dataclass(frozen=True, eq=False)
class Grid:
    """A regular voxel grid in patient space.

    Attributes:
        size: voxels (d, h, w).
        spacing: millimetres between voxel centres (d, h, w).
        origin: LPS position (x, y, z) in millimetres of voxel (0, 0, 0).
        direction: 3x3; column k is the LPS unit vector along which array axis k grows.

    Raises:
        VolumeError: a size or spacing that is not positive, or a direction that is not orthonormal.
    """

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: Floats

    def __post_init__(self) -> None:
        size = tuple(int(n) for n in self.size)
        if len(size) != 3 or min(size) < 1:
            raise VolumeError(f"size is {list(size)}; expected three positive numbers of voxels (d, h, w)")
        spacing = _triple("spacing", self.spacing)
        if min(spacing) <= 0:
            raise VolumeError(f"spacing is {list(spacing)} mm; expected three positive numbers (d, h, w)")
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "spacing", spacing)
        object.__setattr__(self, "origin", _triple("origin", self.origin))
        object.__setattr__(self, "direction", _rotation(self.direction))

    @property
    def orientation(self) -> str:
        """Three letters, for the axes in file order (x, y, z) = (w, h, d): the side of the body towards which the
        index grows."""
        return "".join(reversed([_SIDES[axis][int(sign > 0)] for axis, sign in self._nearest_axes()]))

    @property
    def affine(self) -> Floats:
        """4x4 matrix from index (d, h, w, 1) to LPS millimetres (x, y, z, 1)."""
        affine = np.eye(4)
        affine[:3, :3] = self.direction * np.array(self.spacing)
        affine[:3, 3] = self.origin
        return affine

    def world(self, index: Any) -> Floats:
        """LPS positions (..., 3) in millimetres of voxel indices (..., 3), which need not be whole."""
        return np.asarray(np.asarray(index, dtype=np.float64) @ self.affine[:3, :3].T + np.array(self.origin))

    def index(self, world: Any) -> Floats:
        """Continuous voxel indices (..., 3) of LPS positions (..., 3); the inverse of ``world``."""
        offset = np.asarray(world, dtype=np.float64) - np.array(self.origin)
        return np.asarray(offset @ np.linalg.inv(self.affine[:3, :3]).T)

    def _nearest_axes(self) -> list[tuple[int, float]]:
        """Per array axis: the world axis that it follows, and the cosine. The assignment is one to one, as near as
        possible in sum, with body axes turned by a hair: whatever the order and signs of the array's axes, those that
        lie half way between two body axes are then assigned alike.
        """
        near = np.abs(_HAIR @ self.direction)
        best = max(itertools.permutations(range(3)), key=lambda axes: sum(near[axes[k], k] for k in range(3)))
        return [(axis, float(self.direction[axis, k])) for k, axis in enumerate(best)]

    def part(self, start: Sequence[int], size: Sequence[int]) -> Grid:
        """The grid of ``size`` voxels from voxel ``start`` on; it may reach beyond this one, which pads."""
        origin = self.world(np.array(start, dtype=np.float64))
        return Grid((size[0], size[1], size[2]), self.spacing, tuple(origin), self.direction)

    def reoriented(self, code: str) -> Grid:
        """The same voxels with axes permuted and reversed until ``orientation`` is ``code``.

        Raises:
            VolumeError: ``code`` does not name one side of each of the three body axes.
        """
        wanted = [
            next((axis for axis, sides in enumerate(_SIDES) if letter in sides), -1) for letter in code.upper()[::-1]
        ]
        if sorted(wanted) != [0, 1, 2]:
            raise VolumeError(
                f"orientation is {code!r}; expected one letter each of R|L, A|P and S|I, such as 'LPS' or 'RAS'"
            )
        axes = self._nearest_axes()
        start, order, signs = [0, 0, 0], [], []
        for axis, letter in zip(wanted, code.upper()[::-1], strict=True):
            source = next(k for k, (followed, _) in enumerate(axes) if followed == axis)
            same_way = (axes[source][1] > 0) == (letter == _SIDES[axis][1])
            start[source] = 0 if same_way else self.size[source] - 1
            order.append(source)
            signs.append(1.0 if same_way else -1.0)
        d, h, w = order
        return Grid(
            (self.size[d], self.size[h], self.size[w]),
            (self.spacing[d], self.spacing[h], self.spacing[w]),
            tuple(self.world(np.array(start, dtype=np.float64))),
            self.direction[:, order] * np.array(signs),
        )

    def with_spacing(self, spacing: Sequence[float], origin: Origin = "centered") -> Grid:
        """A grid of another spacing (d, h, w) in millimetres over the same field of view.

        ``"centered"`` keeps the centre: ``round(n * old / new)`` voxels. ``"first_voxel"`` keeps the first voxel's
        centre and stays within half a new voxel of the last one: ``round((n - 1) * old / new + 1)`` voxels, as
        MONAI's ``Spacing`` does.
        """
        new = _triple("spacing", spacing)
        if min(new) <= 0:
            raise VolumeError(f"spacing is {list(new)} mm; expected three positive numbers (d, h, w)")
        ratios = [old / step for old, step in zip(self.spacing, new, strict=True)]
        if origin == "first_voxel":
            size = [round((n - 1) * ratio + 1) for n, ratio in zip(self.size, ratios, strict=True)]
        else:
            size = [max(1, round(n * ratio)) for n, ratio in zip(self.size, ratios, strict=True)]
        return self._regular(size, new, origin)

    def with_size(self, size: Sequence[int], origin: Origin = "centered") -> Grid:
        """A grid of ``size`` voxels (d, h, w), of spacing ``n * old / size``, that keeps the centre or the first
        voxel's centre."""
        if len(size) != 3 or min(size) < 1:
            raise VolumeError(f"size is {list(size)}; expected three positive numbers of voxels (d, h, w)")
        spacing = [n * old / new for n, old, new in zip(self.size, self.spacing, size, strict=True)]
        return self._regular(size, spacing, origin)

    def _regular(self, size: Sequence[int], spacing: Sequence[float], origin: Origin) -> Grid:
        first = np.zeros(3)
        if origin == "centered":
            old_extent = (np.array(self.size) - 1) * np.array(self.spacing)
            new_extent = (np.array(size) - 1) * np.array(spacing)
            first = (old_extent - new_extent) / 2 / np.array(self.spacing)
        elif origin != "first_voxel":
            raise VolumeError(f"origin is {origin!r}; expected 'centered' or 'first_voxel'")
        return Grid(
            (size[0], size[1], size[2]), (spacing[0], spacing[1], spacing[2]), tuple(self.world(first)), self.direction
        )


@dataclass(frozen=True)
class AxisMap:
    """Along one target axis: ``position = scale * index + offset`` on axis ``source`` of the other grid, in voxels."""

    source: int
    positions: Floats

    @property
    def whole(self) -> bool:
        """Whether every position is a voxel centre."""
        return bool((self.positions == np.round(self.positions)).all())


def axis_maps(source: Grid, target: Grid) -> list[AxisMap] | None:
    """The index map from ``target`` to ``source`` as three one-dimensional maps, or ``None`` when the axes are not
    parallel.

    Positions within 1e-4 voxel of voxel centres are snapped to them, all of an axis or none, so that flips,
    permutations, crops and pads are exact whatever rounding the headers went through.
    """
    matrix = np.linalg.inv(source.affine) @ target.affine
    linear = matrix[:3, :3]
    order = [int(np.abs(linear[:, k]).argmax()) for k in range(3)]
    drift = linear.copy()
    drift[order, range(3)] = 0.0
    if sorted(order) != [0, 1, 2] or (np.abs(drift) * np.array(target.size)).max() > 10 * _SNAP:
        return None
    maps = []
    for k, axis in enumerate(order):
        positions = linear[axis, k] * np.arange(target.size[k]) + matrix[axis, 3]
        rounded = np.round(positions)
        maps.append(AxisMap(axis, rounded if np.abs(positions - rounded).max() < _SNAP else positions))
    return maps
