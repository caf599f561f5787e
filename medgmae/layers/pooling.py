"""From tokens to one vector: the words of ``global_pool``, the same for every family of encoders.

- "token": the class token, the mean of several.
- "avg": the mean of the patch tokens.
- "max": their largest value, feature by feature.
- "token_avg": class token and mean of the patches side by side, twice as wide (TANGERINE).
- "last": the last patch token.
- "max_logit": the head is applied to every patch; the largest logit counts, class by class (3D Mamba MAE).
- "none": no pooling; one vector per patch.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

GlobalPool = Literal["token", "avg", "max", "token_avg", "last", "max_logit", "none"]

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
    """Class tokens (B, P, E) and patch tokens (B, N, E) to (B, F); for "none" and "max_logit" the patch tokens."""
    if global_pool == "token":
        return prefix.mean(1)
    if global_pool == "avg":
        return patches.mean(1)
    if global_pool == "max":
        return patches.amax(1)
    if global_pool == "token_avg":
        return torch.cat([prefix.mean(1), patches.mean(1)], dim=1)
    return patches[:, -1] if global_pool == "last" else patches
