"""The compiled CPU kernels of the scan and the convolution: sizes of models, threads, memory, what is copied."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import (
    NATIVE,
    REFERENCE,
    Inputs,
    Path,
    Results,
    assert_close,
    assert_same_bits,
    cotangents,
    error,
    expected,
    make,
    operands,
    reference_of,
)
from torch import Tensor

from medgmae.ops import causal_conv1d, selective_scan
from medgmae.ops.conv import native as conv_native
from medgmae.ops.conv.inputs import ConvInputs
from medgmae.ops.scan import cuda, native

every_path = pytest.mark.parametrize("path", NATIVE, ids=lambda path: path.name)
both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def threaded(path: Path, threads: int) -> Path:
    return Path(path.name, partial(path.forward, threads=threads), partial(path.backward, threads=threads))


@every_path
@both_directions
def test_error_at_the_width_of_the_published_models(path: Path, reverse: bool) -> None:
    """768 channels, 16 states, decays and steps as at the start of training: the documented bounds."""
    inputs = make(1, 768, 300, 16, torch.float32)
    inputs = inputs._replace(
        A=-torch.arange(1.0, 17).repeat(768, 1), delta_bias=torch.linspace(-6.9, -2.25, 768), delta=0.5 * inputs.delta
    )
    grad, grad_state = cotangents(inputs)
    wanted = reference_of(inputs.to(torch.float64), grad.double(), grad_state.double(), reverse=reverse)
    assert_close(path.run(inputs, grad, grad_state, reverse=reverse), wanted, 1e-6, 1e-6)


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "forms"),
    [
        ((1, 200, 150, 16), ("time", "time")),
        ((3, 37, 70, 5), ("time", "time")),
        ((1, 2, 1200, 3), ("time", "time")),  # long, and less than a vector wide
        ((2, 96, 65, 4), (3, 2)),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_the_threads(path: Path, shape: Any, forms: Any, dtype: torch.dtype) -> None:
    inputs = make(*shape, dtype, forms=forms)
    grad, grad_state = cotangents(inputs)
    first = threaded(path, 1).run(inputs, grad, grad_state)
    for threads in (2, 3, 1, 7):
        assert_same_bits(threaded(path, threads).run(inputs, grad, grad_state), first)


@every_path
def test_a_bad_number_stays_in_its_channel_with_many_threads(path: Path) -> None:
    inputs = make(2, 21, 1100, 3, torch.float32)
    grad, grad_state = cotangents(inputs)
    many = threaded(path, 48)  # more than there is work for
    good = many.run(inputs, grad, grad_state)
    inputs.u[1, 4, 600] = math.nan
    found = many.run(inputs, grad, grad_state)
    assert torch.equal(found.out[0], good.out[0])
    assert torch.equal(found.out[1, :4], good.out[1, :4])
    assert torch.equal(found.out[1, 5:], good.out[1, 5:])
    assert torch.equal(found.out[1, 4, :600], good.out[1, 4, :600])
    assert found.out[1, 4, 600:].isnan().all()
    assert torch.equal(found.gradients["u"][1, 5:], good.gradients["u"][1, 5:])


def test_public_functions_use_the_kernels_and_torchs_threads() -> None:
    inputs = make(2, 40, 100, 16, torch.float32)
    out = selective_scan(*inputs, delta_softplus=True)
    assert torch.equal(out, Path("best", native.forward, native.backward).scan(inputs, chunk=100)[0])
    weight = torch.randn(40, 4)
    direct = conv_native.forward(ConvInputs(inputs.u.mT, weight, None, True, False))
    assert torch.equal(causal_conv1d(inputs.u, weight, activation="silu"), direct.mT)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(selective_scan(*inputs, delta_softplus=True), out)
    finally:
        torch.set_num_threads(before)


@both_directions
@pytest.mark.parametrize("forms", [("constant", "constant"), ("time", "constant"), ("constant", 2)], ids=str)
def test_matrices_without_time_take_the_reference(forms: Any, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU and on CUDA, forward and backward, whatever the steps between kept states: no kernel has this form."""
    inputs = make(2, 6, 70, 3, torch.float32, forms=forms)
    grad, grad_state = cotangents(inputs)
    wanted = {chunk: REFERENCE.run(inputs, grad, grad_state, True, reverse, chunk) for chunk in (64, 70)}
    for module in (native, cuda):
        monkeypatch.setattr(module, "_C", None)
        path = Path("", module.forward, module.backward)
        for chunk, results in wanted.items():
            assert_same_bits(path.run(inputs, grad, grad_state, True, reverse, chunk), results)


@every_path
@both_directions
@pytest.mark.parametrize("layout", ["channels first", "halves of wider tokens", "scattered"])
def test_bits_do_not_depend_on_the_layout(path: Path, layout: str, reverse: bool) -> None:
    inputs = make(2, 37, 70, 5, torch.float32, forms=("time", 1))
    grad, grad_state = cotangents(inputs)
    wanted = path.run(inputs, grad, grad_state, reverse=reverse)

    def change(tensor: Tensor) -> Tensor:
        if layout == "scattered" or tensor.dim() < 3:
            return torch.stack([tensor, torch.full_like(tensor, math.nan)], -1).flatten(-2)[..., ::2]
        if layout == "channels first":
            return tensor.contiguous()
        return torch.cat([tensor.mT, torch.full_like(tensor.mT, math.nan)], -1)[..., : tensor.shape[1]].mT

    assert_same_bits(path.run(inputs.map(change), change(grad), change(grad_state), reverse=reverse), wanted)


def addresses(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[set[int]]:
    """The addresses that every call of a kernel is given, as they come."""
    calls: list[set[int]] = []
    real = module._C

    class Recorder:
        def __getattr__(self, attribute: str) -> Any:
            function = getattr(real, attribute)
            if attribute != name:
                return function

            def record(*arguments: Any) -> Any:
                given: set[int] = set()
                for argument in arguments:
                    values = argument.values() if isinstance(argument, dict) else [argument]
                    given |= {v[0] if isinstance(v, tuple) else v for v in values}
                calls.append(given)
                return function(*arguments)

            return record

    monkeypatch.setattr(module, "_C", Recorder())
    return calls


@both_directions
def test_views_of_tokens_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch, reverse: bool) -> None:
    """As a mixer has them: both halves of one projection, B and C as parts of another."""
    length, channels, states = 50, 24, 16
    wide = torch.randn(2, length, 2 * channels)
    parts = torch.randn(2, length, 5 + 2 * states)
    delta = torch.randn(2, length, channels)
    u, z = wide.mT.chunk(2, dim=1)
    _, B, C = parts.mT.split([5, states, states], dim=1)
    weight = torch.randn(channels, 4)
    A = -torch.rand(channels, states)

    scans = addresses(monkeypatch, native, "selective_scan")
    filters = addresses(monkeypatch, conv_native, "causal_conv1d")
    out = selective_scan(u, delta.mT, A, B, C, z=z, delta_softplus=True, reverse=reverse)
    filtered = causal_conv1d(u, weight, activation="silu", reverse=reverse)

    def start(tensor: Tensor) -> int:
        return (tensor[:, :, -1] if reverse else tensor).data_ptr()

    assert len(scans) == len(filters) == 1
    assert {start(t) for t in (u, z, delta.mT, B, C, out)} <= scans[0]
    assert {start(u), start(filtered)} <= filters[0]


def flush(x: Tensor) -> float:
    return float(x.mul(0.5).sum())


@every_path
def test_floating_point_mode_of_the_caller_is_left_alone(path: Path) -> None:
    """The kernels treat subnormal numbers as zero; what runs after them does not."""
    smallest, inputs = torch.full((8,), 1e-40), make(1, 20, 70, 16, torch.float32)
    before = flush(smallest)
    for threads in (1, 2):
        threaded(path, threads).run(inputs, *cotangents(inputs))
        assert flush(smallest) == before != 0


GUARD = 64


@every_path
@both_directions
@pytest.mark.parametrize("shape", [(2, 19, 37, 5), (1, 1, 1, 1), (1, 16, 64, 16), (1, 33, 65, 16)], ids=str)
@pytest.mark.parametrize("forms", [("time", "time"), (1, "time")], ids=str)
def test_nothing_is_written_outside(path: Path, shape: Any, forms: Any, reverse: bool) -> None:
    """Guards on both sides of every buffer that is made for a kernel, and all of it is written."""
    inputs = make(*shape, torch.float32, forms=forms)
    grad, grad_state = cotangents(inputs)
    guarded: list[tuple[Tensor, int, bool]] = []

    def guard(real: Any, filled: bool) -> Any:
        def new(tensor: Tensor, *size: Any, **kwargs: Any) -> Tensor:
            wanted = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
            count = math.prod(wanted)
            whole = torch.full((count + 2 * GUARD,), 12345.0, dtype=kwargs.get("dtype") or tensor.dtype)
            if filled:
                whole[GUARD : GUARD + count] = 0
            guarded.append((whole, count, filled))
            return whole[GUARD : GUARD + count].view(*wanted)

        return new

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", guard(torch.Tensor.new_empty, False))
        patch.setattr(torch.Tensor, "new_zeros", guard(torch.Tensor.new_zeros, True))
        path.run(inputs, grad, grad_state, reverse=reverse)
        rest = ConvInputs(inputs.u.mT, torch.randn(shape[1], 4), torch.randn(shape[1]), True, reverse)
        conv_native.forward(rest, variant=path.name)
        conv_native.backward(grad.mT, rest, variant=path.name)
    assert len(guarded) >= 8
    for whole, count, filled in guarded:
        assert (whole[:GUARD] == 12345.0).all()
        assert (whole[GUARD + count :] == 12345.0).all()
        assert filled or not (whole[GUARD : GUARD + count] == 12345.0).any()


@every_path
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_call_meets_the_definition(path: Path, data: st.DataObject) -> None:
    """Shapes, forms, options and decays as they come, in float64."""
    groups = data.draw(st.integers(1, 4))
    channels = groups * data.draw(st.integers(1, 9))
    forms = tuple(data.draw(st.sampled_from(["time", "constant", groups])) for _ in range(2))
    without = data.draw(st.sets(st.sampled_from(["D", "z", "delta_bias"])))
    shape = data.draw(st.integers(0, 3)), channels, data.draw(st.integers(0, 90)), data.draw(st.integers(1, 20))
    seed = data.draw(st.integers(0, 2**20))
    inputs: Inputs = make(*shape, forms=forms, without=sorted(without), seed=seed)
    inputs = inputs._replace(A=inputs.A * 10 ** data.draw(st.floats(-3, 3)))
    softplus, reverse = data.draw(st.booleans()), data.draw(st.booleans())
    if not softplus:
        inputs = inputs._replace(delta=inputs.delta.abs(), delta_bias=None)
    chunk, threads = data.draw(st.integers(1, 130)), data.draw(st.integers(1, 3))
    grad, grad_state = cotangents(inputs, seed)
    carried = grad_state if data.draw(st.booleans()) else None
    found = threaded(path, threads).run(inputs, grad, carried, softplus, reverse, chunk)
    wanted: Results = expected(inputs, grad, carried, softplus, reverse)
    for name, tensor in found.named().items():
        exact = wanted.named()[name]
        assert tensor.shape == exact.shape, name
        assert error(tensor, exact) <= 1e-9 or float(exact.abs().max()) < 1e-12, name


@every_path
def test_a_backward_from_states_that_lie_too_far_apart(path: Path) -> None:
    """A forward without gradients keeps only its last state; a backward may be called with it all the same."""
    inputs = make(1, 20, 300, 16, torch.float32)
    grad, _ = cotangents(inputs)
    wanted = path.run(inputs, grad)
    found = path.run(inputs, grad, chunk=300)
    assert_close(found, Results(*(t for t in wanted)), 0, 1e-6)


def test_an_unknown_instruction_set_is_refused() -> None:
    inputs = make(dtype=torch.float32)
    with pytest.raises(ValueError, match="mmx"):
        native.forward(operands(inputs), variant="mmx")
