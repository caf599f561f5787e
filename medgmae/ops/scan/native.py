"""The CPU kernels of :func:`medgmae.ops.selective_scan`; constant B or C take the torch reference."""

from __future__ import annotations

from torch import Tensor

from medgmae.ops import native
from medgmae.ops.native import _C, DTYPE_CODES
from medgmae.ops.scan import reference
from medgmae.ops.scan.call import Call
from medgmae.ops.scan.inputs import ScanInputs
from medgmae.ops.streams import STREAM_CODES

SLAB = 64  # kScanSlab of cuda/scan/scan.h: channels of a group over which the kernel sums the gradients of B and C
CHUNK = LONGEST = 64  # steps per chunk of a backward, which holds a chunk of all its channels


def forward(inputs: ScanInputs, *, variant: str = "", threads: int | None = None) -> tuple[Tensor, Tensor]:
    """See ``medgmae::selective_scan``.

    ``variant``: CPU instruction set, "" for the best; ``threads``: ``native.threads()`` if None.
    """
    if inputs.constant:
        return reference.forward(inputs)
    call = Call(inputs, inputs.A.dtype, SLAB, turns=True)
    return call.forward(lambda: _run(call, variant, threads))


def backward(
    grad: Tensor,
    grad_states: Tensor | None,
    states: Tensor,
    inputs: ScanInputs,
    *,
    variant: str = "",
    threads: int | None = None,
) -> tuple[Tensor | None, ...]:
    """See ``medgmae::selective_scan_backward``; options as for :func:`forward`."""
    if inputs.constant:
        return reference.backward(grad, grad_states, states, inputs)
    if inputs.chunk > LONGEST:
        inputs = inputs._replace(chunk=CHUNK)
        states = forward(inputs, variant=variant, threads=threads)[1]
    call = Call(inputs, inputs.A.dtype, SLAB, turns=True)
    return call.backward(grad, grad_states, states, lambda: _run(call, variant, threads))


def _run(call: Call, variant: str, threads: int | None) -> None:
    assert _C is not None
    arguments = DTYPE_CODES[call.wide], call.sizes, call.streams, call.matrices, call.arrays, STREAM_CODES[call.dtype]
    _C.selective_scan(*arguments, threads or native.threads(), variant)
