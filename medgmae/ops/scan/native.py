"""The native kernels of :mod:`medgmae.ops.selective_scan`: allocates what they write, says where everything lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from medgmae.ops.native import _C, DTYPE_CODES

Kernel = Callable[..., Any]

SLAB = 64  # kScanSlab of cuda/scan/scan.h: channels of a group over which the kernel sums the gradients of B and C
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
    call = Call(u, delta, A, B, C, D, z, delta_bias, softplus, reverse, chunk)
    return call.forward(lambda: _run(call, variant, threads))


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
    return call.backward(grad, grad_state, states, lambda: _run(call, variant, threads))


def _run(call: Call, variant: str, threads: int | None) -> None:
    assert _C is not None
    code, threads = DTYPE_CODES[call.wide], threads or torch.get_num_threads()
    _C.selective_scan(code, call.sizes, call.streams, call.matrices, call.arrays, threads, variant)


def room(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense tensor for a kernel to write, of the shape and on the device of another."""
    assert _C is not None
    tensor = like.new_empty(like.shape, dtype=dtype)
    if tensor.nbytes >= LARGE and tensor.device.type == "cpu":
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
    """The arguments of one scan, and what it gives.

    ``streams``: dtype of what is a stream, or B and C by time; that of A if None. ``slab``: channels of a group over
    which the kernel sums the gradients of B and C.
    """

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
        slab: int = SLAB,
    ) -> None:
        super().__init__(streams or A.dtype, u.shape[1], reverse)
        self.inputs = u, A, B, C, D, z, delta_bias
        self.wide = A.dtype  # what is computed in
        groups = math.lcm(*(m.shape[2] for m in (B, C) if m.dim() == 4))
        self.sizes = {
            "batch": u.shape[0],
            "length": u.shape[1],
            "channels": u.shape[2],
            "states": A.shape[1],
            "groups": groups,
            "chunk": chunk,
            "parts": -(-(u.shape[2] // groups) // slab) or 1,
            "softplus": softplus,
        }
        self.matrices = {"B": self._matrix(B, groups), "C": self._matrix(C, groups)}
        for name, tensor in {"u": u, "delta": delta, "z": z}.items():
            if tensor is not None:
                self.stream(name, tensor)
        for name, tensor in {"A": A, "D": D, "bias": delta_bias}.items():
            if tensor is not None:
                self.array(name, tensor)

    def forward(self, run: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """The result and the kept states; ``run`` calls the kernel."""
        u, A = self.inputs[:2]
        out = room(u, self.dtype)
        kept = A.new_empty(u.shape[0], -(-self.length // self.sizes["chunk"]), A.shape[1], A.shape[0])
        self.stream("out", out)
        self.array("kept", kept)
        if out.numel():
            run()
        return out.to(u.dtype), kept

    def backward(
        self, grad: Tensor, grad_state: Tensor | None, states: Tensor, run: Callable[[], None]
    ) -> tuple[Tensor, ...]:
        """The gradients of the operator's tensors, in order; ``run`` calls the kernel."""
        u, A, B, C, D, z, delta_bias = self.inputs
        self.stream("grad", grad)
        self.array("kept", states)
        if grad_state is not None:
            self.array("grad_state", grad_state)
        outputs = {name: room(u, self.dtype) for name in ("du", "ddelta", *(("dz",) if z is not None else ()))}
        for name, tensor in outputs.items():
            self.stream(name, tensor)
        batch, channels = u.shape[0], u.shape[2]
        shapes = {"dA": (batch, *A.shape), "dD": (batch, channels), "dbias": (batch, channels)}
        shapes |= {"dB": self._partial(B), "dC": self._partial(C)}
        # The kernels write every number, if there is anything to do.
        sums = {name: A.new_empty(s) if u.numel() else A.new_zeros(s) for name, s in shapes.items()}
        for name, tensor in sums.items():
            self.array(name, tensor)
        if u.numel():
            run()
        return (
            outputs["du"].to(u.dtype),
            outputs["ddelta"].to(u.dtype),
            sums["dA"].sum(0),
            self._whole(sums["dB"], B),
            self._whole(sums["dC"], C),
            A.new_empty(0) if D is None else sums["dD"].sum(0),
            u.new_empty(0) if z is None else outputs["dz"].to(u.dtype),
            A.new_empty(0) if delta_bias is None else sums["dbias"].sum(0),
        )

    def _partial(self, weights: Tensor) -> tuple[int, ...]:
        """Shape of the kernel's sums of the gradient of B or C: by sample if constant, else by slab of channels."""
        batch, channels, states = self.sizes["batch"], self.sizes["channels"], self.sizes["states"]
        if weights.dim() == 2:
            return batch, channels, states
        return self.sizes["parts"], batch, self.length, self.sizes["groups"], states

    def _whole(self, partial: Tensor, weights: Tensor) -> Tensor:
        """The gradient of B or C, in its shape and dtype."""
        total = partial.sum(0)
        if weights.dim() == 4:
            total = total.flip(1) if self.reverse else total
            wide, narrow = total.shape[2], weights.shape[2]
            if wide != narrow:
                total = total.reshape(*total.shape[:2], narrow, wide // narrow, total.shape[3]).sum(3)
        return total.to(weights.dtype)

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
