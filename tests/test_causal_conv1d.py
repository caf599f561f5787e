"""The causal convolution on every path: against a plain account of it, by its properties, and as torch's operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from sequences import RUNNABLE, error
from torch import Tensor

from medgmae.ops import causal_conv1d
from medgmae.ops.conv import native, reference
from medgmae.ops.conv.inputs import ConvInputs

FORWARD, BACKWARD = torch.ops.medgmae.causal_conv1d.default, torch.ops.medgmae.causal_conv1d_backward.default
both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
with_silu = pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])


class Path(NamedTuple):
    """One implementation: what the registration of ``medgmae::causal_conv1d`` takes."""

    name: str
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor | None, ...]]

    def run(self, inputs: list[Any], grad: Tensor, silu: bool, reverse: bool) -> list[Tensor]:
        """Result (B, D, L) and the gradients of what is there, of channels-first tensors."""
        given = ConvInputs(inputs[0].transpose(1, 2), *inputs[1:], silu, reverse)
        out = self.forward(given)
        dx, *parameters = self.backward(grad.transpose(1, 2), given)
        assert [g is None for g in parameters] == [t is None for t in inputs[1:]]
        return [out.transpose(1, 2), dx.transpose(1, 2), *(g for g in parameters if g is not None)]


NATIVE = [
    Path(name, partial(native.forward, variant=name), partial(native.backward, variant=name)) for name in RUNNABLE
]
PATHS = [Path("reference", reference.forward, reference.backward), *NATIVE]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)


def make(
    batch: int = 2,
    channels: int = 6,
    length: int = 9,
    width: int = 4,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    seed: int = 0,
) -> list[Any]:
    """x (B, D, L) with the channels of a token side by side, weight, bias or None."""
    random = torch.Generator().manual_seed(seed)
    x, weight, shift = (
        torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)
        for shape in [(batch, length, channels), (channels, width), (channels,)]
    )
    return [x.transpose(1, 2), weight, shift if bias else None]


def account(inputs: list[Any], silu: bool, reverse: bool) -> Tensor:
    """The definition in float64, tap by tap."""
    x, weight, bias = (None if t is None else t.double() for t in inputs)
    length, width = x.shape[2], weight.shape[1]
    out = torch.zeros_like(x) if bias is None else torch.zeros_like(x) + bias[:, None]
    for k in range(width):
        late = min(width - 1 - k, length)  # tokens without one to filter
        nothing = torch.zeros_like(x[:, :, :late])
        seen = [x[:, :, late:], nothing] if reverse else [nothing, x[:, :, : length - late]]
        out = out + weight[:, k, None] * torch.cat(seen, -1)
    return out / (1 + torch.exp(-out)) if silu else out


def expected(inputs: list[Any], grad: Tensor, silu: bool, reverse: bool) -> list[Tensor]:
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    out = account(leaves, silu, reverse)
    present = [t for t in leaves if t is not None]
    loss = (out * grad.double()).sum() + sum(0 * t.sum() for t in present)
    return [out.detach(), *torch.autograd.grad(loss, present)]


def check(path: Path, inputs: list[Any], silu: bool, reverse: bool) -> None:
    grad = torch.randn(inputs[0].mT.shape, dtype=torch.float64).mT
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 3e-6)):
        own = [None if t is None else t.to(dtype) for t in inputs]
        wanted = expected(own, grad.to(dtype), silu, reverse)
        for got, exact in zip(path.run(own, grad.to(dtype), silu, reverse), wanted, strict=True):
            assert got.dtype == dtype
            assert got.shape == exact.shape
            assert error(got, exact) <= bound


@every_path
@with_silu
@both_directions
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
def test_values_and_gradients_are_the_definition(path: Path, width: int, silu: bool, reverse: bool) -> None:
    check(path, make(width=width, seed=width), silu, reverse)
    check(path, make(width=width, bias=False), silu, reverse)


@every_path
@both_directions
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 63, 64, 65, 66, 129])
def test_lengths(path: Path, length: int, reverse: bool) -> None:
    check(path, make(1, 3, length), True, reverse)


@every_path
def test_numbers_of_channels(path: Path) -> None:
    for channels in (*range(1, 36), 47, 48, 49, 63, 64, 65, 100):
        check(path, make(2, channels, 6), True, False)


@every_path
@both_directions
@pytest.mark.parametrize("shape", [(0, 4, 9), (2, 4, 0), (0, 4, 0)], ids=str)
def test_nothing_to_filter(path: Path, shape: tuple[int, int, int], reverse: bool) -> None:
    check(path, make(*shape), True, reverse)


@every_path
@with_silu
def test_reverse_is_flip_filter_flip(path: Path, silu: bool) -> None:
    inputs, grad = make(length=30), torch.randn(2, 6, 30, dtype=torch.float64)
    found = path.run(inputs, grad, silu, True)
    out, dx, *rest = path.run([inputs[0].flip(-1), *inputs[1:]], grad.flip(-1), silu, False)
    for got, wanted in zip(found, [out.flip(-1), dx.flip(-1), *rest], strict=True):
        assert error(got, wanted) <= 1e-13


@every_path
@both_directions
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_number_reaches_as_far_as_the_taps(path: Path, value: float, reverse: bool) -> None:
    inputs, grad = make(2, 21, 30, dtype=torch.float32), torch.randn(2, 21, 30)
    good = path.run(inputs, grad, True, reverse)
    spoilt = [t.clone() for t in inputs]
    spoilt[0][1, 4, 12] = value
    found = path.run(spoilt, grad, True, reverse)
    touched = torch.zeros(2, 21, 30, dtype=torch.bool)
    touched[1, 4, 9:13] = True
    if not reverse:
        touched[1, 4] = touched[1, 4].roll(3)
    assert not found[0][1, 4, 12].isfinite()
    assert torch.equal(found[0][~touched], good[0][~touched])
    others = torch.arange(21) != 4
    assert torch.equal(found[1][:, others], good[1][:, others])
    assert torch.equal(found[2][others], good[2][others])
    assert torch.equal(found[3][others], good[3][others])


@every_path
def test_large_arguments_of_silu(path: Path) -> None:
    """Its exponential overflows or vanishes there; the function and its slope do not."""
    x = torch.tensor([-1e6, -200.0, -104.0, -88.8, -87.0, -20.0, -1e-8, 0.0, 20.0, 88.8, 200.0, 1e6])
    inputs = [x.expand(1, 20, 12).contiguous(), torch.ones(20, 1), None]
    out, dx, _ = path.run(inputs, torch.ones(1, 20, 12), True, False)
    wanted = expected(inputs, torch.ones(1, 20, 12), True, False)
    wanted[0] = F.silu(x.double()).expand(1, 20, 12)
    s = torch.sigmoid(x.double())
    torch.testing.assert_close(out.double(), wanted[0], rtol=3e-6, atol=2e-32)
    torch.testing.assert_close(dx.double(), (s + x.double() * s * (1 - s)).expand(1, 20, 12), rtol=3e-6, atol=2e-32)


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: path.name)
@with_silu
@both_directions
def test_bits_do_not_depend_on_the_threads(path: Path, silu: bool, reverse: bool) -> None:
    for shape in [(3, 37, 70), (1, 8, 1000), (2, 300, 11)]:
        inputs, grad = make(*shape, dtype=torch.float32), torch.randn(*shape)
        runs = []
        for threads in (1, 2, 3, 1):
            same = Path(path.name, partial(path.forward, threads=threads), partial(path.backward, threads=threads))
            runs.append(same.run(inputs, grad, silu, reverse))
        for again in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_opcheck() -> None:
    for bias, silu, reverse in ((True, True, False), (False, False, True)):
        x, weight, shift = make(bias=bias)
        inputs = [None if t is None else t.clone().requires_grad_() for t in (x.mT, weight, shift)]
        torch.library.opcheck(FORWARD, (*inputs, silu, reverse))
        arguments = (torch.randn_like(x.mT), x.mT, weight, shift, silu, reverse)
        torch.library.opcheck(BACKWARD, arguments, test_utils=("test_schema", "test_faketensor"))


@with_silu
@both_directions
def test_gradcheck(silu: bool, reverse: bool) -> None:
    inputs = [t.clone().requires_grad_() for t in make(2, 3, 6)]
    activation: Any = "silu" if silu else None

    def run(*tensors: Tensor) -> Tensor:
        return causal_conv1d(*tensors, activation=activation, reverse=reverse)

    assert torch.autograd.gradcheck(run, inputs)


@with_silu
def test_public_function_is_torchs_own_convolution(silu: bool) -> None:
    x, weight, bias = (t.clone().requires_grad_() for t in make(length=30))
    out = causal_conv1d(x, weight, bias, activation="silu" if silu else None)
    plain = F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=6)
    torch.testing.assert_close(out, F.silu(plain) if silu else plain, rtol=1e-12, atol=1e-13)
    loss = F.silu(plain) if silu else plain
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(loss, (x, weight, bias), grad)
    for got, exact in zip(torch.autograd.grad(out, (x, weight, bias), grad), wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


def test_compiles_and_exports_with_a_free_length() -> None:
    class Filter(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return causal_conv1d(x, weight, bias, "silu") + causal_conv1d(x, weight, None, reverse=True)

    compiled = torch.compile(Filter(), fullgraph=True, backend="aot_eager")
    for length in (9, 20, 33):
        one, other = ([t.clone().requires_grad_() for t in make(length=length)] for _ in range(2))
        value, plain = compiled(*one), Filter()(*other)
        torch.testing.assert_close(value, plain)
        found = torch.autograd.grad(value.square().sum(), one)
        for got, wanted in zip(found, torch.autograd.grad(plain.square().sum(), other), strict=True):
            torch.testing.assert_close(got, wanted)
    free = ({2: torch.export.Dim("length", min=2, max=1000)}, None, None)
    exported = torch.export.export(Filter(), tuple(make()), dynamic_shapes=free)
    for length in (9, 77):
        assert torch.equal(exported.module()(*make(length=length)), Filter()(*make(length=length)))


def test_vmap_is_a_loop() -> None:
    stacks = [make(seed=seed) for seed in range(3)]
    weights = torch.stack([s[1] for s in stacks], 1)
    x, _, bias = stacks[0]
    out = torch.vmap(lambda w: causal_conv1d(x, w, bias, "silu"), in_dims=1)(weights)
    for got, (_, weight, _) in zip(out, stacks, strict=True):
        torch.testing.assert_close(got, causal_conv1d(x, weight, bias, "silu"))
    inputs = [t.clone().requires_grad_() for t in stacks[0]]
    out, many = causal_conv1d(*inputs), torch.randn(3, 2, 6, 9, dtype=torch.float64)
    found = torch.autograd.grad(out, inputs, many, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(many):
        for got, alone in zip(found, torch.autograd.grad(out, inputs, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], alone)


def test_second_order_gradient_is_refused() -> None:
    inputs = [t.clone().requires_grad_() for t in make()]
    (first,) = torch.autograd.grad(causal_conv1d(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second-order gradient: call backward"):
        first.sum().backward()


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_wanted_gradients_arrive(wanted: int) -> None:
    inputs = make()
    inputs[wanted].requires_grad_()
    causal_conv1d(*inputs).sum().backward()
    assert [t.grad is not None for t in inputs] == [i == wanted for i in range(3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    half = [t.clone().requires_grad_() for t in make(dtype=dtype)]
    wide = [t.detach().float().requires_grad_() for t in half]
    out, exact = causal_conv1d(*half, activation="silu"), causal_conv1d(*wide, activation="silu")
    assert out.dtype == dtype
    assert torch.equal(out, exact.to(dtype))
    grad = torch.ones_like(out)
    for got, wanted in zip(torch.autograd.grad(out, half, grad), torch.autograd.grad(exact, wide, grad.float()),
                           strict=True):  # fmt: skip
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted.to(dtype))


def test_autocast_changes_nothing() -> None:
    inputs = [t.clone().requires_grad_() for t in make(dtype=torch.float32)]
    plain = causal_conv1d(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = causal_conv1d(*inputs)
        assert torch.equal(out, plain)
        found = torch.autograd.grad(out.square().sum(), inputs)
    for got, wanted in zip(found, torch.autograd.grad(plain.square().sum(), inputs), strict=True):
        assert torch.equal(got, wanted)


def test_layout_of_tensors_does_not_matter() -> None:
    x, weight, bias = make(length=30)
    grad = torch.randn_like(x)
    tokens = torch.cat([x.mT, torch.full_like(x.mT, math.nan)], -1)
    layouts = {
        "channels first": x.contiguous(),
        "half of wider tokens": tokens[..., :6].mT,
        "every second channel": torch.stack([x, torch.full_like(x, math.nan)], 2).flatten(1, 2)[:, ::2],
    }
    inputs = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    out = causal_conv1d(*inputs)
    wanted = torch.autograd.grad(out, inputs, grad)
    for name, loose in layouts.items():
        turned = weight.T.contiguous().T
        others = [t.detach().requires_grad_() for t in (loose, turned, bias.repeat_interleave(2)[::2])]
        again = causal_conv1d(*others)
        assert error(again, out) <= 1e-14, name
        for got, exact in zip(torch.autograd.grad(again, others, grad.contiguous()), wanted, strict=True):
            assert error(got, exact) <= 1e-14, name
    # torch's own gradient of a sum has stride 0
    spread = torch.ones((), dtype=torch.float64).expand_as(out)
    dense = torch.autograd.grad(causal_conv1d(*inputs), inputs, torch.ones_like(out))
    for got, exact in zip(torch.autograd.grad(causal_conv1d(*inputs), inputs, spread), dense, strict=True):
        assert error(got, exact) <= 1e-14


def test_result_and_gradient_lie_as_the_tokens_do() -> None:
    tokens = torch.randn(2, 30, 12, requires_grad=True)
    weight = torch.randn(6, 4)
    out = causal_conv1d(tokens[..., :6].transpose(1, 2), weight, None, "silu")
    assert out.transpose(1, 2).is_contiguous()
    x = make(dtype=torch.float32)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(causal_conv1d(x, weight).sum(), x)
    assert gradient.transpose(1, 2).is_contiguous()


def test_meta_tensors_know_the_shapes() -> None:
    assert causal_conv1d(*(t.to("meta") for t in make(3, 6, 70))).shape == (3, 6, 70)


GOOD = dict(zip(("x", "weight", "bias"), make(dtype=torch.float32), strict=True))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": torch.zeros(6, 9)}, ValueError, r"x must be \(batch, channels, L\).*got \(6, 9\)"),
        ({"weight": torch.zeros(6, 1, 4)}, ValueError, r"weight \(channels, W\), got .*\(6, 1, 4\)"),
        ({"weight": torch.zeros(5, 4)}, ValueError, r"got \(2, 6, 9\) and \(5, 4\)"),
        ({"weight": torch.zeros(6, 0)}, ValueError, r"got \(2, 6, 9\) and \(6, 0\)"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be .*\(6,\), got \(5,\)"),
        ({"activation": "relu"}, ValueError, r"activation must be 'silu' or None, got 'relu'"),
        ({"x": torch.zeros(2, 6, 9).long()}, TypeError, r"x is torch.int64 on cpu: expected real floating point"),
        ({"bias": torch.zeros(6).cfloat()}, TypeError, r"bias is torch.complex64"),
        ({"weight": torch.zeros(6, 4, device="meta")}, TypeError, r"weight is torch.float32 on meta: .* on cpu"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_words(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        causal_conv1d(**{**GOOD, **change})
