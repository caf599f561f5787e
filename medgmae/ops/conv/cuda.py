"""The CUDA kernels of :func:`medgmae.ops.causal_conv1d`, in the manner of :mod:`medgmae.ops.scan.cuda`."""

from __future__ import annotations

import torch
from torch import Tensor

from medgmae.ops.conv.call import Call
from medgmae.ops.conv.inputs import ConvInputs
from medgmae.ops.native import _C, DTYPE_CODES
from medgmae.ops.streams import STREAM_CODES, common_dtype

STRIP = 32  # kConvStrip of cuda/conv/blocks.h: steps over which a thread sums the gradients of weight and bias


def forward(inputs: ConvInputs) -> Tensor:
    """See ``medgmae::causal_conv1d``."""
    call = Call(inputs, common_dtype(inputs.weight.dtype, inputs.x))
    return call.forward(lambda: launch(call))


def backward(grad: Tensor, inputs: ConvInputs) -> tuple[Tensor | None, ...]:
    """See ``medgmae::causal_conv1d_backward``."""
    call = Call(inputs, common_dtype(inputs.weight.dtype, inputs.x, grad))
    return call.backward(grad, STRIP, lambda: launch(call))


def launch(call: Call) -> None:
    """Run the kernel in the current stream of the device that holds the call's tensors."""
    assert _C is not None
    with torch.cuda.device(call.device):
        arguments = DTYPE_CODES[call.wide], call.sizes, call.streams, call.arrays, STREAM_CODES[call.dtype]
        _C.causal_conv1d_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
