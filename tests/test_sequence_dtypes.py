"""Tensors of several dtypes in one scan or convolution: every path computes in the widest, or refuses in words."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import scan_blocks
import torch
from sequences import NATIVE, REFERENCE, Inputs, Path, arguments, cotangents, error, make, operands
from torch import Tensor

from medgmae.ops import causal_conv1d, selective_scan
from medgmae.ops.conv.inputs import ConvInputs
from medgmae.ops.native import _C
from medgmae.ops.scan import cuda, native, operator
from medgmae.ops.scan.inputs import ScanInputs
from medgmae.ops.streams import STREAM_CODES

DTYPES = torch.float32, torch.float64, torch.bfloat16
STREAMS = "u", "delta", "B", "C", "z"
BLOCKS = Path("blocks", scan_blocks.forward, scan_blocks.backward)
PATHS = [REFERENCE, *NATIVE, BLOCKS]
SCAN, SCAN_BACKWARD = torch.ops.medgmae.selective_scan, torch.ops.medgmae.selective_scan_backward
every_pair = pytest.mark.parametrize(("one", "rest"), list(itertools.permutations(DTYPES, 2)), ids=str)
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)


def mixed_inputs(name: str, one: torch.dtype, rest: torch.dtype) -> Inputs:
    """All streams of one dtype but one of them; the parameters in float32."""
    inputs = make(2, 6, 70, 4, torch.float32)
    return inputs._replace(**{n: getattr(inputs, n).to(one if n == name else rest) for n in STREAMS})


def common(inputs: Inputs) -> Inputs:
    """The same numbers in the widest dtype of the streams, and parameters of the dtype that this is computed in."""
    widest = torch.float64 if torch.float64 in {getattr(inputs, n).dtype for n in STREAMS} else torch.float32
    return inputs.map(lambda t: t.to(widest))


@every_path
@every_pair
@pytest.mark.parametrize("name", STREAMS)
def test_the_public_scan(path: Path, name: str, one: Any, rest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "_OP", lambda *values: path.forward(ScanInputs(*values)))
    mixed = mixed_inputs(name, one, rest)
    out = selective_scan(*mixed, delta_softplus=True)
    assert out.dtype == mixed.u.dtype
    wanted = REFERENCE.scan(common(mixed).to(torch.float64))[0]
    bound = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8}[out.dtype]
    assert error(out, wanted) <= (bound if common(mixed).u.dtype == torch.float64 else max(bound, 2e-6))


@every_path
@every_pair
@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_a_raw_call(path: Path, name: str, one: Any, rest: Any, wide: torch.dtype) -> None:
    """Computed in the dtype of A; every result and gradient has the dtype of its input."""
    mixed = mixed_inputs(name, one, rest)
    mixed = mixed._replace(A=mixed.A.to(wide))  # D and the bias stay float32
    grad, grad_state = cotangents(mixed)
    found = path.run(mixed, grad, grad_state)
    exact = mixed.map(lambda t: t.to(wide).double())
    wanted = REFERENCE.run(exact, grad.double(), grad_state.double())
    assert (found.out.dtype, found.state.dtype) == (mixed.u.dtype, wide)
    for key, tensor in found.named().items():
        if key.startswith("d "):
            assert tensor.dtype == mixed.present()[key[2:]].dtype, key
        eps = torch.finfo(tensor.dtype).eps
        assert error(tensor, wanted.named()[key]) <= max(eps, 1e-5 if wide == torch.float32 else 1e-10), key


@every_pair
@pytest.mark.parametrize("name", STREAMS)
def test_gradients_of_the_public_scan_have_the_dtypes_of_the_inputs(name: str, one: Any, rest: Any) -> None:
    mixed = mixed_inputs(name, one, rest)
    leaves = mixed.leaves()
    grad, _ = cotangents(mixed)
    found = torch.autograd.grad(selective_scan(*leaves, delta_softplus=True), list(leaves), grad)
    wanted = REFERENCE.run(common(mixed).to(torch.float64), grad.double()).gradients
    for (key, tensor), gradient in zip(mixed.present().items(), found, strict=True):
        assert gradient.dtype == tensor.dtype, key
        assert error(gradient, wanted[key]) <= max(torch.finfo(tensor.dtype).eps, 1e-5), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32], ids=str)
def test_parameters_of_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    inputs = make(dtype=torch.float32)
    given = operands(inputs._replace(A=inputs.A.to(dtype)))
    for module in (native, cuda):
        with pytest.raises(TypeError, match=f"the parameters are {dtype}: expected float32 or float64"):
            module.forward(given)
    with pytest.raises(TypeError, match="expected float32 or float64"):
        SCAN(*arguments(inputs._replace(A=inputs.A.half())), True, False, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_raw_operator_with_parameters_of_two_dtypes(dtype: torch.dtype) -> None:
    """D of another dtype than A was once read as numbers of A's."""
    inputs = make(dtype=torch.float32)
    odd = inputs._replace(D=inputs.D.to(dtype), A=inputs.A.double())  # type: ignore[union-attr]
    out, states = SCAN(*arguments(odd), True, False, 4)
    assert error(out.mT, REFERENCE.scan(odd.to(torch.float64))[0]) <= 1e-6
    gradients = SCAN_BACKWARD(torch.ones_like(out), None, states, *arguments(odd), True, False, 4)
    assert [g.dtype for g in gradients] == [t.dtype for t in odd if t is not None]


@pytest.mark.skipif(_C is None, reason="no native module")
def test_the_kernels_refuse_streams_of_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong code in Python is an error, not memory read as other numbers."""
    inputs = make(dtype=torch.float32)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        monkeypatch.setitem(STREAM_CODES, torch.float32, STREAM_CODES[dtype])
        message = f"the streams are {str(dtype).removeprefix('torch.')}, but the computation is in float32"
        with pytest.raises(ValueError, match=f"{message}: expected float32"):
            native.forward(operands(inputs))
        with pytest.raises(ValueError, match=message):
            causal_conv1d(inputs.u, torch.ones(6, 4))
    monkeypatch.setitem(STREAM_CODES, torch.float32, 7)
    with pytest.raises(ValueError, match="unknown type"):
        native.forward(operands(inputs))


def test_what_cuda_cannot_count_is_refused() -> None:
    call = cuda.Call(operands(make(dtype=torch.float32)), torch.float32, 64)
    cuda.check_sizes(call)
    call.streams["u"] = (0, 1, -(2**28), 1)
    with pytest.raises(ValueError, match=f"tokens of u lie {2**28} numbers apart.*contiguous copy"):
        cuda.check_sizes(call)
    call.sizes["length"] = 2**31 - 60
    with pytest.raises(ValueError, match=f"length is {2**31 - 60}: .* take less than"):
        cuda.check_sizes(call)


@every_pair
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_a_raw_convolution(one: torch.dtype, rest: torch.dtype, wide: torch.dtype) -> None:
    x, grad = torch.randn(2, 20, 6).to(one), torch.randn(2, 20, 6).to(rest)
    given = ConvInputs(x, torch.randn(6, 4).to(wide), torch.randn(6), True, False)
    exact = given._replace(x=x.double(), weight=given.weight.double(), bias=given.bias.double())  # type: ignore[union-attr]
    wanted = torch.ops.medgmae.causal_conv1d(*exact)
    slopes = torch.ops.medgmae.causal_conv1d_backward(grad.double(), *exact)

    def check(out: Tensor, gradients: Any) -> None:
        assert out.dtype == one
        assert error(out, wanted) <= max(torch.finfo(one).eps, 1e-6)
        for got, slope, tensor in zip(gradients, slopes, given[:3], strict=True):
            assert got.dtype == tensor.dtype  # type: ignore[union-attr]
            assert error(got, slope) <= max(torch.finfo(got.dtype).eps, 1e-5)

    check(torch.ops.medgmae.causal_conv1d(*given), torch.ops.medgmae.causal_conv1d_backward(grad, *given))
    check(scan_blocks.convolve(given), scan_blocks.differentiate(grad, given))
