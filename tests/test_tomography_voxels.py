"""Reconstruction on voxels: filtered back-projection has the right scale, SART and CG reduce the residual."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from medgmae.data import Grid, Volume, VolumeError
from medgmae.tomography import (
    ProjectionGeometry,
    Projections,
    cg,
    circular_geometry,
    fdk,
    from_hounsfield,
    project,
    sart,
    to_hounsfield,
)

MU = 0.02
GRID = Grid((24, 40, 40), (3.0, 2.0, 2.0), (-39.0, -39.0, -34.5))
CONE: dict[str, Any] = {"sid": 400.0, "sdd": 600.0}


def ball() -> tuple[Volume, torch.Tensor]:
    """A ball of water off the axis, and where it is whole."""
    places = torch.from_numpy(GRID.world(torch.cartesian_prod(*map(torch.arange, GRID.size)).numpy()))
    distance = (places - torch.tensor([4.0, -6.0, 2.0])).norm(dim=1).reshape(GRID.size)
    return Volume(MU * (distance < 24).float()[None], GRID), distance < 17


def scan(degrees: float, views: int, **lengths: Any) -> Projections:
    angles = [0.3 + math.radians(degrees) * k / views for k in range(views)]
    return project(ball()[0], circular_geometry(angles, (40, 48), 3.0 if lengths else 2.0, **lengths))


@pytest.mark.parametrize(
    ("degrees", "lengths"),
    [(360, CONE), (-360, CONE), (215, CONE), (-215, CONE), (180, {}), (240, {}), (360, {})],
    ids=str,
)
def test_a_ball_is_flat_and_has_its_value(degrees: float, lengths: dict[str, Any]) -> None:
    found, inside = fdk(scan(degrees, 90, **lengths), GRID).data[0], ball()[1]
    assert abs(float(found[inside].mean()) / MU - 1) < 0.005
    assert float((found[inside] / MU - 1).abs().quantile(0.95)) < 0.04


def test_an_offset_detector_and_turned_frames_change_nothing() -> None:
    straight = fdk(scan(360, 60, **CONE), GRID)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    turn = turn * torch.linalg.det(turn)
    shift = torch.tensor([30.0, -20.0, 10.0], dtype=torch.float64)
    plain = scan(360, 60, **CONE)
    points = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)[None, :, None]
    moved = ProjectionGeometry(plain.geometry.views @ turn.mT + points * shift, plain.geometry.size)
    origin = turn.numpy() @ GRID.origin + shift.numpy()
    there = Grid(GRID.size, GRID.spacing, tuple(origin), turn.numpy() @ GRID.direction)
    found = fdk(Projections(plain.data, moved), there)
    torch.testing.assert_close(found.data, straight.data, atol=1e-5, rtol=1e-3)


def test_half_the_spacing_doubles_the_attenuation() -> None:
    """Projections are pure numbers: the same ones of a body of half the size are of twice the attenuation."""
    whole = scan(360, 40, **CONE)
    views = whole.geometry.views / 2
    small = Grid(GRID.size, tuple(s / 2 for s in GRID.spacing), tuple(o / 2 for o in GRID.origin))
    found = fdk(Projections(whole.data, ProjectionGeometry(views, whole.geometry.size)), small)
    torch.testing.assert_close(found.data, 2 * fdk(whole, GRID).data, atol=1e-5, rtol=1e-3)


def test_arcs_that_are_too_short() -> None:
    with pytest.raises(VolumeError, match=r"reach over 1[0-9.]+ degrees; filtered back-projection needs"):
        fdk(scan(170, 40, **CONE), GRID)
    with pytest.raises(VolumeError, match=r"a gap of .* degrees in half a turn"):
        fdk(scan(120, 40), GRID)
    with pytest.raises(VolumeError, match="needs views from around, got 1"):
        fdk(scan(360, 1, **CONE), GRID)


def error(volume: Volume) -> float:
    return float((volume.data - ball()[0].data).square().mean().sqrt())


def test_iterations_come_nearer_and_repeat_bit_by_bit() -> None:
    few = scan(360, 12, **CONE)
    errors: dict[str, list[float]] = {"sart": [], "cg": []}
    results = {
        "sart": sart(few, GRID, 3, watch=lambda i, x, s: errors["sart"].append(error(x)), progress=False),
        "cg": cg(few, GRID, 6, watch=lambda i, x, s: errors["cg"].append(error(x)), progress=False),
    }
    for name, values in errors.items():
        assert values == sorted(values, reverse=True), name
        assert values[-1] < error(fdk(few, GRID))
        assert values[-1] == error(results[name])
    assert torch.equal(sart(few, GRID, 3, progress=False).data, results["sart"].data)
    assert float(results["sart"].data.min()) >= 0
    misfit = (project(results["cg"], few.geometry).data - few.data).norm() / few.data.norm()
    assert misfit < 0.05
    better = cg(few, GRID, 2, start=results["sart"], progress=False)
    assert error(better) < errors["cg"][1]


def test_a_body_that_is_wider_than_the_detector_is_said(caplog: pytest.LogCaptureFixture) -> None:
    whole = scan(360, 12, **CONE)
    fdk(whole, GRID)
    assert not caplog.records
    narrow = circular_geometry([0.3 + 0.5 * k for k in range(12)], (40, 16), 3.0, **CONE)
    cg(project(ball()[0], narrow), GRID, 1, progress=False)
    assert "of the body on the grid is outside of the detector" in caplog.text


def test_points_are_seen_where_their_rays_meet_the_detector() -> None:
    for lengths in (CONE, {}):
        geometry = circular_geometry([0.3, 2.0], (9, 7), (3.0, 2.0), offset_mm=(4.0, -2.0), **lengths)
        source, corner, column, row = geometry.views[1]
        pixel = corner + 5 * column + 2.5 * row
        point = source + 0.6 * (pixel - source) if lengths else pixel - 50 * source
        found = geometry.pixels(point[None])[1, 0]
        torch.testing.assert_close(found, torch.tensor([2.5, 5.0], dtype=torch.float64))


def test_what_does_not_fit_is_refused() -> None:
    few = scan(360, 4, **CONE)
    other = Volume(torch.zeros(1, 4, 4, 4), Grid((4, 4, 4)))
    with pytest.raises(VolumeError, match="expected the grid of the result"):
        sart(few, GRID, 1, start=other)
    with pytest.raises(VolumeError, match="2 channels"):
        project(Volume(torch.zeros(2, 4, 4, 4), Grid((4, 4, 4))), few.geometry)


def test_hounsfield_units() -> None:
    values = torch.tensor([-1000.0, 0.0, 500.0])
    torch.testing.assert_close(to_hounsfield(from_hounsfield(values)), values)
    assert from_hounsfield(torch.tensor(-2000.0)) == 0
