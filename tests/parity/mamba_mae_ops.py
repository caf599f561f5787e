"""Adapters for the two operators of the 3D Mamba MAE: the selective scan and the causal convolution.

Each case is computed twice against the same numbers: as it is, and as a reversed operator on the flipped sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medgmae.ops import causal_conv1d, selective_scan
from parity import adapter
from parity.case import Case, Options

PROSE = ("parity_kind", "system", "case", "kind", "inputs", "outputs", "notes", "suggested_tolerance")
FORMS = {"bnl": 3, "bgnl": 4, "dn": 2}


@adapter("mamba_mae/selective_scan")
def scan(case: Case) -> None:
    options = settings(case)
    batch, channels, length = case.input("u").shape
    check_sizes(case, options, B=batch, D=channels, L=length, N=case.input("A").shape[1])
    for name in ("z", "D", "delta_bias"):
        case.same(f"has {name}", name in case.inputs, options(f"has_{name}"))
    form, groups = FORMS[options("BC")], options("groups")
    for name in ("B", "C"):
        weights = case.input(name)
        case.same(f"dimensions of {name}", weights.dim(), form)
        case.same(f"groups of {name}", weights.shape[1] if form == 4 else 1, groups)
    softplus = options("delta_softplus")
    options.done()

    def run(inputs: dict[str, Tensor], reverse: bool) -> dict[str, Tensor]:
        out, state = selective_scan(**inputs, delta_softplus=softplus, reverse=reverse, return_last_state=True)
        return {"out": out, "last_state": state}

    compare(case, run)


@adapter("mamba_mae/causal_conv1d")
def convolution(case: Case) -> None:
    options = settings(case)
    batch, channels, length = case.input("x").shape
    check_sizes(case, options, B=batch, D=channels, L=length, width=case.input("weight").shape[1])
    case.same("has bias", "bias" in case.inputs, options("bias"))
    activation = options("activation")
    options.done()

    def run(inputs: dict[str, Tensor], reverse: bool) -> dict[str, Tensor]:
        return {"out": causal_conv1d(**inputs, activation=activation, reverse=reverse)}

    compare(case, run)


def settings(case: Case) -> Options:
    """The settings of a case; nothing stands beside them."""
    whole = Options(case.spec)
    whole.ignore(*PROSE)
    options = Options(whole("config"))
    whole.done()
    return options


def check_sizes(case: Case, options: Options, **sizes: int) -> None:
    """The sizes that the case states are those of its tensors."""
    for name, size in sizes.items():
        case.same(name, size, options(name))


def compare(case: Case, run: Callable[[dict[str, Tensor], bool], dict[str, Tensor]]) -> None:
    """Values and gradients of <out, dout>; a last state has no part in them."""
    for reverse in (False, True):
        given = {name: flip(tensor) if reverse else tensor for name, tensor in case.inputs.items()}
        cotangent = given.pop("dout")
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
        found: dict[str, Any] = run(leaves, reverse)
        gradients = torch.autograd.grad((found["out"] * cotangent).sum(), list(leaves.values()))
        found |= {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        for name, value in found.items():
            timeless = name == "last_state" or value.dim() < 3
            if reverse:
                back = value if timeless else value.flip(-1)
                case.equal(f"{name}, reversed", back, case.outputs[name], case.tolerance(name))
            else:
                case.offer(name, value)


def flip(tensor: Tensor) -> Tensor:
    """What depends on time, backwards: everything with a batch."""
    return tensor.flip(-1) if tensor.dim() > 2 else tensor
