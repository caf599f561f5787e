"""The native kernels of :mod:`medgmae.ops.selective_scan`: allocates what they write, says where everything lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from medgmae.ops._native import _C, DTYPE_CODES

Kernel = Callable[..., Any]

SLAB = 64  # kScanSlab of cuda/scan.h: channels of a group over which the kernel sums the gradients of B and C
CHUNK = 64
LARGE = 8 << 20  # bytes of an output from which on large pages are worth asking for
LONGEST = 64  # most steps per chunk of a backward: it holds a chunk of all its channels


def kernels() -> Iterator[tuple[str, Kernel, Kernel]]:
    """Dispatch key, forward and backward of every native implementation that is compiled in."""
    if _C is not None:
        yield "CPU", forward, backward


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
    *,
    variant: str = "",
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``medgmae::selective_scan``.

    ``variant``: CPU instruction set, "" for the best; ``threads``: torch's number if None.
    """
    out = room(u, A.dtype)
    kept = A.new_empty(u.shape[0], -(-u.shape[1] // chunk), A.shape[1], A.shape[0])
    call = Call(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, chunk)
    call.stream("out", out)
    call.array("kept", kept)
    if out.numel():
        call.run(variant, threads)
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
    *,
    variant: str = "",
    threads: int | None = None,
) -> tuple[Tensor, ...]:
    """See ``medgmae::selective_scan_backward``; options as for :func:`forward`."""
    if chunk > LONGEST:
        rest = (u, delta, A, B, C, D, z, delta_bias, softplus, reverse)
        chunk, states = CHUNK, forward(*rest, CHUNK, variant=variant, threads=threads)[1]
    call = Call(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, chunk)
    call.stream("grad", grad)
    call.array("kept", states)
    if grad_state is not None:
        call.array("grad_state", grad_state)
    streams = {"du": u, "ddelta": delta} if z is None else {"du": u, "ddelta": delta, "dz": z}
    outputs = {name: room(u, A.dtype) for name in streams}
    for name, tensor in outputs.items():
        call.stream(name, tensor)
    batch, channels, states_count = u.shape[0], *A.shape
    sums = {"dA": A.new_zeros(batch, channels, states_count), "dD": A.new_zeros(batch, channels)}
    sums |= {"dbias": A.new_zeros(batch, channels), "dB": call.partial(B), "dC": call.partial(C)}
    for name, tensor in sums.items():
        call.array(name, tensor)
    if u.numel():
        call.run(variant, threads)
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


def room(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense tensor for a kernel to write, of the shape and on the device of another."""
    assert _C is not None
    tensor = like.new_empty(like.shape, dtype=dtype)
    if tensor.nbytes >= LARGE:
        _C.prefer_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


class Streams:
    """Where the tensors of one call lie; holds them while it lives.

    A stream is (batch, L, channels) with the channels of a token side by side; a reversed one begins at its last token.
    """

    def __init__(self, dtype: torch.dtype, length: int, reverse: bool) -> None:
        self.dtype, self.length, self.reverse = dtype, length, reverse
        self.held: list[Tensor] = []
        self.streams: dict[str, tuple[int, int, int]] = {}
        self.arrays: dict[str, int] = {}

    def stream(self, name: str, tensor: Tensor) -> None:
        """Add a stream; one that is read is copied where it has another dtype or layout."""
        ready = tensor.to(self.dtype)
        ready = ready if ready.stride(2) == 1 else ready.contiguous()
        self.streams[name] = (self.start(ready), ready.stride(0), self.step(ready))

    def array(self, name: str, tensor: Tensor) -> None:
        """Add a dense tensor of the dtype of the call."""
        self.held.append(tensor.contiguous())
        self.arrays[name] = self.held[-1].data_ptr()

    def start(self, tensor: Tensor) -> int:
        """Address of the first token, in the order of the call."""
        self.held.append(tensor)
        last = (self.length - 1) * tensor.stride(1) * tensor.element_size() if self.reverse else 0
        return tensor.data_ptr() + last

    def step(self, tensor: Tensor) -> int:
        """Elements from one token to the next, in the order of the call."""
        return -tensor.stride(1) if self.reverse else tensor.stride(1)


class Call(Streams):
    """The arguments of one scan. ``streams``: dtype of what is a stream, or B and C by time; that of A if None."""

    def __init__(
        self,
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
        streams: torch.dtype | None = None,
    ) -> None:
        super().__init__(streams or A.dtype, u.shape[1], reverse)
        self.wide = A.dtype  # what is computed in
        groups = math.lcm(*(m.shape[2] for m in (B, C) if m.dim() == 4))
        self.sizes = {
            "batch": u.shape[0],
            "length": u.shape[1],
            "channels": u.shape[2],
            "states": A.shape[1],
            "groups": groups,
            "chunk": chunk,
            "parts": -(-(u.shape[2] // groups) // SLAB) or 1,
            "softplus": softplus,
        }
        self.matrices = {"B": self._matrix(B, groups), "C": self._matrix(C, groups)}
        for name, tensor in {"u": u, "delta": delta, "z": z}.items():
            if tensor is not None:
                self.stream(name, tensor)
        for name, tensor in {"A": A, "D": D, "bias": delta_bias}.items():
            if tensor is not None:
                self.array(name, tensor)

    def partial(self, weights: Tensor) -> Tensor:
        """Room for the sums that the kernel makes of the gradient of B or C."""
        return weights.new_zeros(self.partial_shape(weights), dtype=self.wide)

    def partial_shape(self, weights: Tensor) -> tuple[int, ...]:
        """Of :meth:`partial`: for each sample if constant, else for each slab of channels."""
        batch, channels, states = self.sizes["batch"], self.sizes["channels"], self.sizes["states"]
        if weights.dim() == 2:
            return batch, channels, states
        return self.sizes["parts"], batch, self.length, self.sizes["groups"], states

    def whole(self, partial: Tensor, weights: Tensor) -> Tensor:
        """The gradient of B or C, in its shape and dtype."""
        total = partial.sum(0)
        if weights.dim() == 4:
            total = total.flip(1) if self.reverse else total
            wide, narrow = total.shape[2], weights.shape[2]
            if wide != narrow:
                total = total.reshape(*total.shape[:2], narrow, wide // narrow, total.shape[3]).sum(3)
        return total.to(weights.dtype)

    def run(self, variant: str, threads: int | None) -> None:
        """Call the kernel."""
        assert _C is not None
        code, threads = DTYPE_CODES[self.wide], threads or torch.get_num_threads()
        _C.selective_scan(code, self.sizes, self.streams, self.matrices, self.arrays, threads, variant)

    def _matrix(self, weights: Tensor, groups: int) -> tuple[int, int, int, int, int]:
        if weights.dim() == 2:
            self.held.append(weights.to(self.wide).contiguous())
            return self.held[-1].data_ptr(), 0, 0, 0, 1
        ready = weights.to(self.dtype)
        if ready.shape[2] == 1:  # for all groups of the other matrix
            ready = ready.expand(-1, -1, groups, -1)
        elif ready.shape[2] != groups:
            ready = ready.repeat_interleave(groups // ready.shape[2], dim=2)
        ready = ready if ready.stride(3) == 1 or ready.shape[3] == 1 else ready.contiguous()
        return self.start(ready), ready.stride(0), self.step(ready), ready.stride(2), 0
