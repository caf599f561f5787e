"""The CPU kernels of :func:`medgmae.ops.project_volume`."""

from __future__ import annotations

import torch
from torch import Tensor

from medgmae.ops import native
from medgmae.ops.native import _C, DTYPE_CODES
from medgmae.ops.rays.inputs import RayInputs

SLAB = 8  # planes of cells that the adjoint works on at a time, whatever the number of threads


def forward(inputs: RayInputs, *, variant: str = "", threads: int | None = None) -> Tensor:
    """See ``medgmae::project_volume``. Options as for :func:`medgmae.ops.voxelize`'s kernels."""
    out = inputs.volume.new_empty(len(inputs.volume), len(inputs.views), *inputs.size)
    _run(inputs, [inputs.volume.contiguous(), out], False, variant, threads)
    return out


def backward(grad: Tensor, inputs: RayInputs, *, variant: str = "", threads: int | None = None) -> tuple[Tensor]:
    """See ``medgmae::project_volume_backward``. Options as for :func:`medgmae.ops.voxelize`'s kernels."""
    depth = inputs.volume.shape[1]
    out = torch.zeros_like(inputs.volume, memory_format=torch.contiguous_format)
    edges = out.new_zeros(len(out), -(-(depth - 1) // SLAB), *out.shape[2:])  # what slabs add to the next one's plane
    _run(inputs, [grad.to(out.dtype).contiguous(), out, edges], True, variant, threads)
    for slab in range(edges.shape[1]):
        out[:, min((slab + 1) * SLAB, depth - 1)] += edges[:, slab]
    return (out,)


def _run(inputs: RayInputs, tensors: list[Tensor], adjoint: bool, variant: str, threads: int | None) -> None:
    assert _C is not None
    kept = [inputs.views.double().contiguous(), inputs.spacing.double().contiguous(), *tensors]
    _C.project_volume(
        DTYPE_CODES[inputs.volume.dtype],
        list(inputs.volume.shape),
        len(inputs.views),
        list(inputs.size),
        [tensor.data_ptr() for tensor in kept],
        inputs.parallel,
        SLAB,
        adjoint,
        threads or native.threads(),
        variant,
    )
