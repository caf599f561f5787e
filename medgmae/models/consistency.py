"""Consistency of what two networks make of views of one scan: DINO's loss (Caron et al. 2021,
https://arxiv.org/abs/2104.14294), and measures of how different the vectors of different scans are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def teacher_shares(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """What a teacher says of its views, (..., K) that add up to 1: softmax((logits - center) / temperature)."""
    return ((_exact(logits) - center) / temperature).softmax(-1)


def consistency(shares: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of a student's views with a teacher's, over all pairs of one scan, a scalar.

    -sum_k shares_k log softmax(logits / temperature)_k, the mean over pairs and scans.

    Args:
        shares: (B, p, K), see :func:`teacher_shares`.
        logits: (B, m, K) of the student.
        temperature: of the student.
    """
    logs = (_exact(logits) / temperature).log_softmax(-1)
    # the mean over pairs of products is the product of the means
    products: Tensor = shares.mean(1) * logs.mean(1)
    return -products.sum(-1).mean()


def entropy(shares: Tensor) -> Tensor:
    """-sum_k s_k log s_k of (..., K), in nats: 0 where one prototype has it all, log K where all have the same."""
    summands: Tensor = torch.special.entr(shares)
    return summands.sum(-1)


def effective_rank(vectors: Tensor) -> Tensor:
    """How many directions vectors (n, F) spread in: exp of the entropy of the shares of their singular values about
    the mean (Roy and Vetterli 2007); 1 to min(n - 1, F), and 0 where all vectors are one."""
    values = torch.linalg.svdvals(_exact(vectors) - _exact(vectors).mean(0))
    total = values.sum()
    shares = values / total.clamp(min=torch.finfo(values.dtype).tiny)
    return torch.where(total > 0, entropy(shares).exp(), torch.zeros_like(total))


def koleo(vectors: Tensor) -> Tensor:
    """The KoLeo regulariser of vectors (n, F): minus the mean log distance to the nearest of the others, each made to
    have length 1 (Sablayrolles et al. 2019, https://arxiv.org/abs/1806.03198; as in DINOv2). 0 of a single vector."""
    if len(vectors) < 2:
        return vectors.sum() * 0
    unit = F.normalize(_exact(vectors), dim=-1)
    near = (unit @ unit.T).detach().fill_diagonal_(-1).argmax(1)
    distances = torch.linalg.vector_norm(unit - unit[near], dim=-1)
    logs: Tensor = (distances + 1e-8).log()
    return -logs.mean()


def _exact(x: Tensor) -> Tensor:
    """Half precision is not enough for exponentials at a temperature of 0.04."""
    return x if x.dtype == torch.float64 else x.float()
