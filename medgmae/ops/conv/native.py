"""The native kernels of :mod:`medgmae.ops.causal_conv1d`: allocates what they write, says where everything lies."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from medgmae.ops.native import _C, DTYPE_CODES
from medgmae.ops.scan.native import Kernel, Streams, room

SEGMENT = 256  # kConvSegment of cuda/conv/conv.h: steps over which the kernel sums the gradients of weight and bias


def kernels() -> Iterator[tuple[str, Kernel, Kernel]]:
    """Dispatch key, forward and backward of every native implementation that is compiled in."""
    if _C is not None:
        yield "CPU", forward, backward


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    reverse: bool,
    *,
    variant: str = "",
    threads: int | None = None,
) -> Tensor:
    """See ``medgmae::causal_conv1d``. Options as for the scan."""
    out = room(x, weight.dtype)
    call = _call(x, weight, bias, reverse)
    call.stream("out", out)
    if out.numel():
        _run(call, x, weight, silu, variant, threads)
    return out.to(x.dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    reverse: bool,
    *,
    variant: str = "",
    threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``medgmae::causal_conv1d_backward``. Options as for the scan."""
    width, segments = weight.shape[1], -(-x.shape[1] // SEGMENT)
    dx, sums = room(x, weight.dtype), weight.new_zeros(x.shape[0], segments, width + 1, x.shape[2])
    call = _call(x, weight, bias, reverse)
    call.stream("grad", grad)
    call.stream("dx", dx)
    call.array("sums", sums)
    if dx.numel():
        _run(call, x, weight, silu, variant, threads)
    total = sums.sum((0, 1))  # (width + 1, channels)
    return dx.to(x.dtype), total[:width].T.contiguous(), weight.new_empty(0) if bias is None else total[width].clone()


def _call(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Streams:
    call = Streams(weight.dtype, x.shape[1], reverse)
    call.stream("x", x)
    call.array("weight", weight.T)
    if bias is not None:
        call.array("bias", bias)
    return call


def _run(call: Streams, x: Tensor, weight: Tensor, silu: bool, variant: str, threads: int | None) -> None:
    assert _C is not None
    sizes = {"batch": x.shape[0], "length": x.shape[1], "channels": x.shape[2], "width": weight.shape[1], "silu": silu}
    threads = threads or torch.get_num_threads()
    _C.causal_conv1d(DTYPE_CODES[weight.dtype], sizes, call.streams, call.arrays, threads, variant)
