"""Resizing of 8-bit images to the last bit as Pillow does it, which published 2D recipes go through."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
_BITS = 22  # of the fraction of a weight: Pillow computes in whole numbers


def resize_uint8(pixels: Pixels, size: Sequence[int]) -> Pixels:
    """An image (H, W) of uint8 at another size (h, w): bilinear, antialiased where it shrinks, rounded after each axis.

    Equal to ``PIL.Image.resize(..., BILINEAR)``: columns first, then rows, with weights in fixed point. From version
    13 on, Pillow takes the rows first where they shrink far more than the columns; not where the aspect is kept.
    """
    height, width = size
    wide = _along_rows(pixels, width)
    return np.ascontiguousarray(_along_rows(wide.T, height).T)


def _along_rows(pixels: Pixels, length: int) -> Pixels:
    """Every row of (H, W) resized to ``length`` pixels."""
    if pixels.shape[1] == length:
        return pixels
    matrix = _weights(pixels.shape[1], length)
    sums = pixels.astype(np.int64) @ matrix.T + (1 << (_BITS - 1))
    return (sums >> _BITS).clip(0, 255).astype(np.uint8)


def _weights(old: int, new: int) -> NDArray[np.int64]:
    """(new, old) whole-number weights: a triangle of one pixel's half width, or of one new pixel's where it shrinks."""
    scale = old / new
    reach = max(scale, 1.0)
    matrix = np.zeros((new, old), np.int64)
    for row in range(new):
        centre = (row + 0.5) * scale
        first, last = max(0, int(centre - reach + 0.5)), min(old, int(centre + reach + 0.5))
        distance = np.abs((np.arange(first, last) - centre + 0.5) / reach)
        triangle = np.where(distance < 1, 1 - distance, 0.0)
        triangle /= math.fsum(triangle)
        matrix[row, first:last] = np.floor(triangle * (1 << _BITS) + 0.5)
    return matrix
