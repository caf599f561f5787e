"""The CUDA kernels of :mod:`medgmae.ops.selective_scan`: torch allocates what they write; they go into its stream.

Nothing waits for the device, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from medgmae.ops._native import _C, DTYPE_CODES
from medgmae.ops._scan_native import Call, Kernel

# StreamType of cuda/half.h: what streams hold.
STREAM_CODES = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 1, torch.float16: 2}
CHUNK = LONGEST = 64  # kLongestChunk of cuda/scan_work.h
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
    dtype = _streams(u, A, B, C)
    out = u.new_empty(u.shape, dtype=dtype)
    kept = A.new_empty(u.shape[0], -(-u.shape[1] // chunk), A.shape[1], A.shape[0])
    call = Call(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, chunk, dtype)
    call.stream("out", out)
    call.array("kept", kept)
    if out.numel():
        launch(call)
    return out.to(u.dtype), kept


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
    dtype = _streams(u, A, B, C)
    if chunk > LONGEST:
        chunk, states = CHUNK, forward(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, CHUNK)[1]
    call = Call(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, chunk, dtype)
    block = BLOCK_BYTES // A.element_size()
    call.sizes["parts"] = -(-(u.shape[2] // call.sizes["groups"]) // block) or 1
    call.stream("grad", grad)
    call.array("kept", states)
    if grad_state is not None:
        call.array("grad_state", grad_state)
    outputs = {name: u.new_empty(u.shape, dtype=dtype) for name in ("du", "ddelta", "dz")}
    for name, tensor in outputs.items():
        call.stream(name, tensor)
    batch, channels = u.shape[0], u.shape[2]
    shapes = {"dA": (batch, *A.shape), "dD": (batch, channels), "dbias": (batch, channels)}
    shapes |= {"dB": call.partial_shape(B), "dC": call.partial_shape(C)}
    # The kernels write every number, if there is anything to do.
    sums = {name: A.new_empty(s) if u.numel() else A.new_zeros(s) for name, s in shapes.items()}
    for name, tensor in sums.items():
        call.array(name, tensor)
    if u.numel():
        launch(call)
    return (
        outputs["du"].to(u.dtype),
        outputs["ddelta"].to(u.dtype),
        sums["dA"].sum(0),
        call.whole(sums["dB"], B),
        call.whole(sums["dC"], C),
        A.new_empty(0) if D is None else sums["dD"].sum(0),
        u.new_empty(0) if z is None else outputs["dz"].to(u.dtype),
        A.new_empty(0) if delta_bias is None else sums["dbias"].sum(0),
    )


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
