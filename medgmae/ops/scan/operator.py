"""The selective scan of Mamba (Gu & Dao 2023, algorithm 2): a linear recurrence whose coefficients follow the input.

The operators are ``medgmae::selective_scan`` and ``medgmae::selective_scan_backward``, with plain torch for every
device and native kernels for CPU and CUDA where ``medgmae._C`` has them. docs/scan.md tells the whole story.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from medgmae.ops.register import Operator, register
from medgmae.ops.scan import cuda, native, reference
from medgmae.ops.scan.inputs import ScanInputs

# Steps between the states that a forward keeps for its backward.
CHUNK = 64


def _fake(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    u, A = inputs.u, inputs.A
    return u.new_empty(u.shape), A.new_empty(u.shape[0], -(-u.shape[1] // inputs.chunk), A.shape[1], A.shape[0])


_OP = register(Operator("selective_scan", ScanInputs, _fake, ("out", "states")), reference, native, cuda)


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    return_last_state: Literal[False] = False,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    *,
    return_last_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a sequence with input-dependent state spaces, one per channel.

    With steps s = delta + delta_bias, through softplus if asked for, every channel d has the states h (N numbers)::

        h[t] = exp(s[t] A[d]) h[t-1] + s[t] u[t] B[t]        h[-1] = 0
        y[t] = C[t] . h[t] + D[d] u[t]
        out[t] = y[t] silu(z[t])

    Arguments and results are those of ``selective_scan_fn`` in mamba-ssm. What the kernels read is memory in which the
    channels of a token lie side by side: pass ``x.transpose(1, 2)`` of (batch, L, channels) tensors and nothing is
    copied; the result is such a view again. Two runs give the same bits, with any number of threads.

    Args:
        u: (batch, channels, L) float32, float64, float16 or bfloat16. Half precision is read and written as such, and
            computed in float32.
        delta: (batch, channels, L) step sizes, before bias and softplus.
        A: (channels, N), real; negative for a state that decays.
        B: (batch, N, L), or (batch, G, N, L) where channel d belongs to group d // (channels / G), or (channels, N),
            which takes the torch reference.
        C: as B; the two need not have the same form.
        D: (channels,), the weight of a skip connection.
        z: (batch, channels, L), a gate.
        delta_bias: (channels,).
        delta_softplus: pass the steps through softplus (the identity above 20).
        reverse: scan from the last token to the first: the same as flipping everything that depends on time, and the
            result, without copies.
        return_last_state: also return the state after the last scanned token.

    Returns:
        (batch, channels, L) with the dtype of ``u``; with ``return_last_state`` also (batch, channels, N), float32 or
        float64. Gradients flow through both.

    Raises:
        ValueError: shapes do not fit each other.
        TypeError: a complex or integer tensor, or tensors on several devices.
    """
    _check(u, delta, A, B, C, D, z, delta_bias)
    streams = [u, delta, B, C] if z is None else [u, delta, B, C, z]
    dtype = streams[0].dtype
    for tensor in streams[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = (u, delta, A, B, C, D, z, delta_bias)
    learning = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    inputs = ScanInputs(
        u=u.to(dtype).transpose(1, 2),
        delta=delta.to(dtype).transpose(1, 2),
        A=A.to(wide),
        B=_by_token(B.to(dtype if B.dim() > 2 else wide)),
        C=_by_token(C.to(dtype if C.dim() > 2 else wide)),
        D=None if D is None else D.to(wide),
        z=None if z is None else z.to(dtype).transpose(1, 2),
        delta_bias=None if delta_bias is None else delta_bias.to(wide),
        softplus=delta_softplus,
        reverse=reverse,
        chunk=CHUNK if learning else max(u.shape[2], 1),
    )
    out, states = _OP(*inputs)
    result: Tensor = out.to(u.dtype).transpose(1, 2)
    if not return_last_state:
        return result
    last = states[:, -1] if u.shape[2] else states.new_zeros(u.shape[0], A.shape[1], A.shape[0])
    return result, last.transpose(1, 2)


def _by_token(weights: Tensor) -> Tensor:
    """B or C as the operators take them: (batch, L, G, N), or (channels, N) as it is."""
    if weights.dim() == 3:
        return weights.transpose(1, 2).unsqueeze(2)
    return weights.permute(0, 3, 1, 2) if weights.dim() == 4 else weights


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.dim() != 3:
        raise ValueError(f"u must be (batch, channels, L), got {tuple(u.shape)}")
    batch, channels, length = u.shape
    if A.dim() != 2 or A.shape[0] != channels:
        raise ValueError(f"A must be (channels, N) with {channels} channels as u has, got {tuple(A.shape)}")
    expected = {
        "delta": (delta, u.shape),
        "z": (z, u.shape),
        "D": (D, (channels,)),
        "delta_bias": (delta_bias, (channels,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} must be {tuple(shape)}, as u is {tuple(u.shape)}, got {tuple(tensor.shape)}")
    states = A.shape[1]
    for name, weights in (("B", B), ("C", C)):
        by_time = weights.dim() in (3, 4) and (weights.shape[0], *weights.shape[-2:]) == (batch, states, length)
        groups = weights.shape[1] if weights.dim() == 4 else 1
        constant = weights.dim() == 2 and tuple(weights.shape) == tuple(A.shape)  # only then may an export compare them
        if not (constant or by_time) or not groups or channels % groups:
            raise ValueError(
                f"{name} must be (batch, N, L) = {(batch, states, length)}, (batch, groups, N, L) with a number of "
                f"groups that divides the {channels} channels, or (channels, N) = {tuple(A.shape)}, "
                f"got {tuple(weights.shape)}"
            )
    for name, tensor in {"u": u, "A": A, "B": B, "C": C, **{n: t for n, (t, _) in expected.items()}}.items():
        if tensor is not None and (not tensor.is_floating_point() or tensor.device != u.device):
            raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}: expected real floating point on {u.device}")
