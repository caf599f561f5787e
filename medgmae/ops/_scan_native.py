"""The native kernels of :mod:`medgmae.ops.selective_scan`: allocates what they write, says where everything lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from medgmae.ops._native import _C, DTYPE_CODES

Kernel = Callable[..., Any]

SLAB = 64  # kScanSlab of cuda/scan.h: channels of a group over which the kernel sums the gradients of B and C
CHUNK = 32
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
    """See ``medgmae::selective_scan``. ``variant``: CPU instruction set, "" for the best; ``threads``: torch's if None."""
    out = u.new_empty(u.shape, dtype=A.dtype)
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
    call.array("kept", states.contiguous())
    if grad_state is not None:
        call.array("grad_state", grad_state.contiguous())
    streams = {"du": u, "ddelta": delta} if z is None else {"du": u, "ddelta": delta, "dz": z}
    outputs = {name: A.new_empty(u.shape) for name in streams}
    for name, tensor in outputs.items():
        call.stream(name, tensor)
    batch, channels, states_count = u.shape[0], *A.shape
    sums = {"dA": A.new_zeros(batch, channels, states_count), "dD": A.new_zeros(batch, channels)}
    sums |= {"dbias": A.new_zeros(batch, channels), "dB": call.partial(B), "dC": call.partial(C)}
    for name, tensor in sums.items():
        call.array(name, tensor)
    if u.numel():
        call.run(variant, threads)
    empty = A.new_empty(0)
    return (
        outputs["du"].to(u.dtype),
        outputs["ddelta"].to(u.dtype),
        sums["dA"].sum(0),
        call.whole(sums["dB"], B),
        call.whole(sums["dC"], C),
        empty if D is None else sums["dD"].sum(0),
        empty.to(u.dtype) if z is None else outputs["dz"].to(u.dtype),
        empty.clone() if delta_bias is None else sums["dbias"].sum(0),
    )


class Call:
    """The arguments of one call: sizes, and addresses with strides. Holds the tensors that it points to."""

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
    ) -> None:
        self.reverse, self.length, self.dtype = reverse, u.shape[1], A.dtype
        self.held: list[Tensor] = []
        groups = max([m.shape[2] for m in (B, C) if m.dim() == 4], default=1)
        self.sizes = {
            "batch": u.shape[0],
            "length": self.length,
            "channels": u.shape[2],
            "states": A.shape[1],
            "groups": groups,
            "chunk": chunk,
            "parts": -(-(u.shape[2] // groups) // SLAB) or 1,
            "softplus": softplus,
        }
        self.streams: dict[str, tuple[int, int, int]] = {}
        self.arrays: dict[str, int] = {}
        self.stream("u", u)
        self.stream("delta", delta)
        if z is not None:
            self.stream("z", z)
        self.matrices = {"B": self._matrix(B, groups), "C": self._matrix(C, groups)}
        for name, tensor in {"A": A, "D": D, "bias": delta_bias}.items():
            if tensor is not None:
                self.array(name, tensor.contiguous())

    def stream(self, name: str, tensor: Tensor) -> None:
        """Add a tensor (batch, L, channels); one that is read is copied where it has another dtype or layout."""
        ready = tensor.to(self.dtype)
        ready = ready if ready.stride(2) == 1 else ready.contiguous()
        self.held.append(ready)
        self.streams[name] = (self._start(ready), ready.stride(0), self._step(ready))

    def array(self, name: str, tensor: Tensor) -> None:
        """Add a contiguous tensor of the dtype of the call."""
        self.held.append(tensor)
        self.arrays[name] = tensor.data_ptr()

    def partial(self, weights: Tensor) -> Tensor:
        """Room for the sums that the kernel makes of the gradient of B or C."""
        batch, channels, states = self.sizes["batch"], self.sizes["channels"], self.sizes["states"]
        if weights.dim() == 2:
            return self.held[0].new_zeros(batch, channels, states)
        return self.held[0].new_zeros(self.sizes["parts"], batch, self.length, self.sizes["groups"], states)

    def whole(self, partial: Tensor, weights: Tensor) -> Tensor:
        """The gradient of B or C, in its shape and dtype."""
        total = partial.sum(0)
        if weights.dim() == 4:
            total = total.flip(1) if self.reverse else total
            total = total if weights.shape[2] == total.shape[2] else total.sum(2, keepdim=True)
        return total.to(weights.dtype)

    def run(self, variant: str, threads: int | None) -> None:
        """Call the kernel."""
        assert _C is not None
        code, threads = DTYPE_CODES[self.dtype], threads or torch.get_num_threads()
        _C.selective_scan(code, self.sizes, self.streams, self.matrices, self.arrays, threads, variant)

    def _matrix(self, weights: Tensor, groups: int) -> tuple[int, int, int, int, int]:
        ready = weights.to(self.dtype)
        if ready.dim() == 2:
            self.held.append(ready.contiguous())
            return self.held[-1].data_ptr(), 0, 0, 0, 1
        if ready.shape[2] != groups:  # one of B and C is shared by the other's groups
            ready = ready.expand(-1, -1, groups, -1)
        ready = ready if ready.stride(3) == 1 or ready.shape[3] == 1 else ready.contiguous()
        self.held.append(ready)
        return self._start(ready), ready.stride(0), self._step(ready), ready.stride(2), 0

    def _start(self, tensor: Tensor) -> int:
        last = (self.length - 1) * tensor.stride(1) * tensor.element_size() if self.reverse else 0
        return tensor.data_ptr() + last

    def _step(self, tensor: Tensor) -> int:
        return -tensor.stride(1) if self.reverse else tensor.stride(1)
