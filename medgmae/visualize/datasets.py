"""Pictures of data sets: how the sizes, spacings and intensities of their volumes are spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from medgmae.data import CheckReport
from medgmae.visualize.planes import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AXES = ("d", "h", "w")
_SHOWN = {"0.5th percentile": "p0.5", "median": "p50", "99.5th percentile": "p99.5"}


def check_figure(report: CheckReport, *, title: str = "") -> Figure:
    """A figure with three histograms of the volumes of a data set: sizes and spacings along each axis of the array, and
    the intensities at three percentiles of each volume.

    Args:
        report: of :func:`~medgmae.data.check_scans`. Where it read headers only, there are no intensities.
        title: line above the pictures; by default how many volumes there are.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
        TypeError: an argument of another type, such as a list of scans.
        ValueError: a report of no volumes.
    """
    call = "check_figure(report)"
    if not isinstance(report, CheckReport):
        raise TypeError(f"{call}: report must be what check_scans(listing) gives; got {type(report).__name__}")
    if not report.volumes:
        raise ValueError(f"{call}: the report is of no volumes; expected at least one that could be read")
    figure = new_figure((11.0, 3.4))
    sizes, spacings, intensities = figure.subplots(1, 3)
    volumes = report.volumes
    _histogram(sizes, "voxels", {axis: [one.size[k] for one in volumes] for k, axis in enumerate(_AXES)})
    _histogram(spacings, "spacing, mm", {axis: [one.spacing[k] for one in volumes] for k, axis in enumerate(_AXES)})
    read = [one.intensities for one in volumes if one.intensities is not None]
    if read:
        _histogram(intensities, "intensity", {label: [one[name] for one in read] for label, name in _SHOWN.items()})
    else:
        intensities.set_axis_off()
        intensities.text(0.5, 0.5, "intensities were not read", ha="center", transform=intensities.transAxes)
    sizes.set_ylabel("volumes")
    figure.suptitle(title or f"{len(volumes)} volumes", fontsize=12)
    return figure


def _histogram(axes: Axes, name: str, values: Mapping[str, Sequence[float]]) -> None:
    """Bars side by side for several sets of values, in common bins."""
    from matplotlib.ticker import MaxNLocator

    axes.hist(list(values.values()), bins=20, label=list(values))
    axes.set_xlabel(name)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
