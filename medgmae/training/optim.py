"""Parameter groups and learning-rate schedules of MAE-style training, from timm."""

from __future__ import annotations

from typing import Any, Protocol

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


def scale_lr(lr: float, batch_size: int) -> float:
    """The peak learning rate for a batch: ``lr * batch_size / 256``, as MAE's code and all after it state rates
    (Goyal et al. 2017).

    Args:
        lr: for a batch of 256.
        batch_size: of all devices and accumulated steps together.

    Raises:
        ValueError: a batch of nothing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return lr * batch_size / 256


class Schedule(Protocol):
    """Sets the learning rates of an optimiser: timm's scheduler, which takes fractions of an epoch, too."""

    def step(self, epoch: float) -> None:
        """Set the rate of every group, times its ``lr_scale``; 0 is the start, 1.5 the middle of the second epoch."""


def cosine_schedule(
    optimizer: torch.optim.Optimizer, epochs: float, warmup_epochs: float = 0, min_lr: float = 0.0
) -> Schedule:
    """Linear warm-up from 0, then half a cosine down to ``min_lr``; call ``.step(epoch)`` before every update.

    The peak of a group is its ``lr`` at the time of the call (``initial_lr`` where an earlier schedule left one), times
    its ``lr_scale``. Any unit of time serves as an epoch, for example updates.

    Raises:
        ValueError: no epochs are left after the warm-up.
    """
    from timm import scheduler

    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f"warmup_epochs (={warmup_epochs}) must be at least 0 and less than epochs (={epochs})")
    timm_scheduler: Any = scheduler  # timm's annotations do not cover what it accepts
    schedule: Schedule = timm_scheduler.CosineLRScheduler(
        optimizer,
        t_initial=epochs - warmup_epochs,
        lr_min=min_lr,
        warmup_t=warmup_epochs,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        cycle_decay=0.5,  # of the second cycle, which never comes; with 1 timm warns of a cosine of one epoch
    )
    return schedule


def poly_schedule(
    optimizer: torch.optim.Optimizer, epochs: int, warmup_epochs: int = 0, power: float = 0.9
) -> Schedule:
    """nnU-Net's schedule with a warm-up, as OpenMind's pre-trainings have it; call ``.step(epoch)`` before every epoch.

    Epoch e of the W warm-up epochs has (e + 1) / W of the peak; after them the rate falls as (1 - share)^power, where
    the share is that of the epochs after the warm-up which are over. Peaks are those of :func:`cosine_schedule`.

    Raises:
        ValueError: no epochs are left after the warm-up.
    """
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f"warmup_epochs (={warmup_epochs}) must be at least 0 and less than epochs (={epochs})")
    return _Polynomial(optimizer, epochs, warmup_epochs, power)


class _Polynomial:
    """See :func:`poly_schedule`."""

    def __init__(self, optimizer: torch.optim.Optimizer, epochs: int, warmup: int, power: float) -> None:
        self.groups, self.epochs, self.warmup, self.power = optimizer.param_groups, epochs, warmup, power
        for group in self.groups:
            group.setdefault("initial_lr", group["lr"])

    def step(self, epoch: float) -> None:
        """Set the rate of every group for a whole epoch."""
        over = min(int(epoch), self.epochs)
        if over < self.warmup:
            factor = (over + 1) / self.warmup
        else:
            factor = (1 - (over - self.warmup) / (self.epochs - self.warmup)) ** self.power
        for group in self.groups:
            group["lr"] = group["initial_lr"] * factor * group.get("lr_scale", 1.0)
