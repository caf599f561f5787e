"""Global and local views of a prepared volume: where each lies in the patient, and how they overlap."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgmae.data.augmentation import Augmentation
from medgmae.data.crops import NORMALIZE, normalized
from medgmae.data.geometry import Grid, VolumeError
from medgmae.data.store import PreparedScan

Bounds = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class View:
    """A part of a volume at a scale of its own, perhaps mirrored.

    x: (C, *size) float32, (C, h, w) of a plane.
    grid: where its voxels lie in the patient; of a plane (1, h, w).
    kind: "global" or "local".
    """

    x: Tensor
    grid: Grid
    kind: str

    @property
    def box(self) -> Bounds:
        """The least and largest LPS position (x, y, z) in millimetres of its voxels' edges."""
        corners = self.grid.world(_corners(self.grid))
        return tuple(corners.min(0).tolist()), tuple(corners.max(0).tolist())

    def within(self, other: View, patch: Sequence[int]) -> Bounds:
        """From where to where it reaches in another view, (d, h, w) in patches of that one from its first edge."""
        corners = (other.grid.index(self.grid.world(_corners(self.grid))) + 0.5) / np.array(patch)
        return tuple(corners.min(0).tolist()), tuple(corners.max(0).tolist())


@dataclass(frozen=True)
class _Box:
    """Where a view lies in a volume: from ``start``, in voxels from the volume's first edge, ``extent`` voxels far."""

    start: NDArray[np.float64]
    extent: NDArray[np.float64]

    @property
    def end(self) -> NDArray[np.float64]:
        return self.start + self.extent


@dataclass(frozen=True)
class ViewSampler:
    """Draws p global and q local views of a volume, each of its own place, scale, mirroring and intensities; or of one
    plane of it, drawn for each sample.

    Places: a global view lies anywhere within the volume (along an axis that is too short in the middle, with padding).
    A local one lies so that at least the share ``overlap`` of it is scanned and within one of the global views, each of
    which has its turn.

    Attributes:
        global_size: voxels (d, h, w) of a global view; or (h, w), for views of a plane of the first axis, one voxel
            deep and with scale, overlap and mirroring within it. Likewise ``local_size``.
        global_views: p; likewise ``local_views``, q, which may be 0.
        scale: least and largest factor on the volume's spacing, drawn evenly in its logarithm; 1 takes its voxels as
            they are, other factors interpolate linearly.
        overlap: share of a local view, 0 to 1.
        foreground: share of global views whose centre is drawn from the foreground; None: all places alike.
        pad: intensity outside of the volume.
        normalize: of each view, before the changes of intensity, as of :class:`~medgmae.data.Crops`.
        augmentation: ``flip`` and changes of intensity, drawn for each view.

    Raises:
        VolumeError: numbers that make no views, or an augmentation that moves voxels in other ways.
    """

    global_size: tuple[int, ...]
    local_size: tuple[int, ...]
    global_views: int = 2
    local_views: int = 8
    scale: tuple[float, float] = (1.0, 1.0)
    overlap: float = 1.0
    foreground: float | None = None
    pad: float = 0.0
    normalize: str = "none"
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            value = getattr(self, name)
            if len(value) not in (2, 3) or min(value) < 1 or len(value) != len(self.global_size):
                raise VolumeError(
                    f"{name} is {value}; expected voxels (d, h, w) of views of volumes, or (h, w) of views of planes; "
                    "global and local views alike"
                )
        if self.global_views < 1 or self.local_views < 0:
            raise VolumeError(
                f"{self.global_views} global and {self.local_views} local views; expected at least 1 and 0"
            )
        if not 0 < self.scale[0] <= self.scale[1]:
            raise VolumeError(f"scale is {self.scale}; expected factors 0 < low <= high on the spacing")
        if not 0 <= self.overlap <= 1:
            raise VolumeError(f"overlap is {self.overlap}; expected a share 0 to 1 of a local view")
        if self.normalize not in NORMALIZE:
            raise VolumeError(f"normalize is {self.normalize!r}; expected one of {list(NORMALIZE)}")
        moving = [name for name in ("resized_crop", "affine") if getattr(self.augmentation, name) is not None]
        if moving or self.augmentation.rotate90:
            raise VolumeError(
                f"augmentation.{(*moving, 'rotate90')[0]} moves voxels; views have flip, scale (of views) and changes "
                "of intensity: leave it out"
            )
        self.augmentation.check(self.global_size)

    def check(self, scan: PreparedScan) -> None:
        """Whether a volume has room for local views that overlap as much as they should.

        Raises:
            VolumeError: it is too small.
        """
        for name, size in (("global", self.global_size), ("local", self.local_size if self.local_views else None)):
            if size is None:
                continue
            extents = self._extent(size, self.scale[1])
            inside = float(np.minimum(1.0, np.array(scan.size) / extents).prod())
            least = self.overlap if name == "local" else 0.0
            if inside < least:
                raise VolumeError(
                    f"{scan.source}: too small: of a local view of {' x '.join(map(str, size))} voxels at the scale "
                    f"{self.scale[1]:g} it fills {inside:.0%}, and overlap={self.overlap:g}; it has "
                    f"{' x '.join(map(str, scan.size))} voxels. Leave it out, or take smaller views or less overlap"
                )

    def __call__(self, scan: PreparedScan, rng: np.random.Generator) -> list[View]:
        """The global views, then the local ones. Of the file no more is read than the box around all of
        them, and one voxel more on each side.

        Raises:
            VolumeError: the volume is too small, or its file is missing or damaged.
        """
        self.check(scan)
        boxes = [self._global_box(scan, rng) for _ in range(self.global_views)]
        if self._flat:
            for box in boxes:
                box.start[0] = boxes[0].start[0]
        for i in range(self.local_views):
            boxes.append(self._local_box(scan, boxes[i % self.global_views], rng))
        ends = np.array(scan.size)
        first = np.clip(np.floor(np.min([box.start for box in boxes], axis=0)), 0, ends - 1).astype(int)
        last = np.clip(np.ceil(np.max([box.end for box in boxes], axis=0)) + 1, first + 1, ends).astype(int)
        first = np.maximum(first - 1, 0)  # a neighbour on either side, for the interpolation
        around = scan.read(first.tolist(), (last - first).tolist())
        kinds = ["global"] * self.global_views + ["local"] * self.local_views
        return [self._view(scan, around, first, box, kind, rng) for box, kind in zip(boxes, kinds, strict=True)]

    @property
    def _flat(self) -> bool:
        """Whether views are of planes."""
        return len(self.global_size) == 2

    def _factor(self, rng: np.random.Generator) -> float:
        low, high = self.scale
        return low if low == high else math.exp(rng.uniform(math.log(low), math.log(high)))

    def _extent(self, size: Sequence[int], factor: float) -> NDArray[np.float64]:
        """How far a view reaches, in voxels of the volume: a plane stays one voxel deep."""
        extent = np.array(size, dtype=np.float64) * factor
        return np.concatenate([[1.0], extent]) if self._flat else extent

    def _global_box(self, scan: PreparedScan, rng: np.random.Generator) -> _Box:
        extent = self._extent(self.global_size, self._factor(rng))
        centre = None
        if self.foreground is not None:
            inside = bool(rng.random() < self.foreground)
            centre = scan.foreground_table().draw(rng, inside) if 0 < scan.foreground < 1 else None
        starts = []
        for axis, (n, m) in enumerate(zip(scan.size, extent, strict=True)):
            if n <= m:
                start = (n - m) / 2
                starts.append(math.floor(start) if m == round(m) else start)
            elif centre is None:
                starts.append(_drawn(0.0, n - m, m, rng))
            else:
                start = min(max(centre[axis] + 0.5 - m / 2, 0.0), n - m)
                starts.append(math.floor(start) if m == round(m) else start)
        return _Box(np.array(starts, dtype=np.float64), extent)

    def _local_box(self, scan: PreparedScan, around: _Box, rng: np.random.Generator) -> _Box:
        extent = self._extent(self.local_size, self._factor(rng))
        low, high = np.maximum(around.start, 0.0), np.minimum(around.end, np.array(scan.size))
        most = np.minimum(1.0, (high - low) / extent)  # share of an axis that can lie within
        if most.prod() < self.overlap - 1e-9:
            raise VolumeError(
                f"{scan.source}: too small for overlap={self.overlap:g}: {most.prod():.0%} of a local view fit into a "
                "global one. Take smaller local views, a narrower scale or less overlap"
            )
        least = most * (self.overlap / most.prod()) ** (1 / len(self.local_size))
        least[: -len(self.local_size)] = 1.0  # a plane is its global view's
        starts = []
        for axis, (n, m) in enumerate(zip(scan.size, extent, strict=True)):
            first, last = low[axis] - (1 - least[axis]) * m, high[axis] - least[axis] * m
            if n >= m:
                first, last = max(first, 0.0), min(last, n - m)
            starts.append(_drawn(first, last, m, rng))
        return _Box(np.array(starts), extent)

    def _view(
        self,
        scan: PreparedScan,
        around: Tensor,
        first: NDArray[np.int64],
        box: _Box,
        kind: str,
        rng: np.random.Generator,
    ) -> View:
        size = self.global_size if kind == "global" else self.local_size
        chances = self.augmentation.flip if isinstance(self.augmentation.flip, tuple) else (self.augmentation.flip,)
        chances = chances * len(size) if len(chances) == 1 else chances
        if self._flat:
            size, chances = (1, *size), (0.0, *chances)
        signs = np.array([-1.0 if rng.random() < chance else 1.0 for chance in chances])
        step = box.extent / np.array(size)
        x, origin = around, np.zeros(3)
        for axis in range(3):
            places = box.start[axis] - 0.5 + step[axis] * (np.arange(size[axis]) + 0.5)
            places = places if signs[axis] > 0 else places[::-1].copy()
            origin[axis] = places[0]
            x = _interpolated(x, axis + 1, places, int(first[axis]), scan.size[axis], self.pad)
        place, spacing = tuple(scan.grid.world(origin)), tuple(step * np.array(scan.spacing))
        grid = Grid(size, spacing, place, scan.grid.direction * signs)
        x = normalized((x[:, 0] if self._flat else x).contiguous(), self.normalize)
        return View(replace(self.augmentation, flip=0.0)(x, rng), grid, kind)


def _corners(grid: Grid) -> NDArray[np.float64]:
    """The eight corners of the voxels' edges, as indices."""
    return np.array(list(itertools.product(*((-0.5, n - 0.5) for n in grid.size))))


def _drawn(low: float, high: float, extent: float, rng: np.random.Generator) -> float:
    """A start from ``low`` to ``high``: a whole voxel where the view is made of whole voxels."""
    if extent == round(extent):
        return float(rng.integers(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1))
    return float(rng.uniform(low, high))


def _interpolated(x: Tensor, axis: int, places: NDArray[np.float64], first: int, size: int, pad: float) -> Tensor:
    """Values at places along an axis, in voxels of a volume of ``size``, of which ``x`` begins at ``first``.

    Beyond the first and last voxel's centres these are repeated; beyond their edges it is ``pad``.
    """
    inside = np.clip(places, 0, size - 1)
    lower = np.clip(np.floor(inside).astype(np.int64), 0, size - 1)
    weight = torch.from_numpy((inside - lower).astype(np.float32))
    shape = [1] * x.ndim
    shape[axis] = len(places)

    def at(index: NDArray[np.int64]) -> Tensor:
        return x.index_select(axis, torch.from_numpy(np.clip(index - first, 0, x.shape[axis] - 1)))

    values = at(lower)
    if weight.any():
        values = torch.lerp(values, at(np.minimum(lower + 1, size - 1)), weight.view(shape))
    outside = torch.from_numpy((places < -0.5) | (places > size - 0.5))
    return values.masked_fill(outside.view(shape), pad) if outside.any() else values
