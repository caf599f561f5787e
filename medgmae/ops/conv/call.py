"""What the CPU and the CUDA kernels of the convolution share: where the tensors of a call lie, and what it gives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medgmae.ops.conv.inputs import ConvInputs
from medgmae.ops.streams import Streams, room


class Call(Streams):
    """The arguments of one convolution, and what it gives. ``dtype``: of the streams."""

    def __init__(self, inputs: ConvInputs, dtype: torch.dtype) -> None:
        x, weight, bias, silu, reverse = inputs
        super().__init__(dtype, weight.dtype, x.shape[1], reverse)
        self.inputs = inputs
        self.sizes = {
            "batch": x.shape[0],
            "length": x.shape[1],
            "channels": x.shape[2],
            "width": weight.shape[1],
            "silu": silu,
        }
        self.stream("x", x)
        self.array("weight", weight.T)
        if bias is not None:
            self.array("bias", bias)

    def forward(self, run: Callable[[], None]) -> Tensor:
        """The result; ``run`` calls the kernel."""
        x = self.inputs.x
        out = room(x, self.dtype)
        self.stream("out", out)
        if out.numel():
            run()
        return out.to(x.dtype)

    def backward(self, grad: Tensor, steps: int, run: Callable[[], None]) -> tuple[Tensor | None, ...]:
        """The gradients of the operator's tensors, in order; ``run`` calls the kernel.

        ``steps``: over which it sums the gradients of weight and bias; the rest is summed here.
        """
        x, weight, bias = self.inputs[:3]
        width = weight.shape[1]
        dx, sums = room(x, self.dtype), weight.new_empty(x.shape[0], -(-self.length // steps), width + 1, x.shape[2])
        self.stream("grad", grad)
        self.stream("dx", dx)
        self.array("sums", sums)
        if dx.numel():
            run()
        total = sums.sum((0, 1))  # (width + 1, channels)
        return (
            dx.to(x.dtype),
            total[:width].T.contiguous(),
            None if bias is None else total[width].to(bias.dtype, copy=True),
        )
