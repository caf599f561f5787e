"""Learning rates by their closed form: warm-up, half a cosine, fractions of an epoch, and each group's share."""

from __future__ import annotations

import logging
import math
import warnings

import pytest
import torch
from torch import nn

import medgmae
from medgmae.training import cosine_schedule, param_groups


def optimizer_with(*scales: float | None, lr: float = 0.4) -> torch.optim.Optimizer:
    """SGD with a group for every ``lr_scale``; None leaves it out, as groups without layer-wise rates have it."""
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], **({} if scale is None else {"lr_scale": scale})} for scale in scales
    ]
    return torch.optim.SGD(groups, lr=lr)


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def closed_form(epoch: float, epochs: float, warmup: float, min_lr: float, lr: float = 0.4) -> float:
    if epoch < warmup:
        return lr * epoch / warmup
    done = min((epoch - warmup) / (epochs - warmup), 1)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * done)) / 2


@pytest.mark.parametrize(
    ("epochs", "warmup", "min_lr"), [(10, 0, 0.0), (10, 2, 0.01), (3.5, 0.75, 0.0), (3, 1, 0.0), (1, 0, 0.02)]
)
def test_rates_are_those_of_the_closed_form(epochs: float, warmup: float, min_lr: float) -> None:
    scales = (None, 1.0, 0.25)
    optimizer = optimizer_with(*scales)
    schedule = cosine_schedule(optimizer, epochs, warmup, min_lr)
    for epoch in (0, 0.3, 0.5, 0.75, 1, 1.5, 2, 2.999, 3.5, 7, 10, 12):
        schedule.step(epoch)
        expected = closed_form(epoch, epochs, warmup, min_lr)
        assert rates(optimizer) == pytest.approx([expected * (scale or 1) for scale in scales], abs=1e-15), epoch


def test_epochs_may_come_in_any_order() -> None:
    """As after a resumed run: the rate depends on the epoch alone."""
    optimizer = optimizer_with(0.5)
    schedule = cosine_schedule(optimizer, 10, 2)
    schedule.step(9)
    again = cosine_schedule(optimizer, 10, 2)  # a second one starts from the same peak, not from the rate of epoch 9
    again.step(6)
    assert rates(optimizer) == pytest.approx([0.5 * closed_form(6, 10, 2, 0.0)])


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (2, 1), (5, 4.0)])
def test_a_cosine_of_one_epoch_is_no_reason_for_a_warning(
    epochs: float, warmup: float, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = optimizer_with(None)
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = cosine_schedule(optimizer, epochs, warmup)
        schedule.step(warmup + 0.5)
    assert rates(optimizer) == pytest.approx([0.2])
    assert caplog.records == []


@pytest.mark.parametrize(("epochs", "warmup"), [(5, 5), (5, 6), (0, 0), (5, -1)])
def test_something_must_be_left_after_the_warm_up(epochs: float, warmup: float) -> None:
    with pytest.raises(ValueError, match="less than epochs"):
        cosine_schedule(optimizer_with(None), epochs, warmup)


def test_layer_wise_rates_of_a_model() -> None:
    model = medgmae.create_model("vit_nano_patch8_32", num_classes=2)
    groups = param_groups(model, layer_decay=0.5)
    optimizer = torch.optim.AdamW(groups, lr=0.4)
    cosine_schedule(optimizer, 10, 2).step(1)
    assert {group["lr_scale"] for group in groups} > {1.0, 0.5}
    assert rates(optimizer) == pytest.approx([0.2 * group["lr_scale"] for group in groups])


def test_layer_wise_rates_need_a_model_that_knows_its_layers() -> None:
    with pytest.raises(ValueError, match="layer_decay needs a model with group_matcher, got Linear"):
        param_groups(nn.Linear(2, 2), layer_decay=0.5)
