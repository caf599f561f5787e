"""Small builds of every registered architecture, for tests."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

import medgmae
from medgmae.models.autoencoder import Autoencoder
from medgmae.models.seqvit import SequenceViT

torch.set_num_threads(1)  # the tensors are so small that threads would only wait for each other


@functools.cache
def full_size(name: str) -> Any:
    """The registered architecture itself, without storage."""
    with torch.device("meta"):
        return medgmae.create_model(name)


def encoder_of(model: nn.Module) -> Any:
    """The model, or the encoder in it."""
    return getattr(model, "encoder", model)


def size_of(name: str, grid: tuple[int, ...] = (2, 2, 2)) -> tuple[int, ...]:
    """Voxels per axis of an input with so many patches per axis (the last ones of ``grid`` for images)."""
    patch = encoder_of(full_size(name)).patch_size
    grid = grid[-len(patch) :]
    if getattr(full_size(name), "slice_axis", None) is not None:
        grid = (*grid[:2], 1)
    return tuple(g * p for g, p in zip(grid, patch, strict=True))


def is_autoencoder(model: nn.Module) -> bool:
    """Whether a model takes a masking and gives a loss."""
    return isinstance(model, Autoencoder)


def segments(name: str) -> bool:
    """Whether the architecture predicts a map of classes."""
    return isinstance(full_size(name), medgmae.UNETR)


def renders(name: str) -> bool:
    """Whether the architecture predicts Gaussians instead of voxels."""
    return isinstance(full_size(name), medgmae.GaussianMAE)


def has_blocks(part: Any) -> bool:
    """Whether a part has blocks that mix tokens."""
    return hasattr(part, "blocks")


def has_table(model: nn.Module) -> bool:
    """Whether an encoder, or the one in a model, has a table of positions."""
    return encoder_of(model).pos_embed is not None


def has_bridge(decoder: Any) -> bool:
    """Whether a decoder has a width of its own, and a layer from the encoder's to it."""
    return not isinstance(getattr(decoder, "embed", nn.Identity()), nn.Identity)


def by_sequence(name: str) -> bool:
    """Whether every channel has a stem of its own, by name."""
    return isinstance(encoder_of(full_size(name)), SequenceViT)


def attends(part: Any) -> bool:
    """Whether an encoder or decoder is a transformer, with attention heads, and not a state space."""
    return hasattr(part.blocks[0], "attn")


def small(name: str, **overrides: Any) -> Any:
    """A registered architecture with narrow, few blocks and two patches per axis; random numbers everywhere.

    The tables and tokens that start at zero, or fixed, get values, so that nothing can hide behind a zero.
    """
    options: dict[str, Any] = {"img_size": size_of(name), "depth": 2, "embed_dim": 24}
    if attends(encoder_of(full_size(name))):
        options |= {"num_heads": 2}
    if segments(name):
        options |= {"feature_size": 3, "num_classes": 4, "drop_path_rate": 0.0}
    if is_autoencoder(full_size(name)):
        decoder = full_size(name).decoder
        options |= {"decoder_embed_dim": 12} if has_bridge(decoder) else {}
        options |= {"decoder_depth": 1} if has_blocks(decoder) else {}
        options |= {"decoder_num_heads": 2} if has_blocks(decoder) and attends(decoder) else {}
    if renders(name):
        levels = len(set(full_size(name).decoder.taps))  # each reads after a block of its own
        options |= {"num_gaussians": 5, "decoder_depth": levels}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = medgmae.create_model(name, **{**options, **overrides})
    return randomize(model)


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to every parameter, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def volume(name: str, batch: int = 2, grid: tuple[int, ...] = (2, 2, 2), chans: int | None = None) -> Tensor:
    """A random input for :func:`small`."""
    chans = chans or encoder_of(full_size(name)).in_chans
    return torch.rand(batch, chans, *size_of(name, grid), generator=torch.Generator().manual_seed(batch))


def state_copy(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, detached from later changes."""
    return copy.deepcopy(dict(model.state_dict()))


def assert_same_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    state = model.state_dict()
    assert list(state) == list(expected)
    different = [name for name, value in expected.items() if not torch.equal(state[name], value)]
    assert not different, different
