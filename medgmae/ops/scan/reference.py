"""The selective scan in plain torch, for every device: forward, and a backward whose cost is linear in the length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medgmae.ops.scan.inputs import ScanInputs

PIECE = 64  # steps whose (batch, steps, channels, states) tensors are in memory at a time


def forward(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """See ``medgmae::selective_scan``."""
    u, delta, A, B, C, D, z, delta_bias, softplus, reverse, chunk = inputs
    steps = _steps(delta, delta_bias, softplus, A.dtype)
    wide = u.to(A.dtype)
    y, states = wide.new_zeros(u.shape), A.new_zeros(u.shape[0], -(-u.shape[1] // chunk), *A.T.shape)
    h = A.new_zeros(u.shape[0], *A.shape)
    for c, start in enumerate(range(0, u.shape[1], chunk)):
        for at in _pieces(start, min(start + chunk, u.shape[1]), reverse, u.shape[1]):
            _, after = _run(h, steps[:, at], wide[:, at], A, _matrices(B, at, A), reverse)
            y[:, at] = (after * _matrices(C, at, A)).sum(-1)
            h = after[:, 0 if reverse else -1]
        states[:, c] = h.transpose(1, 2)
    if D is not None:
        y = y + D * wide
    out = y if z is None else y * F.silu(z.to(A.dtype))
    return out.to(u.dtype).contiguous(), states


def backward(grad: Tensor, grad_states: Tensor | None, states: Tensor, inputs: ScanInputs) -> tuple[Tensor | None, ...]:
    """See ``medgmae::selective_scan_backward``."""
    if inputs.chunk > PIECE:
        inputs = inputs._replace(chunk=PIECE)
        states = forward(inputs)[1]
    u, delta, A, B, C, D, z, delta_bias, softplus, reverse, chunk = inputs
    steps, wide, length = _steps(delta, delta_bias, softplus, A.dtype), u.to(A.dtype), u.shape[1]
    dy, gate = grad.to(A.dtype), None
    if z is not None:
        gate = z.to(A.dtype)
        dy = dy * F.silu(gate)
    y = wide * (D if D is not None else 0)
    du, d_steps = dy * (D if D is not None else 0), torch.zeros_like(steps)
    dA, dB, dC = torch.zeros_like(A), torch.zeros_like(B, dtype=A.dtype), torch.zeros_like(C, dtype=A.dtype)
    carry = A.new_zeros(u.shape[0], *A.shape)
    if grad_states is not None and length:
        carry = grad_states[:, -1].to(A.dtype).transpose(1, 2)  # the only one that is handed out
    for c in reversed(range(states.shape[1])):
        h = states[:, c - 1].transpose(1, 2) if c else torch.zeros_like(carry)
        (at,) = _pieces(c * chunk, min((c + 1) * chunk, length), reverse, length)
        weights, rows = _matrices(B, at, A), _matrices(C, at, A)
        decay, after = _run(h, steps[:, at], wide[:, at], A, weights, reverse)
        before = torch.cat([after[:, 1:], h[:, None]], 1) if reverse else torch.cat([h[:, None], after[:, :-1]], 1)
        y[:, at] += (after * rows).sum(-1)
        g, carry = _run_back(carry, rows * dy[:, at, :, None], decay, reverse)
        pushed, pulled = (g * weights).sum(-1), g * before * decay
        du[:, at] += steps[:, at] * pushed
        d_steps[:, at] = wide[:, at] * pushed + (pulled * A).sum(-1)
        dA += (pulled * steps[:, at, :, None]).sum((0, 1))
        _gather(dB, g * (steps * wide)[:, at, :, None], at)
        _gather(dC, after * dy[:, at, :, None], at)
    d_delta, dz = d_steps * _slope(delta, delta_bias, softplus, A.dtype), None
    if gate is not None:
        dz = grad.to(A.dtype) * y * torch.sigmoid(gate) * (1 + gate * (1 - torch.sigmoid(gate)))
    d_bias, dD = d_delta.sum((0, 1)), (dy * wide).sum((0, 1))
    gradients = du, d_delta, dA, dB, dC, dD, dz, d_bias
    # Dense and in the dtype of the input, whatever the layout of the inputs: what compiled code is told beforehand.
    return tuple(
        None if t is None or g is None else g.to(t.dtype).contiguous()
        for g, t in zip(gradients, inputs[:8], strict=True)
    )


def _steps(delta: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    """Step sizes (B, L, D); softplus is the identity above 20, as in mamba-ssm."""
    steps = delta.to(dtype) if bias is None else delta.to(dtype) + bias
    return F.softplus(steps) if softplus else steps


def _slope(delta: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    steps = delta.to(dtype) if bias is None else delta.to(dtype) + bias
    return torch.where(steps > 20, 1.0, torch.sigmoid(steps)) if softplus else torch.ones_like(steps)


def _pieces(start: int, stop: int, reverse: bool, length: int) -> list[slice]:
    """Scanned steps [start, stop) as slices of the sequence, in the order of the scan."""
    pieces = [slice(i, min(i + PIECE, stop)) for i in range(start, stop, PIECE)]
    return [slice(length - p.stop, length - p.start) for p in pieces] if reverse else pieces


def _matrices(weights: Tensor, at: slice, A: Tensor) -> Tensor:
    """B or C of some steps, per channel: (B or 1, steps or 1, D or 1, N)."""
    if weights.dim() == 2:
        return weights.to(A.dtype)[None, None]
    rows = weights[:, at].to(A.dtype)  # (B, steps, G, N)
    return rows if rows.shape[2] == 1 else rows.repeat_interleave(A.shape[0] // rows.shape[2], dim=2)


def _gather(total: Tensor, per_channel: Tensor, at: slice) -> None:
    """Add gradients (B, steps, D, N) to those of B or C, whose channels share values in groups or over time."""
    if total.dim() == 2:
        total += per_channel.sum((0, 1))
    else:
        groups = total.shape[2]
        shape = (*per_channel.shape[:2], groups, per_channel.shape[2] // groups, total.shape[3])
        total[:, at] += per_channel.reshape(shape).sum(3)


def _run(h: Tensor, steps: Tensor, u: Tensor, A: Tensor, B: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Decays exp(steps A) and the states after each step, both (B, steps, D, N)."""
    decay = torch.exp(steps.unsqueeze(-1) * A)
    drive = (steps * u).unsqueeze(-1) * B
    states = torch.empty_like(decay)
    for t in _order(decay.shape[1], reverse):
        h = torch.addcmul(drive[:, t], decay[:, t], h)
        states[:, t] = h
    return decay, states


def _run_back(carry: Tensor, source: Tensor, decay: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the states (B, steps, D, N), and what they hand to the step before the first."""
    g = torch.empty_like(decay)
    for t in _order(decay.shape[1], not reverse):
        g[:, t] = source[:, t] + carry
        carry = decay[:, t] * g[:, t]
    return g, carry


def _order(length: int, reverse: bool) -> range:
    return range(length - 1, -1, -1) if reverse else range(length)
