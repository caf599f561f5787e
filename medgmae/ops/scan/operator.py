"""The selective scan of Mamba (Gu & Dao 2023, algorithm 2): a linear recurrence whose coefficients follow the input.

The operators are ``medgmae::selective_scan`` and ``medgmae::selective_scan_backward``, with plain torch for every
device and native kernels for CPU and CUDA where ``medgmae._C`` has them. docs/scan.md tells the whole story.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medgmae.ops.scan import cuda, native, reference

# Steps between the states that a forward keeps for its backward.
CHUNK = 64

_ARGUMENTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, bool softplus, "
    "bool reverse, SymInt chunk"
)
_LIBRARY: Any = torch.library.Library("medgmae", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"selective_scan({_ARGUMENTS}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"selective_scan_backward(Tensor grad, Tensor? grad_state, Tensor states, {_ARGUMENTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


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
) -> Any:
    """Scan a sequence with input-dependent state spaces, one per channel.

    With steps s = delta + delta_bias, through softplus if asked for, every channel d has the states h (N numbers)::

        h[t] = exp(s[t] A[d]) h[t-1] + s[t] u[t] B[t]        h[-1] = 0
        y[t] = C[t] . h[t] + D[d] u[t]
        out[t] = y[t] silu(z[t])

    Arguments and results are those of ``selective_scan_fn`` in mamba-ssm. What the kernels read is memory in which the
    channels of a token lie side by side: pass ``x.transpose(1, 2)`` of (batch, L, channels) tensors and nothing is
    copied; the result is such a view again. Two runs with the same number of threads give the same bits.

    Args:
        u: (batch, channels, L) float32, float64, float16 or bfloat16. Half precision is read and written as such, and
            computed in float32.
        delta: (batch, channels, L) step sizes, before bias and softplus.
        A: (channels, N), real; negative for a state that decays.
        B: (batch, N, L), or (batch, G, N, L) where channel d belongs to group d // (channels / G), or (channels, N).
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
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    streams = [u, delta, B, C] if z is None else [u, delta, B, C, z]
    dtype = streams[0].dtype
    for tensor in streams[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    parameters = [p if p is None else p.to(wide) for p in (A, D, delta_bias)]
    tensors = [*streams, *(p for p in parameters if p is not None)]
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    out, states = _OP(
        u.to(dtype).transpose(1, 2),
        delta.to(dtype).transpose(1, 2),
        parameters[0],
        _by_token(B.to(dtype if B.dim() > 2 else wide)),
        _by_token(C.to(dtype if C.dim() > 2 else wide)),
        parameters[1],
        None if z is None else z.to(dtype).transpose(1, 2),
        parameters[2],
        delta_softplus,
        reverse,
        CHUNK if learning else max(u.shape[2], 1),
    )
    out = out.to(u.dtype).transpose(1, 2)
    if not return_last_state:
        return out
    last = states[:, -1] if u.shape[2] else states.new_zeros(u.shape[0], A.shape[1], A.shape[0])
    return out, last.transpose(1, 2)


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


def _fake(
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
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), A.new_empty(u.shape[0], -(-u.shape[1] // chunk), A.shape[1], A.shape[0])


def _fake_backward(
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
) -> tuple[Tensor, ...]:
    d_z = u.new_empty(0 if z is None else z.shape)
    d_skip, d_bias = (
        A.new_empty(0 if D is None else D.shape),
        A.new_empty(0 if delta_bias is None else delta_bias.shape),
    )
    return *(t.new_empty(t.shape) for t in (u, delta, A, B, C)), d_skip, d_z, d_bias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *inputs[:8])
    ctx.rest = inputs[8:]


def _backward(ctx: Any, grad: Tensor | None, grad_states: Tensor | None) -> tuple[Tensor | None, ...]:
    states, *inputs = ctx.saved_tensors
    grad = torch.zeros_like(inputs[0]) if grad is None else grad
    # Of the kept states only the last is handed out.
    grad_state = None if grad_states is None or not grad_states.shape[1] else grad_states[:, -1]
    gradients = torch.ops.medgmae.selective_scan_backward(grad, grad_state, states, *inputs, *ctx.rest)
    wanted = [g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False)]
    return (*wanted, None, None, None)


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "selective_scan has no second-order gradient: call backward() or torch.autograd.grad() without "
        "create_graph=True, or detach the gradient before it is used"
    )


def _mapped(op: Any) -> Any:
    """vmap as a loop: A is not batched, so the mapped dimension cannot join the batch."""

    def run(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        results = [
            op(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return run


_LIBRARY.impl("selective_scan", reference.forward, "CompositeExplicitAutograd")
_LIBRARY.impl("selective_scan_backward", reference.backward, "CompositeExplicitAutograd")
for _device, _forward, _gradient in (*native.kernels(), *cuda.kernels()):
    _LIBRARY.impl("selective_scan", _forward, _device)
    _LIBRARY.impl("selective_scan_backward", _gradient, _device)
torch.library.register_fake("medgmae::selective_scan", _fake, lib=_LIBRARY)
torch.library.register_fake("medgmae::selective_scan_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("medgmae::selective_scan", _backward, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd("medgmae::selective_scan_backward", _no_second_gradient, lib=_LIBRARY)
_OP = torch.ops.medgmae.selective_scan.default
torch.library.register_vmap("medgmae::selective_scan", _mapped(_OP), lib=_LIBRARY)
torch.library.register_vmap(
    "medgmae::selective_scan_backward", _mapped(torch.ops.medgmae.selective_scan_backward.default), lib=_LIBRARY
)
