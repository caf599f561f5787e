"""Convolutional blocks of U-shaped decoders: residual blocks, and steps that refine a map by a stride."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.layers.blocks import run_block
from medgmae.layers.norms import norm_activate, norm_add_activate
from medgmae.layers.patches import Shape
from medgmae.ops.precision import full_precision


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


class _Convolution(nn.Module):
    """A convolution with stride 1 that keeps the size, of one map or of several that stand for their concatenation.

    ``forward(x, *more)``: maps (B, channels, *size) whose channels sum up to in_chans; gives (B, out_chans, *size).
    The concatenation is never made: it and its gradient would be the largest maps of a U-shaped decoder.
    """

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """See the class."""
        maps = (x, *more)
        weights = torch.split(self.weight, [m.shape[1] for m in maps], dim=1)
        # On the CPU torch 2.15 takes memory that nobody has written for a part of the gradient of the weight if d is 2
        # and the product in bfloat16: now and then it is NaN.
        if x.dim() == 5 and x.shape[2] == 2 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            with full_precision(x):
                return self._sum([m.to(self.weight.dtype) for m in maps], weights)
        return self._sum(maps, weights)

    def _sum(self, maps: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        # What is added in place are sums that no gradient needs.
        kernel = self.weight.shape[2]
        if kernel == 1 and maps[0].device.type == "cpu":  # where torch has no fast one for channels that lie last
            total = F.linear(maps[0].movedim(1, -1), weights[0].flatten(1), self.bias)
            for x, weight in zip(maps[1:], weights[1:], strict=True):
                total += F.linear(x.movedim(1, -1), weight.flatten(1))
            return total.movedim(-1, 1)
        convolve: Any = F.conv3d if maps[0].dim() == 5 else F.conv2d
        total = convolve(maps[0], weights[0], self.bias, padding=kernel // 2)
        for x, weight in zip(maps[1:], weights[1:], strict=True):
            total += convolve(x, weight, padding=kernel // 2)
        return total  # type: ignore[no-any-return]


class _Conv2d(_Convolution, nn.Conv2d):
    pass


class _Conv3d(_Convolution, nn.Conv3d):
    pass


def convolution(dims: int, in_chans: int, out_chans: int, kernel: int, bias: bool = False) -> nn.Module:
    """A convolution that keeps the size, see :class:`_Convolution`."""
    kind: Any = {2: _Conv2d, 3: _Conv3d}[dims]
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

    (B, in_chans, *size) to (B, out_chans, *size); several maps stand for their concatenation.
    """

    def __init__(self, dims: int, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.conv1 = convolution(dims, in_chans, out_chans, 3)
        self.conv2 = convolution(dims, out_chans, out_chans, 3)
        self.shortcut = convolution(dims, in_chans, out_chans, 1) if in_chans != out_chans else None

    def forward(self, *maps: Tensor) -> Tensor:
        """See the class."""
        return norm_add_activate(self.deep(*maps), self.beside(*maps), self.shortcut is not None)

    def deep(self, *maps: Tensor) -> Tensor:
        """What the convolutions make, before the last norm."""
        return self.conv2(norm_activate(self.conv1(*maps)))  # type: ignore[no-any-return]

    def beside(self, *maps: Tensor) -> Tensor:
        """The shortcut, before its norm."""
        return maps[0] if self.shortcut is None else self.shortcut(*maps)


class UpBlock(nn.Module):
    """Refine a map by a stride, then a residual block: of it alone, or of it and a skip connection of the same width.

    ``forward(x, skip)``: x (B, in_chans, *size), skip (B, out_chans, *finer); gives (B, out_chans, *finer).
    """

    def __init__(self, in_chans: int, out_chans: int, stride: Shape, skip: bool) -> None:
        super().__init__()
        self.up = Upsample(in_chans, out_chans, stride)
        self.block = ResidualBlock(len(stride), (1 + skip) * out_chans, out_chans)

    def forward(self, x: Tensor, skip: Tensor | None = None, recompute: bool = False) -> Tensor:
        """See the class.

        recompute: keep none of the maps between the inputs and the last norms for the backward pass. Each branch of the
            residual block is computed again when its turn has come and the maps of the other are gone: fewer are there
            at once than if the block were computed again as a whole.
        """
        more = () if skip is None else (skip,)
        if not recompute:
            return self.block(*self._refine(x, *more))  # type: ignore[no-any-return]

        def deep(x: Tensor, *more: Tensor) -> Tensor:
            return self.block.deep(*self._refine(x, *more))

        def beside(x: Tensor, *more: Tensor) -> Tensor:
            return self.block.beside(*self._refine(x, *more))

        branches = run_block(deep, x, True, *more), run_block(beside, x, True, *more)
        return norm_add_activate(*branches, self.block.shortcut is not None)

    def _refine(self, x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        x = self.up(x)
        for skip in more:
            for axis, size in enumerate(skip.shape[2:], start=2):
                if x.shape[axis] > size:  # a pooled map of odd size comes back one larger
                    x = x.narrow(axis, 0, size)
        return x, *more


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
