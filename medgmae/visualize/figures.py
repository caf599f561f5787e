"""Pictures of scans in three planes: what a masked autoencoder saw and made of it, features as colours, latent maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from medgmae.data import Volume, reorient
from medgmae.data.contrasts import same_place
from medgmae.data.volume import ScanLike
from medgmae.inference.inputs import argument_volume
from medgmae.inference.reconstruction import Reconstruction
from medgmae.visualize.planes import (
    Centres,
    Column,
    Cross,
    Dots,
    Labels,
    Overlay,
    body,
    greys_of,
    middle,
    planes_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    grey = greys_of(scan)
    columns = [Column("scan", [grey(scan)])]
    if reconstruction is not None:
        columns.append(Column("visible patches", [grey(reconstruction.visible)]))
        if reconstruction.gaussians is None:
            columns.append(Column("reconstruction", [grey(reconstruction.filled)]))
        else:
            columns.append(Column("rendered Gaussians", [grey(reconstruction.predicted)]))
            columns.append(Column("Gaussian centres", [grey(scan), Dots(reconstruction.gaussians)]))
    if colours is not None:
        colours = argument_volume(colours, f"{call}: colours must be what feature_colours(features, scan) gives")
        columns.append(Column("patch features, PCA as RGB", [grey(colours)]))
    return planes_figure(scan, columns, middle(scan), title)


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
    grey = greys_of(scan)
    columns = [
        Column("scan", [grey(scan)]),
        Column("rendered Gaussians", [grey(rendered)]),
        Column("Gaussian centres", [grey(scan), Dots(gaussians, near=1.5)]),
        Column("4 x absolute error", [grey(error)]),
    ]
    return planes_figure(scan, columns, middle(scan), title)


def latent_map_figure(
    scan: ScanLike, latent: ScanLike, *, at: Sequence[float] | None = None, title: str = "", name: str = "latent map"
) -> Figure:
    """A figure with a row per plane: the scan, and on top of it a latent or saliency map in colours, with their scale.

    Where the map is 0, as in hidden patches, nothing is drawn. The colours span percentiles 1 to 99 of all else.

    Args:
        scan: (C, D, H, W), preprocessed, or what :func:`~medgmae.data.as_volume` takes; the first channel is shown.
        latent: (1, D, H, W) on the same grid, of :func:`latent_to_spatial` or :func:`~medgmae.saliency_map`.
        at: LPS position (x, y, z) in mm of the point where the planes meet. None: where the map is largest, among the
            voxels that lie above a tenth of the scan's range: air is often what a model finds most striking.
        title: line above the pictures.
        name: of the map, above its column.

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
    overlay = Overlay(reorient(latent, "RAS"), float(low), float(high))
    grey = greys_of(scan)
    columns = [Column("scan", [grey(scan), Cross()]), Column(name, [grey(scan), overlay])]
    figure = planes_figure(scan, columns, point, title, width=7.6)
    figure.set_layout_engine("constrained", w_pad=0.1)  # beside a colour bar it cuts off labels otherwise
    covered = figure.axes[1::2]
    figure.colorbar(covered[0].images[-1], ax=covered, extend="both", shrink=0.6, panchor=False)
    return figure


def _maximum(latent: Volume, scan: Volume) -> tuple[int, int, int]:
    """The voxel (d, h, w) of the largest value in the body, in the middle of all that have it: a patch has many."""
    inside = body(scan)
    values = latent.data[0].masked_fill(~inside, -math.inf) if inside.any() else latent.data[0]
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


def segmentation_figure(
    scan: ScanLike, labels: ScanLike, *, names: Sequence[str] | None = None, title: str = ""
) -> Figure:
    """A figure with a row per plane: the scan, and on top of it the classes of a segmentation in colours, with a key.

    The planes go through the middle of all classes together; through the scan's where there is none.

    Args:
        scan: (C, D, H, W), or what :func:`~medgmae.data.as_volume` takes; the first channel is shown.
        labels: on the grid of the scan: (1, D, H, W) whole numbers, 0 for background; or masks (K, D, H, W) of 0 and 1,
            of which a later one is drawn over an earlier one.
        names: of the classes, for the key: of label maps with the background first, of masks one per channel.
        title: line above the pictures.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
        TypeError: an argument of another type, such as a model.
        ValueError: labels on another grid than the scan.
    """
    call = "segmentation_figure(scan, labels)"
    scan = argument_volume(scan, f"{call}: scan must be the scan that was segmented")
    labels = argument_volume(labels, f"{call}: labels must be the labels of segment_scan(model, scan, like=scan)")
    if not same_place(labels.grid, scan.grid):
        raise ValueError(
            f"the labels are {labels}, the scan {scan}; expected the same grid: segment_scan(..., like=scan), or "
            "medgmae.data.resample_like(labels, scan, interpolation='nearest')"
        )
    flat = reorient(_one_map(labels), "RAS")
    found = np.unique(np.asarray(flat)).tolist()
    offset = 0 if labels.channels == 1 else 1  # masks have no background among their names
    called = {k: names[k - offset] if names and 0 <= k - offset < len(names) else f"class {k}" for k in found if k}
    point = middle(flat.with_data((flat.data > 0).to(torch.uint8))) if called else middle(scan)
    layer = Labels(flat, called)
    grey = greys_of(scan)
    columns = [Column("scan", [grey(scan)]), Column("segmentation", [grey(scan), layer])]
    figure = planes_figure(scan, columns, point, title, width=8.6)
    layer.key(figure)
    return figure


def _one_map(labels: Volume) -> Volume:
    """Masks as one map of labels, 1 for the first."""
    if labels.channels == 1:
        return labels.with_data(labels.data.to(torch.int16))
    merged = torch.zeros_like(labels.data[:1], dtype=torch.int16)
    for k, mask in enumerate(labels.data, 1):
        merged[0][mask > 0] = k
    return labels.with_data(merged)
