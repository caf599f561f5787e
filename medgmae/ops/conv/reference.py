"""The causal convolution in plain torch, with its gradients written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medgmae.ops.conv.inputs import ConvInputs


def _padded(x: Tensor, width: int, reverse: bool) -> Tensor:
    """x (B, L, D) as (B, D, L + W - 1) with the zeros before (behind, when reversed) the sequence."""
    pad = (0, width - 1) if reverse else (width - 1, 0)
    return F.pad(x.transpose(1, 2), pad)


def _filtered(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """The convolution alone, (B, L, D) in the dtype of ``weight``."""
    if not x.shape[1]:  # torch's convolution refuses a sequence that is shorter than the taps, with its zeros
        return x.to(weight.dtype)
    taps = weight.flip(1) if reverse else weight
    padded = _padded(x.to(weight.dtype), weight.shape[1], reverse)
    return F.conv1d(padded, taps.unsqueeze(1), bias, groups=weight.shape[0]).transpose(1, 2)


def forward(inputs: ConvInputs) -> Tensor:
    """See ``medgmae::causal_conv1d``."""
    x, weight, bias, silu, reverse = inputs
    y = _filtered(x, weight, bias, reverse)
    return (F.silu(y) if silu else y).to(x.dtype).contiguous()


def backward(grad: Tensor, inputs: ConvInputs) -> tuple[Tensor | None, ...]:
    """See ``medgmae::causal_conv1d_backward``."""
    x, weight, bias, silu, reverse = inputs
    grad = grad.to(weight.dtype)
    if silu:
        y = _filtered(x, weight, bias, reverse)
        s = torch.sigmoid(y)
        grad = grad * s * (1 + y * (1 - s))
    dx = _filtered(grad, weight, None, not reverse)
    width, length = weight.shape[1], x.shape[1]
    padded = _padded(x.to(weight.dtype), width, reverse)  # (B, D, L + W - 1)
    taps = [(padded[:, :, k : k + length] * grad.transpose(1, 2)).sum((0, 2)) for k in range(width)]
    dw = torch.stack(taps[::-1] if reverse else taps, dim=1)
    return dx.to(x.dtype).contiguous(), dw, None if bias is None else grad.sum((0, 1))
