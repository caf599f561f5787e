"""Masks as explicit index tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Draws of shares after which even ones are taken: at low mask ratios hardly any others fit.
_DRAWS = 100


class Masking(NamedTuple):
    """Which patches an encoder sees.

    keep: (B, n) long, raster indices of the visible patches, in the order in which the encoder gets them.
    restore: (B, N) long, where raster patch i stands in the sequence [visible, masked].
    mask: (B, N) float, 1 = masked, 0 = visible, raster order.
    """

    keep: Tensor
    restore: Tensor
    mask: Tensor

    @property
    def hidden(self) -> Tensor:
        """(B, N - n) long, raster indices of the masked patches."""
        return self.restore.argsort(dim=1)[:, self.keep.shape[1] :]

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


def sequence_masking(
    batch: int,
    sequences: int,
    tokens: int,
    ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Masking:
    """Hide a random share of the patches of several sequences of one scan, some of them more than others.

    Of every sample ``int(sequences * tokens * (1 - ratio))`` patches stay visible. How they are shared out over the
    sequences is drawn uniformly from all ways to do so (a Dirichlet distribution with ones; a draw that asks a sequence
    for more than it has is repeated), which of a sequence's patches they are as well: BM-MAE's masking.

    Args:
        batch: number of samples B.
        sequences: number of sequences M.
        tokens: number of patches N of each.
        ratio: share to hide, 0 <= ratio < 1.
        generator: source of the random numbers.
        device: where to draw them.

    Returns:
        a masking of M N patches, those of the first sequence first.

    Raises:
        ValueError: ratio outside [0, 1), or no patch left visible.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"mask ratio must be in [0, 1), got {ratio}")
    device = generator.device if generator is not None and device is None else device
    visible = visible_count(sequences * tokens, ratio)
    if visible < 1:
        raise ValueError(f"mask ratio {ratio} of {sequences * tokens} patches leaves none visible; lower the ratio")
    counts = (_shares(batch, sequences, tokens / visible, generator, device) * visible).round()
    noise = torch.rand(batch, sequences, tokens, generator=generator, device=device)
    rank = noise.argsort(dim=2).argsort(dim=2)
    # Counts that rounding left one too high or too low are settled here: what is over goes, what is missing is found.
    hidden = (rank >= counts.unsqueeze(2)).flatten(1)
    order = hidden + torch.rand(batch, sequences * tokens, generator=generator, device=device)
    shuffle = torch.argsort(order, dim=1)
    restore = torch.argsort(shuffle, dim=1)
    return Masking(shuffle[:, :visible], restore, (restore >= visible).to(torch.float32))


def _shares(
    batch: int, sequences: int, most: float, generator: torch.Generator | None, device: torch.device | str | None
) -> Tensor:
    """(B, M) shares that sum to 1, uniform over all such with none above ``most``; even ones where few are."""
    # Exponential numbers over their sum are uniform over the simplex.
    drawn = -torch.rand(_DRAWS, batch, sequences, generator=generator, device=device).clamp_min(1e-12).log()
    drawn = drawn / drawn.sum(dim=2, keepdim=True)
    fits = (drawn <= most).all(dim=2)  # (draws, B)
    first = fits.to(torch.uint8).argmax(dim=0)
    chosen = drawn[first, torch.arange(batch, device=device)]
    return torch.where(fits.any(dim=0).unsqueeze(1), chosen, torch.full_like(chosen, 1 / sequences))
