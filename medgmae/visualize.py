"""Pictures of scans in three planes: what a masked autoencoder saw and made of it, features as colours, latent maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgmae.data import Grid, Volume, reorient
from medgmae.data.contrasts import same_place
from medgmae.inference.latents import latent_to_spatial as latent_to_spatial
from medgmae.inference.reconstruction import Reconstruction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The planes through a volume in RAS, array (z, y, x): name, sliced axis, and the sides of the body at the left, right,
# top and bottom of the picture. The patient's right is on the left, as radiologists look at it.
PLANES = (("axial", 0, "RLAP"), ("coronal", 1, "RLSI"), ("sagittal", 2, "APSI"))
CENTRES = "Gaussian centres"
HIDDEN_COLOUR = "#5a6b8c"  # not a grey: a hidden patch must not look like tissue


def reconstruction_figure(
    scan: Volume, reconstruction: Reconstruction | None = None, colours: Volume | None = None, *, title: str = ""
) -> Figure:
    """A figure with a row per plane: the scan and, where given, its visible patches, their filling and the features.

    A reconstruction from Gaussians is shown as it was rendered, and their centres on top of the scan: all of them,
    whatever their distance from the plane, brighter where the density is larger in size.

    The planes go through the middle of what is not background. Write it with ``figure.savefig("scan.png")``.

    Args:
        scan: (C, D, H, W), preprocessed; the first channel is shown.
        reconstruction: of :func:`~medgmae.reconstruct_scan`.
        colours: (3, D, H, W) on the grid of the scan, of :func:`feature_colours`.
        title: line above the pictures.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
    """
    columns: list[tuple[str, Volume]] = [("scan", scan)]
    if reconstruction is not None:
        columns.append(("visible patches", reconstruction.visible))
        if reconstruction.gaussians is None:
            columns.append(("reconstruction", reconstruction.filled))
        else:
            columns += [("rendered Gaussians", reconstruction.predicted), (CENTRES, scan)]
    if colours is not None:
        columns.append(("patch features, PCA as RGB", colours))
    centres = None if reconstruction is None else reconstruction.gaussians
    return _figure(columns, title, centres)


def fit_figure(scan: Volume, rendered: Volume, gaussians: Centres, *, title: str = "") -> Figure:
    """A figure with a row per plane: the scan, Gaussians fitted to it, their centres, and four times the error.

    Args:
        scan: (1, D, H, W), preprocessed, as it was fitted.
        rendered: the Gaussians on its grid.
        gaussians: (1, K, ...) in LPS mm; centres within one and a half voxels of a plane are shown on the scan,
            brighter where the density is larger in size.
        title: line above the pictures.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
    """
    error = scan.with_data(scan.data.min() + 4 * (rendered.data - scan.data).abs())
    columns = [("scan", scan), ("rendered Gaussians", rendered), (CENTRES, scan), ("4 x absolute error", error)]
    return _figure(columns, title, gaussians, near=1.5)


def latent_map_figure(scan: Volume, latent: Volume, *, at: Sequence[float] | None = None, title: str = "") -> Figure:
    """A figure with a row per plane: the scan, and on top of it a latent map in colours, with their scale.

    Where the map is 0, as in hidden patches, nothing is drawn. The colours span percentiles 1 to 99 of all else.

    Args:
        scan: (C, D, H, W), preprocessed; the first channel is shown.
        latent: (1, D, H, W) on the same grid, of :func:`latent_to_spatial`.
        at: LPS position (x, y, z) in mm of the point where the planes meet. None: where the map is largest, among the
            voxels that lie above a tenth of the scan's range: air is often what a model finds most striking.
        title: line above the pictures.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
        ValueError: a map of several channels or on another grid, or a point outside the scan.
    """
    if latent.channels != 1 or not same_place(latent.grid, scan.grid):
        raise ValueError(
            f"the map is {latent}, the scan {scan}; expected one channel on the scan's grid (resample_like)"
        )
    scan, latent = reorient(scan, "RAS"), reorient(latent, "RAS")
    point = _maximum(latent, scan) if at is None else _voxel(scan.grid, at)
    planes = [(_plane(scan, axis, point), _plane(latent, axis, point)) for _, axis, _ in PLANES]
    widest = max(picture.millimetres[0] for picture, _ in planes)
    heights = [picture.millimetres[1] / widest for picture, _ in planes]
    figure = _new_figure((7.6, 3 * sum(heights) + 0.9))
    figure.set_layout_engine("constrained", w_pad=0.1)  # beside a colour bar it cuts off labels otherwise
    grid = figure.subplots(3, 2, squeeze=False, gridspec_kw={"height_ratios": heights})
    grey = float(scan.data[0].min()), float(np.percentile(scan.data[0].numpy(), 99.9))
    drawn = latent.data[latent.data != 0].numpy()
    low, high = np.percentile(drawn, [1, 99]) if len(drawn) else (0.0, 1.0)
    for (plain, covered), (picture, values), (name, axis, sides) in zip(grid, planes, PLANES, strict=True):
        for axes in (plain, covered):
            _show(axes, picture, *grey)
        width, height = picture.millimetres
        colours = covered.imshow(
            np.ma.masked_equal(values.pixels, 0), cmap="viridis", vmin=low, vmax=high, alpha=0.55, origin="lower",
            extent=(0, width, 0, height), interpolation="nearest",
        )  # fmt: skip
        _cross(plain, scan.grid, axis, point)
        plain.set_ylabel(name, fontsize=11)
        _name_sides(plain, sides)
    grid[0, 0].set_title("scan", fontsize=11)
    grid[0, 1].set_title("latent map", fontsize=11)
    figure.colorbar(colours, ax=grid[:, 1], extend="both", shrink=0.6, panchor=False)
    figure.suptitle(title, fontsize=12)
    return figure


def _maximum(latent: Volume, scan: Volume) -> tuple[int, int, int]:
    """The voxel (d, h, w) of the largest value in the body, in the middle of all that have it: a patch has many."""
    body = _body(scan)
    values = latent.data[0].masked_fill(~body, -math.inf) if body.any() else latent.data[0]
    places = torch.nonzero(values == values.max())
    d, h, w = places[(places - places.float().mean(0)).square().sum(1).argmin()].tolist()
    return d, h, w


def _voxel(grid: Grid, at: Sequence[float]) -> tuple[int, int, int]:
    """The voxel (d, h, w) that holds a point (x, y, z) in LPS mm."""
    d, h, w = (int(i) for i in np.floor(grid.index(at) + 0.5))
    if not all(0 <= i < n for i, n in zip((d, h, w), grid.size, strict=True)):
        first, last = (tuple(grid.world(i).round(1).tolist()) for i in ((0, 0, 0), np.array(grid.size) - 1))
        raise ValueError(
            f"the point {tuple(at)} lies outside the scan, whose corners are at {first} and {last} mm (LPS)"
        )
    return d, h, w


def _cross(axes: Axes, grid: Grid, axis: int, point: tuple[int, int, int]) -> None:
    """Lines where the other two planes cut this slice across ``axis`` of a scan in RAS."""
    up, across = (k for k in range(3) if k != axis)
    axes.axvline((grid.size[across] - 0.5 - point[across]) * grid.spacing[across], color="yellow", lw=0.5)
    axes.axhline((point[up] + 0.5) * grid.spacing[up], color="yellow", lw=0.5)


def _figure(
    columns: list[tuple[str, Volume]], title: str, centres: Centres | None = None, near: float = math.inf
) -> Figure:
    """Volumes side by side, the scan first; on the column ``CENTRES`` those within ``near`` voxels of the plane."""
    scan, at = columns[0][1], _middle(columns[0][1])
    planes = [[_plane(reorient(volume, "RAS"), axis, at) for _, volume in columns] for _, axis, _ in PLANES]
    widest = max(row[0].millimetres[0] for row in planes)
    heights = [row[0].millimetres[1] / widest for row in planes]
    figure = _new_figure((3 * len(columns) + 0.5, 3 * sum(heights) + 0.9))
    grid = figure.subplots(3, len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    low, brightest = float(scan.data[0].min()), float(np.percentile(scan.data[0].numpy(), 99.9))
    for row, pictures, (name, axis, sides) in zip(grid, planes, PLANES, strict=True):
        for axes, picture, (heading, _) in zip(row, pictures, columns, strict=True):
            _show(axes, picture, low, brightest)
            if heading == CENTRES and centres is not None:
                _mark_centres(axes, picture, reorient(scan, "RAS").grid, axis, centres, (at[axis], near))
        row[0].set_ylabel(name, fontsize=11)
        _name_sides(row[0], sides)
    for axes, (name, _) in zip(grid[0], columns, strict=True):
        axes.set_title(name, fontsize=11)
    figure.suptitle(title, fontsize=12)
    return figure


class Centres(Protocol):
    """What a picture shows of :class:`~medgmae.Gaussians`, (1, K, ...) in LPS mm."""

    @property
    def means(self) -> Tensor:
        """(1, K, 3)."""

    @property
    def densities(self) -> Tensor:
        """(1, K)."""


class _Picture(NamedTuple):
    """pixels: (rows, columns) or (rows, columns, 3), the first row at the bottom; millimetres: width and height."""

    pixels: NDArray[Any]
    millimetres: tuple[float, float]


def _middle(scan: Volume) -> tuple[int, int, int]:
    """Voxel (d, h, w) in RAS in the middle of what lies above a tenth of the range; of the volume if nothing does."""
    body = _body(reorient(scan, "RAS"))
    places = torch.nonzero(body)
    low, high = (places.amin(0), places.amax(0)) if len(places) else (torch.zeros(3), torch.tensor(body.shape) - 1)
    d, h, w = ((low + high) // 2).int().tolist()
    return d, h, w


def _body(scan: Volume) -> Tensor:
    """(D, H, W) bool: what lies above a tenth of the range of the first channel."""
    data = scan.data[0]
    return data > data.min() + 0.1 * (data.max() - data.min())


def _plane(volume: Volume, axis: int, at: tuple[int, int, int]) -> _Picture:
    """One slice of a volume (C, D, H, W) in RAS, mirrored so that right, or the front, is on the left."""
    shown = volume.data if volume.data.shape[0] == 3 else volume.data[:1]
    pixels = shown.select(axis + 1, at[axis]).flip(2).movedim(0, 2).squeeze(2).numpy()
    up, across = (mm for k, mm in enumerate(volume.spacing) if k != axis)
    return _Picture(pixels, (pixels.shape[1] * across, pixels.shape[0] * up))


def _show(axes: Axes, picture: _Picture, low: float, high: float) -> None:
    from matplotlib import colormaps

    grey = colormaps["gray"].with_extremes(bad=HIDDEN_COLOUR)
    width, height = picture.millimetres
    axes.imshow(picture.pixels, cmap=grey, vmin=low, vmax=high, origin="lower", extent=(0, width, 0, height))
    axes.set_xticks([])
    axes.set_yticks([])


def _mark_centres(
    axes: Axes, picture: _Picture, grid: Grid, axis: int, gaussians: Centres, slab: tuple[float, float]
) -> None:
    """Points at the centres of Gaussians (1, K, ...) in LPS mm, on a slice across ``axis`` of a scan in RAS.

    ``slab``: the slice, and how many voxels from it a centre may be.
    """
    index = grid.index(gaussians.means[0].numpy())
    shown = np.abs(index[:, axis] - slab[0]) <= slab[1]
    index = index[shown]
    up, across = (k for k in range(3) if k != axis)
    x = (grid.size[across] - 0.5 - index[:, across]) * grid.spacing[across]  # mirrored, as the slice is
    y = (index[:, up] + 0.5) * grid.spacing[up]
    strength = np.abs(gaussians.densities[0].numpy())[shown]
    order = np.argsort(strength)  # strong ones on top
    side = 1.5 if math.isinf(slab[1]) else 5.0  # of the few near a plane each can be seen
    brightest = float(np.percentile(strength, 95)) if len(strength) else 1.0  # few are many times as strong as the rest
    axes.scatter(x[order], y[order], s=side, c=strength[order], cmap="plasma", vmin=0, vmax=brightest, linewidths=0)
    width, height = picture.millimetres
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)


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
