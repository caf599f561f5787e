"""Where a volume has foreground, coarsely: enough to draw the centres of crops without decoding a voxel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CELL = 8  # voxels along each edge of a cell


@dataclass(frozen=True)
class ForegroundTable:
    """The number of foreground voxels in every cell of 8 x 8 x 8 voxels.

    Attributes:
        counts: uint16 (ceil(d / 8), ceil(h / 8), ceil(w / 8)).
        size: voxels (d, h, w); cells at the far edges may have fewer than 512.
    """

    counts: NDArray[np.uint16]
    size: tuple[int, int, int]

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> ForegroundTable:
        """The table of a mask (D, H, W)."""
        counts: NDArray[np.int64] = mask.astype(np.int64)
        for axis, length in enumerate(mask.shape):
            counts = np.add.reduceat(counts, np.arange(0, length, CELL), axis=axis)
        return cls(counts.astype(np.uint16), (mask.shape[0], mask.shape[1], mask.shape[2]))

    @classmethod
    def from_bytes(cls, data: bytes, size: Sequence[int]) -> ForegroundTable:
        """The table that :meth:`to_bytes` wrote of a volume of this size."""
        d, h, w = size
        return cls(np.frombuffer(data, "<u2").reshape([-(-n // CELL) for n in size]), (d, h, w))

    def to_bytes(self) -> bytes:
        """The counts in the order of the cells."""
        return self.counts.astype("<u2").tobytes()

    def draw(self, rng: np.random.Generator, inside: bool) -> tuple[int, int, int] | None:
        """A voxel of the foreground, or of the background where not ``inside``; None where there is none.

        The cell is drawn by its share, the voxel evenly within the cell: in a cell that the border runs through, it
        may lie on the other side.
        """
        lengths = [np.minimum(CELL, n - np.arange(0, n, CELL)) for n in self.size]
        planes = self.counts.sum((1, 2), dtype=np.int64)
        if not inside:
            planes = lengths[0] * (self.size[1] * self.size[2]) - planes
        total = int(planes.sum())
        if total == 0:
            return None
        target = int(rng.integers(total))
        ends = np.cumsum(planes)
        plane = int(np.searchsorted(ends, target, "right"))
        cells = self.counts[plane].astype(np.int64)
        if not inside:
            cells = lengths[0][plane] * np.outer(lengths[1], lengths[2]) - cells
        target -= int(ends[plane] - planes[plane])
        row, column = divmod(int(np.searchsorted(np.cumsum(cells), target, "right")), cells.shape[1])
        d, h, w = (
            cell * CELL + int(rng.integers(length[cell]))
            for cell, length in zip((plane, row, column), lengths, strict=True)
        )
        return d, h, w
