"""The short causal convolution of Mamba, one filter per channel, with SiLU behind it.

The operators are ``medgmae::causal_conv1d`` and ``medgmae::causal_conv1d_backward``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from medgmae.ops.conv import cuda, native, reference

_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse"
_LIBRARY: Any = torch.library.Library("medgmae", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"causal_conv1d({_ARGUMENTS}) -> Tensor")
_LIBRARY.define(f"causal_conv1d_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")


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
    out: Tensor = _OP(
        x.transpose(1, 2), weight.to(wide), None if bias is None else bias.to(wide), activation == "silu", reverse
    )
    return out.transpose(1, 2)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(0 if bias is None else bias.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.medgmae.causal_conv1d_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (*(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False)), None, None)


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "causal_conv1d has no second-order gradient: call backward() or torch.autograd.grad() without "
        "create_graph=True, or detach the gradient before it is used"
    )


def _mapped(op: Any) -> Any:
    """vmap as a loop, as for the scan."""

    def run(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        results = [
            op(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])

    return run


_LIBRARY.impl("causal_conv1d", reference.forward, "CompositeExplicitAutograd")
_LIBRARY.impl("causal_conv1d_backward", reference.backward, "CompositeExplicitAutograd")
for _device, _forward, _gradient in (*native.kernels(), *cuda.kernels()):
    _LIBRARY.impl("causal_conv1d", _forward, _device)
    _LIBRARY.impl("causal_conv1d_backward", _gradient, _device)
torch.library.register_fake("medgmae::causal_conv1d", _fake, lib=_LIBRARY)
torch.library.register_fake("medgmae::causal_conv1d_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_autograd("medgmae::causal_conv1d", _backward, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd("medgmae::causal_conv1d_backward", _no_second_gradient, lib=_LIBRARY)
_OP = torch.ops.medgmae.causal_conv1d.default
torch.library.register_vmap("medgmae::causal_conv1d", _mapped(_OP), lib=_LIBRARY)
torch.library.register_vmap(
    "medgmae::causal_conv1d_backward", _mapped(torch.ops.medgmae.causal_conv1d_backward.default), lib=_LIBRARY
)
