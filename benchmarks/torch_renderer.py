"""The best torch rival of renderer_rivals.py as a module that takes the place of GaussianRenderer(support="box")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from renderer_rivals import boxes
from torch import Tensor, nn

from medgmae import Gaussians, patchify
from medgmae.ops.voxel import reference
from medgmae.ops.voxel.inputs import VoxelInputs


class _SliceLoop(torch.autograd.Function):
    """A loop over Gaussians on the slices of their boxes, one sample; the backward is fed slice by slice."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *parameters, size = arguments
        volume = torch.zeros(size)
        ctx.leaves = [tensor.detach().requires_grad_() for tensor in parameters]
        ctx.pieces = []
        with torch.enable_grad():
            for part, piece in boxes(ctx.leaves, size):
                volume[part] += piece.detach()
                ctx.pieces.append((part, piece))
        return volume

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        torch.autograd.backward([piece for _, piece in ctx.pieces], [gradients[0][part] for part, _ in ctx.pieces])
        ctx.pieces = None
        return (*(leaf.grad for leaf in ctx.leaves), None)


class SliceLoopRenderer(nn.Module):
    """Box support. Patches are picked from the whole volume: a loop over Gaussians has no use for them."""

    def forward(
        self, gaussians: Gaussians, size: Sequence[int], patches: Tensor | None = None, patch_size: Any = None
    ) -> Tensor:
        """As :class:`medgmae.GaussianRenderer`."""
        samples = [
            _SliceLoop.apply(*(tensor[i : i + 1] for tensor in gaussians.tensors()), tuple(size))
            for i in range(len(gaussians.means))
        ]
        volume = torch.stack(samples)[:, None]
        if patches is None:
            return volume
        return patchify(volume, patch_size)[torch.arange(len(patches))[:, None], patches]


class _Reference(torch.autograd.Function):
    """The library's own torch reference, whatever kernels are compiled in."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *parameters, size = arguments
        whole = torch.zeros(len(parameters[0]), 1, dtype=torch.int64)
        ctx.save_for_backward(*parameters, whole)
        ctx.size = size
        return reference.forward(VoxelInputs(*parameters, whole, size, size, 0.0)).reshape(-1, 1, *size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        grad = gradients[0].reshape(len(gradients[0]), 1, -1)
        return (*reference.backward(grad, VoxelInputs(*ctx.saved_tensors, ctx.size, ctx.size, 0.0)), None)


class ReferenceRenderer(nn.Module):
    """Box support, whole volumes."""

    def forward(self, gaussians: Gaussians, size: Sequence[int]) -> Tensor:
        """As :class:`medgmae.GaussianRenderer`."""
        rendered: Tensor = _Reference.apply(*gaussians.tensors(), tuple(size))
        return rendered
