"""The scan's operator as torch sees it: schema, gradients, compilation, vmap, dtypes, layouts and errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import FORMS, REFERENCE, Inputs, arguments, cotangents, error, expected, make, operands
from torch import Tensor

from medgmae.ops import causal_conv1d, selective_scan
from medgmae.ops.scan import operator, reference
from medgmae.ops.scan.operator import CHUNK

FORWARD, BACKWARD = torch.ops.medgmae.selective_scan.default, torch.ops.medgmae.selective_scan_backward.default
every_form = pytest.mark.parametrize("forms", FORMS, ids=str)
ROUNDING = 2e-6  # torch's own sums depend on where the numbers lie
both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def run(inputs: Inputs, **options: Any) -> Any:
    """The public function, steps through softplus."""
    return selective_scan(*inputs, **{"delta_softplus": True, **options})


def gradients(inputs: Inputs, grad: Tensor, grad_state: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """By name, of <result, grad> + <last state, grad_state>."""
    names = inputs.present()
    out, state = run(inputs, return_last_state=True, **options)
    loss = (out * grad).sum() + (0 if grad_state is None else (state * grad_state).sum())
    return dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))


@every_form
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_opcheck(forms: Any) -> None:
    inputs = make(forms=forms)
    rest = True, forms[0] == "time", 4
    torch.library.opcheck(FORWARD, (*arguments(inputs.leaves()), *rest))
    out, states = FORWARD(*arguments(inputs), *rest)
    # It has no derivative by design, so the tests of autograd do not apply.
    checks = ("test_schema", "test_faketensor")
    for carried in (None, torch.randn_like(states)):
        torch.library.opcheck(
            BACKWARD, (torch.randn_like(out), carried, states, *arguments(inputs), *rest), test_utils=checks
        )


@pytest.mark.parametrize("without", [("D",), ("z",), ("D", "z", "delta_bias")], ids=str)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck_of_what_may_be_left_out(without: tuple[str, ...]) -> None:
    inputs = make(without=without)
    torch.library.opcheck(FORWARD, (*arguments(inputs.leaves()), True, False, 4))
    out, states = FORWARD(*arguments(inputs), True, False, 4)
    rest = (torch.randn_like(out), None, states, *arguments(inputs), True, False, 4)
    torch.library.opcheck(BACKWARD, rest, test_utils=("test_schema", "test_faketensor"))


@every_form
@both_directions
def test_gradcheck(forms: Any, reverse: bool) -> None:
    inputs = make(1, 6, 5, 2, forms=forms, seed=2).leaves()

    def scan(*tensors: Tensor) -> Any:
        return run(Inputs(*tensors), reverse=reverse, return_last_state=True)

    assert torch.autograd.gradcheck(scan, tuple(inputs))


def test_gradcheck_over_several_chunks() -> None:
    inputs = make(1, 1, CHUNK + 3, 1, seed=2).leaves()
    assert torch.autograd.gradcheck(lambda *tensors: run(Inputs(*tensors), reverse=True), tuple(inputs))


@every_form
@both_directions
def test_public_function_equals_the_reference(forms: Any, reverse: bool) -> None:
    inputs = make(length=70, forms=forms)
    grad, grad_state = cotangents(inputs)
    wanted = REFERENCE.run(inputs, grad, grad_state, True, reverse)
    out, state = run(inputs, reverse=reverse, return_last_state=True)
    assert error(out, wanted.out) <= 1e-12
    assert error(state, wanted.state) <= 1e-12
    assert torch.equal(run(inputs, reverse=reverse), out)
    for name, gradient in gradients(inputs.leaves(), grad, grad_state, reverse=reverse).items():
        assert error(gradient, wanted.gradients[name]) <= 1e-11, name


def test_the_reference_needs_no_autograd() -> None:
    # Where there is no native module the dispatcher calls it below autograd, which then records nothing.
    inputs = make()
    given = operands(inputs, chunk=4)
    out, states = reference.forward(given)
    wanted = reference.backward(torch.ones_like(out), None, states, given)
    with torch._C._AutoDispatchBelowAutograd():
        found = reference.backward(torch.ones_like(out), None, states, given)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_without_gradients_only_the_last_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with gradients one in CHUNK."""
    kept: list[int] = []

    def spy(*inputs: Any) -> Any:
        out, states = FORWARD(*inputs)
        kept.append(states.shape[1])
        return out, states

    monkeypatch.setattr(operator, "_OP", spy)
    inputs = make(length=3 * CHUNK)
    run(inputs)
    run(inputs.leaves())
    with torch.no_grad():
        run(inputs.leaves())
    assert kept == [1, 3, 1]


def test_compiles_into_one_graph() -> None:
    def loss(*tensors: Tensor) -> Tensor:
        inputs = Inputs(*tensors)
        out, state = run(inputs, return_last_state=True)
        return out.square().mean() + state.square().mean() + (2 * run(inputs, reverse=True)).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for shape in [(2, 6, 70), (2, 6, 11), (3, 6, 9)]:  # later calls may be traced anew with dynamic sizes
        one, other = make(*shape).leaves(), make(*shape).leaves()
        value, plain = compiled(*one), loss(*other)
        torch.testing.assert_close(value, plain)
        for got, wanted in zip(torch.autograd.grad(value, one), torch.autograd.grad(plain, other), strict=True):
            torch.testing.assert_close(got, wanted)


class Scan(torch.nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        out: Tensor = run(Inputs(*tensors), reverse=True)
        return out


def test_exports_with_a_free_length() -> None:
    inputs, length = make(length=20), torch.export.Dim("length", min=2, max=1000)
    shapes = [None if t.dim() < 3 else {2: length} for t in inputs]  # type: ignore[union-attr]
    exported = torch.export.export(Scan(), tuple(inputs), dynamic_shapes=(tuple(shapes),))  # type: ignore[arg-type]
    assert any(str(node.target) == "medgmae.selective_scan.default" for node in exported.graph.nodes)
    for other in (inputs, make(length=77, seed=4)):
        assert torch.equal(exported.module()(*other), Scan()(*other))


@both_directions
def test_vmap_is_a_loop(reverse: bool) -> None:
    stacks = [make(seed=seed) for seed in range(3)]
    u = torch.stack([s.u for s in stacks], 1)
    A = torch.stack([s.A for s in stacks], -1)
    rest = {name: t for name, t in stacks[0].present().items() if name not in ("u", "A")}

    def scan(u: Tensor, A: Tensor) -> Any:
        return selective_scan(u, A=A, **rest, delta_softplus=True, reverse=reverse, return_last_state=True)

    out, state = torch.vmap(scan, in_dims=(1, 2))(u, A)
    for i, one in enumerate(stacks):
        alone = scan(one.u, one.A)
        torch.testing.assert_close(out[i], alone[0], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(state[i], alone[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 2, 6, 9), (3, 2, 6, 0), (3, 0, 6, 9)], ids=str)
def test_vmap_over_nothing(shape: tuple[int, ...]) -> None:
    """No sample, no token, no batch: empty results with gradients."""
    u, weight = torch.randn(shape, requires_grad=True), torch.randn(6, 4)
    B, A = torch.randn(*shape[:2], 4, shape[3]), torch.randn(6, 4)

    def scan(u: Tensor, B: Tensor) -> Tensor:
        return selective_scan(causal_conv1d(u, weight), u, A, B, B)

    out = torch.vmap(scan)(u, B)
    assert out.shape == shape
    (gradient,) = torch.autograd.grad(out.sum(), u)
    assert gradient.shape == shape


def test_gradients_of_many_cotangents() -> None:
    inputs = make().leaves()
    out = run(inputs)
    many = torch.randn(3, *out.shape, dtype=torch.float64)  # the backward is mapped, the inputs are not
    found = torch.autograd.grad(out, list(inputs), many, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(many):
        for got, alone in zip(found, torch.autograd.grad(out, list(inputs), grad, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], alone, rtol=1e-12, atol=1e-13)


def test_second_order_gradient_is_refused() -> None:
    inputs = make().leaves()
    (first,) = torch.autograd.grad(run(inputs).square().sum(), inputs.u, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second-order gradient: call backward"):
        first.sum().backward()


@pytest.mark.parametrize("name", Inputs._fields)
def test_only_wanted_gradients_arrive(name: str) -> None:
    inputs = make()
    alone = inputs.present()[name].requires_grad_()
    out, state = run(inputs, return_last_state=True)
    (out.sum() + state.sum()).backward()
    for other, tensor in inputs.present().items():
        assert (tensor.grad is not None) == (other == name)
    grad, grad_state = torch.ones_like(out), torch.ones_like(state)
    wanted = expected(inputs.map(torch.Tensor.detach), grad, grad_state, True, False).gradients[name]
    torch.testing.assert_close(alone.grad, wanted, rtol=1e-10, atol=1e-11)
    assert not run(inputs.map(torch.Tensor.detach)).requires_grad


def test_gradient_of_the_last_state_alone() -> None:
    inputs = make(length=70).leaves()
    _, state = run(inputs, return_last_state=True)
    grad, grad_state = cotangents(inputs)
    wanted = expected(inputs, 0 * grad, grad_state, True, False).gradients
    names = inputs.present()
    found = torch.autograd.grad(state, list(names.values()), grad_state)
    for name, gradient in zip(names, found, strict=True):
        assert error(gradient, wanted[name]) <= 1e-11, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_and_written_and_computed_in_float32(dtype: torch.dtype) -> None:
    half = make(length=40, dtype=dtype)
    half = half._replace(A=half.A.float(), D=half.D.float())  # type: ignore[union-attr]
    grad, _ = cotangents(half)
    wide = half.to(torch.float32)
    out, state = run(half, return_last_state=True)
    exact, exact_state = run(wide, return_last_state=True)
    assert out.dtype == dtype
    assert state.dtype == torch.float32
    assert torch.equal(out, exact.to(dtype))
    assert torch.equal(state, exact_state)
    found, wanted = gradients(half.leaves(), grad), gradients(wide.leaves(), grad.float())
    for name, tensor in half.present().items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(found[name], wanted[name].to(tensor.dtype), msg=name)


def test_mixed_dtypes_are_computed_in_the_widest() -> None:
    """As models under autocast have them: some tensors in half precision, parameters in float32."""
    inputs = make(dtype=torch.float32)
    mixed = inputs._replace(u=inputs.u.bfloat16(), B=inputs.B.bfloat16(), z=inputs.z.half())  # type: ignore[union-attr]
    out = run(mixed)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, run(mixed.to(torch.float32)).bfloat16())
    for name, gradient in gradients(mixed.leaves(), torch.ones_like(out)).items():
        assert gradient.dtype == mixed.present()[name].dtype
    assert run(inputs._replace(u=inputs.u.double())).dtype == torch.float64


def test_autocast_changes_nothing() -> None:
    inputs = make(length=70, dtype=torch.float32).leaves()
    plain = run(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(inputs)
        assert out.dtype == torch.float32
        assert torch.equal(out, plain)
        found = torch.autograd.grad(out.square().sum(), list(inputs))
    for got, wanted in zip(found, torch.autograd.grad(plain.square().sum(), list(inputs)), strict=True):
        assert torch.equal(got, wanted)


def scattered(tensor: Tensor) -> Tensor:
    """The same values, neither contiguous nor at the start of their storage, with NaN between them."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan, dtype=tensor.dtype)
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


LAYOUTS: dict[str, Any] = {
    "contiguous": torch.Tensor.contiguous,
    "scattered": scattered,
    "half of a wider tensor": lambda t: torch.cat([t, torch.full_like(t, math.nan)], 1)[:, : t.shape[1]],
    "half of wider tokens": lambda t: torch.cat([t.mT, torch.full_like(t.mT, math.nan)], -1)[..., : t.shape[-2]].mT,
    "backwards": lambda t: t.flip(0).contiguous().flip(0),
}


@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_tensors_does_not_matter(forms: Any, layout: str) -> None:
    inputs = make(length=70, dtype=torch.float32, forms=forms)
    grad, grad_state = cotangents(inputs)
    out, wanted = run(inputs), gradients(inputs.leaves(), grad, grad_state)
    change = LAYOUTS[layout]
    loose = inputs.map(lambda t: change(t) if t.dim() > 2 else scattered(t))
    assert error(run(loose), out) <= ROUNDING
    asking = loose.map(lambda t: t.detach().requires_grad_())
    for name, gradient in gradients(asking, change(grad), scattered(grad_state)).items():
        assert error(gradient, wanted[name]) <= ROUNDING, name


def test_expanded_tensors() -> None:
    """Stride 0: one sequence of B for all samples, the gradient of a sum."""
    inputs = make(3, 6, 70)
    same = inputs._replace(B=inputs.B[:1].expand(3, -1, -1), z=inputs.z[:1].expand(3, -1, -1))  # type: ignore[index]
    copied = same.map(torch.Tensor.contiguous)
    assert error(run(same), run(copied)) <= 1e-13
    ones = torch.ones((), dtype=torch.float64).expand_as(inputs.u)
    wanted = gradients(copied.leaves(), ones.contiguous())
    for name, gradient in gradients(same.map(lambda t: t.detach().requires_grad_()), ones).items():
        assert error(gradient, wanted[name]) <= 1e-13, name


def test_result_and_gradients_lie_as_the_tokens_do() -> None:
    """The channels of a token side by side, so that the next linear layer reads them as they are."""
    tokens = torch.randn(2, 70, 12, requires_grad=True)
    x, z = tokens.chunk(2, dim=-1)
    inputs = make(length=70, dtype=torch.float32)
    out = run(inputs._replace(u=x.transpose(1, 2), z=z.transpose(1, 2)))
    assert out.shape == (2, 6, 70)
    assert out.transpose(1, 2).is_contiguous()
    (gradient,) = torch.autograd.grad(out.sum(), tokens)
    assert gradient.is_contiguous()
    for name, found in gradients(inputs.leaves(), torch.ones_like(out)).items():
        if name in ("u", "delta", "z", "B", "C"):
            assert found.transpose(1, 2).is_contiguous(), name


def test_inputs_are_left_alone() -> None:
    inputs = make()
    before = inputs.map(torch.clone)
    grad = torch.ones_like(inputs.u)
    gradients(inputs.leaves(), grad)
    assert torch.equal(grad, torch.ones_like(inputs.u))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_result_is_no_view_of_the_inputs() -> None:
    inputs = make(1, 1, 1, 1)
    kept = {t.untyped_storage().data_ptr() for t in inputs.present().values()}
    for tensor in run(inputs, return_last_state=True):
        assert tensor.untyped_storage().data_ptr() not in kept


def test_fake_and_meta_tensors_know_the_shapes() -> None:
    inputs = make(3, 6, 70, 5, torch.float32).to("meta")
    out, state = run(inputs, return_last_state=True)
    assert out.shape == (3, 6, 70)
    assert state.shape == (3, 6, 5)


GOOD = make(dtype=torch.float32).present()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"u": torch.zeros(6, 9)}, ValueError, r"u must be \(batch, channels, L\), got \(6, 9\)"),
        ({"A": torch.zeros(5, 4)}, ValueError, r"A must be \(channels, N\) with 6 channels .*got \(5, 4\)"),
        ({"A": torch.zeros(6)}, ValueError, r"A must be \(channels, N\).*got \(6,\)"),
        ({"delta": torch.zeros(2, 6, 8)}, ValueError, r"delta must be \(2, 6, 9\).*got \(2, 6, 8\)"),
        ({"z": torch.zeros(2, 5, 9)}, ValueError, r"z must be \(2, 6, 9\).*got \(2, 5, 9\)"),
        ({"D": torch.zeros(5)}, ValueError, r"D must be \(6,\).*got \(5,\)"),
        ({"delta_bias": torch.zeros(6, 1)}, ValueError, r"delta_bias must be \(6,\).*got \(6, 1\)"),
        ({"B": torch.zeros(2, 4, 8)}, ValueError, r"B must be .*\(2, 4, 9\).*got \(2, 4, 8\)"),
        ({"B": torch.zeros(2, 5, 9)}, ValueError, r"B must be .*got \(2, 5, 9\)"),
        ({"C": torch.zeros(2, 4, 4, 9)}, ValueError, r"C must be .*divides the 6 channels.*got \(2, 4, 4, 9\)"),
        ({"C": torch.zeros(2, 0, 4, 9)}, ValueError, r"C must be .*got \(2, 0, 4, 9\)"),
        ({"C": torch.zeros(6, 5)}, ValueError, r"C must be .*got \(6, 5\)"),
        ({"u": torch.zeros(2, 6, 9).long()}, TypeError, r"u is torch.int64 on cpu: expected real floating point"),
        ({"A": torch.zeros(6, 4).cfloat()}, TypeError, r"A is torch.complex64 on cpu: expected real"),
        ({"z": torch.zeros(2, 6, 9, device="meta")}, TypeError, r"z is torch.float32 on meta: expected .* on cpu"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_words(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        selective_scan(**{**GOOD, **change})


def test_as_users_of_mamba_ssm_call_it() -> None:
    """Positions and names of the arguments of selective_scan_fn."""
    u, delta, A, B, C, D, z, bias = make(dtype=torch.float32)
    out, state = selective_scan(u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True, return_last_state=True)
    exact, last = expected(Inputs(u, delta, A, B, C, D, z, bias), torch.zeros_like(u), None, True, False)[:2]
    assert error(out, exact) <= 1e-6
    assert error(state, last) <= 1e-6


def test_the_example_in_the_docs_runs() -> None:
    text = (Path(__file__).parent.parent / "docs/scan.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["y"].shape == (1, 768, 1000)
    assert names["y"].isfinite().all()


def test_func_grad_is_refused_with_the_way_out() -> None:
    inputs = make(1, 2, 5, 3)
    with pytest.raises(NotImplementedError, match=r"selective_scan is; use torch\.autograd\.grad"):
        torch.func.grad(lambda u: selective_scan(u, *inputs[1:]).sum())(inputs[0])
