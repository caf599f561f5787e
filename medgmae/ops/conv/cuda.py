"""The CUDA kernels of :mod:`medgmae.ops.causal_conv1d`, in the manner of :mod:`medgmae.ops.scan.cuda`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from medgmae.ops.native import _C, DTYPE_CODES
from medgmae.ops.scan.cuda import STREAM_CODES
from medgmae.ops.scan.native import Kernel, Streams

STRIP = 32  # kConvStrip of cuda/conv/blocks.h: steps over which a thread sums the gradients of weight and bias


def kernels() -> Iterator[tuple[str, Kernel, Kernel]]:
    """Dispatch key, forward and backward, if they are compiled in."""
    if hasattr(_C, "causal_conv1d_cuda"):
        yield "CUDA", forward, backward


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """See ``medgmae::causal_conv1d``."""
    call = _call(x, weight, bias, reverse)
    out = x.new_empty(x.shape, dtype=call.dtype)
    call.stream("out", out)
    if out.numel():
        launch(call, weight.dtype, _sizes(x, weight, silu))
    return out.to(x.dtype)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``medgmae::causal_conv1d_backward``."""
    call = _call(x, weight, bias, reverse)
    width, strips = weight.shape[1], -(-x.shape[1] // STRIP)
    dx, sums = x.new_empty(x.shape, dtype=call.dtype), weight.new_empty(x.shape[0], strips, width + 1, x.shape[2])
    call.stream("grad", grad)
    call.stream("dx", dx)
    call.array("sums", sums)
    if dx.numel():
        launch(call, weight.dtype, _sizes(x, weight, silu))
    total = sums.sum((0, 1))  # (width + 1, channels)
    return dx.to(x.dtype), total[:width].T.contiguous(), weight.new_empty(0) if bias is None else total[width].clone()


def launch(call: Streams, wide: torch.dtype, sizes: dict[str, int]) -> None:
    """Run the kernel in the current stream of the device that holds the call's tensors."""
    assert _C is not None
    with torch.cuda.device(call.held[0].device):
        stream = torch.cuda.current_stream().cuda_stream
        _C.causal_conv1d_cuda(DTYPE_CODES[wide], sizes, call.streams, call.arrays, STREAM_CODES[call.dtype], stream)


def _call(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Streams:
    call = Streams(x.dtype if x.dtype in STREAM_CODES else weight.dtype, x.shape[1], reverse)
    call.stream("x", x)
    call.array("weight", weight.T)
    if bias is not None:
        call.array("bias", bias)
    return call


def _sizes(x: Tensor, weight: Tensor, silu: bool) -> dict[str, int]:
    return {"batch": x.shape[0], "length": x.shape[1], "channels": x.shape[2], "width": weight.shape[1], "silu": silu}
