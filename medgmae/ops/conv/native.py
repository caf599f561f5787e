"""The CPU kernels of :func:`medgmae.ops.causal_conv1d`."""

from __future__ import annotations

from torch import Tensor

from medgmae.ops import native
from medgmae.ops.conv.call import Call
from medgmae.ops.conv.inputs import ConvInputs
from medgmae.ops.native import _C, DTYPE_CODES
from medgmae.ops.streams import STREAM_CODES

SEGMENT = 256  # kConvSegment of cuda/conv/conv.h: steps over which the kernel sums the gradients of weight and bias


def forward(inputs: ConvInputs, *, variant: str = "", threads: int | None = None) -> Tensor:
    """See ``medgmae::causal_conv1d``. Options as for the scan."""
    call = Call(inputs, inputs.weight.dtype)
    return call.forward(lambda: _run(call, variant, threads))


def backward(
    grad: Tensor, inputs: ConvInputs, *, variant: str = "", threads: int | None = None
) -> tuple[Tensor | None, ...]:
    """See ``medgmae::causal_conv1d_backward``. Options as for the scan."""
    call = Call(inputs, inputs.weight.dtype)
    return call.backward(grad, SEGMENT, lambda: _run(call, variant, threads))


def _run(call: Call, variant: str, threads: int | None) -> None:
    assert _C is not None
    arguments = DTYPE_CODES[call.wide], call.sizes, call.streams, call.arrays, STREAM_CODES[call.dtype]
    _C.causal_conv1d(*arguments, threads or native.threads(), variant)
