"""What ``medgmae::project_volume`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from medgmae.ops.register import Index


class RayInputs(NamedTuple):
    """A volume with a rim of zeros, and views in its indices.

    volume: (B, D + 2, H + 2, W + 2). views: (V, 4, 3) float64, in (d, h, w) indices of this volume: source or
    direction, pixel (0, 0), step per column, step per row. spacing: millimetres (d, h, w) of an index, (3,) float64.
    size: pixels (rows, columns). parallel: whether the first row of a view is a direction.
    """

    volume: Tensor
    views: Index
    spacing: Index
    size: Sequence[int]
    parallel: bool
