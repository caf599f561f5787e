"""Heads of pre-trainings: from tokens into the space of a contrastive model, or to cosines with prototypes."""

from __future__ import annotations

import math

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

    def read(self, pooled: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens (B, N, E) one vector (B, P), and one for each token, (B, N, P); ``pooled`` is not needed."""
        projected = self(tokens)
        return self.pool(projected), self.dense(projected)

    def scores(self, vectors: Tensor, texts: Tensor) -> Tensor:
        """Probabilities (..., T) of texts (T, P), embedded by the model's own text encoder, for vectors (..., P)."""
        cosines = F.normalize(vectors, dim=-1) @ F.normalize(texts, dim=-1).mT
        return (cosines / self.temperature).softmax(-1)


class Projector(nn.Module):
    """DINO's head (Caron et al. 2021, https://arxiv.org/abs/2104.14294): three linear layers with GELU between them, a
    vector of length 1, and its cosines with ``out_dim`` prototypes.

    Args:
        in_dim: width of the pooled vector.
        hidden_dim: width of the two layers between.
        bottleneck_dim: width of the vector whose length is made 1.
        out_dim: number K of prototypes.
        lengths: give every prototype a length that is learned, as in DINOv2, not 1.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        out_dim: int = 65536,
        *,
        lengths: bool = False,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.prototypes = nn.Parameter(torch.empty(out_dim, bottleneck_dim))
        self.lengths = nn.Parameter(torch.ones(out_dim)) if lengths else None
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.kaiming_uniform_(self.prototypes, a=math.sqrt(5))  # as torch's linear layers, DINO's last one too

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) to (..., K), each number from -1 to 1, times the prototype's length."""
        cosines = F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes, dim=-1))
        return cosines if self.lengths is None else cosines * self.lengths


class PrototypeHeads(nn.Module):
    """The two heads of DINOv2's training code: of the class token, and of patches (iBOT's).

    Args:
        embed_dim: width E.
        hidden_dim: see :class:`Projector`; likewise ``bottleneck_dim`` and ``out_dim``, the number K of prototypes.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, bottleneck_dim: int, out_dim: int) -> None:
        super().__init__()
        self.dino = Projector(embed_dim, hidden_dim, bottleneck_dim, out_dim, lengths=True)
        self.ibot = Projector(embed_dim, hidden_dim, bottleneck_dim, out_dim, lengths=True)

    def read(self, pooled: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens (B, E) to (B, K), patches (B, N, E) to (B, N, K)."""
        return self.dino(pooled), self.ibot(tokens)
