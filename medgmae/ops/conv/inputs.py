"""What ``medgmae::causal_conv1d`` takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ConvInputs(NamedTuple):
    """Tokens with the channels side by side, parameters in the dtype of the computation.

    x: (B, L, D); weight: (D, W); bias: (D,). silu: whether the activation follows. reverse: filter backwards in time.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    silu: bool
    reverse: bool
