"""The CUDA kernels of :mod:`medgmae.ops.selective_scan`: torch allocates what they write; they go into its stream.

Nothing waits for the device, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from medgmae.ops.native import _C, DTYPE_CODES
from medgmae.ops.scan.native import Call, Kernel

# StreamType of cuda/half.h: what streams hold.
STREAM_CODES = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 1, torch.float16: 2}
CHUNK = LONGEST = 64  # kLongestChunk of cuda/scan/work.h
BLOCK_BYTES = 256  # of a token's channels, in the dtype of the computation, that one block of the backward has


def kernels() -> Iterator[tuple[str, Kernel, Kernel]]:
    """Dispatch key, forward and backward, if they are compiled in."""
    if hasattr(_C, "selective_scan_cuda"):
        yield "CUDA", forward, backward


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    reverse: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """See ``medgmae::selective_scan``."""
    call = Call(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, chunk, _streams(u, A, B, C))
    return call.forward(lambda: launch(call))


def backward(
    grad: Tensor,
    grad_state: Tensor | None,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    reverse: bool,
    chunk: int,
) -> tuple[Tensor, ...]:
    """See ``medgmae::selective_scan_backward``."""
    if chunk > LONGEST:
        chunk, states = CHUNK, forward(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, CHUNK)[1]
    streams, slab = _streams(u, A, B, C), BLOCK_BYTES // A.element_size()
    call = Call(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, chunk, streams, slab)
    return call.backward(grad, grad_state, states, lambda: launch(call))


def launch(call: Call) -> None:
    """Run the kernels in the current stream of the device that holds the call's tensors."""
    assert _C is not None
    device = call.held[0].device
    arguments = DTYPE_CODES[call.wide], call.sizes, call.streams, call.matrices, call.arrays
    with torch.cuda.device(device):
        # The allocator hands this block out again to later work of the same stream only.
        workspace_bytes = _C.selective_scan_cuda_workspace(*arguments)
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream().cuda_stream
        _C.selective_scan_cuda(*arguments, STREAM_CODES[call.dtype], workspace.data_ptr(), workspace_bytes, stream)


def _streams(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> torch.dtype:
    """What the kernels read streams as: constant matrices come with streams of the dtype of A only."""
    return A.dtype if 2 in (B.dim(), C.dim()) or u.dtype not in STREAM_CODES else u.dtype
