"""Tables of positions: sine-cosine tables, resampling to another grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.layers.patches import Shape

# A table of positions: fixed, learned, or none (then rotary positions say where a patch is).
PosEmbed = Literal["sincos", "learned", "none"]


def sincos_pos_embed(dim: int, grid: Sequence[int], *, reversed_mesh: bool = False) -> Tensor:
    """Fixed sine-cosine table of positions, (1, prod(grid), dim) float32, rows in raster order.

    The channels are shared out over the axes in order, the remainder going to the last axes. A block of width b
    holds, for the integer coordinate t along its axis, sin(t w_j), cos(t w_j) with w_j = 10000^(-j / (b // 2)), and
    sin(t / 10000) in one last channel when b is odd. For widths divisible by 2 * len(grid) this is the usual MAE
    table; the rule for the other widths is TANGERINE's (util/pos_embed.py).

    ``reversed_mesh`` reproduces TANGERINE's order on non-cubic grids: row n gets the coordinates that n has in the
    reversed grid. The files that were trained with it carry their table, so it is needed for comparison only.
    """
    shape = tuple(grid)[::-1] if reversed_mesh else tuple(grid)
    coordinates = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")
    widths = axis_widths(dim, len(shape))
    blocks = [_axis_table(t.reshape(-1, 1), width) for t, width in zip(coordinates, widths, strict=True)]
    return torch.cat(blocks, dim=1).unsqueeze(0)


def axis_widths(dim: int, axes: int) -> list[int]:
    """``dim`` channels shared out over the axes in order, the remainder going to the last ones."""
    return [dim // axes + int(axis >= axes - dim % axes) for axis in range(axes)]


def _axis_table(t: Tensor, width: int) -> Tensor:
    """Channels for the coordinates ``t`` (n, 1) along one axis: (n, width)."""
    half = width // 2
    # The published tables were computed by numpy in float32, whose power rounds differently from torch's.
    exponents = np.arange(half, dtype=np.float32) / np.float32(max(half, 1))
    omega = torch.tensor(np.float32(1) / np.power(np.float32(10000), exponents))
    odd = [(t * 1e-4).sin()] if width % 2 else []
    return torch.cat([(t * omega).sin(), (t * omega).cos(), *odd], dim=1)


def sincos_grid(table: Tensor, axes: int) -> tuple[int, ...] | None:
    """The grid for which :func:`sincos_pos_embed` gives this table (1, N, E); None when it is another kind of table.

    Read off the rows along each axis in turn, the last first: its channels begin anew where the coordinate is 0 again.
    """
    rows, dim = table.shape[1:]
    if table.is_meta or dim < 2 * axes or not rows:
        return None
    grid: list[int] = []
    end, stride = dim, 1
    for width in reversed(axis_widths(dim, axes)):
        block = table[0, ::stride, end - width : end].float().cpu()
        again = (block[1:] - block[:1]).abs().amax(1) < 1e-3
        size = int(again.int().argmax()) + 1 if bool(again.any()) else len(block)
        expected = _axis_table(torch.arange(size, dtype=torch.float32).unsqueeze(1), width)
        if not torch.allclose(block[:size], expected, rtol=0, atol=2e-3):  # room for float16
            return None
        grid, end, stride = [size, *grid], end - width, stride * size
    return tuple(grid) if stride == rows else None


def resample_pos_embed(
    table: Tensor, source_grid: Sequence[int], target_grid: Sequence[int], offset: float = 0.0
) -> Tensor:
    """Resample a table of patch positions to another grid: (1, N, E) to (1, N', E).

    Linear along every axis, align_corners False, no antialiasing, computed in float32: what the published loaders
    do on cubic grids, on the true grids here.

    With DINOv2's ``offset`` a new row i of g lies at (i + 1/2) n / (g + offset) - 1/2 of the n old ones, instead of
    (i + 1/2) n / g - 1/2. An axis that keeps its length is copied all the same.

    Raises:
        ValueError: the table does not have prod(source_grid) rows, or the grids differ in their number of axes.
    """
    source, target = tuple(source_grid), tuple(target_grid)
    if table.shape[1] != math.prod(source) or len(source) != len(target):
        raise ValueError(f"a table of {table.shape[1]} rows on grid {source} cannot be resampled to grid {target}")
    if source == target:
        return table
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(source)]
    image = table.float().transpose(1, 2).reshape(1, table.shape[2], *source)
    if offset:
        scales = [(new + offset) / old for old, new in zip(source, target, strict=True)]
        image = F.interpolate(image, scale_factor=scales, mode=mode, align_corners=False)
    else:
        image = F.interpolate(image, size=target, mode=mode, align_corners=False)
    return image.flatten(2).transpose(1, 2).to(table.dtype)


def make_table(kind: PosEmbed, grid: Sequence[int], dim: int) -> nn.Parameter | None:
    """Storage for a table (1, prod(grid), dim) of a kind; None for none."""
    if kind == "none":
        return None
    return nn.Parameter(torch.empty(1, math.prod(grid), dim), requires_grad=kind == "learned")


@torch.no_grad()
def reset_table(table: nn.Parameter | None, grid: Sequence[int]) -> None:
    """Give a table of positions its start: random numbers if it is learned, else sines and cosines."""
    if table is not None and table.requires_grad:
        nn.init.trunc_normal_(table, std=0.02)
    elif table is not None:
        table.copy_(sincos_pos_embed(table.shape[2], grid))


class PositionCache:
    """A table of positions for the grid at hand, resampled once per grid as long as the table does not change.

    A table that is learning is resampled every time. A change is seen unless it goes through ``.data``, which hides it
    from torch: use ``copy_`` under ``torch.no_grad()`` instead.

    Args:
        offset: see :func:`resample_pos_embed`.
    """

    def __init__(self, offset: float = 0.0) -> None:
        self.offset = offset
        self._key: tuple[object, ...] | None = None
        self._value: Tensor | None = None

    def __call__(self, table: Tensor, source_grid: Shape, grid: Shape) -> Tensor:
        """``table`` (1, N, E) of ``source_grid`` on ``grid``, in the table's dtype and device."""
        if grid == source_grid:
            return table
        learning = table.requires_grad and torch.is_grad_enabled()
        if learning or torch.compiler.is_compiling() or table.is_inference():
            return self.resample(table, source_grid, grid)
        # An in-place change of the table bumps its version, a new tensor has another address.
        key = (grid, source_grid, table.data_ptr(), table._version, table.dtype, table.device)
        if self._value is None or key != self._key:
            with torch.inference_mode(False), torch.no_grad():
                self._key, self._value = key, self.resample(table.detach(), source_grid, grid)
        return self._value

    def resample(self, table: Tensor, source_grid: Shape, grid: Shape) -> Tensor:
        """``table`` on another grid, see :func:`resample_pos_embed`."""
        return resample_pos_embed(table, source_grid, grid, self.offset)

    def resized(self, table: nn.Parameter | None, source_grid: Shape, grid: Shape) -> nn.Parameter | None:
        """A table that a model may have, for another grid: a parameter of its own."""
        if table is None:
            return None
        resampled = self.resample(table.detach(), source_grid, grid)
        return nn.Parameter(resampled.clone(), requires_grad=table.requires_grad)

    def __deepcopy__(self, memo: object) -> PositionCache:
        return PositionCache(self.offset)

    def __reduce__(self) -> tuple[type[PositionCache], tuple[float]]:
        return (PositionCache, (self.offset,))
