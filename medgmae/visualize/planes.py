"""Slices of volumes in three planes, drawn layer by layer: what every picture of this room is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgmae.data import Grid, Volume, reorient

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The planes through a volume in RAS, array (z, y, x): name, sliced axis, and the sides of the body at the left, right,
# top and bottom of the picture. The patient's right is on the left, as radiologists look at it.
PLANES = (("axial", 0, "RLAP"), ("coronal", 1, "RLSI"), ("sagittal", 2, "APSI"))
HIDDEN_COLOUR = "#5a6b8c"  # not a grey: a hidden patch must not look like tissue


class Centres(Protocol):
    """What a picture shows of :class:`~medgmae.Gaussians`, (1, K, ...) in LPS mm."""

    @property
    def means(self) -> Tensor:
        """(1, K, 3)."""

    @property
    def densities(self) -> Tensor:
        """(1, K)."""


@dataclass(frozen=True)
class Plane:
    """A slice through a scan, shown with right, or the front, on the left; a picture's first row is at the bottom.

    grid: of the scan in RAS. axis: the one that is sliced. at: a voxel (d, h, w) in the slice.
    """

    grid: Grid
    axis: int
    at: tuple[int, int, int]

    @property
    def _kept(self) -> tuple[int, int]:
        """The array axes that go up and across the picture."""
        up, across = (k for k in range(3) if k != self.axis)
        return up, across

    @property
    def millimetres(self) -> tuple[float, float]:
        """Width and height of the picture."""
        up, across = self._kept
        return self.grid.size[across] * self.grid.spacing[across], self.grid.size[up] * self.grid.spacing[up]

    def pixels(self, volume: Volume) -> NDArray[Any]:
        """(rows, columns) of the first channel of a volume in RAS, or (rows, columns, 3) of three channels."""
        shown = volume.data if volume.data.shape[0] == 3 else volume.data[:1]
        return shown.select(self.axis + 1, self.at[self.axis]).flip(2).movedim(0, 2).squeeze(2).numpy()

    def place(self, index: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Millimetres from the left and from the bottom of the picture of voxel indices (..., 3), mirrored as it is."""
        up, across = self._kept
        x = (self.grid.size[across] - 0.5 - index[..., across]) * self.grid.spacing[across]
        return x, (index[..., up] + 0.5) * self.grid.spacing[up]


class Layer(Protocol):
    """Something that is drawn on the three slices of a column."""

    def draw(self, axes: Axes, plane: Plane) -> None:
        """On the picture of one slice."""


class Column(NamedTuple):
    """A column of a figure: its heading, and what is drawn in it, the lowest layer first."""

    heading: str
    layers: Sequence[Layer]


@dataclass(frozen=True)
class Image:
    """A volume in RAS, from black at ``low`` to white at ``high``; three channels are colours."""

    volume: Volume
    low: float
    high: float

    def draw(self, axes: Axes, plane: Plane) -> None:
        """On the picture of one slice."""
        from matplotlib import colormaps

        grey = colormaps["gray"].with_extremes(bad=HIDDEN_COLOUR)
        width, height = plane.millimetres
        pixels = plane.pixels(self.volume)
        axes.imshow(pixels, cmap=grey, vmin=self.low, vmax=self.high, origin="lower", extent=(0, width, 0, height))


@dataclass(frozen=True)
class Overlay:
    """A map in RAS as colours over what is below, from ``low`` to ``high``; nothing where it is 0."""

    volume: Volume
    low: float
    high: float

    def draw(self, axes: Axes, plane: Plane) -> None:
        """On the picture of one slice."""
        width, height = plane.millimetres
        axes.imshow(
            np.ma.masked_equal(plane.pixels(self.volume), 0), cmap="viridis", vmin=self.low, vmax=self.high,
            alpha=0.55, origin="lower", extent=(0, width, 0, height), interpolation="nearest",
        )  # fmt: skip


@dataclass(frozen=True)
class Labels:
    """A map of labels in RAS (1, D, H, W) int16 as colours over what is below; nothing where it is 0.

    names: of the labels that have one.
    """

    volume: Volume
    names: Mapping[int, str]

    def draw(self, axes: Axes, plane: Plane) -> None:
        """On the picture of one slice."""
        width, height = plane.millimetres
        pixels = plane.pixels(self.volume)
        colours = np.zeros((*pixels.shape, 4))
        for label in self.names:
            colours[pixels == label] = (*self._colour(label), 0.55)
        axes.imshow(colours, origin="lower", extent=(0, width, 0, height), interpolation="nearest")

    def key(self, figure: Figure) -> None:
        """Names and colours beside the pictures."""
        from matplotlib.patches import Patch

        patches = [Patch(color=self._colour(label), label=name) for label, name in self.names.items()]
        if patches:
            figure.legend(handles=patches, loc="outside right upper", fontsize=8, frameon=False)

    def _colour(self, label: int) -> tuple[float, float, float]:
        from matplotlib import colormaps

        red, green, blue, _ = colormaps["tab20"]((label - 1) % 20)
        return red, green, blue


class Cross:
    """Lines where the other two planes cut a slice."""

    def draw(self, axes: Axes, plane: Plane) -> None:
        """On the picture of one slice."""
        x, y = plane.place(np.array(plane.at, dtype=np.float64))
        axes.axvline(float(x), color="yellow", lw=0.5)
        axes.axhline(float(y), color="yellow", lw=0.5)


@dataclass(frozen=True)
class Dots:
    """Points at the centres of Gaussians (1, K, ...) in LPS mm, up to ``near`` voxels from the slice."""

    gaussians: Centres
    near: float = math.inf

    def draw(self, axes: Axes, plane: Plane) -> None:
        """On the picture of one slice."""
        index = plane.grid.index(self.gaussians.means[0].numpy())
        shown = np.abs(index[:, plane.axis] - plane.at[plane.axis]) <= self.near
        x, y = plane.place(index[shown])
        strength = np.abs(self.gaussians.densities[0].numpy())[shown]
        order = np.argsort(strength)  # strong ones on top
        side = 1.5 if math.isinf(self.near) else 5.0  # of the few near a plane each can be seen
        brightest = float(np.percentile(strength, 95)) if len(strength) else 1.0  # few are many times stronger
        axes.scatter(x[order], y[order], s=side, c=strength[order], cmap="plasma", vmin=0, vmax=brightest, linewidths=0)
        width, height = plane.millimetres
        axes.set_xlim(0, width)
        axes.set_ylim(0, height)


def greys_of(scan: Volume) -> Callable[[Volume], Image]:
    """Makes images of volumes on the grid of a scan, in the scan's range of greys."""
    low, high = float(scan.data[0].min()), float(np.percentile(scan.data[0].numpy(), 99.9))
    return lambda volume: Image(reorient(volume, "RAS"), low, high)


def planes_figure(
    scan: Volume, columns: Sequence[Column], at: tuple[int, int, int], title: str, width: float | None = None
) -> Figure:
    """A row per plane through voxel ``at`` (d, h, w) of the scan in RAS; ``width`` in inches."""
    grid = scan.grid.reoriented("RAS")
    planes = [Plane(grid, axis, at) for _, axis, _ in PLANES]
    widest = max(plane.millimetres[0] for plane in planes)
    heights = [plane.millimetres[1] / widest for plane in planes]
    figure = new_figure((3 * len(columns) + 0.5 if width is None else width, 3 * sum(heights) + 0.9))
    rows = figure.subplots(3, len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, plane, (name, _, sides) in zip(rows, planes, PLANES, strict=True):
        for axes, column in zip(row, columns, strict=True):
            for layer in column.layers:
                layer.draw(axes, plane)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(name, fontsize=11)
        name_sides(row[0], sides)
    for axes, column in zip(rows[0], columns, strict=True):
        axes.set_title(column.heading, fontsize=11)
    figure.suptitle(title, fontsize=12)
    return figure


def middle(scan: Volume) -> tuple[int, int, int]:
    """Voxel (d, h, w) in RAS in the middle of what lies above a tenth of the range; of the volume if nothing does.

    Of n voxels along an axis, voxel n // 2 is the middle one, as ``crop_or_pad`` has it.
    """
    inside = body(reorient(scan, "RAS"))
    places = torch.nonzero(inside if inside.any() else ~inside)
    first, count = places.amin(0), places.amax(0) - places.amin(0) + 1
    d, h, w = (first + count // 2).tolist()
    return d, h, w


def body(scan: Volume) -> Tensor:
    """(D, H, W) bool: what lies above a tenth of the range of the first channel."""
    data = scan.data[0]
    return data > data.min() + 0.1 * (data.max() - data.min())


def name_sides(axes: Axes, sides: str) -> None:
    """The side of the body at each edge of a picture: left, right, top, bottom."""
    for letter, (x, y) in zip(sides, ((0.03, 0.5), (0.97, 0.5), (0.5, 0.96), (0.5, 0.04)), strict=True):
        text = axes.text(x, y, letter, transform=axes.transAxes, ha="center", va="center", fontsize=8, color="white")
        text.set_bbox({"facecolor": "black", "alpha": 0.5, "pad": 1, "linewidth": 0})


def new_figure(inches: tuple[float, float]) -> Figure:
    """An empty figure of a width and height.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib, which is not installed: pip install medgmae[viz]") from error
    return Figure(figsize=inches, layout="constrained", facecolor="white", dpi=110)
