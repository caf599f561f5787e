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
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Origin = Literal["centered", "first_voxel", "edges"]
Rounding = Literal["round", "floor"]
Centering = Literal["middle", "floor", "ceil"]

_SIDES = ("RL", "AP", "IS")  # per world axis (x, y, z) in LPS: the side of the negative and of the positive direction
_PERTURBATION = np.eye(3) + 1e-5 * np.array([[0, -3, 2], [3, 0, -1], [-2, 1, 0]])
_ORTHONORMAL = 1e-3  # DICOM gives cosines with as few as 4 digits
SNAP = 1e-4  # voxels: positions this close to a voxel centre are that voxel (NIfTI stores geometry in float32)


class VolumeError(ValueError):
    """A scan cannot be read, written or brought into the form that is asked for."""


def sizes(size: int | Sequence[int]) -> tuple[int, int, int]:
    """Voxels (d, h, w) of a size, or of one number for all axes.

    Raises:
        VolumeError: not positive whole numbers, or another count of them than one or three.
    """
    values = list(size) if isinstance(size, Sequence | np.ndarray) else [size] * 3
    if len(values) != 3 or not all(isinstance(n, (int, np.integer)) and n > 0 for n in values):
        raise VolumeError(f"size is {values}; expected three positive numbers of voxels (d, h, w), or one for all axes")
    d, h, w = map(int, values)
    return d, h, w


def centred_start(size: Sequence[int], wanted: Sequence[int], rule: Centering = "middle") -> list[int]:
    """First voxel of ``wanted`` voxels in the middle of ``size``, per axis; negative where it takes padding.

    The rule of the library is ``"middle"``: voxel ``n // 2`` becomes voxel ``wanted // 2``, so that a crop undoes a pad
    whatever is odd or even. The others are those of other programs: what is cut, or added, in front is half the
    difference, rounded down (``"floor"``) or up (``"ceil"``, TorchIO).
    """
    pairs = list(zip(size, wanted, strict=True))
    if rule == "middle":
        return [n // 2 - m // 2 for n, m in pairs]
    up = int(rule == "ceil")
    return [(1 if n > m else -1) * ((abs(n - m) + up) // 2) for n, m in pairs]


def spacings(spacing: float | Sequence[float]) -> tuple[float, float, float]:
    """Millimetres (d, h, w) of a spacing, or of one number for all axes.

    Raises:
        VolumeError: not positive finite numbers, or another count of them than one or three.
    """
    numbers = _triple("spacing", spacing if isinstance(spacing, Sequence | np.ndarray) else [spacing] * 3)
    if min(numbers) <= 0:
        raise VolumeError(
            f"spacing is {list(numbers)} mm; expected three positive numbers (d, h, w), or one for all axes"
        )
    return numbers


def _triple(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    numbers = tuple(float(v) for v in values)
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
        raise VolumeError(f"{name} is {list(numbers)}; expected three finite numbers")
    return numbers


def _rotation(matrix: ArrayLike) -> Floats:
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


@dataclass(frozen=True, eq=False, init=False)
class Grid:
    """A regular voxel grid in patient space: ``Grid(size, spacing)``, or with all four.

    Attributes:
        size: voxels (d, h, w), or one number for all axes.
        spacing: millimetres between voxel centres (d, h, w), or one number for all axes; 1 by default.
        origin: LPS position (x, y, z) in millimetres of voxel (0, 0, 0); 0 by default.
        direction: 3x3; column k is the LPS unit vector along which array axis k grows; by default the array's axes
            are those of the body, (z, y, x).

    Raises:
        VolumeError: a size or spacing that is not positive, or a direction that is not orthonormal.
    """

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: Floats

    def __init__(
        self,
        size: int | Sequence[int],
        spacing: float | Sequence[float] = 1.0,
        origin: Sequence[float] = (0.0, 0.0, 0.0),
        direction: ArrayLike | None = None,
    ) -> None:
        object.__setattr__(self, "size", sizes(size))
        object.__setattr__(self, "spacing", spacings(spacing))
        object.__setattr__(self, "origin", _triple("origin", origin))
        object.__setattr__(self, "direction", _rotation(np.eye(3)[:, ::-1] if direction is None else direction))

    def __eq__(self, other: object) -> bool:
        """Whether all numbers are the same; grids read from different formats may differ in the last digits."""
        if not isinstance(other, Grid):
            return NotImplemented
        return self._numbers() == other._numbers()

    def __hash__(self) -> int:
        return hash(self._numbers())

    def _numbers(self) -> tuple[object, ...]:
        return self.size, self.spacing, self.origin, tuple(self.direction.flat)

    @classmethod
    def from_affine(cls, affine: Floats, size: Sequence[int]) -> Grid:
        """The grid of ``size`` voxels (d, h, w) whose ``affine`` this is: 4x4, index (d, h, w) to LPS millimetres.

        Raises:
            VolumeError: numbers that are not finite, an axis without length, or axes that are not perpendicular.
        """
        columns = np.asarray(affine, dtype=np.float64)[:3, :3]
        spacing = np.linalg.norm(columns, axis=0)
        if not (np.isfinite(affine).all() and spacing.min() > 0):
            raise VolumeError(
                f"the geometry is {np.asarray(affine)[:3].tolist()}; expected finite numbers and a positive spacing"
            )
        return cls(size, tuple(spacing), tuple(affine[:3, 3]), columns / spacing)

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

    def world(self, index: ArrayLike) -> Floats:
        """LPS positions (..., 3) in millimetres of voxel indices (..., 3), which need not be whole."""
        return np.asarray(np.asarray(index, dtype=np.float64) @ self.affine[:3, :3].T + np.array(self.origin))

    def index(self, world: ArrayLike) -> Floats:
        """Continuous voxel indices (..., 3) of LPS positions (..., 3); the inverse of ``world``."""
        offset = np.asarray(world, dtype=np.float64) - np.array(self.origin)
        return np.asarray(offset @ np.linalg.inv(self.affine[:3, :3]).T)

    def _nearest_axes(self) -> list[tuple[int, float]]:
        """Per array axis: the world axis that it follows, and the cosine. The assignment is one to one, as near as
        possible in sum, with body axes slightly perturbed: whatever the order and signs of the array's axes, those that
        lie half way between two body axes are then assigned alike.
        """
        near = np.abs(_PERTURBATION @ self.direction)
        best = max(itertools.permutations(range(3)), key=lambda axes: sum(near[axes[k], k] for k in range(3)))
        return [(axis, float(self.direction[axis, k])) for k, axis in enumerate(best)]

    def part(self, start: Sequence[int], size: Sequence[int]) -> Grid:
        """The grid of ``size`` voxels from voxel ``start`` on; it may reach beyond this one, which pads."""
        origin = self.world(np.array(start, dtype=np.float64))
        return Grid(size, self.spacing, tuple(origin), self.direction)

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
        return Grid(
            [self.size[k] for k in order],
            [self.spacing[k] for k in order],
            tuple(self.world(np.array(start, dtype=np.float64))),
            self.direction[:, order] * np.array(signs),
        )

    def with_spacing(
        self, spacing: float | Sequence[float], origin: Origin = "centered", rounding: Rounding = "round"
    ) -> Grid:
        """A grid of another spacing (d, h, w) in millimetres, or one number for all axes, over the same field of view.

        ``"centered"`` keeps the centre: ``round(n * old / new)`` voxels. ``"edges"`` has as many and keeps the outer
        edges, so that the spacing is only near the one that is asked for. ``"first_voxel"`` keeps the first voxel's
        centre and stays within half a new voxel of the last one: ``round((n - 1) * old / new + 1)`` voxels, as
        MONAI's ``Spacing`` does.

        ``rounding="floor"`` is TorchIO's: down to whole voxels, and an axis of one voxel keeps it.
        """
        new = spacings(spacing)
        apart = 1 if origin == "first_voxel" else 0
        counts = [(n - apart) * old / step + apart for n, old, step in zip(self.size, self.spacing, new, strict=True)]
        if rounding == "floor":
            whole = [1 if n == 1 else max(1, math.floor(count)) for n, count in zip(self.size, counts, strict=True)]
        else:
            whole = [max(1, round(count)) for count in counts]
        return self.with_size(whole) if origin == "edges" else self._regular(whole, new, origin)

    def with_size(self, size: int | Sequence[int], origin: Origin = "centered") -> Grid:
        """A grid of ``size`` voxels (d, h, w), or one number for all axes, of spacing ``n * old / size``, that keeps
        the centre, and so the edges, or the first voxel's centre."""
        counts = sizes(size)
        spacing = [n * old / new for n, old, new in zip(self.size, self.spacing, counts, strict=True)]
        return self._regular(counts, spacing, origin)

    def _regular(self, size: Sequence[int], spacing: Sequence[float], origin: Origin) -> Grid:
        first = np.zeros(3)
        if origin in ("centered", "edges"):
            old_extent = (np.array(self.size) - 1) * np.array(self.spacing)
            new_extent = (np.array(size) - 1) * np.array(spacing)
            first = (old_extent - new_extent) / 2 / np.array(self.spacing)
        elif origin != "first_voxel":
            raise VolumeError(f"origin is {origin!r}; expected 'centered', 'edges' or 'first_voxel'")
        return Grid(size, spacing, tuple(self.world(first)), self.direction)


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
    if sorted(order) != [0, 1, 2] or (np.abs(drift) * np.array(target.size)).max() > 10 * SNAP:
        return None
    maps = []
    for k, axis in enumerate(order):
        positions = linear[axis, k] * np.arange(target.size[k]) + matrix[axis, 3]
        rounded = np.round(positions)
        maps.append(AxisMap(axis, rounded if np.abs(positions - rounded).max() < SNAP else positions))
    return maps
