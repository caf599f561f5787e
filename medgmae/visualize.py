"""Pictures of scans in three planes: what a masked autoencoder saw and made of it, features as colours, latent maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgmae.data import Grid, Volume, reorient
from medgmae.data.contrasts import same_place
from medgmae.data.volume import ScanLike
from medgmae.inference.inputs import argument_volume
from medgmae.inference.latents import latent_to_spatial as latent_to_spatial
from medgmae.inference.reconstruction import Reconstruction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The planes through a volume in RAS, array (z, y, x): name, sliced axis, and the sides of the body at the left, right,
# top and bottom of the picture. The patient's right is on the left, as radiologists look at it.
PLANES = (("axial", 0, "RLAP"), ("coronal", 1, "RLSI"), ("sagittal", 2, "APSI"))
HIDDEN_COLOUR = "#5a6b8c"  # not a grey: a hidden patch must not look like tissue


def reconstruction_figure(
    scan: ScanLike, reconstruction: Reconstruction | None = None, colours: ScanLike | None = None, *, title: str = ""
) -> Figure:
    """A figure with a row per plane: the scan and, where given, its visible patches, their filling and the features.

    A reconstruction from Gaussians is shown as it was rendered, and their centres on top of the scan: all of them,
    whatever their distance from the plane, brighter where the density is larger in size.

    The planes go through the middle of what is not background. Write it with ``figure.savefig("scan.png")``.

    Args:
        scan: (C, D, H, W), preprocessed, or what :func:`~medgmae.data.as_volume` takes; the first channel is shown.
        reconstruction: of :func:`~medgmae.reconstruct_scan`.
        colours: (3, D, H, W) on the grid of the scan, of :func:`feature_colours`.
        title: line above the pictures.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
        TypeError: an argument of another type, such as a model.
    """
    call = "reconstruction_figure(scan, reconstruction, colours)"
    scan = argument_volume(scan, f"{call}: scan must be the prepared scan")
    if reconstruction is not None and not isinstance(reconstruction, Reconstruction):
        raise TypeError(
            f"{call}: reconstruction must be what reconstruct_scan(model, scan) gives; got "
            f"{type(reconstruction).__name__}"
        )
    grey = _greys_of(scan)
    columns = [_Column("scan", [grey(scan)])]
    if reconstruction is not None:
        columns.append(_Column("visible patches", [grey(reconstruction.visible)]))
        if reconstruction.gaussians is None:
            columns.append(_Column("reconstruction", [grey(reconstruction.filled)]))
        else:
            columns.append(_Column("rendered Gaussians", [grey(reconstruction.predicted)]))
            columns.append(_Column("Gaussian centres", [grey(scan), _Dots(reconstruction.gaussians)]))
    if colours is not None:
        colours = argument_volume(colours, f"{call}: colours must be what feature_colours(features, scan) gives")
        columns.append(_Column("patch features, PCA as RGB", [grey(colours)]))
    return _figure(scan, columns, _middle(scan), title)


def fit_figure(scan: ScanLike, rendered: ScanLike, gaussians: Centres, *, title: str = "") -> Figure:
    """A figure with a row per plane: the scan, Gaussians fitted to it, their centres, and four times the error.

    Args:
        scan: (1, D, H, W), preprocessed, as it was fitted; or what :func:`~medgmae.data.as_volume` takes.
        rendered: the Gaussians on its grid.
        gaussians: (1, K, ...) in LPS mm; centres within one and a half voxels of a plane are shown on the scan,
            brighter where the density is larger in size.
        title: line above the pictures.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
        TypeError: an argument of another type, such as a model.
        ValueError: a rendering of another shape than the scan's.
    """
    call = "fit_figure(scan, rendered, gaussians)"
    scan = argument_volume(scan, f"{call}: scan must be the scan that was fitted")
    rendered = argument_volume(rendered, f"{call}: rendered must be the Gaussians rendered on the scan's grid")
    if not (hasattr(gaussians, "means") and hasattr(gaussians, "densities")):
        raise TypeError(f"{call}: gaussians must be Gaussians in LPS mm; got {type(gaussians).__name__}")
    if rendered.shape != scan.shape:
        raise ValueError(f"{call}: rendered has shape {rendered.shape}; expected the scan's, {scan.shape}")
    error = scan.with_data(scan.data.min() + 4 * (rendered.data - scan.data).abs())
    grey = _greys_of(scan)
    columns = [
        _Column("scan", [grey(scan)]),
        _Column("rendered Gaussians", [grey(rendered)]),
        _Column("Gaussian centres", [grey(scan), _Dots(gaussians, near=1.5)]),
        _Column("4 x absolute error", [grey(error)]),
    ]
    return _figure(scan, columns, _middle(scan), title)


def latent_map_figure(
    scan: ScanLike, latent: ScanLike, *, at: Sequence[float] | None = None, title: str = ""
) -> Figure:
    """A figure with a row per plane: the scan, and on top of it a latent map in colours, with their scale.

    Where the map is 0, as in hidden patches, nothing is drawn. The colours span percentiles 1 to 99 of all else.

    Args:
        scan: (C, D, H, W), preprocessed, or what :func:`~medgmae.data.as_volume` takes; the first channel is shown.
        latent: (1, D, H, W) on the same grid, of :func:`latent_to_spatial`.
        at: LPS position (x, y, z) in mm of the point where the planes meet. None: where the map is largest, among the
            voxels that lie above a tenth of the scan's range: air is often what a model finds most striking.
        title: line above the pictures.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
        TypeError: an argument of another type, such as a model.
        ValueError: a map of several channels or on another grid, or a point outside the scan.
    """
    call = "latent_map_figure(scan, latent)"
    scan = argument_volume(scan, f"{call}: scan must be the prepared scan")
    latent = argument_volume(latent, f"{call}: latent must be what latent_to_spatial(model, scan) gives")
    if latent.channels != 1 or not same_place(latent.grid, scan.grid):
        raise ValueError(
            f"the map is {latent}, the scan {scan}; expected one channel on the scan's grid (resample_like)"
        )
    point = _maximum(reorient(latent, "RAS"), reorient(scan, "RAS")) if at is None else _voxel(scan, at)
    shown = latent.data[latent.data != 0].numpy()
    low, high = np.percentile(shown, [1, 99]) if len(shown) else (0.0, 1.0)
    overlay = _Overlay(reorient(latent, "RAS"), float(low), float(high))
    grey = _greys_of(scan)
    columns = [_Column("scan", [grey(scan), _Cross()]), _Column("latent map", [grey(scan), overlay])]
    figure = _figure(scan, columns, point, title, width=7.6)
    figure.set_layout_engine("constrained", w_pad=0.1)  # beside a colour bar it cuts off labels otherwise
    covered = figure.axes[1::2]
    figure.colorbar(covered[0].images[-1], ax=covered, extend="both", shrink=0.6, panchor=False)
    return figure


def _maximum(latent: Volume, scan: Volume) -> tuple[int, int, int]:
    """The voxel (d, h, w) of the largest value in the body, in the middle of all that have it: a patch has many."""
    body = _body(scan)
    values = latent.data[0].masked_fill(~body, -math.inf) if body.any() else latent.data[0]
    places = torch.nonzero(values == values.max())
    d, h, w = places[(places - places.float().mean(0)).square().sum(1).argmin()].tolist()
    return d, h, w


def _voxel(scan: Volume, at: Sequence[float]) -> tuple[int, int, int]:
    """The voxel (d, h, w) of the scan in RAS that holds a point (x, y, z) in LPS mm."""
    grid = scan.grid.reoriented("RAS")
    d, h, w = (int(i) for i in np.floor(grid.index(at) + 0.5))
    if not all(0 <= i < n for i, n in zip((d, h, w), grid.size, strict=True)):
        first, last = (tuple(grid.world(i).round(1).tolist()) for i in ((0, 0, 0), np.array(grid.size) - 1))
        raise ValueError(
            f"the point {tuple(at)} lies outside the scan, whose corners are at {first} and {last} mm (LPS)"
        )
    return d, h, w


class Centres(Protocol):
    """What a picture shows of :class:`~medgmae.Gaussians`, (1, K, ...) in LPS mm."""

    @property
    def means(self) -> Tensor:
        """(1, K, 3)."""

    @property
    def densities(self) -> Tensor:
        """(1, K)."""


@dataclass(frozen=True)
class _Plane:
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


class _Layer(Protocol):
    """Something that is drawn on the three slices of a column."""

    def draw(self, axes: Axes, plane: _Plane) -> None:
        """On the picture of one slice."""


class _Column(NamedTuple):
    """A column of a figure: its heading, and what is drawn in it, the lowest layer first."""

    heading: str
    layers: Sequence[_Layer]


@dataclass(frozen=True)
class _Image:
    """A volume in RAS, from black at ``low`` to white at ``high``; three channels are colours."""

    volume: Volume
    low: float
    high: float

    def draw(self, axes: Axes, plane: _Plane) -> None:
        from matplotlib import colormaps

        grey = colormaps["gray"].with_extremes(bad=HIDDEN_COLOUR)
        width, height = plane.millimetres
        pixels = plane.pixels(self.volume)
        axes.imshow(pixels, cmap=grey, vmin=self.low, vmax=self.high, origin="lower", extent=(0, width, 0, height))


@dataclass(frozen=True)
class _Overlay:
    """A map in RAS as colours over what is below, from ``low`` to ``high``; nothing where it is 0."""

    volume: Volume
    low: float
    high: float

    def draw(self, axes: Axes, plane: _Plane) -> None:
        width, height = plane.millimetres
        axes.imshow(
            np.ma.masked_equal(plane.pixels(self.volume), 0), cmap="viridis", vmin=self.low, vmax=self.high,
            alpha=0.55, origin="lower", extent=(0, width, 0, height), interpolation="nearest",
        )  # fmt: skip


class _Cross:
    """Lines where the other two planes cut a slice."""

    def draw(self, axes: Axes, plane: _Plane) -> None:
        x, y = plane.place(np.array(plane.at, dtype=np.float64))
        axes.axvline(float(x), color="yellow", lw=0.5)
        axes.axhline(float(y), color="yellow", lw=0.5)


@dataclass(frozen=True)
class _Dots:
    """Points at the centres of Gaussians (1, K, ...) in LPS mm, up to ``near`` voxels from the slice."""

    gaussians: Centres
    near: float = math.inf

    def draw(self, axes: Axes, plane: _Plane) -> None:
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


def _greys_of(scan: Volume) -> Callable[[Volume], _Image]:
    """Makes images of volumes on the grid of a scan, in the scan's range of greys."""
    low, high = float(scan.data[0].min()), float(np.percentile(scan.data[0].numpy(), 99.9))
    return lambda volume: _Image(reorient(volume, "RAS"), low, high)


def _figure(
    scan: Volume, columns: Sequence[_Column], at: tuple[int, int, int], title: str, width: float | None = None
) -> Figure:
    """A row per plane through voxel ``at`` (d, h, w) of the scan in RAS; ``width`` in inches."""
    grid = scan.grid.reoriented("RAS")
    planes = [_Plane(grid, axis, at) for _, axis, _ in PLANES]
    widest = max(plane.millimetres[0] for plane in planes)
    heights = [plane.millimetres[1] / widest for plane in planes]
    figure = _new_figure((3 * len(columns) + 0.5 if width is None else width, 3 * sum(heights) + 0.9))
    rows = figure.subplots(3, len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, plane, (name, _, sides) in zip(rows, planes, PLANES, strict=True):
        for axes, column in zip(row, columns, strict=True):
            for layer in column.layers:
                layer.draw(axes, plane)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(name, fontsize=11)
        _name_sides(row[0], sides)
    for axes, column in zip(rows[0], columns, strict=True):
        axes.set_title(column.heading, fontsize=11)
    figure.suptitle(title, fontsize=12)
    return figure


def _middle(scan: Volume) -> tuple[int, int, int]:
    """Voxel (d, h, w) in RAS in the middle of what lies above a tenth of the range; of the volume if nothing does.

    Of n voxels along an axis, voxel n // 2 is the middle one, as ``crop_or_pad`` has it.
    """
    body = _body(reorient(scan, "RAS"))
    places = torch.nonzero(body if body.any() else ~body)
    first, count = places.amin(0), places.amax(0) - places.amin(0) + 1
    d, h, w = (first + count // 2).tolist()
    return d, h, w


def _body(scan: Volume) -> Tensor:
    """(D, H, W) bool: what lies above a tenth of the range of the first channel."""
    data = scan.data[0]
    return data > data.min() + 0.1 * (data.max() - data.min())


def _name_sides(axes: Axes, sides: str) -> None:
    """The side of the body at each edge of a picture: left, right, top, bottom."""
    for letter, (x, y) in zip(sides, ((0.03, 0.5), (0.97, 0.5), (0.5, 0.96), (0.5, 0.04)), strict=True):
        text = axes.text(x, y, letter, transform=axes.transAxes, ha="center", va="center", fontsize=8, color="white")
        text.set_bbox({"facecolor": "black", "alpha": 0.5, "pad": 1, "linewidth": 0})


def _new_figure(inches: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib, which is not installed: pip install medgmae[viz]") from error
    return Figure(figsize=inches, layout="constrained", facecolor="white", dpi=110)
