"""What the functions of this room are given: a model, whose encoder they run, and a scan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeGuard

from torch import Tensor, nn

from medgmae.data import Volume
from medgmae.layers.patches import Shape

# What these functions take as a scan.
Scan = Volume


class Encoder(Protocol):
    """What these functions ask of an encoder of this library."""

    img_size: Shape
    patch_size: Shape
    in_chans: int
    num_prefix_tokens: int
    map_reduction: str
    norm: nn.Module

    def forward_features(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens (B, P + N, E)."""

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled vectors (B, F)."""

    def forward_last_block(self, x: Tensor) -> Tensor:
        """What the last block returns, (B, P + N, E)."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them."""


def encoder_of(model: nn.Module, caller: str) -> Encoder:
    """The encoder of a masked autoencoder, or the encoder itself.

    Raises:
        TypeError: not a model of this library.
        ValueError: a model for images.
    """
    encoder: Any = getattr(model, "encoder", model)
    if not all(hasattr(encoder, name) for name in ("patch_size", "in_chans", "forward_features", "forward_last_block")):
        raise TypeError(f"{caller} needs a model of this library, got {type(model).__name__}")
    if len(encoder.patch_size) != 3:
        raise ValueError(
            f"{caller} needs a model for volumes; {type(encoder).__name__} with patches of "
            f"{tuple(encoder.patch_size)} pixels is one for images"
        )
    checked: Encoder = encoder
    return checked


def is_batch(x: Tensor | Scan) -> TypeGuard[Tensor]:
    """Whether this is what a model takes, (B, C, D, H, W) without a geometry, and not one scan.

    A tensor may be a scan too: MONAI's MetaTensor (C, D, H, W), which carries its affine.
    """
    return isinstance(x, Tensor) and not (x.dim() == 4 and hasattr(x, "affine"))


def volume_of(scan: Tensor | Scan) -> Volume:
    """A scan as a volume.

    Raises:
        TypeError: something else.
    """
    if not isinstance(scan, Volume):
        raise TypeError(
            f"the scan must be a Volume that has been prepared for the model, such as "
            f"medgmae.create_transform(model)(path) gives; got {type(scan).__name__}"
        )
    return scan


def check_channels(encoder: Encoder, channels: int) -> None:
    """Raise ValueError unless a scan of so many channels fits the encoder."""
    if channels != encoder.in_chans:
        raise ValueError(
            f"the scan has {channels} channel(s), the model takes {encoder.in_chans}: the contrasts that it was "
            f"trained on, in its order. Or build the model with in_chans={channels}"
        )
