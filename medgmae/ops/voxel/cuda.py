"""The CUDA kernels of :func:`medgmae.ops.voxelize`: torch allocates what they write, they go into the current stream.

Nothing waits for the device, so a call can be captured in a CUDA graph. That is also why nobody looks at the numbers of
the patches: a patch that does not exist is rendered as NaN, and nothing of its gradient is used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medgmae.ops.native import _C, DTYPE_CODES
from medgmae.ops.voxel.inputs import VoxelInputs


def forward(inputs: VoxelInputs) -> Tensor:
    """See ``medgmae::voxelize``."""
    out = inputs.means.new_empty(*inputs.patches.shape, math.prod(inputs.patch_size))
    _launch(inputs, [out])
    return out


def backward(grad: Tensor, inputs: VoxelInputs) -> tuple[Tensor, ...]:
    """See ``medgmae::voxelize_backward``."""
    gradients = tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:4])
    _launch(inputs, [grad.to(inputs.means.dtype), *gradients])
    return gradients


def _launch(inputs: VoxelInputs, others: list[Tensor]) -> None:
    """Run the kernels with the result, or with a gradient and its four results."""
    assert _C is not None
    means, patches = inputs.means, inputs.patches
    shape = means.shape[0], means.shape[1], patches.shape[1]
    sides = list(inputs.size), list(inputs.patch_size)
    with torch.cuda.device(means.device):
        contiguous = [tensor.contiguous() for tensor in (*inputs[:5], *others)]  # what is written is dense
        # The allocator hands these blocks out again to later work of the same stream only.
        workspace_bytes = _C.voxelize_cuda_workspace(*shape, *sides, len(others) > 1)
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=means.device)
        _C.voxelize_cuda(
            DTYPE_CODES[means.dtype],
            *shape,
            [tensor.data_ptr() for tensor in contiguous],
            *sides,
            [0.0, 0.0, 0.0],
            [1 / (s - 1) if s > 1 else 0.0 for s in inputs.size],
            inputs.support,
            (0.0, math.inf),
            workspace.data_ptr(),
            workspace_bytes,
            torch.cuda.current_stream().cuda_stream,
        )
