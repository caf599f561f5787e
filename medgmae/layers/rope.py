"""Rotary positions: angles of tokens in a sequence or in a volume, and the rotation by them.

Two kinds of models turn channels. A Vim turns its tokens themselves, by the angles of a :data:`Rope`. A transformer
turns queries and keys inside every head, by those of a :class:`HeadRope`, which says what a checkpoint's convention is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medgmae.layers.patches import Shape
from medgmae.layers.positions import axis_widths

Rope = Literal["sequence", "axial", "axial_published"]
Coordinates = Literal["integer", "unit", "scaled"]

# Patches along an axis in EVA-02's pre-training, whose places other grids are given.
REFERENCE = 16

# The axial rotations of a volume, whatever its grid, run from 0 to this angle (in the fastest pair of channels).
EXTENT = 14.0


def widened(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class HeadRope:
    """How the channels of an attention head are turned by a patch's place in a volume, whatever its grid.

    A head of d channels has m = d / 2a bands for each of a axes, three by default. Band k of an axis turns by the
    coordinate times base^(-exponent k / m). The pair of channels (2 p, 2 p + 1) has band p % m of axis p // m.
    Checkpoints with another order of channels are converted by a permutation of the rows of their layers for queries
    and keys.

    Attributes:
        coordinates: "integer" counts patches, 0 to n - 1; "unit" is 2 pi (2 (i + 1/2) / n - 1), the same extent on
            every grid; "scaled" is 16 i / n, EVA-02's.
        base: of the bands.
        exponent: of the bands, 1 where they reach 1 / base.
        dtype: in which coordinates, bands and angles are computed: weights learn the rounding too.
        axes: of the grid, those that turn channels.
    """

    coordinates: Coordinates = "integer"
    base: float = 10000.0
    exponent: float = 1.0
    dtype: torch.dtype = torch.float32
    axes: tuple[int, ...] = (0, 1, 2)

    def check(self, dim: int) -> None:
        """Raise ValueError unless a head of ``dim`` channels has as many bands for every axis."""
        if dim % (2 * len(self.axes)):
            raise ValueError(
                f"rotary positions turn pairs of channels for {len(self.axes)} axes: embed_dim / num_heads must be a "
                f"multiple of {2 * len(self.axes)}, got {dim}"
            )

    def angles(self, grid: Shape, dim: int, device: torch.device | None = None) -> Tensor:
        """Angles (prod(grid), dim / 2) of patches in raster order, in ``dtype``; dim: channels of a head."""
        bands = dim // (2 * len(self.axes))
        steps = torch.arange(bands, dtype=self.dtype, device=device)
        frequencies = 1.0 / self.base ** (self.exponent * steps / max(bands, 1))
        columns = []
        for axis in self.axes:
            count = grid[axis]
            t = torch.arange(count, dtype=self.dtype, device=device)
            if self.coordinates == "unit":
                t = 2 * math.pi * (2 * (t + 0.5) / count - 1)
            elif self.coordinates == "scaled":
                t = t / count * REFERENCE
            columns.append(_over_grid(torch.outer(t, frequencies), axis, grid))
        return torch.cat(columns, dim=1)


# Queries and keys of Primus and of COLIPRI.
PRIMUS = HeadRope()


def sequence_angles(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Angles (length, dim // 4) float32 of a sequence's tokens: token t turns pair j by t 10000^(-2j / (dim // 2)).

    They are for the first half of the channels, as the reference's pre-training has it (models_vim_mae.py). The product
    is taken in float32: at 64,000 tokens another order of rounding would be another angle.
    """
    return torch.outer(torch.arange(length, dtype=torch.float32, device=device), _frequencies(dim // 2, device))


def axial_angles(grid: Shape, dim: int, device: torch.device | None = None) -> Tensor:
    """Angles (prod(grid), dim // 2) float32 of patches in raster order; the pairs are shared out over all axes.

    Patch i of g along an axis lies at (i + 1/2) / g * 14, so that the place in the volume decides and not the grid, as
    it does where a table of positions is resampled. Pair j of an axis with n pairs turns by that times 10000^(-j / n).
    """
    columns = []
    for axis, pairs in enumerate(axis_widths(dim // 2, len(grid))):
        t = (torch.arange(grid[axis], dtype=torch.float32, device=device) + 0.5) / grid[axis] * EXTENT
        columns.append(_over_grid(torch.outer(t, _frequencies(2 * pairs, device)), axis, grid))
    return torch.cat(columns, dim=1)


def published_axial_angles(grid: Shape, dim: int, device: torch.device | None = None) -> Tensor:
    """Angles (prod(grid), 2 * (dim // 4)) float32 of the reference's classifier: the first axis does not enter.

    Patch i of g along an axis lies at i / g * 14. The first half of the channels follows the second axis, the other
    half the third one (rope.py, whose index drops the part for the first axis).
    """
    columns = []
    for axis in (1, 2):
        t = torch.arange(grid[axis], dtype=torch.float32, device=device) / grid[axis] * EXTENT
        columns.append(_over_grid(torch.outer(t, _frequencies(dim // 2, device)), axis, grid))
    return torch.cat(columns, dim=1)


def _frequencies(dim: int, device: torch.device | None) -> Tensor:
    """10000^(-2j / dim) for the dim // 2 pairs of ``dim`` channels."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device)[: dim // 2] / max(dim, 1)
    return 1.0 / (10000.0**exponents)


def _over_grid(rows: Tensor, axis: int, grid: Shape) -> Tensor:
    """Rows (g, n) for the coordinates along one axis, given to every patch of the grid: (prod(grid), n)."""
    shape = [1] * len(grid) + [rows.shape[1]]
    shape[axis] = grid[axis]
    return rows.reshape(shape).expand(*grid, -1).reshape(-1, rows.shape[1])


class Rotary:
    """Tables for :func:`rotate`, made once per grid and kept beside the model, not in its state.

    Args:
        kind: "sequence", "axial" or "axial_published", see the functions above; or the convention of heads.
        dim: width of what is turned, even: of the tokens, or of a head.

    Raises:
        ValueError: an unknown kind, or a width that cannot be turned so.
    """

    def __init__(self, kind: Rope | HeadRope, dim: int) -> None:
        if isinstance(kind, HeadRope):
            kind.check(dim)
        elif kind not in ("sequence", "axial", "axial_published"):
            raise ValueError(f"rope must be None, 'sequence', 'axial' or 'axial_published', got {kind!r}")
        elif dim % 2:
            raise ValueError(f"rotary positions turn pairs of channels: embed_dim must be even, got {dim}")
        self.kind, self.dim = kind, dim
        self._held: tuple[object, Tensor] | None = None

    def table(self, grid: Shape, length: int, like: Tensor) -> Tensor:
        """Cosine and sine for every pair of channels, (rows, dim / 2, 2), for tokens of the kind of ``like``.

        "sequence" has ``length`` rows. The others have one row per patch of the grid, and a last one that turns
        nothing, for tokens without a place. Pairs without an angle stay as they are.
        """
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if torch.compiler.is_compiling():
            return self._make(grid, length, like.device).to(dtype)
        key = (length if self.kind == "sequence" else grid, dtype, like.device, type(like))
        held = self._held
        if held is None or held[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                held = self._held = (key, self._make(grid, length, like.device).to(dtype))
        return held[1]

    def turns(self, grid: Shape, prefix: int, keep: Tensor | None, like: Tensor) -> Tensor:
        """The rows of :meth:`table` for tokens of heads: ``prefix`` that stay as they are, then patches.

        (P + N, dim / 2, 2) for all patches in raster order; (B, 1, P + n, dim / 2, 2) for those of ``keep`` (B, n).
        """
        table = self.table(grid, 0, like)
        still = len(table) - 1
        if keep is None:
            return torch.cat([table[still:].expand(prefix, -1, -1), table[:still]])
        rows = torch.cat([keep.new_full((keep.shape[0], prefix), still), keep], dim=1)
        return table[rows].unsqueeze(1)

    def _make(self, grid: Shape, length: int, device: torch.device) -> Tensor:
        if isinstance(self.kind, HeadRope):
            angles, still = self.kind.angles(grid, self.dim, device), 1
        elif self.kind == "sequence":
            angles, still = sequence_angles(length, self.dim, device), 0
        else:
            make = axial_angles if self.kind == "axial" else published_axial_angles
            angles, still = make(grid, self.dim, device), 1
        angles = F.pad(angles, (0, self.dim // 2 - angles.shape[1], 0, still))
        return torch.stack([angles.cos(), angles.sin()], dim=-1)

    def __deepcopy__(self, memo: object) -> Rotary:
        return Rotary(self.kind, self.dim)

    def __reduce__(self) -> tuple[type[Rotary], tuple[Rope | HeadRope, int]]:
        return (Rotary, (self.kind, self.dim))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs of channels (0, 1), (2, 3), ... of x (..., L, E) by a table (..., L, E / 2, 2).

    Leading axes of the table may be missing or of length 1. Returns float32, or float64 for float64.
    """
    pairs = widened(x).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    if torch.compiler.is_compiling():  # what a compiler fuses; complex numbers it hands back to torch
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    # As a product of complex numbers it is one pass over memory; with the formula above it takes five times as long.
    turned = torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(table)
    return torch.view_as_real(turned).flatten(-2)
