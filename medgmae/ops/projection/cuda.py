"""The CUDA kernels of :func:`medgmae.ops.project`: torch allocates what they write, they go into the current stream.

Nothing waits for the device, so a call can be captured in a CUDA graph. That is also why nobody looks at the views: one
that is no detector is NaN, and so are the gradients of its set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medgmae.ops.native import _C, DTYPE_CODES
from medgmae.ops.projection.inputs import ProjectInputs


def forward(inputs: ProjectInputs) -> Tensor:
    """See ``medgmae::project``."""
    out = inputs.means.new_empty([*inputs.views.shape[:2], *inputs.size])
    _launch(inputs, [out])
    return out


def backward(grad: Tensor, inputs: ProjectInputs) -> tuple[Tensor, ...]:
    """See ``medgmae::project_backward``."""
    gradients = tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:4])
    _launch(inputs, [grad.to(inputs.means.dtype), *gradients])
    return gradients


def _launch(inputs: ProjectInputs, others: list[Tensor]) -> None:
    """Run the kernels with the result, or with a gradient and its four results."""
    assert _C is not None
    means, views = inputs.means, inputs.views.to(torch.float64)
    shape = DTYPE_CODES[means.dtype], means.shape[0], means.shape[1], views.shape[1]
    with torch.cuda.device(means.device):
        contiguous = [tensor.contiguous() for tensor in (*inputs[:4], views, *others)]  # what is written is dense
        # The allocator hands these blocks out again to later work of the same stream only.
        workspace_bytes = _C.project_cuda_workspace(*shape, list(inputs.size), len(others) > 1)
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=means.device)
        _C.project_cuda(
            *shape,
            [tensor.data_ptr() for tensor in contiguous],
            list(inputs.size),
            inputs.support,
            inputs.parallel,
            inputs.affine,
            workspace.data_ptr(),
            workspace_bytes,
            torch.cuda.current_stream().cuda_stream,
        )
