"""Masks as explicit index tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Masking(NamedTuple):
    """Which patches an encoder sees.

    keep: (B, n) long, raster indices of the visible patches, in the order in which the encoder gets them.
    restore: (B, N) long, where raster patch i stands in the sequence [visible, masked].
    mask: (B, N) float, 1 = masked, 0 = visible, raster order.
    """

    keep: Tensor
    restore: Tensor
    mask: Tensor

    def __repr__(self) -> str:
        return f"Masking({self.keep.shape[-1]} of {self.restore.shape[-1]} patches visible, batch {len(self.restore)})"


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
