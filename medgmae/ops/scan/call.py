"""What the CPU and the CUDA kernels of the scan share: where the tensors of a call lie, and what it gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from medgmae.ops.scan.inputs import ScanInputs
from medgmae.ops.streams import Streams, room


class Call(Streams):
    """The arguments of one scan, and what it gives.

    ``dtype``: of the streams, and of B and C. ``slab``: channels of a group over which the kernel sums the
    gradients of B and C.
    """

    def __init__(self, inputs: ScanInputs, dtype: torch.dtype, slab: int, turns: bool = False) -> None:
        u, delta, A, B, C, D, z, delta_bias, softplus, reverse, chunk = inputs
        super().__init__(dtype, A.dtype, u.shape[1], reverse, turns)
        self.inputs = inputs
        groups = math.lcm(B.shape[2], C.shape[2])
        self.parts = -(-(u.shape[2] // groups) // slab)
        self.sizes = {
            "batch": u.shape[0],
            "length": u.shape[1],
            "channels": u.shape[2],
            "states": A.shape[1],
            "groups": groups,
            "chunk": chunk,
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
        u, A = self.inputs.u, self.inputs.A
        out = room(u, self.dtype)
        kept = A.new_empty(u.shape[0], -(-self.length // self.sizes["chunk"]), A.shape[1], A.shape[0])
        self.stream("out", out)
        self.array("kept", kept)
        if out.numel():
            run()
        return out.to(u.dtype), kept

    def backward(
        self, grad: Tensor, grad_states: Tensor | None, states: Tensor, run: Callable[[], None]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the operator's tensors, in order; ``run`` calls the kernel."""
        u, delta, A, B, C, D, z, delta_bias = self.inputs[:8]
        self.stream("grad", grad)
        self.array("kept", states)
        if grad_states is not None and self.length:
            self.array("grad_state", grad_states[:, -1])  # the only one that is handed out
        outputs = {name: room(u, self.dtype) for name in ("du", "ddelta", *(("dz",) if z is not None else ()))}
        for name, tensor in outputs.items():
            self.stream(name, tensor)
        batch, channels = u.shape[0], u.shape[2]
        shapes = {"dA": (batch, *A.shape), "dD": (batch, channels), "dbias": (batch, channels)}
        partial = self.parts, batch, self.length, self.sizes["groups"], A.shape[1]
        shapes |= {"dB": partial, "dC": partial}
        # The kernels write every number, if there is anything to do.
        sums = {name: A.new_empty(s) if u.numel() else A.new_zeros(s) for name, s in shapes.items()}
        for name, tensor in sums.items():
            self.array(name, tensor)
        if u.numel():
            run()
        return (
            outputs["du"].to(u.dtype),
            outputs["ddelta"].to(delta.dtype),
            sums["dA"].sum(0),
            self._whole(sums["dB"], B),
            self._whole(sums["dC"], C),
            None if D is None else sums["dD"].sum(0).to(D.dtype),
            None if z is None else outputs["dz"].to(z.dtype),
            None if delta_bias is None else sums["dbias"].sum(0).to(delta_bias.dtype),
        )

    def _whole(self, partial: Tensor, weights: Tensor) -> Tensor:
        """The gradient of B or C, in its shape and dtype."""
        total = partial.sum(0)
        total = total.flip(1) if self.reverse else total
        wide, narrow = total.shape[2], weights.shape[2]
        if wide != narrow:
            total = total.reshape(*total.shape[:2], narrow, wide // narrow, total.shape[3]).sum(3)
        return total.to(weights.dtype)

    def _matrix(self, weights: Tensor, groups: int) -> tuple[int, int, int, int]:
        ready = weights.to(self.dtype)
        if ready.shape[2] == 1:  # for all groups of the other matrix
            ready = ready.expand(-1, -1, groups, -1)
        elif ready.shape[2] != groups:
            ready = ready.repeat_interleave(groups // ready.shape[2], dim=2)
        ready = ready if ready.stride(3) == 1 or ready.shape[3] == 1 else ready.contiguous()
        return self.start(ready), ready.stride(0), self.step(ready), ready.stride(2)
