"""The registered models, and what the contract tests of all of them share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import encoder_of, full_size, is_autoencoder, segments
from torch import Tensor, nn

import medgmae
from medgmae.layers.masking import Masking

NAMES = medgmae.list_models()
ENCODERS = [name for name in NAMES if encoder_of(full_size(name)) is full_size(name)]
AUTOENCODERS = [name for name in NAMES if is_autoencoder(full_size(name))]
SEGMENTERS = [name for name in NAMES if segments(name)]
OTHER_GRID = (1, 3, 2)

# One of each kind, whatever its size and width: small() makes the others the same but for the patch. They run in the
# slow tests.
FIRST = {re.sub(r"_[a-z]+_patch\d+_[\dx]+(_(dec|f)\d+)?", "", name): name for name in reversed(NAMES)}.values()


def _names(rare: Callable[[str], bool]) -> Any:
    """A parameter ``name``; rare ones in the slow tests."""
    return pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * rare(n)) for n in NAMES])


every = _names(lambda name: name in SEGMENTERS and name not in FIRST)  # around encoders that are tested by themselves
# Compilers take seconds for each; of models that share their classes one runs each time.
ALIKE = ("glmae_", "_cgs", "_hierarchical", "_residual", "simmim_", "unetr2d_", "_slice", "unetr_primus", "unetr_vim")
# Encoders whose autoencoder runs, autoencoders that test_gmae.py and the test of gradients through a compiler run, and
# one of images, whose encoder runs.
ELSEWHERE = ("seqvit_", "primus_", "mae_vit_", "gmae_vit_", "mae2d_")
through_compilers = _names(
    lambda name: name not in FIRST or any(part in name for part in ALIKE) or name.startswith(ELSEWHERE)
)
every_encoder = pytest.mark.parametrize("name", ENCODERS)
every_autoencoder = pytest.mark.parametrize("name", AUTOENCODERS)


def masking_for(x: Tensor, model: nn.Module) -> Masking:
    """A fixed masking of an input."""
    patch = encoder_of(model).patch_size
    tokens = math.prod(s // p for s, p in zip(x.shape[2:], patch, strict=True))
    noise = torch.linspace(0, 1, len(x) * tokens).reshape(tokens, len(x)).T
    return medgmae.random_masking(len(x), tokens, 0.5, noise=(noise * 7919) % 1)


def run(model: Any, x: Tensor) -> Tensor:
    """The tensor that a model computes: pooled vector, logits, or what is compared with the input."""
    return prediction(model, x, masking_for(x, model)) if is_autoencoder(model) else model(x)


def prediction(model: Any, x: Tensor, masking: Masking) -> Tensor:
    """What an autoencoder compares with the input: patches, or a volume."""
    out = model(x, masking)
    return out.volume if hasattr(out, "volume") else out.pred


def patch_length(model: Any) -> int:
    """Numbers that a masked autoencoder of voxels predicts of a patch: one per voxel and channel, or a Fourier code."""
    voxels: int = model.encoder.in_chans * torch.Size(model.encoder.patch_size).numel()
    return voxels * (2 * getattr(model, "fourier_frequencies", 0) or 1)


def loss_of(model: Any, x: Tensor) -> Tensor:
    """A scalar that depends on every trained parameter."""
    return model(x, masking_for(x, model)).loss if is_autoencoder(model) else model(x).square().sum()


def plain(output: Any) -> Any:
    """An output as assert_close compares it: Gaussians as their tensors."""
    if isinstance(output, Tensor):
        return output
    return [part.tensors() if isinstance(part, medgmae.Gaussians) else part for part in output]
