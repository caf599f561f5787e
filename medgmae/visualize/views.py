"""Pictures of the views that a pre-training takes of a scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from medgmae.data import View, Volume
from medgmae.visualize.planes import Column, Plane, greys_of, middle, planes_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Boxes:
    """The outlines of views, one colour each: whole lines where the slice cuts the view, faint ones where it does not;
    dashed ones are local."""

    views: Sequence[View]

    def draw(self, axes: Axes, plane: Plane) -> None:
        """On the picture of one slice."""
        from matplotlib.patches import Rectangle

        for number, view in enumerate(self.views):
            ends = np.array([[-0.5] * 3, [n - 0.5 for n in view.grid.size]])
            low, high = np.sort(plane.grid.index(view.grid.world(ends)), axis=0)
            cut = low[plane.axis] <= plane.at[plane.axis] <= high[plane.axis]
            x, y = plane.place(np.stack([low, high]))
            style, alpha = ("--" if view.kind == "local" else "-"), (1.0 if cut else 0.3)
            corner, width, height = (float(x.min()), float(y.min())), float(np.ptp(x)), float(np.ptp(y))
            colour = f"C{number % 10}"
            axes.add_patch(Rectangle(corner, width, height, fill=False, ec=colour, ls=style, lw=1.2, alpha=alpha))


def views_figure(scan: Volume, views: Sequence[View], *, title: str = "") -> Figure:
    """A figure of a scan in three planes through its middle, with the outlines of views of it.

    Args:
        scan: a prepared volume, ``PreparedScan.volume()``.
        views: of :class:`~medgmae.data.ViewSampler`, of this volume.
        title: line above the pictures.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
    """
    grey = greys_of(scan)
    whole, parts = ([view for view in views if view.kind == kind] for kind in ("global", "local"))
    columns = [Column("global views", [grey(scan), Boxes(whole)]), Column("local views", [grey(scan), Boxes(parts)])]
    return planes_figure(scan, columns, middle(scan), title, width=7.6)
