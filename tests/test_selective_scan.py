"""What the selective scan returns, on every path: against a plain account of the definition, and by its properties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sequences import (
    FORMS,
    PATHS,
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
    textbook,
    walk,
)

every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
every_form = pytest.mark.parametrize("forms", FORMS, ids=str)
both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
# Of the largest value, in float32. Gradients of parameters are sums that may cancel.
VALUES, GRADIENTS = 1e-6, 1e-5


def check(
    path: Path,
    inputs: Inputs,
    softplus: bool = True,
    reverse: bool = False,
    chunk: int = 64,
    values: float = VALUES,
) -> None:
    """Float64 to rounding, float32 within the stated bounds."""
    grad, grad_state = cotangents(inputs)
    wanted = expected(inputs, grad, grad_state, softplus, reverse)
    found = path.run(inputs, grad, grad_state, softplus, reverse, chunk)
    assert_close(found, wanted, 1e-12, 1e-11)
    single = inputs.to(torch.float32)
    wanted = expected(single, grad.float(), grad_state.float(), softplus, reverse)
    found = path.run(single, grad.float(), grad_state.float(), softplus, reverse, chunk)
    assert all(tensor.dtype == torch.float32 for tensor in found.named().values())
    assert_close(found, wanted, values, GRADIENTS)


@every_path
@every_form
@both_directions
def test_values_and_gradients_are_the_definition(path: Path, forms: Any, reverse: bool) -> None:
    check(path, make(length=70, forms=forms), reverse=reverse)


@every_path
@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")], ids=str)
@pytest.mark.parametrize("softplus", [False, True])
def test_what_may_be_left_out(path: Path, without: tuple[str, ...], softplus: bool) -> None:
    inputs = make(length=13, without=without)
    if not softplus:
        inputs = inputs._replace(delta=inputs.delta.abs())
    check(path, inputs, softplus)


@every_path
@both_directions
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 66, 129, 200])
def test_lengths_around_the_chunks(path: Path, length: int, reverse: bool) -> None:
    check(path, make(1, 5, length, 3), reverse=reverse)


@every_path
@pytest.mark.parametrize("states", [1, 2, 3, 5, 8, 15, 16, 17, 24, 33, 64])
def test_numbers_of_states(path: Path, states: int) -> None:
    check(path, make(1, 18, 20, states))
    check(path, make(1, 3, 20, states, forms=("constant", 3)))


@every_path
def test_numbers_of_channels(path: Path) -> None:
    """Vectors hold 2 to 16 of them; what is left over is computed as well."""
    for channels in (*range(1, 36), 47, 48, 49, 63, 64, 65, 100, 128, 130):
        check(path, make(2, channels, 11, 4))


@every_path
@pytest.mark.parametrize("groups", [1, 2, 4, 20])
def test_groups_narrower_than_a_vector(path: Path, groups: int) -> None:
    check(path, make(2, 20, 9, 5, forms=(groups, groups)))


@every_path
@both_directions
@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 100, 1000])
def test_the_steps_between_kept_states_do_not_matter(path: Path, chunk: int, reverse: bool) -> None:
    inputs = make(1, 4, 100, 3)
    check(path, inputs, reverse=reverse, chunk=chunk)
    _, states = path.forward(operands(inputs, True, reverse, chunk))
    assert states.shape == (1, -(-100 // chunk), 3, 4)
    after = walk(inputs, True, reverse)[1]
    for c, kept in enumerate(states[0]):
        torch.testing.assert_close(kept.T[None], after[min((c + 1) * chunk, 100)], rtol=1e-11, atol=1e-12)


@every_path
@pytest.mark.parametrize("shape", [(0, 4, 9), (2, 4, 0), (0, 4, 0), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("forms", [("time", "time"), ("constant", "constant"), (2, "constant")], ids=str)
def test_nothing_to_scan(path: Path, shape: tuple[int, int, int], forms: Any) -> None:
    if 2 in forms and shape[1] % 2:
        forms = (1, "constant")
    inputs = make(*shape, states=3, forms=forms)
    grad, grad_state = cotangents(inputs)
    found = path.run(inputs, grad, grad_state)
    assert_close(found, expected(inputs, grad, grad_state, True, False), 1e-12, 1e-11)
    for name, tensor in inputs.present().items():
        assert found.gradients[name].shape == tensor.shape


@every_path
@every_form
def test_reverse_is_flip_scan_flip(path: Path, forms: Any) -> None:
    inputs = make(length=75, forms=forms)
    grad, grad_state = cotangents(inputs)
    backwards = path.run(inputs, grad, grad_state, reverse=True)
    flipped = path.run(inputs.flip(), grad.flip(-1), grad_state)
    turned = {n: g.flip(-1) if g.dim() > 2 else g for n, g in flipped.gradients.items()}
    assert_close(backwards, Results(flipped.out.flip(-1), flipped.state, turned), 1e-13, 1e-13)


@every_path
def test_every_sample_is_scanned_alone(path: Path) -> None:
    """To the bit, but for torch's own functions, whose rounding depends on where a number lies in memory."""
    bound = 1e-6 if path is REFERENCE else 0.0
    inputs = make(3, 20, 70, 4, torch.float32)
    grad, grad_state = cotangents(inputs)
    whole = path.run(inputs, grad, grad_state)
    for b in range(3):
        part = inputs.map(lambda t, b=b: t[b : b + 1] if t.dim() > 2 else t)  # type: ignore[misc]
        alone = path.run(part, grad[b : b + 1], grad_state[b : b + 1])
        assert error(alone.out[0], whole.out[b]) <= bound
        assert error(alone.state[0], whole.state[b]) <= bound
        for name in ("u", "delta", "B", "C", "z"):
            assert error(alone.gradients[name][0], whole.gradients[name][b]) <= bound, name


@every_path
def test_gradients_of_the_result_alone_and_of_the_state_alone(path: Path) -> None:
    inputs = make(length=70)
    grad, grad_state = cotangents(inputs)
    result = path.run(inputs, grad)
    state = path.run(inputs, torch.zeros_like(grad), grad_state)
    both = path.run(inputs, grad, grad_state)
    for name, gradient in both.gradients.items():
        torch.testing.assert_close(result.gradients[name] + state.gradients[name], gradient, rtol=1e-10, atol=1e-11)
    assert_close(result, expected(inputs, grad, None, True, False), 1e-12, 1e-11)


@every_path
def test_softplus_is_the_identity_above_20(path: Path) -> None:
    """The published functions switch there, which is seen in the gradient: exactly 1, not the sigmoid."""
    steps = torch.tensor([-120.0, -89.0, -40.0, -17.0, -15.0, -1e-3, 0.0, 1.0, 15.0, 19.99, 20.0, 20.01, 25.0, 100.0])
    inputs = make(1, len(steps), 1, 1, without=("D", "z", "delta_bias"))
    # Without a state before, y = s u B C: the gradient of the steps is what softplus makes of them.
    ones = torch.ones_like(inputs.u)
    inputs = inputs._replace(u=ones, B=ones[:, :1] * 1.0, C=ones[:, :1] * 1.0, delta=steps[None, :, None].double())
    exact = torch.tensor([v if v > 20 else math.log1p(math.exp(v)) for v in steps.tolist()], dtype=torch.float64)
    slope = torch.tensor([1.0 if v > 20 else 1 / (1 + math.exp(-v)) for v in steps.tolist()], dtype=torch.float64)
    found = path.run(inputs, ones)
    torch.testing.assert_close(found.out.flatten(), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.gradients["delta"].flatten(), slope, rtol=1e-12, atol=0)
    assert (found.gradients["delta"].flatten()[-3:] == 1).all()
    single = path.run(inputs.to(torch.float32), ones.float())
    smallest = 2e-38  # below that float32 has no normal numbers
    torch.testing.assert_close(single.out.flatten(), exact.float(), rtol=3e-6, atol=smallest)
    torch.testing.assert_close(single.gradients["delta"].flatten(), slope.float(), rtol=3e-6, atol=smallest)
    raised = inputs._replace(delta=inputs.delta - 3, delta_bias=torch.full((len(steps),), 3.0).double())
    torch.testing.assert_close(path.scan(raised)[0], found.out, rtol=1e-11, atol=1e-30)


@every_path
@pytest.mark.parametrize("decay", [-1e-6, -1.0, -30.0, -87.5, -100.0, -1e4, -1e30], ids=str)
def test_states_that_keep_everything_or_nothing(path: Path, decay: float) -> None:
    """Products of decays leave the range of float32; what is left of them is zero, not noise."""
    inputs = make(1, 20, 130, 3)
    inputs = inputs._replace(A=torch.full_like(inputs.A, decay))
    grad, grad_state = cotangents(inputs)
    wanted = expected(inputs, grad, grad_state, True, False)
    assert_close(path.run(inputs, grad, grad_state), wanted, 1e-11, 1e-10)
    single = inputs.to(torch.float32)
    found = path.run(single, grad.float(), grad_state.float())
    wanted = expected(single, grad.float(), grad_state.float(), True, False)
    for name, tensor in found.named().items():
        exact = wanted.named()[name]
        assert tensor.isfinite().all(), name
        assert float((tensor - exact).abs().max()) <= 1e-5 * float(exact.abs().max()) + 1e-30, name


@every_path
def test_a_subnormal_decay(path: Path) -> None:
    """exp(s A) between 1e-38 and 1e-45 times a state that float32 holds."""
    inputs = make(1, 16, 2, 1, torch.float32, without=("D", "z", "delta_bias"))
    u = torch.zeros_like(inputs.u)
    u[..., 0] = 1e30
    inputs = inputs._replace(
        u=u,
        delta=torch.ones_like(inputs.delta),
        A=-torch.linspace(80, 103, 16)[:, None],
        B=torch.ones_like(inputs.B),
        C=torch.ones_like(inputs.C),
    )
    out, _ = path.scan(inputs, softplus=False)
    exact = 1e30 * torch.exp(inputs.A[:, 0].double())
    assert float((out[0, :, 1] - exact).abs().max()) <= 1e30 * 1.2e-38


@every_path
def test_states_that_grow(path: Path) -> None:
    inputs = make(1, 18, 66, 4)
    inputs = inputs._replace(A=-0.1 * inputs.A)
    assert float(textbook(inputs)[1].abs().max()) > 50
    check(path, inputs, values=1e-5)  # so do errors


@every_path
def test_what_overflows_is_not_finite(path: Path) -> None:
    inputs = make(1, 20, 3, 2, torch.float32, without=("z", "delta_bias"))
    delta = torch.ones_like(inputs.delta)
    delta[..., 0] = 0.01
    inputs = inputs._replace(A=torch.full_like(inputs.A, 200.0), delta=delta)
    out, state = path.scan(inputs, softplus=False)
    assert out[..., 0].isfinite().all()
    assert not out[..., 1:].isfinite().any()
    assert not state.isfinite().any()


BAD = [("u", math.nan), ("u", math.inf), ("delta", math.nan), ("delta", math.inf), ("z", math.nan), ("A", math.nan)]
BAD += [("D", math.nan), ("delta_bias", math.nan)]


@every_path
@both_directions
@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_number_stays_in_its_channel(path: Path, name: str, value: float, reverse: bool) -> None:
    """It is seen there, from its token on, and nowhere else but in what sums over channels."""
    length, channel, token = 70, 4, 30
    inputs = make(2, 21, length, 3, torch.float32)
    grad, grad_state = cotangents(inputs)
    good = path.run(inputs, grad, grad_state, reverse=reverse)
    spoilt = inputs.map(torch.clone)
    tensor = spoilt.present()[name]
    tensor[(1, channel, token) if tensor.dim() == 3 else (channel, ...)] = value
    found = path.run(spoilt, grad, grad_state, reverse=reverse)

    mine = torch.zeros(2, 21, dtype=torch.bool)
    mine[1 if tensor.dim() == 3 else slice(None), channel] = True
    assert torch.equal(found.out[~mine], good.out[~mine])
    assert torch.equal(found.state[~mine], good.state[~mine])
    for parameter in ("u", "delta", "z"):
        assert torch.equal(found.gradients[parameter][~mine], good.gradients[parameter][~mine]), parameter
    for parameter in ("A", "D", "delta_bias"):
        rest = torch.arange(21) != channel
        assert torch.equal(found.gradients[parameter][rest], good.gradients[parameter][rest]), parameter
    if tensor.dim() == 3:
        for parameter in ("B", "C"):
            assert torch.equal(found.gradients[parameter][0], good.gradients[parameter][0]), parameter
        after = slice(None, token) if reverse else slice(token + 1, None)
        before = slice(token + 1, None) if reverse else slice(None, token)
        assert not found.out[1, channel, token].isfinite()
        assert torch.equal(found.out[1, channel, before], good.out[1, channel, before])
        if name != "z":
            assert not found.out[1, channel, after].isfinite().any()
    else:
        assert found.out[:, channel].isnan().any(-1).all()
        assert found.gradients["u"][:, channel].isnan().any(-1).all()


@every_path
@pytest.mark.parametrize("name", ["B", "C"])
def test_a_bad_number_for_all_channels_stays_in_its_sample(path: Path, name: str) -> None:
    inputs = make(2, 21, 70, 3, torch.float32)
    grad, _ = cotangents(inputs)
    good = path.run(inputs, grad)
    spoilt = inputs.map(torch.clone)
    spoilt.present()[name][1, 2, 30] = math.nan
    found = path.run(spoilt, grad)
    assert torch.equal(found.out[0], good.out[0])
    assert torch.equal(found.out[1, :, :30], good.out[1, :, :30])
    assert found.out[1, :, 30].isnan().all()
    assert found.out[1, :, 31:].isnan().all() if name == "B" else torch.equal(found.out[1, :, 31:], good.out[1, :, 31:])
    for parameter in ("u", "delta", "z", "B", "C"):
        assert torch.equal(found.gradients[parameter][0], good.gradients[parameter][0]), parameter


@every_path
def test_two_runs_give_the_same_bits(path: Path) -> None:
    inputs = make(2, 37, 200, 16, torch.float32)
    grad, grad_state = cotangents(inputs)
    first = path.run(inputs, grad, grad_state)
    for _ in range(2):
        assert_same_bits(path.run(inputs, grad, grad_state), first)


@every_path
def test_error_of_a_long_sequence(path: Path) -> None:
    """The stated bounds at the states and the decays of the published models, with few channels."""
    inputs = make(1, 16, 2000, 16, torch.float32)
    inputs = inputs._replace(
        A=-torch.arange(1.0, 17).expand(16, 16).contiguous(),
        delta=inputs.delta,
        delta_bias=torch.linspace(-6.9, -2.25, 16),
    )
    grad, _ = cotangents(inputs)
    wanted = reference_of(inputs.to(torch.float64), grad.double())
    found = path.run(inputs, grad)
    for name, tensor in found.named().items():
        assert error(tensor, wanted.named()[name]) <= (GRADIENTS if name.startswith("d ") else VALUES), name
