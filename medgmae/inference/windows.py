"""Windows over a whole scan, on its patch grid: where they lie, what is cut out, how they are averaged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.data import Volume
from medgmae.layers.patches import Shape

# What a tent keeps at its rim, so that a place at the rim of a scan, under one window alone, counts fully.
_RIM = 1e-6


def extend_rim(scan: Volume, start: Sequence[int], size: Sequence[int]) -> Volume:
    """``size`` voxels from voxel ``start`` on, float32; beyond the scan its rim, as black would look like air."""
    data = scan.data.float()
    for axis, (first, count, n) in enumerate(zip(start, size, scan.size, strict=True)):
        data = data.index_select(axis + 1, torch.arange(first, first + count).clamp(0, n - 1))
    return Volume(data, scan.grid.part(start, size), scan.source)


class _Cover(NamedTuple):
    """Windows over a padded scan, on its patch grid. Every tuple has one entry per axis (d, h, w).

    patch: voxels of a patch. window: voxels of a window. starts: first voxels of the windows along the axis.
    """

    patch: tuple[int, ...]
    window: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]

    def windows(self) -> list[tuple[int, ...]]:
        """First voxel of every window."""
        return list(itertools.product(*self.starts))

    def voxels(self, start: Sequence[int]) -> tuple[slice, ...]:
        """The voxels of a window."""
        return tuple(slice(s, s + w) for s, w in zip(start, self.window, strict=True))

    def patches(self, start: Sequence[int]) -> tuple[slice, ...]:
        """The patches of a window."""
        triples = zip(start, self.window, self.patch, strict=True)
        return tuple(slice(s // p, (s + w) // p) for s, w, p in triples)

    def shares(self, start: Sequence[int], means: Tensor) -> Tensor:
        """What Gaussians (..., 3) of the window at ``start`` count, (...), 0 to 1.

        Each window weighs a place by a tent over it, highest in its middle; a share is the weight of the own window
        over the sum of all. So the shares of all windows at one place sum to 1.
        """
        share = torch.ones_like(means[..., 0])
        for k, (own, others) in enumerate(zip(start, self.starts, strict=True)):
            length = max(self.window[k] - 1, 1)
            place = means[..., k].clamp(0, 1)
            tents = []
            for other in (own, *others):
                t = place + (own - other) / length
                tents.append(torch.where((t >= 0) & (t <= 1), torch.minimum(t, 1 - t) + _RIM, 0.0))
            share = share * tents[0] / sum(tents[1:])
        return share


def _covered(size: Sequence[int], patch: Sequence[int], window: Sequence[int], overlap: float) -> _Cover:
    """As few windows as the overlap allows over ``size`` voxels, spread evenly."""
    starts = []
    for n, w, p in zip(size, window, patch, strict=True):
        room, step = (n - w) // p, max(1, round(w // p * (1 - overlap)))
        count = math.ceil(room / step)
        starts.append(tuple(round(i * room / max(count, 1)) * p for i in range(count + 1)))
    return _Cover(tuple(patch), tuple(window), tuple(starts))


Blend = Literal["gaussian", "uniform"]


# Spread of the Gaussian in units of the window: a token at the rim weighs exp(-8), a 3000th of one in the middle.
SIGMA = 0.125


@dataclass(frozen=True)
class _Layout:
    """Where the windows lie on the patch grid of a padded scan; every tuple has one entry per axis.

    size: voxels of the scan. patch: voxels of a patch. window: patches of a window. grid: patches of the padded scan.
    starts: first patch of each window along the axis.
    """

    size: Shape
    patch: Shape
    window: Shape
    grid: Shape
    starts: tuple[tuple[int, ...], ...]

    @property
    def before(self) -> Shape:
        """Voxels of padding in front of the scan; as many behind it, or one more."""
        return tuple((g * p - s) // 2 for g, p, s in zip(self.grid, self.patch, self.size, strict=True))

    @property
    def inside(self) -> tuple[slice, ...]:
        """The patches that hold at least one voxel of the scan."""
        triples = zip(self.before, self.size, self.patch, strict=True)
        return tuple(slice(b // p, -((b + s) // -p)) for b, s, p in triples)

    def windows(self) -> list[Shape]:
        """First patch of every window."""
        return list(itertools.product(*self.starts))

    def patches(self, start: Shape) -> tuple[slice, ...]:
        """The patches of the window at ``start``."""
        return tuple(slice(i, i + w) for i, w in zip(start, self.window, strict=True))


def _lay_out(size: Shape, patch: Shape, window: Shape | None, overlap: float) -> _Layout:
    """Cover a scan with as few windows as the overlap allows, spread evenly."""
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
    needed = tuple(-(s // -p) for s, p in zip(size, patch, strict=True))
    tokens = needed if window is None else tuple(w // p for w, p in zip(window, patch, strict=True))
    grid = tuple(map(max, needed, tokens))
    starts = []
    for total, width in zip(grid, tokens, strict=True):
        stride = max(1, math.floor(width * (1 - overlap) + 1e-6))
        steps = math.ceil((total - width) / stride)
        starts.append(tuple(round(i * (total - width) / max(steps, 1)) for i in range(steps + 1)))
    return _Layout(size, patch, tokens, grid, tuple(starts))


def blend_weights(window: Shape, blend: Blend = "gaussian") -> Tensor:
    """Weights (d, h, w) of the tokens of one window, at most 1; averages divide by their sum over the windows.

    Raises:
        ValueError: another blend.
    """
    if blend == "uniform":
        return torch.ones(window)
    if blend != "gaussian":
        raise ValueError(f"blend must be 'gaussian' or 'uniform', got {blend!r}")
    weight = torch.ones(())
    for width in window:
        position = (torch.arange(width) - (width - 1) / 2) / width
        weight = weight.unsqueeze(-1) * torch.exp(-0.5 * (position / SIGMA) ** 2)
    return weight


def _cut(data: Tensor, layout: _Layout, start: Shape, outside: float) -> Tensor:
    """The voxels (C, *window) of the window at ``start``; ``outside`` where it reaches over the scan."""
    inner, padding = [], []
    for axis, token in enumerate(start):
        patch = layout.patch[axis]
        low = token * patch - layout.before[axis]
        high = low + layout.window[axis] * patch
        size = layout.size[axis]
        inner.append(slice(max(low, 0), min(high, size)))
        padding.append((max(-low, 0), max(high - size, 0)))
    piece = data[(slice(None), *inner)].float()
    if any(map(any, padding)):
        piece = F.pad(piece, [n for pair in reversed(padding) for n in pair], value=outside)
    return piece


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every part gets its own mode back, frozen norms too."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
