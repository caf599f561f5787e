"""Encoders side by side: what each makes of some scans, as colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from medgmae.data.volume import ScanLike
from medgmae.inference.inputs import argument_volume
from medgmae.visualize.planes import PLANES, Plane, greys_of, middle, name_sides, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = [plane for plane in PLANES if plane[0] != "sagittal"]  # half of a body looks like the other


def gallery_figure(scans: Mapping[str, ScanLike], colours: Mapping[str, Sequence[ScanLike]]) -> Figure:
    """A figure with two rows per scan, axial and coronal: the scan, then the features of every encoder as colours.

    The planes go through the middle of what is not background. Colours are principal components, of each encoder and
    scan by themselves: equal colours in two pictures mean nothing, borders between colours do.

    Args:
        scans: by name, (C, D, H, W), prepared; the first channel is shown.
        colours: by the name of the encoder, one per scan in their order and on their grids, of
            :func:`~medgmae.feature_colours`.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
        TypeError: an argument of another type, such as a model.
        ValueError: no scan, or an encoder that has not as many colours as there are scans.
    """
    call = "gallery_figure(scans, colours)"
    if not scans:
        raise ValueError(f"{call}: there is no scan; expected at least one")
    for name, made in colours.items():
        if len(made) != len(scans):
            raise ValueError(f"{call}: {name} has colours of {len(made)} scans; expected {len(scans)}, one per scan")
    rows = []
    for number, (name, scan) in enumerate(scans.items()):
        volume = argument_volume(scan, f"{call}: {name} must be a prepared scan")
        pictures = [volume]
        for encoder, made in colours.items():
            pictures.append(argument_volume(made[number], f"{call}: {encoder} must be what feature_colours gives"))
        rows += [(name, volume, pictures, plane) for plane in SHOWN]
    planes = [Plane(volume.grid.reoriented("RAS"), axis, middle(volume)) for _, volume, _, (_, axis, _) in rows]
    heights = [plane.millimetres[1] / plane.millimetres[0] for plane in planes]
    figure = new_figure((2.6 * (1 + len(colours)) + 0.4, 2.6 * sum(heights) + 0.5))
    grid = figure.subplots(len(rows), 1 + len(colours), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, plane, (name, volume, pictures, (title, _, sides)) in zip(grid, planes, rows, strict=True):
        grey = greys_of(volume)
        for axes, picture in zip(row, pictures, strict=True):
            grey(picture).draw(axes, plane)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(f"{name}, {title}", fontsize=9)
        name_sides(row[0], sides)
    for axes, heading in zip(grid[0], ["scan", *colours], strict=True):
        axes.set_title(heading, fontsize=9)
    return figure
