"""What every reader of a format gives, and what it may ask of the machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgmae.data.geometry import Floats, VolumeError

SHARE = 4  # of the free memory, for voxels: reading takes up to three times their size
# Limit, use, and where the part of the use is said that is a cache of files, which gives way: version 2 and 1.
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "file "),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_cache ",
    ),
)


@dataclass(frozen=True)
class Image:
    """What a file holds.

    Attributes:
        voxels: (C, D, H, W), of a type that torch calculates with, in memory of their own.
        affine: 4x4, from index (x, y, z) to LPS millimetres.
        frames: length of the file's fourth axis when C stands for it (a 4-D image), else 0.
        notes: choices that may surprise, or that lose something.
    """

    voxels: NDArray[Any]
    affine: Floats
    frames: int = 0
    notes: tuple[str, ...] = ()


def _number_in(path: str, key: str = "") -> int | None:
    """The first number of a file of the kernel, or of its line that starts with ``key``."""
    try:
        lines = Path(path).read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).removeprefix(key).split()[0])
    except (OSError, ValueError, StopIteration, IndexError):
        return None


def free_memory() -> int:
    """Bytes that this process can still take: what the machine has left, or its container if that is less."""
    kilobytes = _number_in("/proc/meminfo", "MemAvailable:")
    free = [kilobytes * 1024 if kilobytes is not None else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit, used, details, cache in _CGROUPS:
        most, now = _number_in(limit), _number_in(used)
        if most is not None and now is not None:
            free.append(max(0, most - now + (_number_in(details, cache) or 0)))
    return min(free)


def named_shape(shape: tuple[int, ...]) -> str:
    """(C, D, H, W) as files give it: x, y, z, then channels where there are several."""
    return " x ".join(map(str, [*shape[:0:-1], *(shape[:1] if shape[0] > 1 else ())]))


class TooLargeError(VolumeError):
    """A header claims more voxels than the limits allow."""


@dataclass(frozen=True)
class Limits:
    """What a header may ask for, and how much of a file is read.

    Attributes:
        max_bytes: of voxels in memory; a quarter of the free memory by default.
        allow_outside: whether a header may name data files that lie elsewhere than beside or below it.
        voxels: whether voxels are read. If not, an image has zeros that take no memory, of the shape and type that the
            header says; formats whose headers say little without the voxels are read all the same.
    """

    max_bytes: int = field(default_factory=lambda: free_memory() // SHARE)
    allow_outside: bool = False
    voxels: bool = True

    def check(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Raises a TooLargeError unless voxels (C, D, H, W), at four bytes at least, stay within the limit."""
        needed = int(np.prod(shape, dtype=object)) * max(4, dtype.itemsize)
        if needed > self.max_bytes:
            raise TooLargeError(
                f"the header claims {named_shape(shape)} voxels, {needed:.4g} bytes in memory; expected at "
                f"most {self.max_bytes:.4g} (a quarter of the free memory by default; if the file is what you think "
                f"it is, read_volume(..., max_bytes={needed}))"
            )


def unread(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros in place of voxels (C, D, H, W) that are not read: one number in memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)
