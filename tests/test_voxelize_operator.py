"""The operator as torch sees it: schema, gradients, compilation, vmap, dtypes, layouts and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gaussians import REFERENCE, SUPPORTS, cut, leaves, make

from medgmae.ops import causal_conv1d, voxelize
from medgmae.ops.voxel import reference
from medgmae.ops.voxel.inputs import VoxelInputs
from medgmae.ops.voxel.operator import support_code

FORWARD, BACKWARD = torch.ops.medgmae.voxelize.default, torch.ops.medgmae.voxelize_backward.default
SIZE = (6, 4, 9)
every_support = pytest.mark.parametrize("support", SUPPORTS, ids=str)
PATCHES = torch.tensor([[5, 0, 3], [1, 1, 4]])
LAYOUTS = {"dense": (torch.zeros(2, 1, dtype=torch.int64), SIZE), "patches": (PATCHES, (3, 2, 3))}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def arguments(layout: str, support: Any) -> tuple[Any, ...]:
    patches, patch = LAYOUTS[layout]
    return patches, list(SIZE), list(patch), support_code(support)


@every_layout
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_opcheck(layout: str) -> None:
    parameters = make()
    rest = arguments(layout, "box" if layout == "dense" else None)
    torch.library.opcheck(FORWARD, (*leaves(parameters), *rest))
    torch.library.opcheck(FORWARD, (*parameters[:3], *leaves(parameters[3:]), *rest))
    grad = torch.randn_like(FORWARD(*parameters, *rest))
    # It has no derivative by design, so the tests of autograd do not apply.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(BACKWARD, (grad, *parameters, *rest), test_utils=checks)


@every_support
@every_layout
def test_gradcheck(layout: str, support: Any) -> None:
    patches, patch = LAYOUTS[layout]
    chosen: dict[str, Any] = {} if layout == "dense" else {"patches": patches, "patch_size": patch}
    parameters = leaves(make(count=2, scale=0.3, seed=2))
    assert torch.autograd.gradcheck(lambda *inputs: voxelize(*inputs, SIZE, support=support, **chosen), parameters)


@every_layout
def test_the_reference_needs_no_autograd(layout: str) -> None:
    # Where there is no native module the dispatcher calls it below autograd, which then records nothing.
    inputs = VoxelInputs(*make(), *arguments(layout, None))
    grad = torch.randn_like(FORWARD(*inputs))
    expected = reference.backward(grad, inputs)
    with torch._C._AutoDispatchBelowAutograd():
        found = reference.backward(grad, inputs)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@every_support
def test_public_function_equals_the_reference(support: Any) -> None:
    parameters = leaves(make())
    volume = voxelize(*parameters, SIZE, support=support)
    cotangent = torch.randn_like(volume)
    expected, wanted = REFERENCE.gradients(parameters, cotangent, SIZE, support)
    torch.testing.assert_close(volume.detach(), expected, rtol=1e-10, atol=1e-12)
    for got, gradient in zip(torch.autograd.grad(volume, parameters, cotangent), wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-8, atol=1e-10)
    patches, patch = LAYOUTS["patches"]
    rendered = voxelize(*parameters, SIZE, support=support, patches=patches, patch_size=patch)
    torch.testing.assert_close(rendered, cut(volume, patches, patch), rtol=1e-10, atol=1e-12)
    same = voxelize(*parameters, (6, 4, 8), support=support, patches=patches, patch_size=2)
    assert same.shape == (2, 3, 8)
    assert torch.equal(voxelize(*parameters, 6, support=support), voxelize(*parameters, (6, 6, 6), support=support))


def test_compiles_into_one_graph() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(*parameters: torch.Tensor) -> torch.Tensor:
        volume = voxelize(*parameters, SIZE, support="box")
        part = voxelize(*parameters, SIZE, support=3.0, patches=PATCHES, patch_size=(3, 2, 3))
        return volume.square().mean() + (2 * part).square().mean()

    for batch_of in (make(), make(count=8, seed=1)):  # the second call may be traced anew with a dynamic size
        inputs, others = leaves(batch_of), leaves(batch_of)
        value = loss(*inputs)
        expected = loss._torchdynamo_orig_callable(*others)
        torch.testing.assert_close(value, expected)
        for got, wanted in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, others), strict=True):
            torch.testing.assert_close(got, wanted)


@every_support
def test_vmap_is_a_loop(support: Any) -> None:
    parameters = [p.unflatten(0, (3, 2)) for p in make(batch=6)]
    fixed = parameters[2][0]  # rotations shared by all: in_dims None

    def run(means: Any, scales: Any, quats: Any, densities: Any) -> Any:
        return voxelize(means, scales, quats, densities, SIZE, support=support)

    moved = parameters[1].movedim(0, 2)
    got = torch.vmap(run, in_dims=(0, 2, None, 0))(parameters[0], moved, fixed, parameters[3])
    expected = [run(parameters[0][i], parameters[1][i], fixed, parameters[3][i]) for i in range(3)]
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-10, atol=1e-12)


@every_layout
def test_gradients_through_vmap_and_of_many_cotangents(layout: str) -> None:
    parameters, rest = make(), arguments(layout, None)
    inputs, alone = leaves(parameters), leaves(parameters)
    tripled = torch.vmap(lambda factor: FORWARD(*inputs[:3], factor * inputs[3], *rest))(
        torch.arange(1.0, 4.0).double()
    )
    plain = FORWARD(*alone, *rest)
    wanted = torch.autograd.grad(plain.sum(), alone, retain_graph=True)
    for got, one in zip(torch.autograd.grad(tripled.sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(got, 6 * one, rtol=1e-9, atol=1e-11)
    cotangents = torch.randn(3, *plain.shape, dtype=torch.float64)  # the backward is mapped, the parameters are not
    many = torch.autograd.grad(plain, alone, cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        for got, one in zip(many, torch.autograd.grad(plain, alone, cotangent, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], one, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("empty", ["patches", "batch", "mapped", "Gaussians"])
def test_vmap_over_nothing(empty: str) -> None:
    lead = {"mapped": (0, 2), "batch": (3, 0)}.get(empty, (3, 2))
    count = 0 if empty == "Gaussians" else 5
    shapes = (*lead, count, 3), (*lead, count, 3), (*lead, count, 4), (*lead, count)
    inputs = leaves([torch.rand(shape, dtype=torch.float64) for shape in shapes])
    patches = torch.zeros(*lead, 0 if empty == "patches" else 4, dtype=torch.int64)

    def run(*values: Any) -> Any:
        return voxelize(*values[:4], SIZE, patches=values[4], patch_size=(3, 2, 3))

    rendered = torch.vmap(run)(*inputs, patches)
    assert rendered.shape == (*patches.shape, 18)
    for gradient, shape in zip(torch.autograd.grad(rendered.sum(), inputs), shapes, strict=True):
        assert gradient.shape == shape
        assert (gradient == 0).all()


def test_a_loop_of_vmap_over_nothing() -> None:
    """Of an operator whose inputs have not all a batch axis."""
    x, weights, bias = torch.rand(2, 3, 6), torch.rand(0, 3, 4, requires_grad=True), torch.rand(3)
    out = torch.vmap(lambda w: causal_conv1d(x, w, bias, "silu"))(weights)
    assert out.shape == (0, 2, 3, 6)
    assert torch.autograd.grad(out.sum(), weights)[0].shape == (0, 3, 4)


def test_gradients_of_every_sample() -> None:
    """What torch.func.grad would do; it is refused, with the way that the message names."""
    parameters = [p.unflatten(0, (3, 2)) for p in make(batch=6)]
    inputs = leaves(parameters)

    def loss(*values: Any) -> Any:
        return voxelize(*values, SIZE).square().sum()

    found = torch.autograd.grad(torch.vmap(loss)(*inputs).sum(), inputs)
    for i in range(3):
        alone = leaves([p[i] for p in parameters])
        for got, wanted in zip(found, torch.autograd.grad(loss(*alone), alone), strict=True):
            torch.testing.assert_close(got[i], wanted, rtol=1e-9, atol=1e-11)
    sample = [p[0] for p in parameters]
    with pytest.raises(NotImplementedError, match=r"use torch\.autograd\.grad: of the sum of a torch\.vmap"):
        torch.func.grad(loss)(*sample)
    with pytest.raises(NotImplementedError, match=r"use torch\.autograd\.grad: of the sum of a torch\.vmap"):
        torch.vmap(torch.func.grad(loss))(*parameters)


def test_second_order_gradient_is_refused() -> None:
    inputs = leaves(make())
    (first,) = torch.autograd.grad(voxelize(*inputs, SIZE).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second-order gradient: call backward"):
        first.sum().backward()


def test_only_wanted_gradients_arrive() -> None:
    means, scales, quats, densities = make()
    means.requires_grad_()
    voxelize(means, scales, quats, densities, SIZE).sum().backward()
    assert means.grad is not None
    assert scales.grad is None
    assert not voxelize(means.detach(), scales, quats, densities, SIZE).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = leaves(make(dtype=dtype))
    wide = leaves([p.detach().float() for p in inputs])
    volume, expected = voxelize(*inputs, SIZE), voxelize(*wide, SIZE)
    assert volume.dtype == torch.float32
    assert torch.equal(volume, expected)
    volume.square().sum().backward()
    expected.square().sum().backward()
    for got, exact in zip(inputs, wide, strict=True):
        assert got.grad is not None
        assert got.grad.dtype == dtype
        assert torch.equal(got.grad, exact.grad.to(dtype))  # type: ignore[union-attr]


def test_autocast_changes_nothing() -> None:
    inputs = leaves(make(dtype=torch.float32))
    plain = voxelize(*inputs, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        volume = voxelize(*inputs, SIZE)
        assert volume.dtype == torch.float32
        assert torch.equal(volume, plain)
        gradients = torch.autograd.grad(volume.square().sum(), inputs)
    for got, expected in zip(gradients, torch.autograd.grad(plain.square().sum(), inputs), strict=True):
        assert torch.equal(got, expected)


def scattered(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, neither contiguous nor at the start of their storage."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan, dtype=tensor.dtype)
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


@every_support
@every_layout
def test_layout_of_tensors_does_not_matter(layout: str, support: Any) -> None:
    parameters = make()
    patches, *rest = arguments(layout, support)
    expected = FORWARD(*parameters, patches, *rest)
    grad = torch.randn_like(expected)
    wanted = BACKWARD(grad, *parameters, patches, *rest)
    loose = [scattered(p) for p in parameters]
    turned = patches.t().contiguous().t()
    assert torch.equal(FORWARD(*loose, turned, *rest), expected)
    for got, gradient in zip(BACKWARD(scattered(grad), *loose, turned, *rest), wanted, strict=True):
        assert torch.equal(got, gradient)


@every_support
def test_expanded_tensors(support: Any) -> None:
    """Stride 0: gradients of a sum, one Gaussian for all samples, one patch list for all."""
    means, scales, quats, densities = (p[:1] for p in make())
    shared = leaves((means, scales, quats, densities))
    many = [p.expand(3, *p.shape[1:]) for p in shared]
    volume = voxelize(*many, SIZE, support=support)
    alone = leaves((means, scales, quats, densities))
    expected = voxelize(*alone, SIZE, support=support)
    assert torch.equal(volume, expected.expand_as(volume))
    volume.sum().backward()
    (3 * expected.sum()).backward()
    for got, one in zip(shared, alone, strict=True):
        torch.testing.assert_close(got.grad, one.grad, rtol=1e-9, atol=1e-11)
    patches = PATCHES[:1].expand(3, 3)
    rendered = voxelize(*many, SIZE, support=support, patches=patches, patch_size=(3, 2, 3))
    torch.testing.assert_close(rendered, cut(volume, patches, (3, 2, 3)), rtol=1e-10, atol=1e-12)


def test_inputs_are_left_alone() -> None:
    parameters = make()
    before = [p.clone() for p in parameters]
    inputs = leaves(parameters)
    volume = voxelize(*inputs, SIZE)
    grad = torch.ones_like(volume)
    volume.backward(grad)
    assert torch.equal(grad, torch.ones_like(volume))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@every_support
def test_two_runs_give_the_same_bits(support: Any) -> None:
    inputs = leaves(make(count=50, dtype=torch.float32))
    runs = []
    for _ in range(3):
        volume = voxelize(*inputs, (17, 20, 33), support=support)
        runs.append([volume.detach(), *torch.autograd.grad(volume.square().sum(), inputs)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_fake_and_meta_tensors_know_the_shapes() -> None:
    means, scales, quats, densities = (p.to("meta") for p in make(dtype=torch.float32))
    assert voxelize(means, scales, quats, densities, SIZE).shape == (2, 1, *SIZE)
    patches = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    rendered = voxelize(means, scales, quats, densities, SIZE, patches=patches, patch_size=(3, 2, 3))
    assert rendered.shape == (2, 3, 18)


GOOD = dict(zip(("means", "scales", "quats", "densities"), make(dtype=torch.float32), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"means": torch.rand(2, 5, 2)}, ValueError, r"means has shape \(2, 5, 2\): expected \(B, K, 3\)"),
        ({"means": torch.rand(5, 3)}, ValueError, r"means has shape \(5, 3\): expected \(B, K, 3\)"),
        ({"scales": torch.rand(2, 4, 3)}, ValueError, r"scales has shape .* = \(2, 5, 3\), as means is"),
        ({"quats": torch.rand(2, 5, 3)}, ValueError, r"quats has shape .*\(B, K, 4\)"),
        ({"densities": torch.rand(2, 5, 1)}, ValueError, r"densities has shape .*\(B, K\)"),
        ({"scales": torch.rand(2, 5, 3).double()}, TypeError, r"scales is torch.float64 on cpu, means is"),
        ({"densities": torch.ones(2, 5).long()}, TypeError, r"densities is torch.int64"),
        ({"size": (4, 5)}, ValueError, r"size must be one or three positive .*got \(4, 5\)"),
        ({"size": (4, 0, 5)}, ValueError, r"size must be one or three positive .*got \(4, 0, 5\)"),
        ({"size": (2**31, 1, 1)}, ValueError, r"size \(2147483648, 1, 1\) is too large: .* 2\*\*30 voxels along"),
        ({"size": (2**21, 2**21, 2**21)}, ValueError, r"size .* is too large: .* less than 2\*\*63 in all"),
        ({"patches": PATCHES, "patch_size": 2**40}, ValueError, r"patch_size .* is too large"),
        ({"support": "ellipsoid"}, ValueError, r"support must be 'box', a number .*got 'ellipsoid'"),
        ({"support": 0.0}, ValueError, r"support must be .*got 0.0"),
        ({"support": -1}, ValueError, r"support must be .*got -1"),
        ({"support": math.nan}, ValueError, r"support must be .*got nan"),
        ({"support": True}, ValueError, r"support must be .*got True"),
        ({"patch_size": 2}, ValueError, r"patch_size came without patches"),
        ({"patches": PATCHES}, ValueError, r"patches came without patch_size"),
        ({"patches": PATCHES, "patch_size": 4}, ValueError, r"size \(6, 4, 9\) is not a multiple of patch_size"),
        ({"patches": PATCHES[:1], "patch_size": (3, 2, 3)}, ValueError, r"patches is \(1, 3\) .*= \(2, n\)"),
        ({"patches": PATCHES.int(), "patch_size": (3, 2, 3)}, ValueError, r"torch.int32: expected .* torch.int64"),
        ({"patches": PATCHES.to("meta"), "patch_size": (3, 2, 3)}, TypeError, r"patches is on meta, means on cpu"),
        ({"patches": PATCHES + 10, "patch_size": (3, 2, 3)}, ValueError, r"patches must number the 12 patches from 0"),
        ({"patches": PATCHES - 1, "patch_size": (3, 2, 3)}, ValueError, r"patches must number the 12 patches from 0"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_words(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        voxelize(**{**GOOD, "size": SIZE, **change})
