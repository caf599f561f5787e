"""Ways to run the selective scan in plain torch, and mamba-ssm: what scan.py compares with.

Each takes the tensors of one call with batch 1 (channels first or tokens first, as `tokens` says: what is faster for
it, prepared outside the clock) and returns the result in the same layout. Autograd differentiates all but the
prefix scan, whose recurrence has a backward of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medgmae.ops.scan import reference
from medgmae.ops.scan.inputs import ScanInputs

PIECE = 64  # steps of the parallel-prefix scan that are in memory at a time
MAMBA = "mamba-ssm"
OWN_REFERENCE = "torch reference of this library"
Tensors = Sequence[Tensor]  # u, delta, A, B, C, D, z, delta_bias


class Rival(NamedTuple):
    """A way to scan. `tokens`: it takes (1, L, D) and (1, L, N) tensors instead of (1, D, L) and (1, N, L)."""

    run: Callable[..., Tensor]
    tokens: bool
    longest_backward: int = 1 << 62


def by_index(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """The published reference's way: whole (1, D, L, N) tensors, and every step indexes them.

    The backward of an index is a whole tensor of zeros with one step in it, so that its time is quadratic.
    """
    steps = F.softplus(delta + bias[:, None])
    decay = torch.exp(steps.unsqueeze(-1) * A[:, None])
    drive = (steps * u).unsqueeze(-1) * B.transpose(1, 2).unsqueeze(1)
    h = u.new_zeros(u.shape[0], *A.shape)
    rows = []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + drive[:, :, t]
        rows.append(torch.einsum("bdn,bn->bd", h, C[:, :, t]))
    return (torch.stack(rows, dim=2) + D[:, None] * u) * F.silu(z)


def unbound(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """The same with the time axis first and taken apart once: linear, forward and backward."""
    steps = F.softplus(delta + bias)
    decay = torch.exp(steps[0].unsqueeze(-1) * A)  # (L, D, N)
    drive = (steps * u)[0].unsqueeze(-1) * B[0].unsqueeze(1)
    h = torch.zeros_like(A)
    rows = []
    for a, b, c in zip(decay.unbind(0), drive.unbind(0), C[0].unbind(0), strict=True):
        h = torch.addcmul(b, a, h)
        rows.append(torch.mv(h, c))
    return (torch.stack(rows) + D * u) * F.silu(z)


def prefix(decay: Tensor, drive: Tensor) -> Tensor:
    """h[t] = decay[t] h[t - 1] + drive[t] along the first axis, in log2(steps) rounds (Hillis & Steele 1986)."""
    decay, h, reach = decay.clone(), drive, 1
    while reach < len(decay):
        h = torch.cat([h[:reach], torch.addcmul(h[reach:], decay[reach:], h[:-reach])])
        if 2 * reach < len(decay):
            decay = torch.cat([decay[:reach], decay[reach:] * decay[:-reach]])
        reach *= 2
    return h


class PrefixScan(torch.autograd.Function):
    """:func:`prefix`, whose backward is the same scan from the other end."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, drive: Tensor) -> Tensor:  # type: ignore[override]
        """Keep the decays and the states."""
        h = prefix(decay, drive)
        ctx.save_for_backward(decay, h)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """g[t] = grad[t] + decay[t + 1] g[t + 1]."""
        decay, h = ctx.saved_tensors
        after = torch.cat([torch.zeros_like(decay[:1]), decay[1:].flip(0)])
        g = prefix(after, grad.flip(0)).flip(0)
        return torch.cat([torch.zeros_like(h[:1]), h[:-1]]) * g, g


def parallel_prefix(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """Piece after piece, each by a prefix scan; a piece is computed again in the backward, so memory stays bounded."""
    steps = F.softplus(delta + bias)

    def piece(h: Tensor, steps: Tensor, u: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        decay = torch.exp(steps.unsqueeze(-1) * A)
        drive = (steps * u).unsqueeze(-1) * B.unsqueeze(1)
        drive = torch.cat([torch.addcmul(drive[:1], decay[:1], h), drive[1:]])
        states = PrefixScan.apply(decay, drive)
        return torch.matmul(states, C.unsqueeze(-1)).squeeze(-1), states[-1:]

    h, rows = torch.zeros_like(A)[None], []
    for parts in zip(*(t[0].split(PIECE) for t in (steps, u, B, C)), strict=True):
        if torch.is_grad_enabled():
            y, h = checkpoint(piece, h, *parts, use_reentrant=False, preserve_rng_state=False)  # type: ignore[misc]
        else:
            y, h = piece(h, *parts)
        rows.append(y)
    return (torch.cat(rows) + D * u) * F.silu(z)


class TorchReference(torch.autograd.Function):
    """The library's own reference, without its kernels: a loop over pieces with a backward written by hand."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        """(1, L, D) and (1, L, N) tensors."""
        out, states = reference.forward(as_operator(tensors))
        ctx.save_for_backward(states, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Gradients of all eight."""
        states, *tensors = ctx.saved_tensors
        gradients = reference.backward(grad, None, states, as_operator(tensors))
        return tuple(g.squeeze(2) if g.dim() == 4 else g for g in gradients if g is not None)


def as_operator(tensors: Tensors) -> ScanInputs:
    """B and C with an axis of groups."""
    return ScanInputs(*(t.unsqueeze(2) if i in (3, 4) else t for i, t in enumerate(tensors)), True, False, 64)


def rivals(device: str) -> dict[str, Rival]:
    """Name -> rival; what is not a rival but our own reference comes last."""
    found = {
        "torch, (B, D, L, N) tensors indexed step by step": Rival(by_index, False, 250),
        "torch, time axis unbound once": Rival(unbound, True),
        "torch, parallel prefix in pieces": Rival(parallel_prefix, True),
    }
    if device == "cuda":
        try:
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        except ImportError as error:
            print(f"mamba-ssm is not among the rivals: {error}")
        else:

            def mamba(*tensors: Tensor) -> Tensor:
                u, delta, A, B, C, D, z, bias = tensors
                out: Tensor = selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=True)
                return out

            found[MAMBA] = Rival(mamba, False)
    found[OWN_REFERENCE] = Rival(TorchReference.apply, True)
    return found
