"""Which voxels count: for statistics, and as a scan's foreground."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medgmae.data.geometry import VolumeError

Counted = Literal["all", "nonzero", "above_mean"]


def counted(data: Tensor, of: Counted) -> Tensor:
    """The values of the voxels that count, in a row; of all voxels where none is of that kind.

    Raises:
        VolumeError: another kind of voxels.
    """
    if of not in get_args(Counted):
        raise VolumeError(f"of is {of!r}; expected one of {list(get_args(Counted))}")
    if of == "all":
        return data.flatten()
    chosen = data[data != 0] if of == "nonzero" else data[data > data.double().mean()]
    return chosen if chosen.numel() else data.flatten()


def mostly_true(mask: NDArray[np.bool_], within: int) -> NDArray[np.bool_]:
    """Where more than half of the cube of ``within`` voxels around a voxel is true; beyond the mask all is false."""
    if within == 1:
        return mask
    # Sums run over in 16 bits, and their differences, which are at most within ** 3, are right all the same.
    sums = mask.astype(np.uint16)
    for axis, length in enumerate(mask.shape):
        margins = [(0, 0)] * 3
        margins[axis] = (within // 2 + 1, within // 2)
        running = np.pad(sums, margins).cumsum(axis, dtype=np.uint16)
        far, near = np.arange(within, within + length), np.arange(length)
        sums = running.take(far, axis) - running.take(near, axis)
    return sums > within**3 // 2


def bounding_box(mask: NDArray[np.bool_]) -> list[tuple[int, int]] | None:
    """First and last index, exclusive, along each axis of what is true; None where nothing is."""
    box = []
    for axis in range(mask.ndim):
        used = np.flatnonzero(mask.any(tuple(k for k in range(mask.ndim) if k != axis)))
        if not len(used):
            return None
        box.append((int(used[0]), int(used[-1]) + 1))
    return box
