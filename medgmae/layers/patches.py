"""Volumes as sequences of patches: sizes, grids, cutting and putting together, embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Size = int | Sequence[int]


Shape = tuple[int, ...]


def to_tuple(size: Size, dims: int, what: str = "size") -> Shape:
    """An int for every axis, or one value per axis, as a tuple of ``dims`` positive ints; ValueError otherwise."""
    values = (size,) * dims if isinstance(size, int) else tuple(int(v) for v in size)
    if len(values) != dims or any(v < 1 for v in values):
        raise ValueError(f"{what} must be one positive int or {dims} of them, got {size!r}")
    return values


class PatchEmbed(nn.Module):
    """Cut an input into patches and project each: (B, C, *size) to (B, N, E) in raster order.

    The weight is a convolution's, (E, C, *patch), with kernel = stride = patch. It is applied as a product with the
    unfolded patches, so that only the visible ones are computed when ``keep`` is given. With ``norm_eps`` a layer norm
    of that epsilon follows.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: Sequence[int], norm_eps: float | None = None) -> None:
        super().__init__()
        self.patch_size = tuple(patch_size)
        conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[len(self.patch_size)]
        self.proj = conv(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(embed_dim, eps=norm_eps)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """``keep``: (B, n) long, the patches to embed, (B, n, E) then."""
        patches = patchify(x, self.patch_size)  # (B, N, prod(patch) * C)
        if keep is not None:
            patches = take_tokens(patches, keep)
        weight = self.proj.weight.movedim(1, -1).flatten(1)  # (E, prod(patch) * C), a view for one channel
        return self.norm(F.linear(patches, weight, self.proj.bias))  # type: ignore[no-any-return]


def input_grid(x: Tensor, in_chans: int, patch_size: Shape) -> Shape:
    """Patch grid of an input (B, C, *size), after checking its rank, channels and size.

    Raises:
        ValueError: an input of another rank or channel count, or of a size that is no multiple of the patch.
    """
    dims = len(patch_size)
    if x.dim() != dims + 2 or x.shape[1] != in_chans:
        axes = "D, H, W" if dims == 3 else "H, W"
        raise ValueError(
            f"input must be (B, {in_chans}, {axes}), got {tuple(x.shape)}; build the model with "
            f"in_chans={x.shape[1] if x.dim() == dims + 2 else '...'} for another channel count"
        )
    check_multiple(x.shape[2:], patch_size)
    return tuple(s // p for s, p in zip(x.shape[2:], patch_size, strict=True))


def tap_indices(indices: int | list[int] | None, depth: int) -> list[int]:
    """Blocks to tap, 0-based: negative ones count from the end, an int means the last that many, None all.

    Raises:
        ValueError: a block that does not exist.
    """
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        wanted = list(range(depth - indices, depth)) or [depth]  # none at all is as wrong as too many
    else:
        wanted = [i + depth if i < 0 else i for i in indices]
    if not all(0 <= i < depth for i in wanted):
        raise ValueError(f"indices {indices} reach outside the {depth} blocks; valid: {-depth} to {depth - 1}")
    return wanted


def take_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Pick tokens (B, N, E) at ``indices`` (B, n) along the sequence: (B, n, E)."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


# By number of axes, in einops' words: an input, and the same as a sequence of patch vectors, channel fastest.
LAYOUTS = {
    2: ("b c (d p) (h q)", "b (d h) (p q c)"),
    3: ("b c (d p) (h q) (w r)", "b (d h w) (p q r c)"),
}


def check_multiple(size: Sequence[int], patch_size: Sequence[int]) -> None:
    """Raise ValueError unless every axis is a positive multiple of the patch; the message gives a size that fits."""
    if len(size) != len(patch_size) or any(s < p or s % p for s, p in zip(size, patch_size, strict=False)):
        fit = tuple(max(1, -(-s // p)) * p for s, p in zip(size, patch_size, strict=False))
        raise ValueError(
            f"an input of {tuple(size)} voxels cannot be cut into patches of {tuple(patch_size)}: every axis must be "
            f"a multiple of the patch. Crop or pad it to {fit}, for example with medgmae.data.crop_or_pad"
        )


def _named(axes: str, sizes: Sequence[int]) -> dict[str, int]:
    """Lengths by the letters of LAYOUTS. As many letters as sizes: dynamo in torch 2.6 takes no other zip."""
    return dict(zip(axes[: len(sizes)], sizes, strict=True))


def patchify(x: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Cut (B, C, *size) into (B, N, prod(patch) * C): patches in raster order, inside a patch channel fastest.

    Works for volumes (D, H, W) and images (H, W).

    Raises:
        ValueError: an axis is not a multiple of the patch.
    """
    check_multiple(x.shape[2:], patch_size)
    whole, patches = LAYOUTS[len(patch_size)]
    return rearrange(x, f"{whole} -> {patches}", **_named("pqr", patch_size))


def unpatchify(patches: Tensor, patch_size: Sequence[int], grid: Sequence[int], channels: int) -> Tensor:
    """Inverse of :func:`patchify`: (B, N, prod(patch) * C) and the grid it came from to (B, C, *size).

    Raises:
        ValueError: the number of patches or their length does not fit.
    """
    count, length = math.prod(grid), math.prod(patch_size) * channels
    if patches.shape[1:] != (count, length):
        raise ValueError(
            f"patches must be (B, {count}, {length}) for grid {tuple(grid)}, patch {tuple(patch_size)} and "
            f"{channels} channels, got {tuple(patches.shape)}"
        )
    sizes = _named("dhw", grid) | _named("pqr", patch_size)
    whole, sequence = LAYOUTS[len(grid)]
    return rearrange(patches, f"{sequence} -> {whole}", c=channels, **sizes)
