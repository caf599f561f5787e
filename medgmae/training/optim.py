"""Parameter groups and learning-rate schedule of MAE-style training, from timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def param_groups(
    model: nn.Module, weight_decay: float = 0.05, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: no decay for biases and norms, smaller steps for earlier layers when asked.

    Args:
        model: any module; layer-wise rates need one with ``group_matcher``, such as :class:`~medgmae.ViT`.
        weight_decay: of matrices and kernels; 1-D parameters, biases and what the model's ``no_weight_decay()`` names
            get none.
        layer_decay: factor per layer from the head (1) down to the stem (layer_decay ** (blocks + 1)), given as
            ``lr_scale`` in each group, which :func:`cosine_schedule` applies (Bao et al. 2022, BEiT).
    """
    from timm import optim

    timm_optim: Any = optim  # timm's annotations do not cover what it accepts
    undecayed: set[str] = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    if layer_decay is None:
        return timm_optim.param_groups_weight_decay(  # type: ignore[no-any-return]
            model, weight_decay=weight_decay, no_weight_decay_list=undecayed
        )
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"layer_decay needs a model with group_matcher, got {type(model).__name__}; pass its encoder")
    return timm_optim.param_groups_layer_decay(  # type: ignore[no-any-return]
        model, weight_decay=weight_decay, no_weight_decay_list=undecayed, layer_decay=layer_decay
    )


class CosineSchedule:
    """Sets an optimiser's rates for a time in epochs, fractions included; see :func:`cosine_schedule`."""

    def __init__(self, timm_schedule: Any) -> None:
        self._schedule = timm_schedule

    def step(self, epoch: float) -> float:
        """Set the rates for ``epoch`` (0 = start; 1.5 = the middle of the second) and return the unscaled one."""
        rates = self._schedule._get_lr(epoch)
        for group, rate in zip(self._schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * group.get("lr_scale", 1.0)
        return float(max(rates))


def cosine_schedule(
    optimizer: torch.optim.Optimizer, epochs: float, warmup_epochs: float = 0, min_lr: float = 0.0
) -> CosineSchedule:
    """Linear warm-up from 0, then half a cosine down to ``min_lr``; call ``.step(epoch)`` before every update.

    The peak is each group's ``lr`` at the time of the call, times its ``lr_scale``.

    Raises:
        ValueError: no epochs are left after the warm-up.
    """
    from timm import scheduler

    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f"warmup_epochs (={warmup_epochs}) must be at least 0 and less than epochs (={epochs})")
    timm_scheduler: Any = scheduler
    schedule = timm_scheduler.CosineLRScheduler(
        optimizer,
        t_initial=epochs - warmup_epochs,
        lr_min=min_lr,
        warmup_t=warmup_epochs,
        warmup_lr_init=0.0,
        warmup_prefix=True,
    )
    return CosineSchedule(schedule)
