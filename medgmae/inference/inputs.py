"""What the functions of this room are given: a model, whose encoder they run, and a scan."""

from __future__ import annotations

import os
from typing import TypeGuard

from torch import Tensor, nn

from medgmae.data.volume import ScanLike, Volume, as_volume, finite, is_scan
from medgmae.models.encoder import Encoder, Model
from medgmae.models.parts import unwrap


def encoder_of(model: nn.Module, caller: str) -> Encoder:
    """The encoder of a masked autoencoder, or the encoder itself.

    Raises:
        TypeError: not a model of this library.
        ValueError: a model for images.
    """
    inner = unwrap(model)
    if not isinstance(inner, Model):
        raise TypeError(f"{caller} needs a model of this library, got {type(inner).__name__}")
    encoder = inner.encoder
    if len(encoder.patch_size) != 3:
        raise ValueError(
            f"{caller} needs a model for volumes; {type(encoder).__name__} with patches of {encoder.patch_size} pixels "
            "is one for images"
        )
    return encoder


def is_batch(x: ScanLike) -> TypeGuard[Tensor]:
    """Whether this is what a model takes, (B, C, D, H, W) without a geometry, and not one scan.

    A tensor may be a scan too: MONAI's MetaTensor (C, D, H, W), which carries its affine.
    """
    return isinstance(x, Tensor) and not (x.dim() == 4 and hasattr(x, "affine"))


def volume_of(scan: ScanLike) -> Volume:
    """A prepared scan as a volume: one of this library's, or what :func:`medgmae.data.as_volume` takes.

    Raises:
        TypeError: something else, such as a path: what a model takes has been prepared.
        ValueError: an array of another rank; NaN or infinite voxels.
    """
    if isinstance(scan, (str, os.PathLike)):
        raise TypeError(
            f"the scan must have been prepared for the model, as medgmae.create_transform(model, whole=True)(path) "
            f"does; got the path {os.fspath(scan)!r}"
        )
    return finite(argument_volume(scan, "the scan must be a Volume, or what medgmae.as_volume takes"))


def argument_volume(value: object, expected: str) -> Volume:
    """An argument as a volume; NaN is allowed.

    Args:
        value: what was given.
        expected: a sentence for the error, that says what the argument must be.

    Raises:
        TypeError: a model, a path, or anything else that is not a scan.
    """
    if not is_scan(value):
        raise TypeError(f"{expected}; got {type(value).__name__}")
    return as_volume(value)


def check_channels(encoder: Encoder, channels: int) -> None:
    """Raise ValueError unless a scan of so many channels fits the encoder."""
    if channels != encoder.in_chans:
        raise ValueError(
            f"the scan has {channels} channel(s), the model takes {encoder.in_chans}: the contrasts that it was "
            f"trained on, in its order. Or build the model with in_chans={channels}"
        )
