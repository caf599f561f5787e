"""What ``medgmae::selective_scan`` takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScanInputs(NamedTuple):
    """Tokens with the channels side by side, parameters in the dtype of the computation.

    u, delta, z: (B, L, D); A: (D, N); B, C: (B, L, G, N), or (D, N) for the whole sequence; D, delta_bias: (D,).
    softplus: of the steps. reverse: scan backwards in time. chunk: steps between the states that are kept.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    softplus: bool
    reverse: bool
    chunk: int

    @property
    def constant(self) -> bool:
        """Whether B or C is the same for the whole sequence: a form that has no kernels, only the torch reference."""
        return self.B.dim() == 2 or self.C.dim() == 2
