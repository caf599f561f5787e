"""Norm, rotary positions, bidirectional mixer and block, against formulas written out step by step."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import randomize
from torch import Tensor

from medgmae.layers.mamba import BidirectionalMamba, MambaBlock, MambaStack, RMSNorm
from medgmae.layers.rope import Rotary, axial_angles, published_axial_angles, rotate, sequence_angles

KINDS: list[Any] = ["sequence", "axial", "axial_published"]


def mixer(dim: int = 6, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return randomize(BidirectionalMamba(dim, 3, 2, **options)).to(dtype)


def scanned_by_hand(m: Any, xz: Tensor, suffix: str) -> Tensor:
    """One direction over one sample, xz (L, 2 * inner) in the order in which it is scanned: (L, inner)."""
    x, z = xz.chunk(2, dim=-1)
    letters = f"A{suffix}_log", f"D{suffix}"
    a, skip = -getattr(m, letters[0]).exp(), getattr(m, letters[1])
    conv, x_proj, dt_proj = (getattr(m, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
    taps = conv.weight.shape[-1]
    state, out = torch.zeros_like(a), []
    for t in range(len(x)):
        u = conv.bias.clone()
        for k in range(taps):
            if t - (taps - 1) + k >= 0:
                u = u + conv.weight[:, 0, k] * x[t - (taps - 1) + k]
        u = F.silu(u)
        dt, b, c = x_proj(u).split([m.dt_rank, m.d_state, m.d_state])
        step = F.softplus(dt_proj(dt)).unsqueeze(-1)
        state = (step * a).exp() * state + step * u.unsqueeze(-1) * b
        out.append((state @ c + skip * u) * F.silu(z[t]))
    return torch.stack(out)


@pytest.mark.parametrize("divide", [True, False])
def test_the_mixer_is_two_recurrences(divide: bool) -> None:
    m, x = mixer(divide_output=divide), torch.randn(2, 7, 6, dtype=torch.float64)
    for sample, ours in zip(x, m(x), strict=True):
        xz = m.in_proj(sample)
        both = scanned_by_hand(m, xz, "") + scanned_by_hand(m, xz.flip(0), "_b").flip(0)
        torch.testing.assert_close(ours, m.out_proj(both / 2 if divide else both), atol=1e-12, rtol=1e-10)


def test_directions_change_places_when_time_does() -> None:
    m, x = mixer(), torch.randn(2, 9, 6, dtype=torch.float64)
    other = copy.deepcopy(m)
    state = m.state_dict()
    swapped = {"A_log": "A_b_log", "D": "D_b"}
    swapped |= {f"{n}.{p}": f"{n}_b.{p}" for n in ("conv1d", "dt_proj") for p in ("weight", "bias")}
    swapped |= {"x_proj.weight": "x_proj_b.weight"}
    swapped |= {b: a for a, b in swapped.items()}
    other.load_state_dict({name: state[swapped.get(name, name)] for name in state})
    torch.testing.assert_close(other(x.flip(1)).flip(1), m(x))


def test_gradients_of_the_mixer() -> None:
    m, x = mixer(4), torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in m.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(m, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *m.parameters()), nondet_tol=1e-12)


def test_a_new_mixer_starts_as_mamba_does_in_both_directions() -> None:
    m = BidirectionalMamba(32, 5, dt_rank=3, out_scale=0.5)
    assert (m.dt_rank, BidirectionalMamba(384).dt_rank, BidirectionalMamba(40).dt_rank) == (3, 24, 3)
    for log, skip, steps in ((m.A_log, m.D, m.dt_proj), (m.A_b_log, m.D_b, m.dt_proj_b)):
        torch.testing.assert_close(log.exp(), torch.arange(1.0, 6).expand(64, 5))
        assert torch.equal(skip, torch.ones(64))
        dt = F.softplus(steps.bias)
        assert 0.9e-3 < dt.min() < 4e-3
        assert 0.03 < dt.max() < 0.11
        assert 0.5 * 3**-0.5 < steps.weight.abs().max() <= 3**-0.5
    assert 0.2 / 8 < m.out_proj.weight.abs().max() <= 0.5 / 8
    before = copy.deepcopy(m.state_dict())
    m.reset_parameters()
    assert not torch.equal(before["dt_proj_b.bias"], m.dt_proj_b.bias)
    assert m.out_proj.weight.abs().max() <= 0.5 / 8  # scaled once


def test_names_are_those_of_the_published_files() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in MambaBlock(384).state_dict().items()}
    assert shapes == {
        "norm.weight": (384,),
        "mixer.A_log": (768, 16),
        "mixer.D": (768,),
        "mixer.A_b_log": (768, 16),
        "mixer.D_b": (768,),
        "mixer.in_proj.weight": (1536, 384),
        "mixer.conv1d.weight": (768, 1, 4),
        "mixer.conv1d.bias": (768,),
        "mixer.x_proj.weight": (56, 768),
        "mixer.dt_proj.weight": (768, 24),
        "mixer.dt_proj.bias": (768,),
        "mixer.conv1d_b.weight": (768, 1, 4),
        "mixer.conv1d_b.bias": (768,),
        "mixer.x_proj_b.weight": (56, 768),
        "mixer.dt_proj_b.weight": (768, 24),
        "mixer.dt_proj_b.bias": (768,),
        "mixer.out_proj.weight": (384, 768),
    }
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_043_328


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    norm = randomize(RMSNorm(5, eps=0.1)).to(dtype)
    x = (300 * torch.randn(2, 3, 5)).to(dtype)  # squares beyond what float16 holds
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight.double()
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).double(), exact, atol=0, rtol={8: 1e-12, 4: 1e-6, 2: 8e-3}[x.element_size()])
    torch.testing.assert_close(norm(x.float()), norm(x), check_dtype=False)


def test_rotation_by_hand() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    angles = torch.rand(3, 3, dtype=torch.float64) * 9
    turned = rotate(x, torch.stack([angles.cos(), angles.sin()], -1))
    for pair in range(3):
        for token in range(3):
            c, s = angles[token, pair].cos(), angles[token, pair].sin()
            expected = x[:, token, 2 * pair : 2 * pair + 2] @ torch.stack([torch.stack([c, s]), torch.stack([-s, c])])
            torch.testing.assert_close(turned[:, token, 2 * pair : 2 * pair + 2], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_compiled_rotation_is_the_same(kind: Any, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    rotary, x = Rotary(kind, 12), torch.randn(2, 24, 12).to(dtype).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return rotate(x, rotary.table((2, 3, 4), 24, x)[:24])

    compiled: Any = torch.compile(run, fullgraph=True, backend="aot_eager")
    plain, other = run(x), compiled(x)
    assert plain.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(other, plain)
    gradients = [torch.autograd.grad(out.square().sum() + out[..., 0].sum(), x)[0] for out in (plain, other)]
    torch.testing.assert_close(*gradients)


def test_every_axis_turns_channels_of_its_own() -> None:
    angles = axial_angles((2, 3, 4), 16).reshape(2, 3, 4, 8)  # 2, 3 and 3 of the 8 pairs
    for axis, columns in enumerate((slice(0, 2), slice(2, 5), slice(5, 8))):
        part = angles[..., columns].movedim(axis, 0)
        assert (part == part[:, :1, :1]).all()
        n = columns.stop - columns.start
        fastest = part[:, 0, 0, 0]
        torch.testing.assert_close(fastest, (torch.arange(len(part)) + 0.5) / len(part) * 14)
        torch.testing.assert_close(part[:, 0, 0, 1], fastest * 10000 ** (-1 / n))


def test_the_same_places_on_a_finer_grid() -> None:
    coarse, fine = axial_angles((2, 1, 3), 12), axial_angles((4, 2, 6), 12)
    means = F.avg_pool3d(fine.T.reshape(6, 4, 2, 6), 2).flatten(1).T
    torch.testing.assert_close(means, coarse)


def test_published_rotations_leave_an_axis_out() -> None:
    angles = published_axial_angles((5, 3, 4), 8).reshape(5, 3, 4, 4)
    assert (angles == angles[:1]).all()
    torch.testing.assert_close(angles[0, :, 0, :2], torch.tensor([[0.0, 0], [14 / 3, 14 / 300], [28 / 3, 28 / 300]]))
    torch.testing.assert_close(angles[0, 0, :, 2], torch.arange(4) * 3.5)


def test_rotations_of_a_sequence_are_for_half_of_the_channels() -> None:
    angles = sequence_angles(70_000, 8)
    assert angles.shape == (70_000, 2)
    torch.testing.assert_close(angles[-1], torch.tensor([69_999.0, 699.99]))
    x = torch.randn(1, 5, 8)
    turned = rotate(x, Rotary("sequence", 8).table((5,), 5, x))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[:, 0], x[:, 0])
    assert not torch.isclose(turned[:, 1:, :4], x[:, 1:, :4]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_kept_per_grid(kind: Any) -> None:
    rotary, x = Rotary(kind, 10), torch.zeros(1)
    first = rotary.table((1, 2, 3), 6, x)
    assert first.shape == ((6, 5, 2) if kind == "sequence" else (7, 5, 2))
    assert rotary.table((1, 2, 3), 6, x) is first
    assert rotary.table((1, 2, 4), 8, x) is not first
    assert rotary.table((1, 2, 3), 6, x.double()).dtype == torch.float64
    if kind != "sequence":
        assert torch.equal(first[-1], torch.tensor([1.0, 0]).expand(5, 2))
    for other in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary))):
        assert torch.equal(other.table((1, 2, 3), 6, x), first)
    with torch.inference_mode():
        table = Rotary(kind, 10).table((1, 2, 3), 6, x)
    assert not table.is_inference()  # a later call may need it for a gradient


def test_wrong_rotations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'axial_published', got 'axail'"):
        Rotary("axail", 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"even, got 5"):
        Rotary("axial", 5)


def block() -> Any:
    return randomize(MambaBlock(6, 3, 2)).double().eval()


def test_a_block_hands_the_stream_on() -> None:
    b, hidden, stream = block(), torch.randn(2, 4, 6).double(), torch.randn(2, 4, 6).double()
    out, kept = b(hidden, stream)
    assert torch.equal(kept, hidden + stream)
    torch.testing.assert_close(out, b.mixer(b.norm(hidden + stream)))
    first, kept = b(hidden)
    assert torch.equal(kept, hidden)
    torch.testing.assert_close(first, b.mixer(b.norm(hidden)))


def test_the_stream_stays_in_float32() -> None:
    b, x = MambaBlock(6, 3, 2), torch.randn(2, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, stream = b(x.bfloat16())
        assert (hidden.dtype, stream.dtype) == (torch.bfloat16, torch.float32)
        assert b(hidden, stream)[1].dtype == torch.float32
    half = copy.deepcopy(b).bfloat16()
    hidden, stream = half(x.bfloat16())
    assert (hidden.dtype, stream.dtype) == (torch.bfloat16, torch.float32)
    expected = b(x)[0]
    assert (hidden - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("rope_residual", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("rope", ["sequence", None])
def test_a_stack_turns_and_runs_its_blocks(rope: Any, rope_residual: bool, recompute: bool) -> None:
    stack = randomize(MambaStack(6, 3, d_state=3, rope=rope, rope_residual=rope_residual)).double()
    x = torch.randn(2, 4, 6).double().requires_grad_()
    table = stack.rotations(x, (4,), None)
    assert (table is None) == (rope is None)

    def turn(tokens: torch.Tensor) -> torch.Tensor:
        return tokens if table is None else rotate(tokens, table)

    hidden, stream, expected = x, torch.zeros_like(x), {}
    for i, block in enumerate(stack):
        stream = turn(stream) if rope_residual else stream
        hidden, stream = block(turn(hidden), stream)
        expected[i] = hidden + stream
    out, residual, tapped = stack.scan(x, table, [0, 2], recompute=recompute)
    torch.testing.assert_close((out, residual), (hidden, stream))
    torch.testing.assert_close(tapped, {i: expected[i] for i in (0, 2)})
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), x), torch.autograd.grad(hidden.square().sum(), x)
    )
    first, kept, _ = stack.scan(x, table, depth=1)
    torch.testing.assert_close(first + kept, expected[0])
