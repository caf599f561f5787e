"""From tokens to one vector: the words of ``global_pool``, the same for every family of encoders.

- "token": the class token, the mean of several.
- "avg": the mean of the patch tokens.
- "max": their largest value, feature by feature.
- "token_avg": class token and mean of the patches side by side, twice as wide (TANGERINE).
- "last": the last patch token.
- "attention": what one learned query finds among the patch tokens, the attentive probe (V-JEPA, Bardes et al. 2024).
- "max_logit": the head is applied to every patch; the largest logit counts, class by class (3D Mamba MAE).
- "none": no pooling; one vector per patch.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

GlobalPool = Literal["token", "avg", "max", "token_avg", "last", "attention", "max_logit", "none"]

# What other libraries say.
_OTHER_WORDS: dict[object, GlobalPool] = {"": "none", None: "none", "cls": "token", "mean": "avg", "cat": "token_avg"}


def check_pool(global_pool: GlobalPool, class_tokens: int) -> None:
    """Raise ValueError for another word, or for one that needs a class token where there is none."""
    if global_pool not in get_args(GlobalPool):
        words = ", ".join(map(repr, get_args(GlobalPool)))
        hint = f"; did you mean {_OTHER_WORDS[global_pool]!r}?" if global_pool in _OTHER_WORDS else ""
        raise ValueError(f"global_pool must be one of {words}, got {global_pool!r}{hint}")
    if global_pool in ("token", "token_avg") and not class_tokens:
        raise ValueError(
            f"global_pool={global_pool!r} needs a class token; build the encoder with one, or use global_pool='avg'"
        )


def pooled_width(embed_dim: int, global_pool: GlobalPool) -> int:
    """Width of the pooled vector of tokens ``embed_dim`` wide."""
    return embed_dim * (2 if global_pool == "token_avg" else 1)


def pool_tokens(prefix: Tensor, patches: Tensor, global_pool: GlobalPool) -> Tensor:
    """Class tokens (B, P, E) and patch tokens (B, N, E) to (B, F); for what pools later, or not, the patch tokens."""
    if global_pool == "token":
        return prefix.mean(1)
    if global_pool == "avg":
        return patches.mean(1)
    if global_pool == "max":
        return patches.amax(1)
    if global_pool == "token_avg":
        return torch.cat([prefix.mean(1), patches.mean(1)], dim=1)
    return patches[:, -1] if global_pool == "last" else patches


class AttentionPool(nn.Module):
    """One learned query that attends to the patch tokens, in heads about 64 wide: (B, N, E) to (B, E).

    Args:
        dim: width E.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.norm = nn.LayerNorm(dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Initialise the query."""
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, E) to (B, E)."""
        batch, count, dim = patches.shape
        keys, values = self.kv(self.norm(patches)).reshape(batch, count, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        query = self.query.to(keys.dtype).reshape(1, self.heads, 1, -1).expand(batch, -1, -1, -1)
        found = functional.scaled_dot_product_attention(query, keys, values)  # (B, heads, 1, E / heads)
        return self.proj(found.reshape(batch, dim))  # type: ignore[no-any-return]


def make_pool(global_pool: GlobalPool, embed_dim: int) -> nn.Module:
    """What pools with weights of its own, after :func:`pool_tokens`; an identity where nothing does."""
    return AttentionPool(embed_dim) if global_pool == "attention" else nn.Identity()
