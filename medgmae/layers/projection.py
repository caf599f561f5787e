"""From tokens into the space of a contrastive model: a linear layer, and attention from their mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.layers.blocks import check_heads


class Projection(nn.Module):
    """COLIPRI's projector and pooler: ``forward`` projects tokens (B, N, E) to (B, N, P).

    One attention pools: its query is the mean of the projected tokens, its keys and values are these tokens. What it
    does to a value, without the attention, makes of each projected token a vector of the pooled ones' space.

    Args:
        embed_dim: width E.
        width: P.
        num_heads: of the attention.
    """

    temperature: Tensor

    def __init__(self, embed_dim: int, width: int, num_heads: int) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.width, self.num_heads = width, num_heads
        self.proj = nn.Linear(embed_dim, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, E) to (B, N, P)."""
        return self.proj(tokens)  # type: ignore[no-any-return]

    def pool(self, projected: Tensor) -> Tensor:
        """One vector (B, P) of projected tokens (B, N, P)."""
        parts = zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
        given = (projected.mean(1, keepdim=True), projected, projected)
        shape = (len(projected), -1, self.num_heads, self.width // self.num_heads)
        query, keys, values = (
            F.linear(x, *part).reshape(shape).transpose(1, 2) for x, part in zip(given, parts, strict=True)
        )
        found = F.scaled_dot_product_attention(query, keys, values)  # (B, heads, 1, P / heads)
        return self.out(found.flatten(1))  # type: ignore[no-any-return]

    def dense(self, projected: Tensor) -> Tensor:
        """A vector for every projected token: (B, N, P) to (B, N, P)."""
        weight, bias = self.qkv.weight.chunk(3)[2], self.qkv.bias.chunk(3)[2]
        return self.out(F.linear(projected, weight, bias))  # type: ignore[no-any-return]

    def scores(self, vectors: Tensor, texts: Tensor) -> Tensor:
        """Probabilities (..., T) of texts (T, P), embedded by the model's own text encoder, for vectors (..., P)."""
        cosines = F.normalize(vectors, dim=-1) @ F.normalize(texts, dim=-1).mT
        return (cosines / self.temperature).softmax(-1)
