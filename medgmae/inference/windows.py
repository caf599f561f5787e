"""Windows over a whole scan, on its patch grid: where they lie, what is cut out, how they are averaged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.data import Grid
from medgmae.layers.patches import Shape, Size

Blend = Literal["gaussian", "uniform"]
# "even": as few windows as the overlap allows, spread evenly. "strided": where MONAI's sliding_window_inference has
# them.
Placement = Literal["even", "strided"]
# What lies beyond a scan: an intensity, or "rim" for its outermost voxels repeated, where black would look like air.
Outside = float | Literal["rim"]
Slices = tuple[slice, ...]

# Spread of the Gaussian in units of the window: a token at the rim weighs exp(-8), a 3000th of one in the middle.
SIGMA = 0.125

# What a tent keeps at its rim, so that a place at the rim of a scan, under one window alone, counts fully.
_RIM = 1e-6


@dataclass(frozen=True)
class Layout:
    """Windows over a scan that is padded to whole patches and at least one window; every tuple is (d, h, w).

    The one layout of this library, made by :func:`lay_out`: every function that slides a window over a scan asks it.

    size: voxels of the scan.
    patch: voxels of a patch.
    window: patches of a window.
    grid: patches of the padded scan.
    starts: first patch of each window along the axis.
    before: voxels of padding in front of the scan.
    """

    size: Shape
    patch: Shape
    window: Shape
    grid: Shape
    starts: tuple[tuple[int, ...], ...]
    before: Shape

    @property
    def window_size(self) -> Shape:
        """Voxels of a window."""
        return tuple(w * p for w, p in zip(self.window, self.patch, strict=True))

    @property
    def padded_size(self) -> Shape:
        """Voxels of the padded scan."""
        return tuple(g * p for g, p in zip(self.grid, self.patch, strict=True))

    @property
    def scan(self) -> Slices:
        """The voxels of the padded scan that are the scan."""
        return tuple(slice(b, b + n) for b, n in zip(self.before, self.size, strict=True))

    @property
    def inside(self) -> Slices:
        """The patches that hold at least one voxel of the scan."""
        triples = zip(self.before, self.size, self.patch, strict=True)
        return tuple(slice(b // p, -((b + n) // -p)) for b, n, p in triples)

    def windows(self) -> list[Shape]:
        """First patch of every window."""
        return list(itertools.product(*self.starts))

    def patches(self, start: Shape) -> Slices:
        """The patches of the window at patch ``start``."""
        return tuple(slice(i, i + w) for i, w in zip(start, self.window, strict=True))

    def voxels(self, start: Shape) -> Slices:
        """The voxels of the padded scan in the window at patch ``start``."""
        triples = zip(start, self.window, self.patch, strict=True)
        return tuple(slice(i * p, (i + w) * p) for i, w, p in triples)

    def corner(self, start: Shape) -> Shape:
        """First voxel of the window at patch ``start``, counted from the scan's own first voxel: negative in front."""
        return tuple(i * p - b for i, p, b in zip(start, self.patch, self.before, strict=True))

    def shifted(self, part: Sequence[int], parts: int) -> Layout:
        """The windows moved by parts of a patch, for maps that are finer than the patches: with each patch cut into
        ``parts`` along every axis, the middle of each moved patch is that of its part ``part`` (d, h, w), or half a
        voxel behind it."""
        forward = [k * (p // parts) - (p - p // parts) // 2 for k, p in zip(part, self.patch, strict=True)]
        return replace(self, before=tuple(b - n for b, n in zip(self.before, forward, strict=True)))

    def patch_grid(self, scan: Grid, parts: int = 1) -> Grid:
        """The patches ``inside`` as a grid in the scan's world, each cut into ``parts`` along every axis, where the
        patches of the layouts :meth:`shifted` have their middles."""
        first = tuple(kept.start for kept in self.inside)
        corner = self.shifted((0,) * len(first), parts).corner(first)
        x, y, z = scan.world([c + (p - 1) / 2 for c, p in zip(corner, self.patch, strict=True)]).tolist()
        d, h, w = ((kept.stop - kept.start) * parts for kept in self.inside)
        spacing = [mm * p / parts for mm, p in zip(scan.spacing, self.patch, strict=True)]
        return Grid((d, h, w), (spacing[0], spacing[1], spacing[2]), (x, y, z), scan.direction)

    def shares(self, start: Shape, means: Tensor) -> Tensor:
        """How much Gaussians of the window at patch ``start`` count, (...), 0 to 1; their centres are ``means``
        (..., 3), in units of the window's axes.

        Each window weighs a place by a tent over it, highest in its middle; a share is the weight of the own window
        over the sum of all. So the shares of all windows at one place sum to 1.
        """
        share = torch.ones_like(means[..., 0])
        for k, (own, others) in enumerate(zip(start, self.starts, strict=True)):
            patch, length = self.patch[k], max(self.window_size[k] - 1, 1)
            place = means[..., k].clamp(0, 1)
            tents = []
            for other in (own, *others):
                t = place + (own - other) * patch / length
                tents.append(torch.where((t >= 0) & (t <= 1), torch.minimum(t, 1 - t) + _RIM, 0.0))
            share = share * tents[0] / sum(tents[1:])
        return share


def lay_out(size: Shape, patch: Shape, window: Size | None, overlap: float, placement: Placement = "even") -> Layout:
    """Cover a scan with as few windows as the overlap allows, spread evenly, all on one patch grid.

    The scan lies in the middle of the padded grid, where :func:`medgmae.data.crop_or_pad` puts it: its voxel
    ``n // 2`` is voxel ``m // 2`` of the padded one.

    Args:
        size: voxels of the scan.
        patch: voxels of a patch.
        window: voxels of a window, multiples of the patch; an int for every axis, None for one window over all.
        overlap: least share of a window in common with the next, 0 to below 1.
        placement: "strided" steps by ``int(window * (1 - overlap))`` patches, moves the last window back to the end,
            and puts ``missing // 2`` voxels in front of a scan that is smaller than a window: where MONAI's
            ``sliding_window_inference`` has windows, if a patch is a voxel.

    Raises:
        ValueError: a window, overlap or placement that is not possible.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
    if placement not in ("even", "strided"):
        raise ValueError(f"placement must be 'even' or 'strided', got {placement!r}")
    needed = tuple(-(n // -p) for n, p in zip(size, patch, strict=True))
    tokens = needed if window is None else _window_patches(window, patch)
    grid = tuple(map(max, needed, tokens))
    starts = []
    for total, width in zip(grid, tokens, strict=True):
        if placement == "strided":
            starts.append((*range(0, total - width, max(1, int(width * (1 - overlap)))), total - width))
            continue
        stride = max(1, math.floor(width * (1 - overlap) + 1e-6))
        steps = math.ceil((total - width) / stride)
        starts.append(tuple(round(i * (total - width) / max(steps, 1)) for i in range(steps + 1)))
    before = tuple(g * p // 2 - n // 2 for g, p, n in zip(grid, patch, size, strict=True))
    if placement == "strided":
        before = tuple((g * p - n) // 2 for g, p, n in zip(grid, patch, size, strict=True))
    return Layout(tuple(size), tuple(patch), tokens, grid, tuple(starts), before)


def _window_patches(window: Size, patch: Shape) -> Shape:
    """Patches (d, h, w) of a window of so many voxels."""
    size = (window,) * len(patch) if isinstance(window, int) else tuple(window)
    words = isinstance(window, str)
    if words or len(size) != len(patch) or any(s < 1 or s % p for s, p in zip(size, patch, strict=True)):
        raise ValueError(
            f"window must be 'model', None, or one size per axis in multiples of the patch {tuple(patch)}, got "
            f"{window!r}"
        )
    return tuple(int(s // p) for s, p in zip(size, patch, strict=True))


def cut(data: Tensor, first: Sequence[int], size: Sequence[int], outside: Outside) -> Tensor:
    """``size`` voxels (C, *size) from voxel ``first`` of a scan (C, D, H, W) on, float32, with at least one voxel of
    the scan among them; ``outside`` says what lies beyond the scan."""
    inner, padding = [], []
    for start, count, n in zip(first, size, data.shape[1:], strict=True):
        inner.append(slice(max(start, 0), min(start + count, n)))
        padding.append((max(-start, 0), max(start + count - n, 0)))
    piece = data[(slice(None), *inner)].float()
    if not any(map(any, padding)):
        return piece
    widths = [n for pair in reversed(padding) for n in pair]
    if outside == "rim":
        return F.pad(piece, widths, mode="replicate")
    return F.pad(piece, widths, value=outside)


def batches(
    data: Tensor, layout: Layout, outside: Outside, batch_size: int = 1
) -> Iterator[tuple[list[Shape], Tensor]]:
    """The windows of a scan (C, D, H, W), some at a time: their first patches, and their voxels (B, C, d, h, w)."""
    windows = layout.windows()
    for i in range(0, len(windows), batch_size):
        starts = windows[i : i + batch_size]
        yield starts, torch.stack([cut(data, layout.corner(s), layout.window_size, outside) for s in starts])


def blend_weights(window: Shape, blend: Blend = "gaussian") -> Tensor:
    """Weights (d, h, w) of the places of one window, at most 1; averages divide by their sum over the windows.

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


class WindowMean:
    """The weighted mean, place by place, of what overlapping windows say; float32 on the CPU.

    Args:
        grid: places (d, h, w) that the windows cover together.
        weight: (d, h, w), how much each place of a window counts.
    """

    def __init__(self, grid: Shape, weight: Tensor) -> None:
        self.weight, self.weights = weight, torch.zeros(grid)
        self.sums: Tensor | None = None

    def add(self, where: Slices, values: Tensor) -> None:
        """``values`` (E, d, h, w) of one window, which lies at ``where``."""
        if self.sums is None:
            self.sums = torch.zeros(len(values), *self.weights.shape)
        self.sums[(slice(None), *where)] += values * self.weight
        self.weights[where] += self.weight

    def result(self) -> Tensor:
        """(E, *grid), after the last window: the sums are divided in place.

        Raises:
            RuntimeError: no window was added.
        """
        if self.sums is None:
            raise RuntimeError("no window was added, so there is no mean")
        return self.sums.div_(self.weights)


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
