"""The projector as torch sees it: schema, gradients, compilation, vmap, dtypes, layouts and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from projections import KINDS, REFERENCE, SIZE, circle, leaves, make
from test_voxelize_operator import scattered

from medgmae.ops import project, use_native
from medgmae.ops.projection import reference
from medgmae.ops.projection.inputs import ProjectInputs
from medgmae.ops.projection.operator import support_code

FORWARD, BACKWARD = torch.ops.medgmae.project.default, torch.ops.medgmae.project_backward.default
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))


def arguments(kind: dict[str, Any], batch: int = 2) -> tuple[Any, ...]:
    views = circle(3, beam=kind["beam"]).expand(batch, 3, 4, 3)
    return views, list(SIZE), support_code(kind.get("support")), kind["beam"] == "parallel", kind.get("affine", False)


@every_kind
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_opcheck(kind: dict[str, Any]) -> None:
    parameters, rest = make(), arguments(kind)
    torch.library.opcheck(FORWARD, (*leaves(parameters), *rest))
    torch.library.opcheck(FORWARD, (*parameters[:3], *leaves(parameters[3:]), *rest))
    grad = torch.randn_like(FORWARD(*parameters, *rest))
    # It has no derivative by design, so the tests of autograd do not apply.
    torch.library.opcheck(BACKWARD, (grad, *parameters, *rest), test_utils=("test_schema", "test_faketensor"))


@every_kind
def test_the_reference_needs_no_autograd(kind: dict[str, Any]) -> None:
    inputs = ProjectInputs(*make(), *arguments(kind))
    grad = torch.randn_like(FORWARD(*inputs))
    expected = reference.backward(grad, inputs)
    with torch._C._AutoDispatchBelowAutograd():
        found = reference.backward(grad, inputs)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@every_kind
def test_public_function_equals_the_reference(kind: dict[str, Any]) -> None:
    parameters, views = leaves(make()), circle(3, beam=kind["beam"])
    image = project(*parameters, views, SIZE, **kind)
    cotangent = torch.randn_like(image)
    expected, wanted = REFERENCE.gradients(parameters, cotangent, views, **kind)
    torch.testing.assert_close(image.detach(), expected, rtol=1e-10, atol=1e-12)
    for got, gradient in zip(torch.autograd.grad(image, parameters, cotangent), wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-8, atol=1e-10)
    with use_native(False):
        assert torch.equal(project(*parameters, views, SIZE, **kind), expected)
    square = project(*parameters, views, 6, **kind)
    assert torch.equal(square, project(*parameters, views, (6, 6), **kind))


def test_compiles_into_one_graph() -> None:
    views = circle(2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(*parameters: torch.Tensor) -> torch.Tensor:
        image = project(*parameters, views, SIZE, support=3.0)
        return image.square().mean() + project(*parameters, views, SIZE, affine=True).square().mean()

    for batch_of in (make(), make(count=9, seed=1)):  # the second call may be traced anew with a dynamic size
        inputs, others = leaves(batch_of), leaves(batch_of)
        value = loss(*inputs)
        expected = loss._torchdynamo_orig_callable(*others)
        torch.testing.assert_close(value, expected)
        for got, wanted in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, others), strict=True):
            torch.testing.assert_close(got, wanted)


@every_kind
def test_vmap_is_a_loop(kind: dict[str, Any]) -> None:
    """Over Gaussians, and over views alone."""
    parameters = [p.unflatten(0, (3, 2)) for p in make(batch=6)]
    fixed, views = parameters[2][0], circle(3, beam=kind["beam"])

    def run(means: Any, scales: Any, quats: Any, densities: Any, views: Any) -> Any:
        return project(means, scales, quats, densities, views, SIZE, **kind)

    moved = parameters[1].movedim(0, 2)
    got = torch.vmap(run, in_dims=(0, 2, None, 0, None))(parameters[0], moved, fixed, parameters[3], views)
    expected = [run(parameters[0][i], parameters[1][i], fixed, parameters[3][i], views) for i in range(3)]
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-10, atol=1e-12)
    one = [p[0] for p in parameters]
    got = torch.vmap(run, in_dims=(None, None, None, None, 0))(*one, views.unsqueeze(1))
    torch.testing.assert_close(got.squeeze(2).transpose(0, 1), run(*one, views), rtol=1e-10, atol=1e-12)


def test_gradients_of_many_cotangents() -> None:
    inputs, rest = leaves(make()), arguments(KINDS[0])
    image = FORWARD(*inputs, *rest)
    cotangents = torch.randn(3, *image.shape, dtype=torch.float64)
    many = torch.autograd.grad(image, inputs, cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        for got, one in zip(many, torch.autograd.grad(image, inputs, cotangent, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], one, rtol=1e-9, atol=1e-11)


def test_what_has_no_derivative_is_refused() -> None:
    inputs, views = leaves(make()), circle(1)
    (first,) = torch.autograd.grad(project(*inputs, views, SIZE).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second-order gradient: call backward"):
        first.sum().backward()
    with pytest.raises(NotImplementedError, match=r"use torch\.autograd\.grad: of the sum of a torch\.vmap"):
        torch.func.grad(lambda means: project(means, *make()[1:], views, SIZE).sum())(make()[0])


def test_only_wanted_gradients_arrive_and_none_to_views() -> None:
    means, scales, quats, densities = make()
    means.requires_grad_()
    views = circle(2).requires_grad_()
    project(means, scales, quats, densities, views, SIZE).sum().backward()
    assert means.grad is not None
    assert views.grad is None
    assert scales.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = leaves(make(dtype=dtype))
    wide = leaves([p.detach().float() for p in inputs])
    image, expected = project(*inputs, circle(2), SIZE), project(*wide, circle(2), SIZE)
    assert image.dtype == torch.float32
    assert torch.equal(image, expected)
    image.square().sum().backward()
    expected.square().sum().backward()
    for got, exact in zip(inputs, wide, strict=True):
        assert got.grad is not None
        assert torch.equal(got.grad, exact.grad.to(dtype))  # type: ignore[union-attr]


@every_kind
def test_autocast_changes_nothing(kind: dict[str, Any]) -> None:
    inputs, views = leaves(make(dtype=torch.float32)), circle(2, beam=kind["beam"])
    for native in (True, False):
        with use_native(native):
            plain = project(*inputs, views, SIZE, **kind)
            with torch.autocast("cpu", torch.bfloat16):
                image = project(*inputs, views, SIZE, **kind)
                gradients = torch.autograd.grad(image.square().sum(), inputs)
            assert torch.equal(image, plain)
            for got, expected in zip(gradients, torch.autograd.grad(plain.square().sum(), inputs), strict=True):
                assert torch.equal(got, expected)


@every_kind
def test_layout_of_tensors_does_not_matter(kind: dict[str, Any]) -> None:
    parameters, (views, *rest) = make(), arguments(kind)
    expected = FORWARD(*parameters, views, *rest)
    grad = torch.randn_like(expected)
    wanted = BACKWARD(grad, *parameters, views, *rest)
    loose = [scattered(p) for p in parameters]
    assert torch.equal(FORWARD(*loose, scattered(views), *rest), expected)
    for got, gradient in zip(BACKWARD(scattered(grad), *loose, scattered(views), *rest), wanted, strict=True):
        assert torch.equal(got, gradient)
    assert torch.equal(
        BACKWARD(grad[:1, :1].expand_as(grad), *loose, views, *rest)[0].isfinite().all(), torch.tensor(True)
    )


def test_inputs_are_left_alone() -> None:
    parameters, views = make(), circle(2)
    before = [p.clone() for p in (*parameters, views)]
    inputs = leaves(parameters)
    image = project(*inputs, views, SIZE)
    grad = torch.ones_like(image)
    image.backward(grad)
    assert torch.equal(grad, torch.ones_like(image))
    assert all(torch.equal(a, b) for a, b in zip((*inputs, views), before, strict=True))


def test_fake_and_meta_tensors_know_the_shapes() -> None:
    parameters, views = [p.to("meta") for p in make(dtype=torch.float32)], circle(3).to("meta")
    assert project(*parameters, views, SIZE).shape == (2, 3, *SIZE)
    assert project(*(p[0] for p in parameters), views, SIZE, beam="parallel").shape == (3, *SIZE)


GOOD = dict(zip(("means", "scales", "quats", "densities"), (p[0] for p in make(dtype=torch.float32)), strict=True))
VIEWS = circle(2)


def changed(view: int, row: int, value: Any) -> torch.Tensor:
    views = VIEWS.clone()
    views[view, row] = torch.as_tensor(value, dtype=torch.float64)
    return views


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"means": torch.rand(6, 2)}, ValueError, r"means has shape \(6, 2\): expected \(N, 3\) or \(B, N, 3\)"),
        ({"means": torch.rand(1, 1, 6, 3)}, ValueError, r"means has shape .*: expected \(N, 3\) or \(B, N, 3\)"),
        ({"scales": torch.rand(5, 3)}, ValueError, r"scales has shape .* here \(6, 3\), as means is \(6, 3\)"),
        ({"quats": torch.rand(6, 3)}, ValueError, r"quats has shape .*expected \(N, 4\)"),
        ({"densities": torch.rand(6, 1)}, ValueError, r"densities has shape .*expected \(N,\)"),
        ({"scales": torch.rand(6, 3).double()}, TypeError, r"scales is torch.float64 on cpu, means is"),
        ({"densities": torch.ones(6).long()}, TypeError, r"densities is torch.int64"),
        ({"views": VIEWS.float()}, TypeError, r"views is torch.float32 .*expected torch.float64.*pass views.to"),
        ({"views": VIEWS.to("meta")}, TypeError, r"views is torch.float64 on meta"),
        ({"views": VIEWS[0]}, ValueError, r"views has shape \(4, 3\): expected \(V, 4, 3\)"),
        ({"views": VIEWS[:, :, :2]}, ValueError, r"views has shape \(2, 4, 2\)"),
        ({"views": changed(1, 3, VIEWS[1, 2] * -2)}, ValueError, r"view 1 has no area: its steps .* parallel or zero"),
        ({"views": changed(0, 2, [0, 0, 0])}, ValueError, r"view 0 has no area"),
        ({"views": changed(1, 0, VIEWS[1, 1] + VIEWS[1, 2])}, ValueError, r"view 1 has its source in the plane"),
        ({"views": changed(1, 0, VIEWS[1, 2]), "beam": "parallel"}, ValueError, r"view 1 has rays that run along"),
        ({"views": changed(0, 0, [0, 0, 0]), "beam": "parallel"}, ValueError, r"view 0 has rays .* no direction"),
        ({"views": changed(1, 0, [math.nan, 0, 0])}, ValueError, r"view 1 has numbers that are NaN or infinite"),
        ({"size": (4, 5, 6)}, ValueError, r"size must be one or two positive .*got \(4, 5, 6\)"),
        ({"size": (0, 5)}, ValueError, r"size must be one or two positive .*got \(0, 5\)"),
        ({"size": 2**25}, ValueError, r"size .* is too large: expected at most 2\*\*24"),
        ({"beam": "fan"}, ValueError, r"beam must be \"cone\" or \"parallel\", got 'fan'"),
        ({"support": "box"}, ValueError, r"support must be a number .*got 'box'; the box is one of voxels"),
        ({"support": 0.0}, ValueError, r"support must be .*got 0.0"),
        ({"support": math.nan}, ValueError, r"support must be .*got nan"),
        ({"support": True}, ValueError, r"support must be .*got True"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_words(
    change: dict[str, Any], error: type[Exception], message: str, native: bool
) -> None:
    with use_native(native), pytest.raises(error, match=message):
        project(**{**GOOD, "views": VIEWS, "size": SIZE, **change})
