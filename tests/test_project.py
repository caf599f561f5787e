"""What a projection of Gaussians should be, whichever path computes it: oracles and invariances."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from gaussians import covariance
from projections import KINDS, SIZE, circle, leaves, make, peak_error, relative
from torch import Tensor

from medgmae.ops import project, voxelize
from medgmae.ops.projection.reference import line_integrals

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))


def views_of(kind: dict[str, Any], views: int = 3, **kwargs: Any) -> Tensor:
    return circle(views, beam=kind["beam"], **kwargs)


def rays(view: Tensor, size: tuple[int, int], beam: str) -> tuple[Tensor, Tensor]:
    """A point of each ray and its direction, (H, W, 3)."""
    source, corner, column, row = view
    r, c = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    point = corner + c[..., None] * column + r[..., None] * row
    return point, source.expand_as(point) if beam == "parallel" else point - source


def by_quadrature(parameters: Any, views: Tensor, size: tuple[int, int], beam: str, support: Any) -> Tensor:
    """(V, H, W): the trapezoid rule along each ray, over ±9 standard deviations around the densest point.

    It shares no formula with the library: turned axes are quaternion products, the covariance is inverted numerically.
    """
    means, scales, quats, densities = (p.detach().double().numpy() for p in parameters)
    out = np.zeros((len(views), *size))
    for v, i in itertools.product(range(len(views)), range(len(means))):
        inverse = np.linalg.inv(covariance(scales[i], quats[i]))
        points, directions = (t.numpy() for t in rays(views[v], size, beam))
        directions = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
        offset = points - means[i]
        along = np.einsum("hwi,ij,hwj->hw", directions, inverse, directions)
        densest = -np.einsum("hwi,ij,hwj->hw", directions, inverse, offset) / along
        steps = np.linspace(-9, 9, 201) / np.sqrt(along)[..., None]
        x = offset[..., None, :] + (densest[..., None] + steps)[..., None] * directions[..., None, :]
        square = np.einsum("hwti,ij,hwtj->hwt", x, inverse, x)
        values = np.exp(-0.5 * square).sum(-1) * (steps[..., 1] - steps[..., 0])
        out[v] += densities[i] * values * (square[..., 100] <= (support or math.inf) ** 2)
    return torch.from_numpy(out)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "affine" not in kind], ids=str)
def test_quadrature(kind: dict[str, Any]) -> None:
    parameters = [p[0] for p in make(1, 4)]
    expected = by_quadrature(parameters, views_of(kind), SIZE, kind["beam"], kind.get("support"))
    assert peak_error(project(*parameters, views_of(kind), SIZE, **kind), expected) <= 1e-12


@every_kind
def test_gradcheck(kind: dict[str, Any]) -> None:
    inputs = leaves(make(1, 2, seed=2))
    views = views_of(kind, 2, size=(4, 5), pixel=(40.0, 45.0))
    assert torch.autograd.gradcheck(lambda *p: project(*p, views, (4, 5), **kind), inputs, atol=1e-7)


def test_gradcheck_of_single_rays() -> None:
    inputs = leaves([p[0] for p in make(1, 3)])
    origins, directions = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *p: line_integrals(*p, origins, directions), inputs)


def test_single_rays_are_those_of_an_image() -> None:
    parameters, view = [p[0] for p in make(1, 5)], circle(1)
    points, directions = rays(view[0], SIZE, "cone")
    one_by_one = line_integrals(*parameters, points.flatten(0, 1), directions.flatten(0, 1))
    image = project(*parameters, view, SIZE)
    torch.testing.assert_close(one_by_one.sum(0).reshape(1, *SIZE), image, rtol=1e-10, atol=1e-13)


def turned(quat: Tensor, points: Tensor) -> Tensor:
    """Points turned by a unit quaternion (w, x, y, z)."""
    w, v = quat[0], quat[1:].expand_as(points)
    t = 2 * torch.linalg.cross(v, points, dim=-1)
    return points + w * t + torch.linalg.cross(v, t, dim=-1)


def product(p: Tensor, q: Tensor) -> Tensor:
    """p q of one quaternion and many."""
    w = p[0] * q[..., :1] - (p[1:] * q[..., 1:]).sum(-1, keepdim=True)
    return torch.cat(
        [w, p[0] * q[..., 1:] + q[..., :1] * p[1:] + torch.linalg.cross(p[1:].expand_as(q[..., 1:]), q[..., 1:])], -1
    )


@every_kind
def test_the_world_may_be_turned_and_moved(kind: dict[str, Any]) -> None:
    means, scales, quats, densities = make()
    views = views_of(kind)
    turn = torch.nn.functional.normalize(torch.tensor([0.3, -0.5, 0.7, 0.2], dtype=torch.float64), dim=0)
    shift = torch.tensor([30.0, -200.0, 11.0], dtype=torch.float64)
    moved = torch.stack([turned(turn, row) for row in views.unbind(1)], 1)
    moved[:, 1] += shift
    if kind["beam"] == "cone":
        moved[:, 0] += shift
    image = project(means, scales, quats, densities, views, SIZE, **kind)
    again = project(turned(turn, means) + shift, scales, product(turn, quats), densities, moved, SIZE, **kind)
    torch.testing.assert_close(image, again, rtol=1e-9, atol=1e-12)


@every_kind
def test_views_are_independent_and_values_linear_in_the_densities(kind: dict[str, Any]) -> None:
    means, scales, quats, densities = make()
    views = views_of(kind)
    image = project(means, scales, quats, densities, views, SIZE, **kind)
    turned_round = project(means, scales, quats, densities, views.flip(0), SIZE, **kind)
    assert torch.equal(image, turned_round.flip(1))
    parts = [
        project(*(p[:, i : i + 1] for p in (means, scales, quats, densities)), views, SIZE, **kind) for i in range(6)
    ]
    torch.testing.assert_close(sum(parts), image, rtol=1e-10, atol=1e-13)
    scaled = project(means, scales, quats, -3 * densities, views, SIZE, **kind)
    torch.testing.assert_close(scaled, -3 * image, rtol=1e-10, atol=1e-13)


@every_kind
def test_length_does_not_matter_to_direction_quaternion_and_unit(kind: dict[str, Any]) -> None:
    """Doubling all lengths doubles the integrals; a fifth of the density makes up for five times the size."""
    means, scales, quats, densities = make()
    views = views_of(kind)
    image = project(means, scales, quats, densities, views, SIZE, **kind)
    longer = views.clone()
    if kind["beam"] == "parallel":
        longer[:, 0] *= 7
    same = project(5 * means, 5 * scales, 3 * quats, densities / 5, 5 * longer, SIZE, **kind)
    torch.testing.assert_close(same, image, rtol=1e-10, atol=1e-13)


def test_mass_is_kept_by_a_parallel_beam() -> None:
    """Sum over pixels times a pixel's area is the integral over space, a (2π)^1.5 s1 s2 s3."""
    means, scales, quats, densities = (p[0] for p in make(1, 3, scale=8.0, spread=0.2, field=20.0))
    size, pixel = (60, 70), (4.0, 5.0)
    views = circle(2, size, beam="parallel", pixel=pixel, tilt=0.0)
    image = project(means, scales, quats, densities, views, size, beam="parallel")
    mass = (densities * (2 * math.pi) ** 1.5 * scales.prod(-1)).sum()
    torch.testing.assert_close(image.sum((1, 2)) * pixel[0] * pixel[1], mass.expand(2), rtol=1e-6, atol=0)


def test_a_far_source_makes_a_parallel_beam() -> None:
    parameters = make()
    beam = circle(3, beam="parallel")
    cone = beam.clone()
    cone[:, 0] = beam[:, 1] - 1e8 * beam[:, 0]
    expected = project(*parameters, beam, SIZE, beam="parallel")
    # The pixels' rays are parallel to the one through pixel (0, 0) to one part in a million.
    assert peak_error(project(*parameters, cone, SIZE), expected) <= 1e-4
    cone[:, 0] = beam[:, 1] - 1e10 * beam[:, 0]
    assert peak_error(project(*parameters, cone, SIZE), expected) <= 1e-6


def test_a_fan_is_one_row_of_a_cone() -> None:
    parameters, views = make(), circle(3)
    whole = project(*parameters, views, SIZE)
    row = views.clone()
    row[:, 1] += 5 * views[:, 3]
    fan = project(*parameters, row, (1, SIZE[1]))
    torch.testing.assert_close(fan, whole[:, :, 5:6], rtol=1e-9, atol=1e-13)
    pixel = row.clone()
    pixel[:, 1] += 7 * views[:, 2]
    torch.testing.assert_close(project(*parameters, pixel, 1), whole[:, :, 5:6, 7:8], rtol=1e-9, atol=1e-13)


def test_affine_is_right_at_the_centre_and_wrong_beside_it() -> None:
    """The ray through the centre gives the exact value, a small Gaussian is nearly right, a large one is not."""
    views = circle(1, source=180.0, detector=320.0)
    mean = (0.55 * views[0, 1] + 0.45 * views[0, 0] + 0.55 * (4 * views[0, 2] + 5 * views[0, 3]))[None]
    quat, density = torch.tensor([[1.0, 0.4, -0.3, 0.2]]).double(), torch.ones(1).double()
    for scale, least, most in [(1.0, 0, 0.02), (30.0, 0.05, 1.0)]:
        scales = scale * torch.tensor([[1.0, 2.0, 0.5]]).double()
        exact = project(mean, scales, quat, density, views, SIZE)
        affine = project(mean, scales, quat, density, views, SIZE, affine=True)
        torch.testing.assert_close(affine[0, 5, 4], exact[0, 5, 4], rtol=1e-9, atol=0)
        assert least <= peak_error(affine, exact) <= most


def test_affine_changes_nothing_of_a_parallel_beam() -> None:
    parameters, views = make(), circle(2, beam="parallel")
    image = project(*parameters, views, SIZE, beam="parallel")
    assert torch.equal(project(*parameters, views, SIZE, beam="parallel", affine=True), image)


def test_what_is_behind_the_source_is_left_out() -> None:
    means, scales, quats, densities = make(1, 4)
    views = circle(1)
    behind = means.clone()
    behind[:, 1] = 2 * views[0, 0] - 0.1 * means[:, 1]
    inputs = leaves((behind, scales, quats, densities))
    image = project(*inputs, views, SIZE)
    rest = [p[:, [0, 2, 3]] for p in (behind, scales, quats, densities)]
    torch.testing.assert_close(image, project(*rest, views, SIZE), rtol=1e-12, atol=1e-15)
    for gradient in torch.autograd.grad(image.sum(), inputs):
        assert (gradient[:, 1] == 0).all()
        assert (gradient[:, 0] != 0).any()


@pytest.mark.parametrize("support", [None, 3.0])
def test_a_source_inside_a_gaussian(support: Any) -> None:
    """All its rays go through the Gaussian, so all pixels count, whatever the support."""
    views = circle(2)
    source = views[0, 0]
    mean = (source + 0.02 * (views[0, 1] - source))[None]
    scales, quat = torch.tensor([[90.0, 60.0, 70.0]]).double(), torch.tensor([[0.5, 1.0, 0.3, 0.1]]).double()
    image = project(mean, scales, quat, torch.ones(1).double(), views[:1], SIZE, support=support)
    assert (image > 0).all()
    expected = by_quadrature((mean, scales, quat, torch.ones(1)), views[:1], SIZE, "cone", None)
    assert peak_error(image, expected) <= 1e-12


def test_projection_of_a_rendered_volume() -> None:
    """`voxelize` along the rays of a view, by the trapezoid rule, against `project` of the same Gaussians."""
    side, extent = 97, 120.0  # voxels an axis, and millimetres
    means, scales, quats, densities = make(1, 3, scale=5.0, spread=0.2, field=10.0)
    view = torch.tensor([[1.0, 0, 0], [0, -20.0, -15.0], [0, 5.0, 0], [0, 0, 7.5]]).double()
    unit = (means / extent + 0.5, scales / extent, quats, densities)  # axes x, y, z in this order
    volume = voxelize(*unit, side, support=None)[0, 0]
    along = (volume * extent / (side - 1)).sum(0)
    at = [
        (view[1, k] + n * torch.arange(4).double() + extent / 2) / extent * (side - 1) for k, n in ((1, 5.0), (2, 7.5))
    ]
    image = project(means, scales, quats, densities, view[None], (4, 4), beam="parallel")[0, 0]
    picked = along[at[0].round().long()][:, at[1].round().long()].T
    assert all(float((a - a.round()).abs().max()) < 1e-9 for a in at)
    assert peak_error(picked, image) <= 1e-10


@every_kind
def test_sets_are_independent(kind: dict[str, Any]) -> None:
    parameters, views = make(3, 5), views_of(kind)
    image = project(*parameters, views, SIZE, **kind)
    for i in range(3):
        alone = project(*(p[i] for p in parameters), views, SIZE, **kind)
        torch.testing.assert_close(alone, image[i], rtol=1e-10, atol=1e-15)


@every_kind
def test_nothing_to_project(kind: dict[str, Any]) -> None:
    for batch, count, views in [(2, 0, 2), (0, 3, 2), (2, 3, 0)]:
        inputs = leaves(make(batch, count))
        image = project(*inputs, views_of(kind, views), SIZE, **kind)
        assert image.shape == (batch, views, *SIZE)
        assert not image.any()
        for gradient, parameter in zip(torch.autograd.grad(image.sum(), inputs), inputs, strict=True):
            assert gradient.shape == parameter.shape
            assert not gradient.any()


@every_kind
@pytest.mark.parametrize(("index", "value"), [(0, math.nan), (1, 0.0), (1, math.inf), (2, math.nan), (3, math.inf)])
def test_bad_gaussians(kind: dict[str, Any], index: int, value: float) -> None:
    parameters, views = make(dtype=torch.float32), views_of(kind)
    good = leaves(parameters)
    expected = project(*good, views, SIZE, **kind)
    wanted = torch.autograd.grad(expected.sum(), good)
    parameters[index][1, 2].flatten()[:1].fill_(value)
    inputs = leaves(parameters)
    image = project(*inputs, views, SIZE, **kind)
    assert torch.equal(image[0], expected[0])
    assert image[1].isnan().all()
    rest = torch.arange(12).reshape(2, 6) != 8
    for got, gradient in zip(torch.autograd.grad(image, inputs, torch.ones_like(image)), wanted, strict=True):
        assert got[1, 2].isnan().all()
        assert relative(got[rest], gradient[rest]) <= 1e-6
