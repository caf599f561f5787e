"""The native kernels of :mod:`medgmae.ops.voxelize`: checks tensors, allocates what the kernels write, calls them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from medgmae.ops import _voxelize_cuda as cuda
from medgmae.ops._native import _C, DTYPE_CODES

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
    out = means.new_empty(*patches.shape, math.prod(patch_size))
    _call([means, scales, quats, densities, patches], [out], size, patch_size, support, variant, threads)
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
    inputs = [means, scales, quats, densities, patches, grad.to(means.dtype)]
    out = means.new_empty(means.shape), means.new_empty(scales.shape), means.new_empty(quats.shape)
    outputs = [*out, means.new_empty(densities.shape)]
    _call(inputs, outputs, size, patch_size, support, variant, threads)
    return outputs[0], outputs[1], outputs[2], outputs[3]


def _call(
    inputs: list[Tensor],
    outputs: list[Tensor],
    size: Sequence[int],
    patch_size: Sequence[int],
    support: float,
    variant: str,
    threads: int | None,
) -> None:
    assert _C is not None
    means, patches = inputs[0], inputs[4]
    count = math.prod(s // p for s, p in zip(size, patch_size, strict=True))
    if patches.numel() and not (0 <= int(patches.min()) and int(patches.max()) < count):
        raise ValueError(f"patches must number the {count} patches from 0 on, got {patches.min()} to {patches.max()}")
    contiguous = [tensor.contiguous() for tensor in inputs]  # held until the kernel is done
    _C.voxelize(
        DTYPE_CODES[means.dtype],
        means.shape[0],
        means.shape[1],
        patches.shape[1],
        [tensor.data_ptr() for tensor in (*contiguous, *outputs)],
        list(size),
        list(patch_size),
        [0.0, 0.0, 0.0],
        [1 / (s - 1) if s > 1 else 0.0 for s in size],
        support,
        (0.0, math.inf),
        threads or torch.get_num_threads(),
        variant,
    )
