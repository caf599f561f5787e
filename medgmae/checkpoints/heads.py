"""Rows of layers for queries and keys in another order: between the conventions of rotary positions.

Our rotation turns the pairs of channels (2 p, 2 p + 1) of a head, pair p having band p % m of axis p // m. Attention
does not notice a permutation of a head's channels that queries and keys share: other conventions are converted exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def from_halves(head_dim: int) -> list[int]:
    """Channels of a head whose pairs are (p, p + d / 2), in our order: "rotate halves"."""
    half = head_dim // 2
    return [place for pair in range(half) for place in (pair, pair + half)]


def from_axes(head_dim: int, axes: Sequence[int]) -> list[int]:
    """Channels of a head whose block of channels for axis ``axes[k]`` stands k-th, in our order: (1, 0, 2), say."""
    size = head_dim // len(axes)
    return [axes.index(axis) * size + place for axis in range(len(axes)) for place in range(size)]


def permute_heads(tensor: Tensor, channels: Sequence[int]) -> Tensor:
    """A weight (E, ...) or bias (E) of queries or keys, its rows permuted alike inside every head."""
    heads = tensor.reshape(-1, len(channels), *tensor.shape[1:])
    return heads[:, torch.tensor(channels, device=tensor.device)].reshape(tensor.shape)
