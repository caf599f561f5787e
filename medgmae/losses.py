"""Reconstruction losses over patches."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

NormTarget = Literal["unbiased", "biased"]

# Added to a patch's variance before the root, in every published variant.
PATCH_EPS = 1e-6


def patch_statistics(patches: Tensor, norm: NormTarget) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, both (B, N, 1): std = sqrt(var + 1e-6).

    ``norm`` says which variance: "unbiased" divides by n - 1 (He et al. 2022 and TANGERINE), "biased" by n (a layer
    norm without affine part: SelfMedMAE and the voxel baseline of MedGMAE).
    """
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=int(norm == "unbiased"))
    return mean, (variance + PATCH_EPS).sqrt()


def patch_mse(pred: Tensor, target: Tensor, mask: Tensor, norm: NormTarget | None = None) -> Tensor:
    """Mean squared error over the masked patches, a scalar; computed in float32.

    Args:
        pred: (B, N, L) predicted patch vectors.
        target: (B, N, L) true patch vectors.
        mask: (B, N), 1 where a patch counts. With nothing masked the loss is 0.
        norm: None compares raw values; otherwise each true patch is normalised, see :func:`patch_statistics`.
    """
    pred, target, mask = pred.float(), target.float(), mask.float()
    if norm is not None:
        mean, std = patch_statistics(target, norm)
        target = (target - mean) / std
    per_patch = (pred - target).square().mean(-1)
    return (per_patch * mask).sum() / mask.sum().clamp(min=1)
