"""Pictures of CT reconstructions: side by side in three planes, and how they came nearer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from medgmae.data import Volume, reorient
from medgmae.visualize.planes import Column, Image, middle, new_figure, planes_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Step(Protocol):
    """A look at a reconstruction under way."""

    step: int
    seconds: float
    psnr: float | None


def ct_figure(
    volumes: Mapping[str, Volume],
    truth: Volume | None = None,
    *,
    window: tuple[float, float] = (-1000.0, 1000.0),
    title: str = "",
) -> Figure:
    """A row per plane: the truth where there is one, every reconstruction, and how the last one differs from it.

    Args:
        volumes: heading to volume in Hounsfield units, all on one grid.
        truth: on the same grid.
        window: Hounsfield units shown black and white; differences have a quarter of it to either side of grey.
        title: line above the pictures.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
        ValueError: no volume.
    """
    if not volumes:
        raise ValueError("ct_figure needs at least one volume")
    shown = {"truth": truth, **volumes} if truth is not None else dict(volumes)
    columns = [Column(name, [Image(reorient(volume, "RAS"), *window)]) for name, volume in shown.items()]
    last = list(volumes.values())[-1]
    if truth is not None:
        reach = (window[1] - window[0]) / 4
        difference = Image(reorient(last.with_data(last.data - truth.data), "RAS"), -reach, reach)
        columns.append(Column(f"difference, ±{reach:g} HU", [difference]))
    first = truth if truth is not None else last
    return planes_figure(first, columns, middle(first), title)


def descent_figure(curves: Mapping[str, Sequence[Step]], levels: Mapping[str, float] | None = None) -> Figure:
    """PSNR over seconds and over steps.

    Args:
        curves: name to the looks at a reconstruction, see :class:`~medgmae.tomography.Reconstruction`; those without a
            PSNR are left out.
        levels: name to a PSNR that is drawn as a line across, such as that of filtered back-projection.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
        ValueError: no curve has a PSNR.
    """
    known = {name: [look for look in curve if look.psnr is not None] for name, curve in curves.items()}
    if not any(known.values()):
        raise ValueError("no curve has a PSNR; pass truth= to reconstruct_ct")
    figure = new_figure((9.0, 3.6))
    left, right = figure.subplots(1, 2, sharey=True)
    axes: Any
    for axes, what in ((left, "seconds"), (right, "step")):
        for name, looks in known.items():
            axes.plot([getattr(look, what) for look in looks], [look.psnr for look in looks], label=name)
        for name, value in (levels or {}).items():
            axes.axhline(value, linestyle=":", color="grey")
            axes.annotate(name, (0.99, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        axes.set_xlabel(what)
    left.set_ylabel("PSNR, dB")
    right.legend(fontsize=8)
    return figure
