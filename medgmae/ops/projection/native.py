"""The CPU kernels of :func:`medgmae.ops.project`: allocates what they write."""

from __future__ import annotations

import torch
from torch import Tensor

from medgmae.ops import native
from medgmae.ops.native import _C, DTYPE_CODES
from medgmae.ops.projection.inputs import ProjectInputs, check_views


def forward(inputs: ProjectInputs, *, variant: str = "", threads: int | None = None) -> Tensor:
    """See ``medgmae::project``.

    ``variant``: CPU instruction set, "" for the best; ``threads``: ``native.threads()`` if None.
    """
    out = inputs.means.new_empty([*inputs.views.shape[:2], *inputs.size])
    if not _run(inputs, [out], variant, threads):
        check_views(inputs.views, inputs.parallel)  # says which view, and why
        raise ValueError("a view is within rounding of no detector; expected rays across it and steps that differ")
    return out


def backward(
    grad: Tensor, inputs: ProjectInputs, *, variant: str = "", threads: int | None = None
) -> tuple[Tensor, ...]:
    """See ``medgmae::project_backward``; options as for :func:`forward`."""
    gradients = tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:4])
    _run(inputs, [grad.to(inputs.means.dtype), *gradients], variant, threads)
    return gradients


def _run(inputs: ProjectInputs, others: list[Tensor], variant: str, threads: int | None) -> bool:
    """Call the kernel with the result, or with a gradient and its four results; False if a view is no detector."""
    assert _C is not None
    views = inputs.views.to(torch.float64)
    # Held until the kernel is done; what it writes is dense.
    contiguous = [tensor.contiguous() for tensor in (*inputs[:4], views, *others)]
    fits: bool = _C.project(
        DTYPE_CODES[inputs.means.dtype],
        inputs.means.shape[0],
        inputs.means.shape[1],
        views.shape[1],
        [tensor.data_ptr() for tensor in contiguous],
        list(inputs.size),
        inputs.support,
        inputs.parallel,
        inputs.affine,
        threads or native.threads(),
        variant,
    )
    return fits
