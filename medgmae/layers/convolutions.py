"""Convolutional blocks of U-shaped decoders: residual blocks, and steps that refine a map by a stride."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.layers.patches import Shape
from medgmae.ops.precision import full_precision

SLOPE = 0.01  # of the leaky rectifier
EPS = 1e-5  # of the instance norm


def stage_strides(patch_size: Shape) -> list[Shape]:
    """The steps from the voxels to the patches, finest first: their product is the patch.

    Each axis takes its prime factors, the smaller ones at the fine end. An axis with fewer of them than another begins
    later, as nnU-Net lets thick slices wait (Isensee et al. 2021): 16 is 2, 2, 2, 2; 12 is 2, 2, 3; the patch (4, 16,
    16) is (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2).

    Raises:
        ValueError: a patch of one voxel: there is nothing to refine.
    """
    factors = [_prime_factors(size) for size in patch_size]
    levels = max(map(len, factors))
    if not levels:
        raise ValueError(f"patch_size {patch_size} is one voxel; a U-shaped decoder needs a larger patch")
    padded = [[1] * (levels - len(own)) + own for own in factors]
    return [tuple(strides) for strides in zip(*padded, strict=True)]


def _prime_factors(number: int) -> list[int]:
    """In ascending order."""
    found, candidate = [], 2
    while number > 1:
        while number % candidate == 0:
            found.append(candidate)
            number //= candidate
        candidate += 1
    return found


def instance_norm(x: Tensor) -> Tensor:
    """Every channel of every sample with mean 0 and variance 1, without parameters; x: (B, C, *size)."""
    # Both are the same sums. torch's group norm is the quicker one on the CPU; on a GPU it has a block per channel
    # only. The forms in torch.nn.functional refuse a map of one place, whose norm is 0.
    if x.device.type == "cpu":
        return torch.group_norm(x, x.shape[1], None, None, EPS)
    return torch.instance_norm(x, None, None, None, None, True, 0.0, EPS, torch.backends.cudnn.enabled)


def activate(x: Tensor) -> Tensor:
    """The leaky rectifier of all blocks here, in place: what comes in is a norm's output, which nothing else keeps."""
    return F.leaky_relu_(x, SLOPE)


class _Conv3d(nn.Conv3d):
    """torch's, but in full precision where its gradient in bfloat16 is not to be trusted."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, d, h, w) to (B, out_channels, ...)."""
        if x.shape[2] != 2 or x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        # On the CPU torch 2.15 takes memory that nobody has written for a part of the gradient of the weight if d is 2:
        # now and then it is NaN.
        with full_precision(x):
            return super().forward(x.to(self.weight.dtype))


def convolution(dims: int, in_chans: int, out_chans: int, kernel: int, bias: bool = False) -> nn.Module:
    """A convolution that keeps the size."""
    kind: Any = {2: nn.Conv2d, 3: _Conv3d}[dims]
    return kind(in_chans, out_chans, kernel, padding=kernel // 2, bias=bias)  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """A transposed convolution whose kernel is its stride: (B, C, *size) to (B, out_chans, *(size * stride))."""

    def __init__(self, in_chans: int, out_chans: int, stride: Shape) -> None:
        super().__init__()
        kind: Any = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[len(stride)]
        self.conv = kind(in_chans, out_chans, stride, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.conv(x)  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance norms beside a shortcut, which is a 1x1 convolution where the widths differ.

    (B, in_chans, *size) to (B, out_chans, *size).
    """

    def __init__(self, dims: int, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.conv1 = convolution(dims, in_chans, out_chans, 3)
        self.conv2 = convolution(dims, out_chans, out_chans, 3)
        self.shortcut = convolution(dims, in_chans, out_chans, 1) if in_chans != out_chans else None

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = activate(instance_norm(self.conv1(x)))
        y = instance_norm(self.conv2(y))
        return activate(y + (x if self.shortcut is None else instance_norm(self.shortcut(x))))


class UpBlock(nn.Module):
    """Refine a map by a stride, then a residual block: of it alone, or of it and a skip connection of the same width.

    ``forward(x, skip)``: x (B, in_chans, *size), skip (B, out_chans, *finer); gives (B, out_chans, *finer).
    """

    def __init__(self, in_chans: int, out_chans: int, stride: Shape, skip: bool) -> None:
        super().__init__()
        self.up = Upsample(in_chans, out_chans, stride)
        self.block = ResidualBlock(len(stride), (1 + skip) * out_chans, out_chans)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """See the class."""
        x = self.up(x)
        if skip is None:
            return self.block(x)  # type: ignore[no-any-return]
        for axis, size in enumerate(skip.shape[2:], start=2):
            x = x.narrow(axis, 0, size)  # a pooled map of odd size comes back one larger
        return self.block(torch.cat([x, skip], dim=1))  # type: ignore[no-any-return]


class SkipPath(nn.Module):
    """Refine a map of tokens, (B, in_chans, *grid), step by step to (B, out_chans, *(grid * strides)).

    Args:
        in_chans: width of the tokens.
        out_chans: width of everything after the first step.
        strides: of the steps, coarsest first.
    """

    def __init__(self, in_chans: int, out_chans: int, strides: Sequence[Shape]) -> None:
        super().__init__()
        self.up = Upsample(in_chans, out_chans, strides[0])
        self.stages = nn.ModuleList(UpBlock(out_chans, out_chans, stride, skip=False) for stride in strides[1:])

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.up(x)
        for stage in self.stages:
            x = stage(x)
        return x
