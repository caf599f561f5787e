"""The CPU kernels of :func:`medgmae.ops.voxelize`: allocates what they write, renders in levels where that pays."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from medgmae.ops import native
from medgmae.ops.native import _C, DTYPE_CODES
from medgmae.ops.voxel import levels as multiresolution
from medgmae.ops.voxel.inputs import VoxelInputs
from medgmae.ops.voxel.levels import Lattice


def forward(inputs: VoxelInputs, *, variant: str = "", threads: int | None = None) -> Tensor:
    """See ``medgmae::voxelize``.

    ``variant``: CPU instruction set, "" for the best; ``threads``: ``native.threads()`` if None.
    """
    size, threads = tuple(inputs.size), threads or native.threads()
    finest, *coarse = multiresolution.levels(size, multiresolution.strides(inputs))

    def render(lattice: Lattice, patch: Sequence[int]) -> Tensor:
        out = inputs.means.new_empty(*inputs.patches.shape, math.prod(patch))
        _run([*inputs[:5], out], lattice, patch, inputs.support, variant, threads)
        return out

    out = render(finest, inputs.patch_size)
    for level in coarse:
        values = render(level, level.size).reshape(-1, *level.size)
        multiresolution.add_interpolated(level, values, out.view(-1, *size), threads, variant)
    return out


def backward(grad: Tensor, inputs: VoxelInputs, *, variant: str = "", threads: int | None = None) -> tuple[Tensor, ...]:
    """See ``medgmae::voxelize_backward``; options as for :func:`forward`."""
    size, threads = tuple(inputs.size), threads or native.threads()
    finest, *coarse = multiresolution.levels(size, multiresolution.strides(inputs))
    gradients = tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:4])
    grad = grad.to(inputs.means.dtype).contiguous()
    _run([*inputs[:5], grad, *gradients], finest, inputs.patch_size, inputs.support, variant, threads)
    for level in coarse:
        gathered = multiresolution.gathered(level, grad.view(-1, *size), threads, variant)
        _run([*inputs[:5], gathered, *gradients], level, level.size, inputs.support, variant, threads)
    return gradients


def _run(
    tensors: list[Tensor], lattice: Lattice, patch_size: Sequence[int], support: float, variant: str, threads: int
) -> None:
    """Call the kernel with the five tensors of the inputs and the result, or a gradient and its four results."""
    assert _C is not None
    means, patches = tensors[0], tensors[4]
    count = math.prod(s // p for s, p in zip(lattice.size, patch_size, strict=True))
    if patches.numel() and not (int(patches.min()) >= 0 and int(patches.max()) < count):
        raise ValueError(f"patches must number the {count} patches from 0 on, got {patches.min()} to {patches.max()}")
    contiguous = [tensor.contiguous() for tensor in tensors]  # held until the kernel is done; what it writes is dense
    _C.voxelize(
        DTYPE_CODES[means.dtype],
        means.shape[0],
        means.shape[1],
        patches.shape[1],
        [tensor.data_ptr() for tensor in contiguous],
        list(lattice.size),
        list(patch_size),
        list(lattice.origin),
        list(lattice.step),
        support,
        lattice.widths,
        threads,
        variant,
    )
