"""The short causal convolution of Mamba, one filter per channel, with SiLU behind it.

The operators are ``medgmae::causal_conv1d`` and ``medgmae::causal_conv1d_backward``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medgmae.ops.conv import cuda, native, reference
from medgmae.ops.conv.inputs import ConvInputs
from medgmae.ops.register import Operator, register


def _fake(inputs: ConvInputs) -> Tensor:
    return inputs.x.new_empty(inputs.x.shape)


_OP = register(Operator("causal_conv1d", ConvInputs, _fake), reference, native, cuda)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["silu"] | None = None,
    reverse: bool = False,
) -> Tensor:
    """Filter every channel over the tokens up to the present one.

    out[t] = act(bias + sum over k of weight[k] x[t - (W - 1) + k]), with zeros before the sequence, as
    ``causal_conv1d_fn`` of causal-conv1d. As for :func:`~medgmae.ops.selective_scan`, ``x.transpose(1, 2)`` of a
    (batch, L, channels) tensor is read without a copy and the result is such a view.

    Args:
        x: (batch, channels, L), floating point.
        weight: (channels, W); the last tap is for the present token.
        bias: (channels,).
        activation: "silu" or None.
        reverse: the taps reach into the future: the same as flipping x and the result.

    Returns:
        (batch, channels, L) with the dtype of ``x``.

    Raises:
        ValueError: shapes do not fit each other, or an unknown activation.
        TypeError: a complex or integer tensor, or tensors on several devices.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[1] or not weight.shape[1]:
        raise ValueError(
            f"x must be (batch, channels, L) and weight (channels, W), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (x.shape[1],):
        raise ValueError(f"bias must be (channels,) = {(x.shape[1],)}, got {tuple(bias.shape)}")
    for name, tensor in {"x": x, "weight": weight, "bias": bias}.items():
        if tensor is not None and (not tensor.is_floating_point() or tensor.device != x.device):
            raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}: expected real floating point on {x.device}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs = ConvInputs(
        x=x.transpose(1, 2),
        weight=weight.to(wide),
        bias=None if bias is None else bias.to(wide),
        silu=activation == "silu",
        reverse=reverse,
    )
    out: Tensor = _OP(*inputs)
    return out.transpose(1, 2)
