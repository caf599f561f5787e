"""Whole scans through a model that says something of every voxel: a class, or which of several masks hold it.

Windows are read in order, the last axis fastest. As soon as no window to come covers a block of voxels, its logits are
averaged, decided and forgotten, so that what is kept are the logits of windows that still overlap with others to come:
of the scan's longest axis, overlap x window planes, whatever its length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from medgmae.data import Grid, Volume, as_volume, resample_like
from medgmae.data.volume import ScanLike
from medgmae.inference.inputs import volume_of
from medgmae.inference.windows import (
    Blend,
    Layout,
    Outside,
    Placement,
    Slices,
    blend_weights,
    cut,
    evaluating,
    lay_out,
)
from medgmae.layers.patches import Shape
from medgmae.models.parts import unwrap
from medgmae.ops.progress import progress_bar

# The least weight of a voxel in a window, MONAI's: where all windows end, as in corners, their logits count alike.
_LEAST_WEIGHT = 1e-3


class Segmentation(NamedTuple):
    """A whole scan, segmented.

    labels: (1, D, H, W), the class of every voxel, 0 for the first; of overlapping masks (K, D, H, W), 1 inside.
        uint8, int16 for more than 256 classes.
    probabilities: (K, D, H, W) float32 on the grid of the prepared scan, if they were asked for.
    """

    labels: Volume
    probabilities: Volume | None = None


class WindowOptions(TypedDict, total=False):
    """How windows are laid, read and averaged; see :func:`predict_logits`."""

    window: Literal["model"] | int | Sequence[int]
    overlap: float
    blend: Blend
    placement: Placement
    mirror: bool | Sequence[int]
    outside: Outside
    batch_size: int
    autocast: torch.dtype | None
    progress: bool | None


def predict_logits(
    model: nn.Module,
    scan: ScanLike,
    *,
    window: Literal["model"] | int | Sequence[int] = "model",
    overlap: float = 0.5,
    blend: Blend = "gaussian",
    placement: Placement = "even",
    mirror: bool | Sequence[int] = False,
    outside: Outside = 0.0,
    batch_size: int = 1,
    autocast: torch.dtype | None = None,
    progress: bool | None = None,
) -> Volume:
    """What a model says of every voxel of a whole scan, averaged over windows; it takes 4 K bytes per voxel.

    ``placement="strided"`` with ``blend="uniform"`` (MONAI's "constant") or ``"gaussian"`` gives what MONAI's
    ``sliding_window_inference`` gives; SelfMedMAE uses the first, with an overlap of a half.

    Args:
        model: any module that makes (B, K, d, h, w) of windows (B, C, d, h, w).
        scan: (C, D, H, W), preprocessed.
        window: voxels (d, h, w) that the model sees at once: "model" for the size it was built for (its ``img_size``),
            an int for a cube.
        overlap: least share of a window that it has in common with the next, 0 to below 1.
        blend: how overlapping windows are averaged: "gaussian" trusts the middle of a window more than its rim.
        placement: "even" spreads as few windows as possible; "strided" has them where MONAI has.
        mirror: also read every window flipped along each combination of these axes (0, 1, 2 for d, h, w; True for
            all), and average: twice the work for each axis.
        outside: intensity beyond a scan that is smaller than a window, in its units; "rim" repeats its outermost
            voxels.
        batch_size: windows per pass.
        autocast: run the model under autocast with this dtype.
        progress: show a progress bar over the windows; by default in terminals and notebooks.

    Returns:
        (K, D, H, W) float32 logits on the scan's grid.

    Raises:
        ValueError: channels that the model does not take, an option that is not possible, or an output that is NaN,
            infinite or of another size than the window.
        TypeError: the scan is not a scan.
    """
    volume = volume_of(scan)
    reader = _Reader(model, outside, batch_size, autocast, _axes(mirror))
    layout = _layout(model, volume, window, overlap, placement)
    logits = torch.empty(0)
    for where, part in _finished(reader, volume.data, layout, blend, progress):
        if not len(logits):
            logits = torch.empty(len(part), *volume.size)
        logits[(slice(None), *where)] = part
        del part
    return volume.with_data(logits)


def segment_scan(
    model: nn.Module,
    scan: ScanLike,
    *,
    multilabel: bool = False,
    probabilities: bool = False,
    like: ScanLike | Grid | None = None,
    window: Literal["model"] | int | Sequence[int] = "model",
    overlap: float = 0.5,
    blend: Blend = "gaussian",
    placement: Placement = "even",
    mirror: bool | Sequence[int] = False,
    outside: Outside = 0.0,
    batch_size: int = 1,
    autocast: torch.dtype | None = None,
    progress: bool | None = None,
) -> Segmentation:
    """The class of every voxel of a whole scan: the largest of the logits, averaged over windows.

    Memory beside scan and labels does not grow with the longest axis of the scan: blocks of voxels are decided as soon
    as no window to come covers them.

    Args:
        model: any module that makes logits (B, K, d, h, w) of windows (B, C, d, h, w).
        scan: (C, D, H, W), preprocessed, as ``create_transform(model, whole=True)(path)`` gives it.
        multilabel: each channel is a mask of its own, inside where its sigmoid is above a half; masks may overlap.
        probabilities: also return the softmax, or with ``multilabel`` the sigmoid, of the averaged logits: 4 K bytes
            per voxel.
        like: the scan before it was prepared, or its grid: labels are put there by the nearest voxel, 0 outside of what
            was prepared, and exactly where the preparation only turned, cropped or padded.
        window, overlap, blend, placement, mirror, outside, batch_size, autocast, progress: see :func:`predict_logits`.

    Raises:
        ValueError: what :func:`predict_logits` raises; one class without ``multilabel``.
        TypeError: the scan is not a scan.
    """
    volume = volume_of(scan)
    target = None if like is None else like if isinstance(like, Grid) else as_volume(like).grid
    reader = _Reader(model, outside, batch_size, autocast, _axes(mirror))
    layout = _layout(model, volume, window, overlap, placement)
    labels, shares = torch.empty(0), torch.empty(0)
    for where, part in _finished(reader, volume.data, layout, blend, progress):
        if not len(labels):
            labels = _empty_labels(len(part), volume.size, multilabel)
            shares = torch.empty(len(part) if probabilities else 0, *volume.size)
        labels[(slice(None), *where)] = ((part > 0) if multilabel else part.max(0, keepdim=True).indices).to(
            labels.dtype
        )
        if probabilities:
            shares[(slice(None), *where)] = part.sigmoid() if multilabel else part.softmax(0)
        del part  # a view of a whole window, which need not lie beside the next one
    result = volume.with_data(labels)
    if target is not None:
        result = resample_like(result, target, interpolation="nearest")
    return Segmentation(result, volume.with_data(shares) if probabilities else None)


def _empty_labels(classes: int, size: Shape, multilabel: bool) -> Tensor:
    if classes < 2 and not multilabel:
        raise ValueError(
            "the model has one output, of which the largest is always the first; expected two classes or more, or "
            "multilabel=True, which compares it with 0"
        )
    channels = classes if multilabel else 1
    return torch.zeros(channels, *size, dtype=torch.uint8 if multilabel or classes <= 256 else torch.int16)


def _axes(mirror: bool | Sequence[int]) -> tuple[int, ...]:
    axes = (0, 1, 2) if mirror is True else () if mirror is False else tuple(mirror)
    if len(set(axes)) != len(axes) or not set(axes) <= {0, 1, 2}:
        raise ValueError(f"mirror is {mirror!r}; expected True, False or different axes among 0, 1, 2 for (d, h, w)")
    return axes


def _layout(
    model: nn.Module,
    volume: Volume,
    window: Literal["model"] | int | Sequence[int],
    overlap: float,
    placement: Placement,
) -> Layout:
    """Windows that may begin at every voxel."""
    inner = unwrap(model)
    takes = getattr(inner, "in_chans", volume.channels)
    if volume.channels != takes:
        raise ValueError(
            f"the scan has {volume.channels} channel(s), the model takes {takes}: the contrasts that it was trained "
            "on, in its order"
        )
    size = getattr(inner, "img_size", None) if window == "model" else window
    if size is None or isinstance(size, str):
        raise ValueError(
            f"window is {window!r}; expected voxels (d, h, w), or 'model' of a model that has an img_size, which "
            f"{type(inner).__name__} {'has' if hasattr(inner, 'img_size') else 'has not'}"
        )
    return lay_out(volume.size, (1, 1, 1), size, overlap, placement)


@dataclass(frozen=True)
class _Reader:
    """A model, and how it reads windows."""

    model: nn.Module
    outside: Outside
    batch_size: int
    autocast: torch.dtype | None
    mirror: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if isinstance(self.outside, str) and self.outside != "rim":
            raise ValueError(f"outside must be an intensity or 'rim', got {self.outside!r}")

    def logits(self, batch: Tensor) -> Tensor:
        """(B, K, d, h, w), float32 on the CPU, of windows (B, C, d, h, w); nothing else holds this memory."""
        parameter = next(self.model.parameters(), torch.empty(0))
        x = batch.to(parameter.device, parameter.dtype)
        flips = [flip for n in range(len(self.mirror) + 1) for flip in itertools.combinations(self.mirror, n)]
        total: Tensor | None = None
        with torch.no_grad(), torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            for flip in flips:
                axes = [axis + 2 for axis in flip]
                found = self._checked(self.model(x.flip(axes) if axes else x), batch)
                found = (found.flip(axes) if axes else found).float()
                total = found if total is None else total + found
        assert total is not None
        held = {tensor.data_ptr() for tensor in itertools.chain(self.model.parameters(), self.model.buffers())}
        total = total.cpu().contiguous()
        return (total.clone() if total.data_ptr() in held else total).div_(len(flips))

    def _checked(self, found: object, batch: Tensor) -> Tensor:
        size = (len(batch), *batch.shape[2:])
        if not isinstance(found, Tensor) or found.dim() != 5 or (len(found), *found.shape[2:]) != size:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"of windows {tuple(batch.shape)} the model {type(unwrap(self.model)).__name__} makes {got}; expected "
                f"logits ({size[0]}, K, {', '.join(map(str, size[1:]))}), one for each class and voxel"
            )
        if not all(map(torch.isfinite, found.aminmax())):  # isfinite of all would take as much memory again
            raise ValueError(
                f"the model's logits are NaN or infinite in {found.dtype}; expected finite ones: run it in float32, "
                "without autocast, and look whether its weights are finite"
            )
        return found


def _finished(
    reader: _Reader, data: Tensor, layout: Layout, blend: Blend, progress: bool | None
) -> Iterator[tuple[Slices, Tensor]]:
    """Blocks of a scan (C, D, H, W), each voxel in one of them: where they lie, and their averaged logits
    (K, d, h, w)."""
    weight = blend_weights(layout.window, blend).clamp_(min=_LEAST_WEIGHT)
    sums = _OpenSums(layout)
    windows = sorted(layout.windows(), key=lambda start: [start[axis] for axis in sums.order])
    with evaluating(reader.model), progress_bar(len(windows), "windows", progress) as bar:
        for first in range(0, len(windows), reader.batch_size):
            starts = windows[first : first + reader.batch_size]
            batch = [cut(data, layout.corner(start), layout.window_size, reader.outside) for start in starts]
            logits = reader.logits(torch.stack(batch))
            for start, values in zip(starts, logits, strict=True):
                done, part = sums.add(start, values.mul_(weight))
                inside = tuple(map(_meet, done, layout.scan))
                if all(one.start < one.stop for one in inside):
                    part = part[(slice(None), *map(_moved, inside, [one.start for one in done]))]
                    part.div_(_weights_of_all(layout, weight, inside))  # in place: the last block is a whole window
                    yield tuple(map(_moved, inside, layout.before)), part
            del logits, values, part  # all classes of a window, which need not lie beside those of the next
            bar.update(len(starts))


class _OpenSums:
    """Sums of weighted windows, as far as windows to come still add to them.

    Along each axis, what a window has in common with the next is kept until that comes; what lies before is passed on
    to the next axis. Windows must come with ``order[0]`` slowest, which is the scan's longest axis: so the largest sums
    that are kept are those over its shorter two.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.order = sorted(range(3), key=lambda axis: -layout.grid[axis])
        self.kept: dict[int, Tensor] = {}

    def add(self, start: Shape, values: Tensor) -> tuple[Slices, Tensor]:
        """Add the window at ``start`` (K, *window), which is changed. What it finished: where, and the sums (K, ...)
        there; nothing, where a slice is empty."""
        done = [slice(0, width) for width in self.layout.window]
        for axis in reversed(self.order):
            first, width, starts = start[axis], self.layout.window[axis], self.layout.starts[axis]
            place = starts.index(first)
            if axis not in self.kept:
                self.kept[axis] = torch.empty(self._size(axis, len(values)))
            kept = self.kept[axis][(slice(None), *done[:axis], slice(None), *done[axis + 1 :])]
            common = starts[place - 1] + width - first if place else 0
            values.narrow(axis + 1, 0, common).add_(kept.narrow(axis + 1, 0, common))
            stop = starts[place + 1] if place + 1 < len(starts) else first + width
            kept.narrow(axis + 1, 0, first + width - stop).copy_(
                values.narrow(axis + 1, stop - first, first + width - stop)
            )
            values = values.narrow(axis + 1, 0, stop - first)
            done[axis] = slice(first, stop)
        return tuple(done), values

    def _size(self, axis: int, classes: int) -> list[int]:
        """Of what is kept along an axis: the whole scan along those that were passed before, a window along others."""
        layout, passed = self.layout, self.order[self.order.index(axis) + 1 :]
        size = [layout.grid[k] if k in passed else layout.window[k] for k in range(3)]
        overlaps = [layout.window[axis] - (b - a) for a, b in itertools.pairwise(layout.starts[axis])]
        size[axis] = max(overlaps, default=0)
        return [classes, *size]


def _weights_of_all(layout: Layout, weight: Tensor, where: Slices) -> Tensor:
    """The sum of the weights (d, h, w) of all windows over a block."""
    total = torch.zeros([one.stop - one.start for one in where])
    covering = [
        [first for first in starts if first < one.stop and first + width > one.start]
        for starts, width, one in zip(layout.starts, layout.window, where, strict=True)
    ]
    for start in itertools.product(*covering):
        shared = list(map(_meet, layout.patches(start), where))
        there = tuple(map(_moved, shared, [one.start for one in where]))
        total[there] += weight[tuple(map(_moved, shared, start))]
    return total


def _meet(one: slice, other: slice) -> slice:
    """What two ranges have in common; empty where stop is not above start."""
    return slice(max(one.start, other.start), min(one.stop, other.stop))


def _moved(one: slice, back: int) -> slice:
    return slice(one.start - back, one.stop - back)
