"""The CUDA kernels of :func:`medgmae.ops.selective_scan`: torch allocates what they write; they go into its stream.

Nothing waits for the device, so a call can be captured in a CUDA graph. Constant B or C take the torch reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medgmae.ops.native import _C, DTYPE_CODES
from medgmae.ops.scan import reference
from medgmae.ops.scan.call import Call
from medgmae.ops.scan.inputs import ScanInputs
from medgmae.ops.scan.native import SLAB
from medgmae.ops.streams import STREAM_CODES, common_dtype

CHUNK = LONGEST = 64  # kLongestChunk of cuda/scan/work.h
LARGEST, TILE = 2**31 - 1 - 64, 8  # scan_is_small of cuda/scan/work.h
BLOCK_BYTES = 256  # of a token's channels, in the dtype of the computation, that one block of the backward has


def forward(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """See ``medgmae::selective_scan``."""
    if inputs.constant:
        return reference.forward(inputs)
    call = Call(inputs, _stream_dtype(inputs), SLAB)
    return call.forward(lambda: launch(call))


def backward(grad: Tensor, grad_states: Tensor | None, states: Tensor, inputs: ScanInputs) -> tuple[Tensor | None, ...]:
    """See ``medgmae::selective_scan_backward``."""
    if inputs.constant:
        return reference.backward(grad, grad_states, states, inputs)
    if inputs.chunk > LONGEST:
        inputs = inputs._replace(chunk=CHUNK)
        states = forward(inputs)[1]
    call = Call(inputs, _stream_dtype(inputs, grad), BLOCK_BYTES // inputs.A.element_size())
    return call.backward(grad, grad_states, states, lambda: launch(call))


def launch(call: Call) -> None:
    """Run the kernels in the current stream of the device that holds the call's tensors."""
    assert _C is not None
    check_sizes(call)
    numbers = call.sizes, call.streams, call.matrices, call.arrays
    arguments = DTYPE_CODES[call.wide], *numbers, STREAM_CODES[call.dtype]
    with torch.cuda.device(call.device):
        # The allocator hands this block out again to later work of the same stream only.
        workspace_bytes = _C.selective_scan_cuda_workspace(*arguments)
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=call.device)
        stream = torch.cuda.current_stream().cuda_stream
        _C.selective_scan_cuda(*arguments, workspace.data_ptr(), workspace_bytes, stream)


def check_sizes(call: Call) -> None:
    """Refuse what the kernels cannot count in 32 bits."""
    for name, size in call.sizes.items():
        if size >= LARGEST:
            raise ValueError(f"{name} is {size}: the CUDA kernels take less than {LARGEST}; cut the call into several")
    for name, (_, _, step, *_) in (call.streams | call.matrices).items():
        if abs(step) > LARGEST // TILE:
            raise ValueError(
                f"the tokens of {name} lie {abs(step)} numbers apart: the CUDA kernels take at most {LARGEST // TILE}; "
                "pass a contiguous copy"
            )


def _stream_dtype(inputs: ScanInputs, *grads: Tensor) -> torch.dtype:
    return common_dtype(inputs.A.dtype, inputs.u, inputs.delta, inputs.B, inputs.C, inputs.z, *grads)
