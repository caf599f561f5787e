"""Masks as explicit index tensors, and volumes as sequences of patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

# By number of axes, in einops' words: an input, and the same as a sequence of patch vectors, channel fastest.
LAYOUTS = {
    2: ("b c (d p) (h q)", "b (d h) (p q c)"),
    3: ("b c (d p) (h q) (w r)", "b (d h w) (p q r c)"),
}


class Masking(NamedTuple):
    """Which patches an encoder sees.

    keep: (B, n) long, raster indices of the visible patches, in the order in which the encoder gets them.
    restore: (B, N) long, where raster patch i stands in the sequence [visible, masked].
    mask: (B, N) float, 1 = masked, 0 = visible, raster order.
    """

    keep: Tensor
    restore: Tensor
    mask: Tensor


def visible_count(tokens: int, ratio: float) -> int:
    """Number of visible patches: ``int(tokens * (1 - ratio))`` in double precision, as every MAE code base has it."""
    return int(tokens * (1 - ratio))


def random_masking(
    batch: int,
    tokens: int,
    ratio: float,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Masking:
    """Hide a random share of the patches of every sample.

    The patches with the smallest noise stay visible, in the order of their noise (He et al. 2022, section 3).

    Args:
        batch: number of samples B.
        tokens: number of patches N per sample.
        ratio: share to hide, 0 <= ratio < 1.
        noise: (B, N), any float dtype; the same noise gives the same masking. Drawn uniformly when None.
        generator: source of the noise when ``noise`` is None.
        device: where to draw the noise when ``noise`` is None.

    Raises:
        ValueError: ratio outside [0, 1), no patch left visible, or noise of another shape.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"mask ratio must be in [0, 1), got {ratio}")
    visible = visible_count(tokens, ratio)
    if visible < 1:
        raise ValueError(f"mask ratio {ratio} of {tokens} patches leaves none visible; lower the ratio")
    if noise is None:
        device = generator.device if generator is not None and device is None else device
        noise = torch.rand(batch, tokens, generator=generator, device=device)
    if noise.shape != (batch, tokens):
        raise ValueError(f"noise must be {(batch, tokens)} (batch, patches), got {tuple(noise.shape)}")
    shuffle = torch.argsort(noise, dim=1, stable=True)
    restore = torch.argsort(shuffle, dim=1)
    return Masking(shuffle[:, :visible], restore, (restore >= visible).to(torch.float32))


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
