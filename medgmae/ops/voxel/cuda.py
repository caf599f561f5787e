"""The CUDA kernels of :mod:`medgmae.ops.voxelize`: torch allocates what they write, they go into the current stream.

Nothing waits for the device, so a call can be captured in a CUDA graph. That is also why nobody looks at the numbers of
the patches: a patch that does not exist is rendered as NaN, and nothing of its gradient is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from medgmae.ops.native import _C, DTYPE_CODES


def forward(
    means: Tensor,
    scales: Tensor,
    quats: Tensor,
    densities: Tensor,
    patches: Tensor,
    size: Sequence[int],
    patch_size: Sequence[int],
    support: float,
) -> Tensor:
    """See ``medgmae::voxelize``."""
    out = means.new_empty(*patches.shape, math.prod(patch_size))
    _launch([means, scales, quats, densities, patches], [out], size, patch_size, support)
    return out


def backward(
    grad: Tensor,
    means: Tensor,
    scales: Tensor,
    quats: Tensor,
    densities: Tensor,
    patches: Tensor,
    size: Sequence[int],
    patch_size: Sequence[int],
    support: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``medgmae::voxelize_backward``."""
    parameters = [means, scales, quats, densities]
    out = [tensor.new_empty(tensor.shape) for tensor in parameters]
    _launch([*parameters, patches, grad.to(means.dtype)], out, size, patch_size, support)
    return out[0], out[1], out[2], out[3]


def _launch(
    inputs: list[Tensor], outputs: list[Tensor], size: Sequence[int], patch_size: Sequence[int], support: float
) -> None:
    assert _C is not None
    means, patches = inputs[0], inputs[4]
    backward = len(outputs) > 1
    shape = means.shape[0], means.shape[1], patches.shape[1]
    sides = list(size), list(patch_size)
    with torch.cuda.device(means.device):
        contiguous = [tensor.contiguous() for tensor in inputs]
        # The allocator hands these blocks out again to later work of the same stream only.
        workspace_bytes = _C.voxelize_cuda_workspace(*shape, *sides, backward)
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=means.device)
        _C.voxelize_cuda(
            DTYPE_CODES[means.dtype],
            *shape,
            [tensor.data_ptr() for tensor in (*contiguous, *outputs)],
            *sides,
            [0.0, 0.0, 0.0],
            [1 / (s - 1) if s > 1 else 0.0 for s in size],
            support,
            (0.0, math.inf),
            workspace.data_ptr(),
            workspace_bytes,
            torch.cuda.current_stream().cuda_stream,
        )
