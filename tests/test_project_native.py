"""The compiled CPU kernels of the projector against the float64 reference, where vectors, rows and threads show."""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import Any

import pytest
import torch
from projections import KINDS, NATIVE, REFERENCE, SIZE, Path, circle, leaves, make, peak_error, relative

from medgmae.ops import project
from medgmae.ops.projection import native
from medgmae.ops.projection.inputs import ProjectInputs

every_path = pytest.mark.parametrize("path", NATIVE, ids=lambda path: path.name)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
# One pixel, one row, one column, no multiples of a vector, more rows than a block of them.
SIZES = [(1, 1), (1, 70), (70, 1), (33, 50), (7, 131)]


def at_the_rim(parameters: Any, views: torch.Tensor, size: tuple[int, int], kind: dict[str, Any]) -> torch.Tensor:
    """Pixels (B, V, H, W) so near to the edge of a support that rounding decides on which side they are."""
    k = kind.get("support")
    if k is None:
        return torch.zeros(2, len(views), *size, dtype=torch.bool)
    near = [
        REFERENCE.project([p.double() for p in parameters], views, size, **kind | {"support": k * factor})
        for factor in (1 - 5e-6, 1 + 5e-6)
    ]
    return near[0] != near[1]


@functools.cache
def case(size: tuple[int, int], number: int, scale: float, spread: float = 0.4) -> tuple[Any, ...]:
    """Float32 parameters, views, a cotangent that is 0 at rims, and what the reference makes of them in float64."""
    kind = KINDS[number]
    means, scales, quats, densities = make(count=24, dtype=torch.float32, scale=scale, spread=spread, seed=7)
    parameters = means, scales, quats, densities.abs()
    views = circle(2, size, beam=kind["beam"], pixel=(5.0, 6.0))
    cotangent = torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(1))
    rim = at_the_rim(parameters, views, size, kind)
    cotangent[rim] = 0
    exact = REFERENCE.gradients([p.double() for p in parameters], cotangent.double(), views, size, **kind)
    return parameters, views, cotangent, rim, *exact


@every_path
@pytest.mark.parametrize("number", range(len(KINDS)))
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("scale", "spread"), [(3.0, 0.4), (7.0, 0.5), (15.0, 0.4), (8.0, 2.0)], ids=["small", "middle", "wide", "needles"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_equal_the_reference(
    path: Path, number: int, size: tuple[int, int], scale: float, spread: float, dtype: torch.dtype
) -> None:
    parameters, views, cotangent, rim, expected, wanted = case(size, number, scale, spread)
    image, gradients = path.gradients(
        [p.to(dtype) for p in parameters], cotangent.to(dtype), views, size, **KINDS[number]
    )
    bounds = (2e-6, 1e-5) if dtype == torch.float32 else (1e-12, 1e-11)
    assert peak_error(image.masked_fill(rim, 0), expected.masked_fill(rim, 0)) <= bounds[0]
    for got, gradient in zip(gradients, wanted, strict=True):
        assert relative(got, gradient) <= bounds[1]


@functools.cache
def many_wide_rows() -> tuple[Any, ...]:
    """Hundreds of Gaussians whose rows are several vectors long, and what the reference makes of them in float64."""
    random, size, kind = torch.Generator().manual_seed(0), (256, 256), {"support": 7.0}
    means = (torch.rand(1, 300, 3, generator=random) * 2 - 1) * 80
    scales = 6.0 * (0.3 * torch.randn(1, 300, 3, generator=random)).exp()
    quats, densities = torch.randn(1, 300, 4, generator=random), 0.02 * torch.rand(1, 300, generator=random)
    parameters = means, scales, quats, densities
    views = torch.tensor([[[1000.0, 0, 0], [-500, -178.5, 178.5], [0, 1.4, 0], [0, 0, -1.4]]], dtype=torch.float64)
    cotangent = torch.rand(1, 1, *size, generator=random)
    wanted = REFERENCE.gradients([p.double() for p in parameters], cotangent.double(), views, size, **kind)[1]
    return parameters, cotangent, views, size, kind, wanted


@every_path
def test_long_sums_keep_their_digits(path: Path) -> None:
    """Of the quaternions most: what their gradient is made of almost cancels."""
    parameters, cotangent, views, size, kind, wanted = many_wide_rows()
    for got, gradient in zip(path.gradients(parameters, cotangent, views, size, **kind)[1], wanted, strict=True):
        assert relative(got, gradient) <= 1e-5


@every_path
@pytest.mark.parametrize("support", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_source_inside_a_support(path: Path, support: Any, dtype: torch.dtype) -> None:
    """Also where the plane through the source cuts a support, whose shadow is then a parabola or a hyperbola."""
    views, size = circle(2, tilt=0.3), SIZE
    source, axis = views[0, 0], views[0, 1] - views[0, 0]
    means = torch.stack([source + 0.05 * axis, source + 0.03 * axis + 30 * views[0, 2] / 14, source + 0.5 * axis])
    scales = torch.tensor([[90.0, 60.0, 70.0], [25.0, 8.0, 14.0], [9.0, 20.0, 400.0]])
    parameters = [means[None], scales[None], torch.tensor([[[0.5, 1, 0.3, 0.1]] * 3]), torch.ones(1, 3)]
    exact = [p.double() for p in parameters]
    cotangent = torch.randn(1, 1, *size, dtype=torch.float64)
    expected, wanted = REFERENCE.gradients(exact, cotangent, views[:1], size, support=support)
    image, gradients = path.gradients([p.to(dtype) for p in exact], cotangent, views[:1], size, support=support)
    assert peak_error(image, expected) <= (2e-6 if dtype == torch.float32 else 1e-12)
    for got, gradient in zip(gradients, wanted, strict=True):
        assert relative(got, gradient) <= (1e-5 if dtype == torch.float32 else 1e-11)


@every_path
@every_kind
@pytest.mark.parametrize("scale", [8.0, 25.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_the_threads(path: Path, kind: dict[str, Any], scale: float, dtype: torch.dtype) -> None:
    size, parameters = (67, 90), make(batch=3, count=101, dtype=dtype, scale=scale)
    one, three = (circle(views, size, beam=kind["beam"]) for views in (1, 3))
    # One view of one set is divided into most bands; centres at its first rows, whose numbers have more digits.
    high = one + 30 * one[:, 3:] * torch.tensor([[kind["beam"] == "cone"], [True], [False], [False]])
    for sets, views in ((3, one), (3, three), (1, high)):
        cotangent, results = torch.randn(sets, len(views), *size, dtype=dtype), []
        for threads in (1, 2, 3, 1):
            same = Path(path.name, partial(path.forward, threads=threads), partial(path.backward, threads=threads))
            image, gradients = same.gradients([p[:sets] for p in parameters], cotangent, views, size, **kind)
            results.append([image, *gradients])
        for again in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@every_path
@every_kind
def test_sets_and_views_do_not_change_each_others_bits(path: Path, kind: dict[str, Any]) -> None:
    parameters, views = make(batch=3, count=9, dtype=torch.float32), circle(4, beam=kind["beam"])
    image = path.project(parameters, views, **kind)
    for i in range(3):
        assert torch.equal(path.project([p[i : i + 1] for p in parameters], views[1:3], **kind)[0], image[i, 1:3])


@every_path
@every_kind
def test_what_lies_outside_of_a_support_does_not_reach_its_gradient(path: Path, kind: dict[str, Any]) -> None:
    """Not even NaN does, although vectors read beyond the rows of a Gaussian."""
    kind = {"support": 2.0, **kind}
    size, parameters = (33, 70), make(1, 1, torch.float32, scale=12.0, field=100.0)
    views = circle(1, size, beam=kind["beam"], pixel=(5.0, 5.0))
    inside = path.project((*parameters[:3], torch.ones(1, 1)), views, size, **kind) != 0
    assert inside.any()
    assert not inside.all()
    cotangent = torch.randn(1, 1, *size)
    expected = path.gradients(parameters, cotangent, views, size, **kind)[1]
    spoiled = cotangent.masked_fill(~inside, math.nan)
    for got, wanted in zip(path.gradients(parameters, spoiled, views, size, **kind)[1], expected, strict=True):
        assert torch.equal(got, wanted)


@every_path
@every_kind
def test_nothing_is_written_outside(path: Path, kind: dict[str, Any]) -> None:
    """Guards on both sides of every buffer that a kernel reads or writes."""
    parameters = [p.contiguous() for p in make(dtype=torch.float32, scale=30.0, field=200.0)]
    real, guarded = torch.Tensor.new_empty, []

    def new_empty(tensor: torch.Tensor, *shape: Any, **kwargs: Any) -> torch.Tensor:
        wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = math.prod(wanted)
        whole = real(tensor, count + 128, **kwargs).fill_(12345.0)
        guarded.append((whole, count))
        return whole[64 : 64 + count].view(*wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        path.gradients(parameters, torch.randn(2, 3, *SIZE), circle(3, beam=kind["beam"]), **kind)
    assert len(guarded) >= 5
    for whole, count in guarded:
        assert (whole[:64] == 12345.0).all()
        assert (whole[64 + count :] == 12345.0).all()
        assert not (whole[64 : 64 + count] == 12345.0).any()


@every_path
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_parameters(path: Path, kind: dict[str, Any], dtype: torch.dtype) -> None:
    """From far smaller than a pixel to far larger than the distance to the source, on its plane, far away."""
    views = circle(2, beam=kind["beam"], tilt=0.0)
    for scale in (1e-9, 1e-3, 1.0, 1e5):
        means, scales, quats, densities = make(2, 12, scale=scale, spread=2.0)
        means[:, 0] = 1e7
        means[:, 1] = views[0, 0]  # the source itself
        means[:, 2] = views[0, 0] + 50 * views[0, 3]  # beside it
        means[:, 3] = views[0, 0] + 1e-7 * (views[0, 1] - views[0, 0])
        means[:, 4] = views[0, 1] + 3 * views[0, 2] + 2 * views[0, 3]  # on a pixel
        scales[:, 5] = torch.tensor([scale, 1.0, 1e-3])
        parameters, cotangent = [p.to(dtype) for p in (means, scales, quats, densities)], torch.randn(2, 2, *SIZE)
        exact = [p.double() for p in parameters]
        expected, wanted = REFERENCE.gradients(exact, cotangent.double(), views, **kind)
        image, gradients = path.gradients(parameters, cotangent.to(dtype), views, **kind)
        assert peak_error(image, expected) <= (2e-6 if dtype == torch.float32 else 1e-9)
        for got, gradient in zip(gradients, wanted, strict=True):
            # Of a Gaussian of 1e-9 mm the pixel's own rounding is a part of its width.
            difference = float((got.double() - gradient).norm())
            assert difference <= (1e-4 if dtype == torch.float32 else 1e-6) * float(gradient.norm()) + 1e-5


def test_the_public_function_uses_the_kernels() -> None:
    parameters, views = make(dtype=torch.float32), circle(2)
    image = project(*parameters, views, SIZE, support=3.0)
    direct = native.forward(ProjectInputs(*parameters, views.expand(2, 2, 4, 3), list(SIZE), 3.0, False, False))
    assert torch.equal(image, direct)
    assert not leaves(parameters)[0].grad
