"""The native kernels of :mod:`medgmae.ops.voxelize`: checks tensors, allocates what the kernels write, calls them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from medgmae.ops.native import _C, DTYPE_CODES
from medgmae.ops.voxel import cuda
from medgmae.ops.voxel import levels as multiresolution
from medgmae.ops.voxel.levels import Lattice

Kernel = Callable[..., Any]


def kernels() -> Iterator[tuple[str, Kernel, Kernel]]:
    """Dispatch key, forward and backward of every native implementation that is compiled in."""
    if _C is not None:
        yield "CPU", forward, backward
    if hasattr(_C, "voxelize_cuda"):
        yield "CUDA", cuda.forward, cuda.backward


def forward(
    means: Tensor,
    scales: Tensor,
    quats: Tensor,
    densities: Tensor,
    patches: Tensor,
    size: Sequence[int],
    patch_size: Sequence[int],
    support: float,
    *,
    variant: str = "",
    threads: int | None = None,
) -> Tensor:
    """See ``medgmae::voxelize``. ``variant``: CPU instruction set, "" for the best; ``threads``: torch's if None."""
    parameters, size = [means, scales, quats, densities, patches], tuple(size)
    threads = threads or torch.get_num_threads()

    def render(lattice: Lattice, patch: Sequence[int]) -> Tensor:
        out = means.new_empty(*patches.shape, math.prod(patch))
        _call(parameters, [out], lattice, patch, support, variant, threads)
        return out

    with torch.autocast(means.device.type, enabled=False):
        strides = multiresolution.strides(parameters, patches, size, patch_size, support)
        finest, *coarse = multiresolution.levels(size, strides)
        out = render(finest, patch_size)
        for level in coarse:
            values = render(level, level.size).reshape(-1, *level.size)
            multiresolution.add_interpolated(level, values, out.view(-1, *size), threads, variant)
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
    *,
    variant: str = "",
    threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``medgmae::voxelize_backward``; options as for :func:`forward`."""
    parameters, size = [means, scales, quats, densities, patches], tuple(size)
    threads = threads or torch.get_num_threads()
    out = [tensor.new_empty(tensor.shape) for tensor in (means, scales, quats, densities)]
    grad = grad.to(means.dtype).contiguous()
    with torch.autocast(means.device.type, enabled=False):
        strides = multiresolution.strides(parameters, patches, size, patch_size, support)
        finest, *coarse = multiresolution.levels(size, strides)
        _call([*parameters, grad], out, finest, patch_size, support, variant, threads)
        for level in coarse:
            gathered = multiresolution.gathered(level, grad.view(-1, *size), threads, variant)
            _call([*parameters, gathered], out, level, level.size, support, variant, threads)
    return out[0], out[1], out[2], out[3]


def _call(
    inputs: list[Tensor],
    outputs: list[Tensor],
    lattice: Lattice,
    patch_size: Sequence[int],
    support: float,
    variant: str,
    threads: int,
) -> None:
    assert _C is not None
    means, patches = inputs[0], inputs[4]
    count = math.prod(s // p for s, p in zip(lattice.size, patch_size, strict=True))
    if patches.numel() and not (int(patches.min()) >= 0 and int(patches.max()) < count):
        raise ValueError(f"patches must number the {count} patches from 0 on, got {patches.min()} to {patches.max()}")
    contiguous = [tensor.contiguous() for tensor in inputs]  # held until the kernel is done
    _C.voxelize(
        DTYPE_CODES[means.dtype],
        means.shape[0],
        means.shape[1],
        patches.shape[1],
        [tensor.data_ptr() for tensor in (*contiguous, *outputs)],
        list(lattice.size),
        list(patch_size),
        list(lattice.origin),
        list(lattice.step),
        support,
        lattice.widths,
        threads,
        variant,
    )
