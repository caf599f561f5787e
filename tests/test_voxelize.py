"""What the renderer returns, on every path: against a slow account of the definition, and by its properties."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from gaussians import (
    PATHS,
    REFERENCE,
    SUPPORTS,
    Path,
    box,
    cut,
    leaves,
    make,
    peak_error,
    round_to_float32,
    slow_render,
)
from hypothesis import given, settings
from hypothesis import strategies as st

every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
every_support = pytest.mark.parametrize("support", SUPPORTS, ids=str)


@every_path
@every_support
@pytest.mark.parametrize("size", [(5, 7, 6), (4, 1, 9), (1, 1, 1), (2, 3, 18)], ids=str)
def test_values_are_the_definition(path: Path, support: Any, size: tuple[int, int, int]) -> None:
    parameters = make(scale=0.3)
    expected = slow_render(parameters, size, support)
    torch.testing.assert_close(path.render(parameters, size, support), expected, rtol=1e-10, atol=1e-12)
    single = path.render([p.float() for p in parameters], size, support)
    assert single.dtype == torch.float32
    assert peak_error(single, slow_render([p.float() for p in parameters], size, support)) < 2e-6


@every_path
@every_support
def test_gradients_are_those_of_the_values(path: Path, support: Any) -> None:
    parameters = leaves(make(count=3, scale=0.3, seed=1))
    patches = torch.tensor([[3, 0], [1, 1]])

    def dense(*inputs: torch.Tensor) -> torch.Tensor:
        return path.render(inputs, (3, 1, 5), support)

    def sparse(*inputs: torch.Tensor) -> torch.Tensor:
        return path.render(inputs, (4, 2, 6), support, patches, (2, 1, 3))

    assert torch.autograd.gradcheck(dense, parameters)
    assert torch.autograd.gradcheck(sparse, parameters)


def one_per_sample(centers: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
    identity = torch.tensor([1.0, 0, 0, 0]).expand(len(centers), 1, 4)
    return centers[:, None], scales[:, None], identity, torch.ones(len(centers), 1)


def assert_boxes(path: Path, centers: torch.Tensor, scales: torch.Tensor, size: tuple[int, int, int]) -> None:
    volume = path.render(one_per_sample(centers, scales), size, "box")[:, 0]
    expected = torch.zeros(volume.shape, dtype=torch.bool)
    for filled, center, scale in zip(expected, centers.tolist(), scales.tolist(), strict=True):
        z, y, x = (box(c, s, n) for c, s, n in zip(center, scale, size, strict=True))
        filled[z.start : z.stop, y.start : y.stop, x.start : x.stop] = True
    assert torch.equal(volume != 0, expected)
    assert expected.any()
    assert not expected.all()


@every_path
@pytest.mark.parametrize("size", [(8, 16, 32), (9, 23, 7), (1, 2, 33)], ids=str)
def test_box_is_the_published_one_voxel_by_voxel(path: Path, size: tuple[int, int, int]) -> None:
    n = torch.tensor(size)
    centers = torch.rand(300, 3) * 1.4 - 0.2
    assert_boxes(path, centers, (0.3 + 1.2 * torch.rand(300, 3)) / n, size)
    # Multiples of powers of two put the ends exactly on voxels, where rounding and truncation decide.
    centers, scales = torch.randint(-12, 76, (300, 3)) / 64, torch.randint(3, 12, (300, 3)) / 8 / n
    assert_boxes(path, centers, scales, size)
    # One float32 step beside them.
    up, down = centers.nextafter(torch.full((), 2.0)), centers.nextafter(torch.full((), -2.0))
    assert_boxes(path, torch.where(torch.rand(300, 3) < 0.5, up, down), scales, size)


@every_path
def test_box_below_zero_still_paints_the_first_plane(path: Path) -> None:
    """The upper end truncates toward zero, so an end between -1 and 0 counts as 0."""
    centers = torch.tensor([[-0.26, 0.5, 0.5], [-0.4, 0.5, 0.5]])
    volume = path.render(one_per_sample(centers, torch.full((2, 3), 0.1)), (8, 8, 8), "box")
    assert volume[0, 0, 0].any()
    assert not volume[0, 0, 1:].any()
    assert not volume[1].any()


@every_path
@every_support
@pytest.mark.parametrize("patch", [(2, 4, 3), (4, 4, 4), (1, 1, 1), (8, 4, 12)], ids=str)
def test_patches_are_those_of_the_volume(path: Path, support: Any, patch: tuple[int, int, int]) -> None:
    size, parameters = (8, 4, 12), make(scale=0.2)
    count = math.prod(s // p for s, p in zip(size, patch, strict=True))
    patches = torch.stack([torch.randperm(count)[: max(1, count // 2)] for _ in range(2)])
    volume = path.render(parameters, size, support)
    rendered = path.render(parameters, size, support, patches, patch)
    torch.testing.assert_close(rendered, cut(volume, patches, patch), rtol=1e-11, atol=1e-13)

    cotangent, spread = torch.randn_like(rendered), leaves([volume])[0]
    (dense_cotangent,) = torch.autograd.grad(cut(spread, patches, patch), spread, cotangent)
    sparse = path.gradients(parameters, cotangent, size, support, patches, patch)[1]
    dense = path.gradients(parameters, dense_cotangent, size, support)[1]
    for got, expected in zip(sparse, dense, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@every_path
@every_support
def test_sum_is_linear_in_the_densities_and_free_of_order(path: Path, support: Any) -> None:
    means, scales, quats, densities = make(count=40)
    size, other = (9, 8, 17), torch.randn_like(densities)

    def at(values: torch.Tensor) -> torch.Tensor:
        return path.render((means, scales, quats, values), size, support)

    torch.testing.assert_close(at(2 * densities - 3 * other), 2 * at(densities) - 3 * at(other), rtol=1e-10, atol=1e-11)
    order = torch.randperm(40)
    shuffled = path.render((means[:, order], scales[:, order], quats[:, order], densities[:, order]), size, support)
    torch.testing.assert_close(shuffled, at(densities), rtol=1e-10, atol=1e-11)
    halves = [path.render([p[:, part] for p in (means, scales, quats, densities)], size, support)
              for part in (slice(0, 13), slice(13, 40))]  # fmt: skip
    torch.testing.assert_close(halves[0] + halves[1], at(densities), rtol=1e-10, atol=1e-11)


@every_path
def test_backward_is_the_adjoint_of_the_forward(path: Path) -> None:
    """<cotangent, J step> from finite differences equals <backward(cotangent), step>."""
    parameters, size = make(count=30, scale=0.2), (12, 9, 17)
    steps = [torch.randn_like(p) for p in parameters]
    volume = path.render(parameters, size, None)
    cotangent, h = torch.randn_like(volume), 1e-6
    ahead, behind = (
        path.render([p + sign * h * s for p, s in zip(parameters, steps, strict=True)], size, None) for sign in (1, -1)
    )
    forward = float((cotangent * (ahead - behind)).sum() / (2 * h))
    gradients = path.gradients(parameters, cotangent, size, None)[1]
    backward = sum(float((g * s).sum()) for g, s in zip(gradients, steps, strict=True))
    assert forward == pytest.approx(backward, rel=1e-6)


@every_path
@every_support
def test_every_sample_of_a_batch_is_rendered_alone(path: Path, support: Any) -> None:
    parameters, size = make(batch=3, count=20), (7, 18, 9)
    cotangent = torch.randn(3, 1, *size, dtype=torch.float64)
    volume, gradients = path.gradients(parameters, cotangent, size, support)
    for b in range(3):
        alone = path.gradients([p[b : b + 1] for p in parameters], cotangent[b : b + 1], size, support)
        assert torch.equal(volume[b], alone[0][0])
        for whole, part in zip(gradients, alone[1], strict=True):
            assert torch.equal(whole[b], part[0])


@every_path
@every_support
def test_nothing_to_render(path: Path, support: Any) -> None:
    for batch, count in [(2, 0), (0, 3), (0, 0)]:
        parameters = make(batch, count)
        volume, gradients = path.gradients(
            parameters, torch.ones(batch, 1, 4, 3, 5, dtype=torch.float64), (4, 3, 5), support
        )
        assert volume.shape == (batch, 1, 4, 3, 5)
        assert not volume.any()
        assert [g.shape for g in gradients] == [p.shape for p in parameters]
    none = torch.zeros(2, 0, dtype=torch.int64)
    rendered, gradients = path.gradients(
        make(), torch.ones(2, 0, 8, dtype=torch.float64), (4, 4, 4), support, none, (2, 2, 2)
    )
    assert rendered.shape == (2, 0, 8)
    assert not any(g.any() for g in gradients)


@every_path
@every_support
def test_zero_cotangent_gives_zero_gradients(path: Path, support: Any) -> None:
    _, gradients = path.gradients(make(), torch.zeros(2, 1, 6, 7, 8, dtype=torch.float64), (6, 7, 8), support)
    assert not any(g.any() for g in gradients)


@every_path
@every_support
def test_quaternions_are_directions(path: Path, support: Any) -> None:
    means, scales, quats, densities = make(scale=0.2)
    size = (6, 7, 8)
    volume = path.render((means, scales, quats, densities), size, support)
    for factor in (-1.0, 7.5, 1e-3):
        again = path.render((means, scales, factor * quats, densities), size, support)
        torch.testing.assert_close(again, volume, rtol=1e-10, atol=1e-12)
    zero, identity = torch.zeros_like(quats), torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand_as(quats)
    torch.testing.assert_close(
        path.render((means, scales, zero, densities), size, support),
        path.render((means, scales, identity, densities), size, support),
    )
    cotangent = torch.ones(2, 1, *size, dtype=torch.float64)
    gradients = path.gradients((means, scales, zero, densities), cotangent, size, support)[1]
    assert all(g.isfinite().all() for g in gradients)


BAD = {
    "means": [math.nan, math.inf, -math.inf],
    "scales": [math.nan, math.inf, 0.0],
    "quats": [math.nan, math.inf],
    "densities": [math.nan, math.inf],
}


@every_path
@every_support
@pytest.mark.parametrize(("index", "value"), [(i, v) for i, vs in enumerate(BAD.values()) for v in vs])
def test_a_bad_gaussian_spoils_its_sample_and_its_own_gradients(
    path: Path, support: Any, index: int, value: float
) -> None:
    parameters, size = make(count=6, dtype=torch.float32), (5, 17, 6)
    good = path.gradients(parameters, torch.ones(2, 1, *size), size, support)
    parameters[index][1, 2].flatten()[:1].fill_(value)
    volume, gradients = path.gradients(parameters, torch.ones(2, 1, *size), size, support)
    assert torch.equal(volume[0], good[0][0])
    assert volume[1].isnan().all()
    for got, expected in zip(gradients, good[1], strict=True):
        assert got[1, 2].isnan().all()
        rest = torch.arange(12).reshape(2, 6) != 8
        torch.testing.assert_close(got[rest], expected[rest], rtol=1e-5, atol=1e-6)


@every_path
@every_support
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_least_scale(path: Path, support: Any, dtype: torch.dtype, axis: int) -> None:
    """A Gaussian is bad from where 1 / s² is not finite in its dtype, however it is turned."""
    for factor in (1 + 1e-5, 1 - 1e-5, 1e-3):
        parameters = make(count=4, dtype=dtype)
        parameters[0][0, 1] = 0.5  # on a voxel
        parameters[1][0, 1, axis] = factor * torch.finfo(dtype).max ** -0.5
        volume, gradients = path.gradients(parameters, torch.ones(2, 1, 5, 9, 7, dtype=dtype), (5, 9, 7), support)
        assert volume[1].isfinite().all()
        assert volume[0].isfinite().all() if factor > 1 else volume[0].isnan().all()
        for gradient in gradients:
            flat = gradient.flatten(0, 1).reshape(8, -1)
            assert flat[torch.arange(8) != 1].isfinite().all()
            assert flat[1].isfinite().all() if factor > 1 else flat[1].isnan().all()
        if factor > 1:  # only its density is felt: what is left of it a voxel away is not multiplied by 1 / s³
            for gradient, expected in zip(gradients, (0.0, 0.0, 0.0, 1.0), strict=True):
                torch.testing.assert_close(gradient[0, 1], torch.full_like(gradient[0, 1], expected))


@every_path
@every_support
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 0.004, 30.0, 1e6])
def test_tiny_and_huge_scales(path: Path, support: Any, scale: float) -> None:
    """Smaller than a voxel: only what sits on one is seen. Huge: a constant."""
    means, scales, quats, densities = make(count=4, scale=scale, seed=3)
    means[:, 0] = torch.tensor([0.5, 0.25, 0.0])  # on a voxel
    parameters, size = (means, scales, quats, densities), (9, 5, 3)
    expected = slow_render(parameters, size, support)
    torch.testing.assert_close(path.render(parameters, size, support), expected, rtol=1e-9, atol=1e-12)
    cotangent = torch.ones_like(expected)
    for got, reference in zip(
        path.gradients(parameters, cotangent, size, support)[1],
        REFERENCE.gradients(parameters, cotangent, size, support)[1],
        strict=True,
    ):
        assert got.isfinite().all()
        torch.testing.assert_close(got, reference, rtol=1e-8, atol=1e-9 * float(reference.abs().max()) + 1e-300)


@every_path
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_finite_parameters(path: Path, data: st.DataObject) -> None:
    """Nothing is NaN. In float64 the reference is met; in float32 within what its exponents can hold."""
    count = data.draw(st.integers(1, 3))
    size = tuple(data.draw(st.lists(st.integers(1, 20), min_size=3, max_size=3)))
    log_scales = data.draw(st.lists(st.floats(-9, 3), min_size=3 * count, max_size=3 * count))
    flat = data.draw(st.lists(st.floats(-3, 3), min_size=8 * count, max_size=8 * count))
    support = data.draw(st.sampled_from(["box", None]))
    rest = torch.tensor(flat, dtype=torch.float32).reshape(1, count, 8)
    scales = torch.tensor(log_scales, dtype=torch.float32).exp().reshape(1, count, 3)
    single = rest[..., :3], scales, rest[..., 3:7], rest[..., 7]
    parameters, cotangent = [p.double() for p in single], torch.linspace(-1, 1, math.prod(size)).reshape(1, 1, *size)
    volume, gradients = path.gradients(single, cotangent, size, support)
    assert all(value.isfinite().all() for value in (volume, *gradients))
    expected, wanted = REFERENCE.gradients(parameters, cotangent.double(), size, support)
    # An exponent is a sum of terms as large as this, each rounded.
    largest = float((rest[..., :3].abs() + 1).square().sum(-1).max() / scales.min() ** 2)
    bound = float(parameters[3].abs().sum())
    assert float((volume - expected).abs().max()) <= bound * min(1.0, 1e-6 * (1 + largest)) + 1e-30
    volume, gradients = path.gradients(parameters, cotangent.double(), size, support)
    assert float((volume - expected).abs().max()) <= bound * (1e-12 + 2e-15 * largest) + 1e-30
    for got, reference in zip(gradients, wanted, strict=True):
        assert float((got - reference).norm()) <= 1e-6 * float(reference.norm()) + 1e-9


def test_the_account_itself_rounds_once() -> None:
    """Fractions to float32, against numpy where one rounding is all there is."""
    for value in [0.1, -1 / 3, 2.0**-30 * 1.23456789, 47.9999999, 1.0, 16777217.0, 5e-46, 1e-44]:
        assert float(round_to_float32(Fraction(value))) == float(np.float32(value))
    midpoint = Fraction(48) - Fraction(1, 2**19)  # between two float32 numbers: ties go to the even one
    assert round_to_float32(midpoint) == 48
    assert round_to_float32(midpoint - Fraction(1, 2**80)) == 48 - Fraction(1, 2**18)
