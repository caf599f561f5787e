"""ViT's own options. What every model must do is tested in test_models.py."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import attends, encoder_of, full_size, small, volume
from torch import nn

import medgmae

NAMES = medgmae.list_models("vit*")

every_vit = pytest.mark.parametrize("name", NAMES)


def test_these_are_transformers() -> None:
    assert len(NAMES) >= 14
    assert all(attends(encoder_of(full_size(name))) for name in NAMES)


@every_vit
@pytest.mark.parametrize("pool", ["token", "avg", "max", "token_avg"])
def test_pooling(name: str, pool: str) -> None:
    model, x = small(name, global_pool=pool).eval(), volume(name)
    tokens = model.forward_features(x)
    cls, patches = tokens[:, 0], tokens[:, model.num_prefix_tokens :]
    mean, largest = patches.mean(1), patches.amax(1)
    pooled = {"token": cls, "avg": mean, "max": largest, "token_avg": torch.cat([cls, mean], 1)}[pool]
    assert model.num_features == pooled.shape[1]
    torch.testing.assert_close(model(x), model.fc_norm(pooled))
    assert isinstance(model.fc_norm, nn.Identity) == (pool == "token")


@every_vit
def test_without_class_token(name: str) -> None:
    registers = {"registers": 0} if full_size(name).num_prefix_tokens > 1 else {}  # which stand behind a class token
    model, x = small(name, class_token=False, global_pool="avg", fc_norm=False, **registers), volume(name)
    assert model.forward_features(x).shape[1] == math.prod(model.grid_size)
    torch.testing.assert_close(model(x), model.forward_features(x).mean(1))
    with pytest.raises(ValueError, match="needs a class token"):
        small(name, class_token=False, **registers)
