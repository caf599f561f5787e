"""Fitting single tensors to another model: tables to another grid, stems to other channels, patches or dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medgmae.layers.positions import resample_pos_embed

Inflate = Literal["average", "center"]


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float32 at least: sums of half-precision weights lose digits, or become infinite."""
    return tensor.float() if tensor.itemsize < 4 else tensor


def adapt_table(
    table: Tensor, source_grid: Sequence[int], target_grid: Sequence[int], depth_axis: int = 0, offset: float = 0.0
) -> Tensor:
    """A table of positions (1, N, E) on another grid; a 2D table is repeated along the depth of a 3D grid.

    See :func:`medgmae.layers.positions.resample_pos_embed`.
    """
    source, target = tuple(source_grid), tuple(target_grid)
    if len(source) + 1 == len(target):
        flat = target[:depth_axis] + target[depth_axis + 1 :]
        plane = resample_pos_embed(table, source, flat, offset).reshape(1, *flat, table.shape[2])
        return plane.unsqueeze(1 + depth_axis).expand(1, *target, -1).flatten(1, 3)
    return resample_pos_embed(table, source, target, offset)


def adapt_channels(weight: Tensor, in_chans: int) -> Tensor:
    """A stem weight (E, C, *patch) for another number of channels.

    Every new channel gets the sum over the old channels divided by the new number: an input whose channels are all
    equal gives the same tokens as before.
    """
    return weight.sum(1, keepdim=True).expand(-1, in_chans, *weight.shape[2:]) / in_chans


def inflate_stem(weight: Tensor, depth: int, how: Inflate, axis: int = 0) -> Tensor:
    """A 2D stem (E, C, h, w) as a 3D one, with ``depth`` as axis ``axis`` of its patch: (E, C, depth, h, w) for 0.

    "average" spreads the plane over the depth, divided by it: a volume that is constant along depth gives the tokens
    of its plane (Carreira & Zisserman 2017). "center" puts the plane into the middle slice, zeros around it.
    """
    inflated = weight.unsqueeze(2 + axis)
    if how == "average":
        return inflated.expand(*(depth if d == 2 + axis else -1 for d in range(5))) / depth
    if how != "center":
        raise ValueError(f"inflate must be 'average' or 'center', got {how!r}")
    before = depth // 2
    widths = [0, 0] * (2 - axis) + [before, depth - 1 - before]
    return F.pad(inflated, widths)


def resize_patch(weight: Tensor, patch_size: Sequence[int]) -> Tensor:
    """A stem weight (E, C, *patch) for another patch size, by the pseudo-inverse of linear resizing.

    The new weight answers to a resized patch as the old one does to the original: exactly when the patch grows, in
    the least-squares sense when it shrinks (Beyer et al. 2023, FlexiViT, equation 5). Axis by axis, since the
    resizing of a patch is a Kronecker product of one matrix per axis.
    """
    for axis, new in enumerate(patch_size, start=2):
        old = weight.shape[axis]
        if old != new:
            inverse = torch.linalg.pinv(_resize_matrix(old, new).T).to(weight.dtype)  # (new, old)
            weight = (weight.movedim(axis, -1) @ inverse.T).movedim(-1, axis)
    return weight


def _resize_matrix(old: int, new: int) -> Tensor:
    """The (new, old) float64 matrix of linear, antialiased resizing of ``old`` samples to ``new``."""
    # Along the last axis: along the one before it torch (2.15) repeats the first row where the last axis has length 1.
    eye = torch.eye(old, dtype=torch.float64).reshape(1, old, 1, old)
    return F.interpolate(eye, size=(1, new), mode="bilinear", antialias=True, align_corners=False)[0, :, 0].T


def adapt_stem(weight: Tensor, shape: Sequence[int], inflate: Inflate, depth_axis: int = 0) -> tuple[Tensor, list[str]]:
    """A stem weight for the shape (E, C, *patch) of another stem, and what was done to it."""
    done: list[str] = []
    dims = len(shape) - 2
    if weight.dim() == 4 and dims == 3:
        weight = inflate_stem(weight, int(shape[2 + depth_axis]), inflate, depth_axis)
        done.append(f"inflated from 2D ({inflate} along depth)")
    if weight.shape[1] != shape[1]:
        done.append(f"channels {weight.shape[1]} to {shape[1]} (sum over the old, divided by the new)")
        weight = adapt_channels(weight, int(shape[1]))
    if tuple(weight.shape[2:]) != tuple(shape[2:]):
        done.append(f"patch {tuple(weight.shape[2:])} to {tuple(shape[2:])} (pseudo-inverse)")
        weight = resize_patch(weight, shape[2:])
    return weight.contiguous(), done
