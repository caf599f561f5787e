"""Instance norm, sum and leaky rectifier in one step, which on the CPU keeps what comes out instead of what went in.

What went in can be computed from what comes out, as in-place activated batch norm does (Rota Bulo et al. 2018): the
rectifier has a slope on either side, the norm no parameters. torch keeps a convolution's output for the norm's backward
pass, and the result beside it for the next convolution; here the result is enough.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from medgmae.ops.precision import full_precision

SLOPE = 0.01  # of the leaky rectifier
EPS = 1e-5  # of the instance norm


def channels_last(x: Tensor) -> Tensor:
    """A map (B, C, *size) with the channels of a place side by side in memory, on the CPU; as it is elsewhere.

    oneDNN's 3x3x3 convolutions of 16 or 32 channels take half to four fifths of the time then, for they copy nothing.
    """
    if x.device.type != "cpu":
        return x
    return x.contiguous(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)


def norm_activate(x: Tensor) -> Tensor:
    """The leaky rectifier of the instance norm of x (B, C, *size): every channel of every sample with variance 1."""
    return _norm_activate(x, None, False)


def norm_add_activate(x: Tensor, shortcut: Tensor, norm_shortcut: bool) -> Tensor:
    """The leaky rectifier of the sum of the instance norm of x and a shortcut, or the shortcut's instance norm."""
    return _norm_activate(x, shortcut, norm_shortcut)


def _norm_activate(x: Tensor, shortcut: Tensor | None, norm_shortcut: bool) -> Tensor:
    if x.device.type == "cpu":
        return _NormActivate.apply(x, shortcut, norm_shortcut)[0]  # type: ignore[no-any-return]
    return plain_norm_activate(x, shortcut, norm_shortcut)


def plain_norm_activate(x: Tensor, shortcut: Tensor | None, norm_shortcut: bool) -> Tensor:
    """The same of torch's own parts, for other devices, whose norms are made for them."""
    total = _instance_norm(x)
    if shortcut is not None:
        total = total + (_instance_norm(shortcut) if norm_shortcut else shortcut)
    return F.leaky_relu_(total, SLOPE)


def _instance_norm(x: Tensor) -> Tensor:
    # The form in torch.nn.functional refuses a map of one place, whose norm is 0.
    return torch.instance_norm(x, None, None, None, None, True, 0.0, EPS, torch.backends.cudnn.enabled)


class _NormActivate(torch.autograd.Function):
    """For the CPU, where a new map costs ten times what its arithmetic does, for the kernel has to provide its pages.

    So sums over a map are products of matrices, which write nothing, and what can be is done in place. Below, s is the
    slope of the rectifier at a place.
    """

    @staticmethod
    def forward(x: Tensor, shortcut: Tensor | None, norm_shortcut: bool) -> tuple[Tensor, ...]:
        """The result; the norm of x, where it is not to be had from that; one over the deviations of both."""
        normed, scale = _normalize(x)
        if shortcut is None:
            return F.leaky_relu_(normed, SLOPE).to(x.dtype), x.new_empty(0), scale, x.new_empty(0)
        total, other = _normalize(shortcut) if norm_shortcut else (shortcut.to(normed.dtype, copy=True), x.new_empty(0))
        total += normed
        return F.leaky_relu_(total, SLOPE).to(x.dtype), normed.to(x.dtype), scale, other

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """See :class:`torch.autograd.Function`."""
        ctx.shortcut, ctx.norm_shortcut = inputs[1] is not None, inputs[2]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros for what has no gradient would be whole maps
        ctx.save_for_backward(*output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Of x and of the shortcut."""
        if grad is None:
            return None, None, None
        result, normed, scale, other = ctx.saved_tensors
        kind, result, normed, grad = result.dtype, _precise(result), _precise(normed), _precise(grad)
        if not ctx.shortcut:
            # With n the norm and p the mean of its products with its gradient s * grad, which are those of result and
            # grad: s * grad - p * n = s * (grad - p * result / s^2), which takes one map.
            found = F.leaky_relu(result, SLOPE**-2).mul_(-_products(grad, result)).add_(grad)
            torch.ops.aten.leaky_relu_backward.grad_input(found, result, SLOPE, True, grad_input=found)
            return _finish(found, scale).to(kind), None, None
        grad = torch.ops.aten.leaky_relu_backward(grad, result, SLOPE, True)  # of the sum
        if not ctx.norm_shortcut:
            found = torch.addcmul(grad, normed, _products(grad, normed), value=-1)
            return _finish(found, scale).to(kind), grad.to(kind), None
        of_shortcut = F.leaky_relu(result, 1 / SLOPE).sub_(normed)  # its norm, so far
        of_shortcut.mul_(-_products(grad, of_shortcut)).add_(grad)
        grad.addcmul_(normed, _products(grad, normed), value=-1)
        return _finish(grad, scale).to(kind), _finish(of_shortcut, other).to(kind), None


def _precise(x: Tensor) -> Tensor:
    """In float32 at least: sums over a map have too many terms for less."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """The instance norm, and one over the deviations (B, C, 1, ...)."""
    x = _precise(channels_last(x))
    centred = x - _mean(x)
    scale = (_products(centred, centred) + EPS).rsqrt()
    return centred.mul_(scale), scale


def _finish(found: Tensor, scale: Tensor) -> Tensor:
    """In place, the gradient of what was normalised from g - p * n: g is that of its norm n, p the mean of g * n.

    The mean of g, which belongs to it, is that of ``found``, for that of n is 0.
    """
    return found.sub_(_mean(found)).mul_(scale)


def _mean(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the places of the products, (B, C, 1, ...): the diagonal of a product of matrices."""
    with full_precision(a):
        means = torch.bmm(a.flatten(2), b.flatten(2).mT).diagonal(dim1=1, dim2=2) / a.shape[2:].numel()
    return means.reshape(*means.shape, *(1,) * (a.dim() - 2))
