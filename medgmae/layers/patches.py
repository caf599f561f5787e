"""Volumes as sequences of patches: sizes, grids, cutting and putting together, embedding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Size = int | Sequence[int]
Shape = tuple[int, ...]

# By number of axes, in einops' words: an input, and the same as a sequence of patch vectors, channel fastest.
LAYOUTS = {
    2: ("b c (d p) (h q)", "b (d h) (p q c)"),
    3: ("b c (d p) (h q) (w r)", "b (d h w) (p q r c)"),
}


def to_tuple(size: Size, dims: int, what: str = "size") -> Shape:
    """An int for every axis, or one value per axis, as a tuple of ``dims`` positive ints; ValueError otherwise."""
    if isinstance(size, Integral):
        values = (int(size),) * dims
    elif isinstance(size, Iterable) and not isinstance(size, str):
        values = tuple(int(v) for v in size)
    else:
        values = ()
    if len(values) != dims or any(v < 1 for v in values):
        raise ValueError(f"{what} must be one positive int or {dims} of them, got {size!r}")
    return values


def check_multiple(size: Sequence[int], patch_size: Sequence[int]) -> None:
    """Raise ValueError unless every axis is a positive multiple of the patch; the message gives a size that fits."""
    if len(size) != len(patch_size) or any(s < p or s % p for s, p in zip(size, patch_size, strict=False)):
        fit = tuple(max(1, -(-s // p)) * p for s, p in zip(size, patch_size, strict=False))
        raise ValueError(
            f"an input of {tuple(size)} voxels cannot be cut into patches of {tuple(patch_size)}: every axis must be "
            f"a multiple of the patch. Crop or pad it to {fit}, for example with medgmae.data.crop_or_pad"
        )


def grid_of(size: Sequence[int], patch_size: Sequence[int]) -> Shape:
    """Patches per axis of an input of ``size`` voxels.

    Raises:
        ValueError: an axis is not a positive multiple of the patch.
    """
    check_multiple(size, patch_size)
    return tuple(s // p for s, p in zip(size, patch_size, strict=True))


class PatchEmbed(nn.Module):
    """Cut an input into patches and project each: (B, C, *size) to (B, N, E) in raster order.

    The weight is a convolution's, (E, C, *patch), with kernel = stride = patch. It is applied as a product with the
    unfolded patches, so that only the visible ones are computed when ``keep`` is given. With ``norm_eps`` a layer norm
    of that epsilon follows.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: Sequence[int], norm_eps: float | None = None) -> None:
        super().__init__()
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}")
        self.in_chans, self.patch_size = in_chans, tuple(patch_size)
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
        TypeError: an input that is not a tensor.
        ValueError: an input of another rank or channel count, or of a size that is not a multiple of the patch.
    """
    dims = len(patch_size)
    wanted = f"the input must be a tensor (B, {in_chans}, {'D, H, W' if dims == 3 else 'H, W'}) of floats"
    if not isinstance(x, Tensor):
        hint = "pass its .tensor" if hasattr(x, "tensor") else "make it one with torch.as_tensor"
        raise TypeError(f"{wanted}, got a {type(x).__name__}; {hint}")
    if not x.is_floating_point():
        raise TypeError(f"{wanted}, got {x.dtype}; prepare the scan as the model expects it, or pass x.float()")
    shape = tuple(x.shape)
    if x.dim() == dims:
        raise ValueError(f"{wanted}, got {shape}, which has no batch and no channel axis; pass x[None, None]")
    if x.dim() == dims + 1:
        missing, hint = ("batch", "x[None]") if shape[0] == in_chans else ("channel", "x[:, None]")
        raise ValueError(f"{wanted}, got {shape}, which has no {missing} axis; pass {hint}")
    if x.dim() != dims + 2:
        raise ValueError(f"{wanted}, got {shape}")
    if shape[1] != in_chans:
        raise ValueError(f"{wanted}, got {shape}; build the model with in_chans={shape[1]} for another channel count")
    return grid_of(x.shape[2:], patch_size)


def tap_indices(indices: int | Sequence[int] | None, depth: int) -> list[int]:
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


def _named(axes: str, sizes: Sequence[int]) -> dict[str, int]:
    """Lengths by the letters of LAYOUTS. As many letters as sizes: dynamo in torch 2.6 takes no other zip."""
    return dict(zip(axes[: len(sizes)], sizes, strict=True))


def patchify(x: Tensor, patch_size: Size) -> Tensor:
    """Cut (B, C, *size) into (B, N, prod(patch) * C): patches in raster order, inside a patch channel fastest.

    Works for volumes (D, H, W) and images (H, W).

    Args:
        x: (B, C, *size).
        patch_size: voxels per axis of a patch, or one number for all.

    Raises:
        ValueError: an axis is not a multiple of the patch, or an input without batch or channel axis.
    """
    dims = x.dim() - 2
    if dims not in LAYOUTS:
        raise ValueError(f"patchify takes (B, C, D, H, W) or (B, C, H, W), got {tuple(x.shape)}")
    patch = to_tuple(patch_size, dims, "patch_size")
    check_multiple(x.shape[2:], patch)
    whole, patches = LAYOUTS[dims]
    return rearrange(x, f"{whole} -> {patches}", **_named("pqr", patch))


def unpatchify(patches: Tensor, patch_size: Size, grid_size: Sequence[int], channels: int) -> Tensor:
    """Inverse of :func:`patchify`: (B, N, prod(patch) * C) and the grid it came from to (B, C, *size).

    Args:
        patches: (B, N, prod(patch) * C).
        patch_size: voxels per axis of a patch, or one number for all.
        grid_size: patches per axis.
        channels: C.

    Raises:
        ValueError: the number of patches or their length does not fit.
    """
    patch = to_tuple(patch_size, len(grid_size), "patch_size")
    count, length = math.prod(grid_size), math.prod(patch) * channels
    if patches.shape[1:] != (count, length):
        raise ValueError(
            f"patches must be (B, {count}, {length}) for grid_size {tuple(grid_size)}, patch_size {patch} and "
            f"{channels} channels, got {tuple(patches.shape)}"
        )
    sizes = _named("dhw", grid_size) | _named("pqr", patch)
    whole, sequence = LAYOUTS[len(grid_size)]
    return rearrange(patches, f"{sequence} -> {whole}", c=channels, **sizes)
