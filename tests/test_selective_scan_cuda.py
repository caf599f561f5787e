"""The scan and the convolution on a GPU, through the public functions, against the float64 reference on the CPU."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from sequences import FORMS, REFERENCE, Inputs, Results, assert_close, assert_same_bits, cotangents, error, make
from test_causal_conv1d import PATHS as FILTERS
from test_causal_conv1d import make as make_filter
from torch import Tensor

from medgmae.ops import causal_conv1d, selective_scan
from medgmae.ops.native import native_runs

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
# Of the largest value. The hardware's exponential is good to two units in the last place.
VALUES, GRADIENTS = 2e-6, 1e-5


def run(inputs: Inputs, grad: Tensor, grad_state: Tensor | None = None, reverse: bool = False) -> Results:
    """Forward and backward on the GPU; everything comes back to the CPU."""
    there = inputs.map(lambda t: t.to(DEVICE).detach().requires_grad_())
    out, state = selective_scan(*there, delta_softplus=True, reverse=reverse, return_last_state=True)
    loss = (out * grad.to(DEVICE)).sum()
    if grad_state is not None:
        loss = loss + (state * grad_state.to(DEVICE)).sum()
    names = there.present()
    found = torch.autograd.grad(loss, list(names.values()))
    gradients = {name: g.cpu() for name, g in zip(names, found, strict=True)}
    return Results(out.detach().cpu(), state.detach().cpu(), gradients)


def check(inputs: Inputs, reverse: bool = False, values: float = VALUES) -> None:
    """Float64 to rounding, float32 within the stated bounds."""
    grad, grad_state = cotangents(inputs)
    wanted = REFERENCE.run(inputs, grad, grad_state, True, reverse)
    assert_close(run(inputs, grad, grad_state, reverse), wanted, 1e-11, 1e-10)
    single = inputs.to(torch.float32)
    found = run(single, grad.float(), grad_state.float(), reverse)
    assert all(t.dtype == torch.float32 for t in found.named().values())
    wanted = REFERENCE.run(single.to(torch.float64), grad.float().double(), grad_state.float().double(), True, reverse)
    assert_close(found, wanted, values, GRADIENTS)


def test_the_kernels_are_there() -> None:
    """Else every test below would measure the torch reference."""
    assert native_runs(torch.device("cuda", torch.cuda.current_device()))


@both_directions
@pytest.mark.parametrize("forms", FORMS, ids=str)
def test_values_and_gradients(forms: Any, reverse: bool) -> None:
    check(make(length=70, forms=forms), reverse)


@both_directions
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 66, 129, 513, 3000])
def test_lengths(length: int, reverse: bool) -> None:
    check(make(1, 5, length, 3), reverse)


@pytest.mark.parametrize("states", [1, 2, 3, 5, 8, 15, 16, 17, 24, 33, 64])
def test_numbers_of_states(states: int) -> None:
    check(make(1, 18, 20, states))
    check(make(1, 3, 20, states, forms=("constant", 3)))


@pytest.mark.parametrize("channels", [1, 2, 7, 31, 32, 33, 63, 64, 65, 100, 129, 257, 768])
def test_numbers_of_channels(channels: int) -> None:
    check(make(2, channels, 11, 4))


@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")], ids=str)
def test_what_may_be_left_out(without: tuple[str, ...]) -> None:
    check(make(length=70, without=without))


@pytest.mark.parametrize("shape", [(0, 4, 9), (2, 4, 0), (3, 1, 1)], ids=str)
def test_nothing_to_scan(shape: tuple[int, int, int]) -> None:
    check(make(*shape, states=3))


def test_more_batches_than_a_grid_is_deep() -> None:
    """A launch has at most 65535 blocks along its second and third dimension."""
    check(make(66000, 1, 2, 1))


@pytest.mark.parametrize("length", [1000, 5000])
def test_the_published_models(length: int) -> None:
    """768 channels, 16 states, decays and steps as at the start of training.

    The hardware's exponential may be wrong by 2 units in the last place, which slow decays collect.
    """
    inputs = make(1, 768, length, 16, torch.float32)
    bias = torch.linspace(-6.9, -2.25, 768)
    inputs = inputs._replace(A=-torch.arange(1.0, 17).repeat(768, 1), delta_bias=bias)
    grad, _ = cotangents(inputs)
    wanted = REFERENCE.run(inputs.to(torch.float64), grad.double())
    assert_close(run(inputs, grad), wanted, 4e-6, 5e-6)


@pytest.mark.parametrize("decay", [-1e-6, -1.0, -87.5, -1e4, -1e30], ids=str)
def test_states_that_keep_everything_or_nothing(decay: float) -> None:
    inputs = make(1, 20, 130, 3)
    inputs = inputs._replace(A=torch.full_like(inputs.A, decay)).to(torch.float32)
    grad, grad_state = cotangents(inputs)
    found = run(inputs, grad, grad_state)
    wanted = REFERENCE.run(inputs.to(torch.float64), grad.double(), grad_state.double())
    for name, tensor in found.named().items():
        exact = wanted.named()[name]
        assert tensor.isfinite().all(), name
        assert float((tensor - exact).abs().max()) <= 1e-5 * float(exact.abs().max()) + 1e-30, name


def test_states_that_grow() -> None:
    inputs = make(1, 18, 66, 4)
    check(inputs._replace(A=-0.1 * inputs.A), values=1e-5)


@both_directions
@pytest.mark.parametrize(("name", "value"), [("u", math.nan), ("u", math.inf), ("delta", math.nan), ("z", math.nan),
                                             ("A", math.nan), ("delta_bias", math.nan)])  # fmt: skip
def test_a_bad_number_stays_in_its_channel(name: str, value: float, reverse: bool) -> None:
    inputs = make(2, 41, 70, 3, torch.float32)
    grad, grad_state = cotangents(inputs)
    good = run(inputs, grad, grad_state, reverse)
    spoilt = inputs.map(torch.clone)
    tensor = spoilt.present()[name]
    tensor[(1, 4, 30) if tensor.dim() == 3 else (4, ...)] = value
    found = run(spoilt, grad, grad_state, reverse)
    mine = torch.zeros(2, 41, dtype=torch.bool)
    mine[1 if tensor.dim() == 3 else slice(None), 4] = True
    assert not found.out[mine].isfinite().all(-1).any()
    assert torch.equal(found.out[~mine], good.out[~mine])
    assert torch.equal(found.state[~mine], good.state[~mine])
    for parameter in ("u", "delta", "z"):
        assert torch.equal(found.gradients[parameter][~mine], good.gradients[parameter][~mine]), parameter
    for parameter in ("A", "D", "delta_bias"):
        rest = torch.arange(41) != 4
        assert torch.equal(found.gradients[parameter][rest], good.gradients[parameter][rest]), parameter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_written_and_computed_in_float32(dtype: torch.dtype) -> None:
    half = make(2, 40, 130, 16, dtype)
    half = half._replace(A=half.A.float(), D=half.D.float(), delta_bias=half.delta_bias.float())  # type: ignore[union-attr]
    grad, _ = cotangents(half)
    found = run(half, grad.to(dtype))
    wanted = run(half.to(torch.float32), grad.float())
    assert found.state.dtype == torch.float32
    unit = torch.finfo(dtype).eps
    for name, tensor in found.named().items():
        exact = wanted.named()[name]
        narrow = name in ("out", "d u", "d delta", "d B", "d C", "d z")
        assert tensor.dtype == (dtype if narrow else torch.float32), name
        assert error(tensor, exact) <= (unit if narrow else 1e-5), name


@pytest.mark.parametrize(
    ("one", "rest"), list(itertools.permutations([torch.float32, torch.float64, torch.bfloat16], 2))
)
@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
def test_mixed_dtypes_are_computed_in_the_widest(name: str, one: torch.dtype, rest: torch.dtype) -> None:
    inputs = make(2, 40, 70, 4, torch.float32)
    streams = ("u", "delta", "B", "C", "z")
    mixed = inputs._replace(**{n: getattr(inputs, n).to(one if n == name else rest) for n in streams})
    grad, grad_state = cotangents(mixed)
    found = run(mixed, grad, grad_state.float())
    wanted = REFERENCE.run(mixed.to(torch.float64), grad.double(), grad_state.double())
    for key, tensor in found.named().items():
        dtype = mixed.present()[key[2:]].dtype if key.startswith("d ") else mixed.u.dtype
        assert key == "state" or tensor.dtype == dtype, key
        assert error(tensor, wanted.named()[key]) <= max(torch.finfo(tensor.dtype).eps, GRADIENTS), key


def test_autocast_changes_nothing() -> None:
    inputs = make(length=70, dtype=torch.float32).to(DEVICE)
    plain = selective_scan(*inputs, delta_softplus=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(selective_scan(*inputs, delta_softplus=True), plain)


@pytest.mark.parametrize("shape", [(1, 768, 1000, 16), (2, 40, 300, 5), (1, 16, 5000, 16)], ids=str)
def test_two_runs_give_the_same_bits(shape: Any) -> None:
    inputs = make(*shape, torch.float32)
    grad, grad_state = cotangents(inputs)
    first = run(inputs, grad, grad_state)
    for _ in range(3):
        assert_same_bits(run(inputs, grad, grad_state), first)


@both_directions
def test_layout_of_tensors_does_not_matter(reverse: bool) -> None:
    inputs = make(2, 36, 70, 5, torch.float32)
    grad, grad_state = cotangents(inputs)
    wanted = run(inputs, grad, grad_state, reverse)
    assert_same_bits(run(inputs.map(torch.Tensor.contiguous), grad.contiguous(), grad_state, reverse), wanted)
    tokens = torch.cat([inputs.u.mT, inputs.z.mT], -1).to(DEVICE).requires_grad_()  # type: ignore[union-attr]
    u, z = tokens.mT.chunk(2, dim=1)
    rest = inputs.to(DEVICE)._replace(u=u, z=z)
    out = selective_scan(*rest, delta_softplus=True, reverse=reverse)
    assert torch.equal(out.cpu(), wanted.out)
    assert out.mT.is_contiguous()
    (gradient,) = torch.autograd.grad((out * grad.to(DEVICE)).sum(), tokens)
    alone = run(inputs, grad, None, reverse).gradients
    assert torch.equal(gradient.cpu(), torch.cat([alone["u"].mT, alone["z"].mT], -1))


def filtered(inputs: list[Any], grad: Tensor, silu: bool, reverse: bool) -> list[Tensor]:
    leaves = [None if t is None else t.to(DEVICE).detach().requires_grad_() for t in inputs]
    out = causal_conv1d(*leaves, activation="silu" if silu else None, reverse=reverse)
    found = torch.autograd.grad(out, [t for t in leaves if t is not None], grad.to(DEVICE))
    return [out.detach().cpu(), *(g.cpu() for g in found)]


@both_directions
@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
def test_convolution(width: int, silu: bool, reverse: bool) -> None:
    shapes = (2, 6, 9), (1, 100, 300), (3, 33, 1), (0, 4, 9), (2, 4, 0)
    for shape, bias in itertools.product(shapes, (True, False)):
        inputs = make_filter(*shape, width, bias=bias)
        grad = torch.randn(shape, dtype=torch.float64)
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
            own = [None if t is None else t.to(dtype) for t in inputs]
            wide = [None if t is None else t.double() for t in own]
            wanted = FILTERS[0].run(wide, grad.to(dtype).double(), silu, reverse)
            for got, exact in zip(filtered(own, grad.to(dtype), silu, reverse), wanted, strict=True):
                assert got.dtype == dtype
                assert error(got, exact) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolution_in_half_precision(dtype: torch.dtype) -> None:
    inputs = make_filter(2, 40, 130, dtype=dtype)
    grad = torch.randn(2, 40, 130).to(dtype)
    found = filtered(inputs, grad, True, False)
    wanted = filtered([t.float() for t in inputs], grad.float(), True, False)
    for got, exact in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        assert error(got, exact) <= torch.finfo(dtype).eps


def both_operators(tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """A convolution and a scan of its result, and all gradients."""
    weight, *scan = tensors
    inputs = Inputs(*scan)
    x = causal_conv1d(inputs.u, weight, activation="silu")
    out = selective_scan(*inputs._replace(u=x), delta_softplus=True)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def operands(seed: int) -> list[Tensor]:
    inputs = make(2, 40, 300, 16, torch.float32, seed=seed)
    weight = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))
    return [weight, *inputs.present().values()]


def test_a_stream_of_its_own() -> None:
    """The kernels wait for what the stream holds: here the inputs are made in it, late."""
    tensors, grad = operands(0), torch.randn(2, 40, 300, device=DEVICE)
    expected = both_operators([t.to(DEVICE).requires_grad_() for t in tensors], grad)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [torch.zeros_like(t, device=DEVICE).copy_(t.pin_memory(), non_blocking=True) for t in tensors]
        found = both_operators([t.requires_grad_() for t in late], grad)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_captured_in_a_graph() -> None:
    static = [t.to(DEVICE).requires_grad_() for t in operands(0)]
    grad = torch.randn(2, 40, 300, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            both_operators(static, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_operators(static, grad)
    others = operands(5)
    with torch.no_grad():
        for tensor, value in zip(static, others, strict=True):
            tensor.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    expected = both_operators([t.to(DEVICE).requires_grad_() for t in others], grad)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_memory_does_not_grow() -> None:
    """Nothing is allocated behind torch's back, and every call leaves as much as the one before."""
    tensors, grad = [t.to(DEVICE).requires_grad_() for t in operands(0)], torch.randn(2, 40, 300, device=DEVICE)
    both_operators(tensors, grad)
    torch.cuda.synchronize()
    held, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    for _ in range(20):
        both_operators(tensors, grad)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == held
    assert torch.cuda.mem_get_info()[0] >= free - (8 << 20)


def test_peak_memory_is_of_the_order_of_the_tensors() -> None:
    """No (B, D, L, N) tensor: forward and backward need less on top than inputs and gradients."""
    inputs = make(1, 768, 8000, 16, torch.float32).to(DEVICE)
    leaves = inputs.map(lambda t: t.detach().requires_grad_())
    size = sum(4 * t.numel() for t in inputs.present().values())
    grad = torch.ones_like(inputs.u)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = torch.autograd.grad(selective_scan(*leaves, delta_softplus=True), list(leaves), grad)
    assert len(found) == 8
    assert torch.cuda.max_memory_allocated() - before <= 3 * size
