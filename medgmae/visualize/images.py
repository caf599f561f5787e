"""Pictures of single planes, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from medgmae.visualize.planes import HIDDEN_COLOUR, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def images_figure(images: Mapping[str, torch.Tensor], *, title: str = "") -> Figure:
    """Planes side by side in greys, all on the scale of the first; NaN is shown as hidden.

    Args:
        images: by title, (h, w) each, the first row at the top.
        title: line above the pictures.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
        ValueError: no image, or one that is not (h, w).
    """
    if not images or any(image.ndim != 2 for image in images.values()):
        shapes = [tuple(image.shape) for image in images.values()]
        raise ValueError(f"images_figure needs images (h, w) by title, got {shapes or 'none'}")
    figure = new_figure((3 * len(images) + 0.2, 3.6))
    first = next(iter(images.values()))
    low, high = float(first.min()), float(first.max())
    for number, (name, image) in enumerate(images.items(), 1):
        axes = figure.add_subplot(1, len(images), number, facecolor=HIDDEN_COLOUR)
        axes.imshow(image.numpy(), cmap="gray", vmin=low, vmax=high)  # what is NaN stays transparent
        axes.set_title(name, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(title)
    return figure
