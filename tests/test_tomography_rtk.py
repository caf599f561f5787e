"""Our tomography beside RTK, the Reconstruction Toolkit: projections, reconstructions and files agree, both ways."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medgmae import Gaussians, Volume, ops, psnr, read_volume, tomography
from medgmae.data import Grid, VolumeError
from medgmae.tomography.geometry_files import Detector

EXAMPLES = Path(__file__).parent.parent / "examples"
GRID = Grid((30, 36, 40), (3.0, 2.0, 2.5), (-35.0, -60.0, -25.0))
CONE: dict[str, Any] = {"sid": 400.0, "sdd": 600.0}
BEAMS = pytest.mark.parametrize("lengths", [CONE, {}], ids=["cone", "parallel"])


@pytest.fixture
def rtk_methods(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the examples, as Python finds it beside one that runs."""
    file = "itk.rtkThreeDCircularProjectionGeometryPython"  # itk without RTK lacks it
    pytest.importorskip(file, reason="RTK is not installed: pip install medgmae[rtk]")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("rtk_methods")


def middle(grid: Grid) -> Any:
    return grid.world((np.array(grid.size) - 1) / 2)


def smooth(grid: Grid = GRID) -> Volume:
    """Three blobs, of which little is left where the grid ends."""
    indices = torch.cartesian_prod(*map(torch.arange, grid.size))
    places = torch.from_numpy(grid.world(indices.numpy()) - middle(grid))
    values = torch.zeros(len(places), dtype=torch.float64)
    for width, at in ((9.0, (5.0, -6.0, 3.0)), (7.0, (-10.0, 6.0, -9.0)), (10.0, (0.0, 7.0, 6.0))):
        distance = (places - torch.tensor(at, dtype=torch.float64)).norm(dim=1) / width
        values += 0.02 * torch.exp(-distance.square() / 2)
    return Volume(values.reshape(grid.size).float()[None], grid)


def circle(grid: Grid = GRID, views: int = 40, turn: float = 2 * math.pi, **lengths: Any) -> Any:
    """Around the grid's middle, with a detector that is off the central ray and whose pixels are no squares."""
    angles = [0.3 + turn * k / views for k in range(views)]
    return tomography.circular_geometry(
        angles, (60, 64), (3.0, 2.5), offset_mm=(4.0, -3.0), centre_mm=middle(grid), **lengths
    )


def apart(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative difference in L2, and the largest one as a part of the largest value."""
    difference = found - expected
    return float(difference.norm() / expected.norm()), float(difference.abs().max() / expected.abs().max())


@BEAMS
@pytest.mark.parametrize("turned", [False, True], ids=["straight", "turned"])
def test_projections_of_a_volume_agree(rtk_methods: Any, lengths: dict[str, Any], turned: bool) -> None:
    grid = GRID
    if turned:
        axes = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
        grid = Grid(GRID.size, GRID.spacing, (3.0, 2.0, 1.0), axes.numpy() @ GRID.direction)
    volume, geometry = smooth(grid), circle(grid, views=6, **lengths)
    theirs = rtk_methods.joseph(volume, geometry)
    assert theirs.geometry is geometry
    assert max(apart(tomography.project(volume, geometry).data, theirs.data)) < 0.01
    # The agreement is of these views, not of any: the next ones are far away.
    assert apart(theirs.data, theirs.data.roll(1, 0))[0] > 0.1


def test_a_body_that_the_grid_cuts_off(rtk_methods: Any) -> None:
    """Both volumes end at the same place, or SART would explain its rim by ever larger values there."""
    whole = Volume(torch.full((1, *GRID.size), 0.02), GRID)
    data = tomography.project(whole, circle(views=12, **CONE))
    assert apart(rtk_methods.joseph(whole, data.geometry).data, data.data)[0] < 0.01
    assert apart(rtk_methods.sart(data, GRID, 3).data, whole.data)[0] < 0.1


@BEAMS
def test_exact_projections_of_gaussians_are_those_of_their_voxels(rtk_methods: Any, lengths: dict[str, Any]) -> None:
    grid = Grid((64, 64, 64), 1.5, (-40.0, -50.0, -60.0))
    random = torch.Generator().manual_seed(1)
    means = torch.from_numpy(middle(grid)).float() + 10 * (torch.rand(8, 3, generator=random) - 0.5)
    scales, quats = 6 + 3 * torch.rand(8, 3, generator=random), torch.randn(8, 4, generator=random)
    parameters = means, scales, quats, 0.01 + 0.02 * torch.rand(8, generator=random)
    gaussians = Gaussians(*(values[None] for values in parameters))
    voxels = tomography.render_attenuation(gaussians, grid, support=None)
    geometry = circle(grid, views=6, **lengths)
    exact = ops.project(*gaussians.tensors(), geometry.views, geometry.size, beam=geometry.beam)
    assert max(apart(rtk_methods.joseph(voxels, geometry).data, exact[0])) < 0.01


@pytest.mark.parametrize(
    ("turn", "lengths"),
    [(2 * math.pi, CONE), (math.radians(220), CONE), (2 * math.pi, {})],
    ids=["cone", "short", "parallel"],
)
def test_filtered_back_projections_agree(rtk_methods: Any, turn: float, lengths: dict[str, Any]) -> None:
    data = tomography.project(smooth(), circle(turn=turn, **lengths))
    ours, theirs = tomography.fdk(data, GRID), rtk_methods.fdk(data, GRID)
    body = smooth().data > 0.002
    assert max(apart(ours.data[body], theirs.data[body])) < 1e-5


@pytest.mark.parametrize("name", ["sart", "cg"])
def test_iterations_come_as_near(rtk_methods: Any, name: str) -> None:
    """Both stop at different volumes, as near to the truth; what is watched last is the result."""
    data, truth = tomography.project(smooth(), circle(views=20, **CONE)), smooth().data
    seen: list[tuple[int, float]] = []
    theirs = getattr(rtk_methods, name)(
        data, GRID, 3, watch=lambda number, volume, seconds: seen.append((number, apart(volume.data, truth)[0]))
    )
    assert [number for number, _ in seen] == [1, 2, 3]
    errors = [error for _, error in seen]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == apart(theirs.data, truth)[0]
    ours = apart(getattr(tomography, name)(data, GRID, 3, progress=False).data, truth)[0]
    assert errors[-1] == pytest.approx(ours, rel=0.3)


def test_rows_of_the_example(rtk_methods: Any) -> None:
    data, truth = tomography.project(smooth(), circle(views=12, **CONE)), smooth()
    best = importlib.import_module("ct_from_projections").Best
    rows = rtk_methods.at_their_best(data, GRID, (2, 3), lambda: best(truth))
    assert {name: (row["iteration"], row["of"]) for name, row in rows.items()} == {"RTK SART": (2, 2), "RTK CG": (3, 3)}
    again = rtk_methods.sart(data, GRID, 2)
    assert rows["RTK SART"]["psnr"] == pytest.approx(psnr(again.data, truth.data, data_range=0.06))


@BEAMS
def test_a_circle_of_ours_in_rtk_s_file(rtk_methods: Any, lengths: dict[str, Any], tmp_path: Path) -> None:
    """As RTK writes it and we read it: in RTK's frame, whose axis is y, with the last row first."""
    geometry = circle(views=7, turn=-5.0, **lengths)
    scan = rtk_methods.as_rtk(geometry)
    write(rtk_methods, scan.views, tmp_path / "geometry.xml")
    found = tomography.read_geometry(tmp_path / "geometry.xml", Detector(geometry.size, geometry.pixel_mm))
    assert found.beam == geometry.beam
    source, corner, column, row = geometry.views[..., [1, 2, 0]].unbind(1)
    centre = scan.centre[[1, 2, 0]]
    corner = corner + (geometry.size[0] - 1) * row - centre
    if lengths:
        torch.testing.assert_close(centre, torch.from_numpy(middle(GRID)[[1, 2, 0]]))
        source = source - centre
    else:  # where along the rays a detector is does not matter
        ahead = ((found.views[:, 1] - corner) * source).sum(1, keepdim=True)
        corner = corner + ahead * source
    expected = torch.stack([source, corner, column, -row], dim=1)
    torch.testing.assert_close(found.views, expected, atol=1e-6, rtol=0)


def write(rtk_methods: Any, views: Any, path: Path) -> None:
    """A geometry to a file, by RTK."""
    _, rtk = rtk_methods.toolkit()
    writer = rtk.ThreeDCircularProjectionGeometryXMLFileWriter.New()
    writer.SetFilename(str(path))
    writer.SetObject(views)
    writer.WriteFile()


def test_our_readers_take_what_rtk_writes(rtk_methods: Any, tmp_path: Path) -> None:
    """Views that are tilted, turned and shifted, each its own way; RTK projects, we read, project and compare."""
    itk, rtk = rtk_methods.toolkit()
    kind, views = itk.Image[itk.F, 3], rtk.ThreeDCircularProjectionGeometry.New()
    for k in range(5):
        views.AddProjection(400.0 + k, 600.0 - 2 * k, 70.0 * k, 5.0 - k, -3.0, 6.0 * k - 9, 4.0 - 3 * k, 2.0 * k, 1.0)
    body = itk.image_from_array(smooth().data[0].numpy())
    body.SetSpacing([2.5, 2.0, 3.0])
    body.SetOrigin([-50.0, -36.0, -43.0])
    empty = itk.image_from_array(np.zeros((5, 60, 70), dtype=np.float32))
    empty.SetSpacing([2.5, 3.0, 1.0])
    empty.SetOrigin([-84.0, -90.0, 0.0])
    project = rtk.JosephForwardProjectionImageFilter[kind, kind].New()
    project.SetInput(0, empty)
    project.SetInput(1, body)
    project.SetGeometry(views)
    project.Update()
    itk.imwrite(project.GetOutput(), str(tmp_path / "stack.mha"))
    itk.imwrite(body, str(tmp_path / "body.mha"))
    write(rtk_methods, views, tmp_path / "geometry.xml")
    found = tomography.read_projections(tmp_path / "stack.mha", tmp_path / "geometry.xml")
    ours = tomography.project(read_volume(tmp_path / "body.mha"), found.geometry)
    assert max(apart(ours.data, found.data)) < 0.01


def test_what_rtk_s_circle_does_not_have(rtk_methods: Any) -> None:
    good = circle(views=8, **CONE)
    tilted = good.views.clone()
    tilted[3, 2] += 0.01 * tilted[3, 3]
    turned = good.views[..., [1, 2, 0]]
    for views, message in ((tilted, "view 3 is .* mm from any that RTK's circle has here"), (turned, "axis along z")):
        with pytest.raises(VolumeError, match=message):
            rtk_methods.as_rtk(tomography.ProjectionGeometry(views, good.size))


def test_a_missing_rtk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setitem(sys.modules, "itk", None)
    with pytest.raises(ImportError, match=r"which is not installed: pip install medgmae\[rtk\]"):
        importlib.import_module("rtk_methods").joseph(smooth(), circle(views=4))
