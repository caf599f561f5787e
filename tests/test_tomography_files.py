"""Projections and their geometry from files: every format, and every mistake of units and order that is named."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch

from medgmae.data import VolumeError
from medgmae.tomography import (
    ProjectionGeometry,
    Projections,
    astra_geometry,
    circular_geometry,
    read_geometry,
    read_projections,
    rtk_geometry,
)
from medgmae.tomography.geometry_files import Detector

ANGLES = [0.0, 0.5, 1.2, 4.0]
SIZE = (5, 7)


def circle(**changes: Any) -> ProjectionGeometry:
    given: dict[str, Any] = {"sid": 500.0, "sdd": 800.0, **changes}
    return circular_geometry(given.pop("angles", ANGLES), given.pop("size", SIZE), (3.0, 2.0), **given)


def integrals() -> torch.Tensor:
    return torch.rand(4, *SIZE, generator=torch.Generator().manual_seed(0)) * 3


def test_where_source_and_pixels_stand() -> None:
    """The middle of the detector lies behind the axis, columns run around it, rows down."""
    geometry = circle(angles=[0.0, math.pi / 2])
    source, corner, column, row = geometry.views[1]
    torch.testing.assert_close(source, torch.tensor([0.0, 500.0, 0.0]).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(column, torch.tensor([-2.0, 0.0, 0.0]).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(row, torch.tensor([0.0, 0.0, -3.0]).double(), atol=1e-9, rtol=0)
    middle = corner + 3 * column + 2 * row
    torch.testing.assert_close(middle, torch.tensor([0.0, -300.0, 0.0]).double(), atol=1e-9, rtol=0)
    shifted = circle(offset_mm=(1.0, -4.0)).views[0, 1] - circle().views[0, 1]
    torch.testing.assert_close(shifted, torch.tensor([0.0, 1.0, 4.0]).double(), atol=1e-9, rtol=0)
    assert circle().pixel_mm == pytest.approx((3.0, 2.0))


@pytest.mark.parametrize("beam", ["cone", "parallel"])
def test_our_json_both_ways(beam: str, tmp_path: Path) -> None:
    lengths = {"sid": 500.0, "sdd": 800.0} if beam == "cone" else {"sid": None, "sdd": None}
    geometry = circle(**lengths)
    geometry.save(tmp_path / "vectors.json")
    again = read_geometry(tmp_path / "vectors.json")
    assert torch.equal(again.views, geometry.views)
    assert (again.size, again.beam) == (geometry.size, beam)
    short = {"format": "medgmae-projections-1", "angles_deg": np.rad2deg(ANGLES).tolist(), "pixel_mm": [3.0, 2.0]}
    (tmp_path / "circle.json").write_text(json.dumps({**short, "size": SIZE, **lengths}))
    torch.testing.assert_close(read_geometry(tmp_path / "circle.json").views, geometry.views)


def test_an_rtk_scan(tmp_path: Path) -> None:
    rows = [[600.0, 900.0, g, 1.0, -2.0, 0.5, 0.0, 0.0, 0.0] for g in (0.0, 30.0, 200.0)]
    names = ("GantryAngle", "ProjectionOffsetX", "ProjectionOffsetY", "OutOfPlaneAngle")
    views = "".join(
        "<Projection>" + "".join(f"<{n}>{v}</{n}>" for n, v in zip(names, row[2:6], strict=True)) + "</Projection>"
        for row in rows
    )
    shared = "<SourceToIsocenterDistance>600</SourceToIsocenterDistance>"
    shared += "<SourceToDetectorDistance>900</SourceToDetectorDistance>"
    text = f'<?xml version="1.0"?><RTKThreeDCircularGeometry version="3">{shared}{views}</RTKThreeDCircularGeometry>'
    (tmp_path / "geometry.xml").write_text(text)
    image = SimpleITK.GetImageFromArray(integrals()[:3].numpy())
    image.SetSpacing((2.0, 3.0, 1.0))
    image.SetOrigin((-5.0, -4.0, 0.0))
    SimpleITK.WriteImage(image, str(tmp_path / "stack.mha"))
    found = read_projections(tmp_path / "stack.mha", tmp_path / "geometry.xml")
    expected = rtk_geometry(torch.tensor(rows).double(), SIZE, (3.0, 2.0), (-5.0, -4.0))
    torch.testing.assert_close(found.geometry.views, expected.views)
    torch.testing.assert_close(found.data, integrals()[:3])
    image.SetSpacing((1.0, 1.0, 1.0))
    SimpleITK.WriteImage(image, str(tmp_path / "stack.mha"))
    with pytest.raises(VolumeError, match="says nothing of the size of pixels"):
        read_projections(tmp_path / "stack.mha", tmp_path / "geometry.xml")
    (tmp_path / "geometry.xml").write_text(text.replace("<GantryAngle>30.0</GantryAngle>", ""))
    with pytest.raises(VolumeError, match="view 1 lacks GantryAngle"):
        read_projections(tmp_path / "stack.mha", tmp_path / "geometry.xml")


def test_rtk_leaves_out_what_is_0_in_every_view(tmp_path: Path) -> None:
    """A parallel beam's distance to the detector, and the angle of a view at 0 degrees."""
    path, detector = tmp_path / "geometry.xml", Detector(SIZE, (3.0, 2.0))
    shared = "<SourceToIsocenterDistance>600</SourceToIsocenterDistance>"
    text = "<RTKThreeDCircularGeometry>{}</RTKThreeDCircularGeometry>"
    path.write_text(text.format(shared + "<Projection/>"))
    found = read_geometry(path, detector)
    expected = rtk_geometry(torch.tensor([[600.0, *[0.0] * 8]]), SIZE, (3.0, 2.0))
    assert found.beam == "parallel"
    assert torch.equal(found.views, expected.views)
    path.write_text(text.format("<Projection/>"))
    with pytest.raises(VolumeError, match="view 0 lacks SourceToIsocenterDistance"):
        read_geometry(path, detector)
    distance = "<SourceToDetectorDistance>900</SourceToDetectorDistance>"
    path.write_text(text.format(f"{shared}<Projection>{distance}</Projection><Projection/>"))
    with pytest.raises(VolumeError, match="view 1 lacks SourceToDetectorDistance"):
        read_geometry(path, detector)


def test_views_of_two_beams_are_refused() -> None:
    parameters = torch.tensor([[600.0, 900.0, *[0.0] * 7], [600.0, 0.0, *[0.0] * 7]])
    with pytest.raises(VolumeError, match="1 of 2 views have SDD 0"):
        rtk_geometry(parameters, SIZE, (1.0, 1.0))


@pytest.mark.parametrize("beam", ["cone", "parallel"])
def test_astra_s_vectors(beam: Any, tmp_path: Path) -> None:
    geometry = circle(**({} if beam == "cone" else {"sid": None, "sdd": None}))
    source, corner, column, row = geometry.views.unbind(1)
    vectors = torch.cat([source * (1 if beam == "cone" else 7), corner + 3 * column + 2 * row, column, row], dim=1)
    np.save(tmp_path / "vectors.npy", vectors.numpy())
    np.savetxt(tmp_path / "vectors.txt", vectors.numpy())
    np.save(tmp_path / "data.npy", integrals().numpy())
    for name in ("vectors.npy", "vectors.txt"):
        found = read_projections(tmp_path / "data.npy", tmp_path / name, beam=beam)
        torch.testing.assert_close(found.geometry.views, geometry.views)
    with pytest.raises(VolumeError, match=r"ASTRA's vectors have shape \(4, 3\)"):
        astra_geometry(source, SIZE, beam)


@pytest.mark.parametrize("kind", ["npy", "tif"])
def test_a_folder_of_images_in_the_order_of_their_numbers(kind: str, tmp_path: Path) -> None:
    (folder := tmp_path / "views").mkdir()
    geometry = circle(angles=[0.1 * k for k in range(12)])
    for k in range(12):
        image = np.full(SIZE, 0.1 * (k + 1), dtype=np.float32)
        if kind == "npy":
            np.save(folder / f"view{k}.npy", image)
        else:
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image), str(folder / f"view{k}.tif"))
    found = read_projections(folder, geometry)
    torch.testing.assert_close(found.data[:, 0, 0], 0.1 * torch.arange(1, 13))
    if kind == "tif":
        counts = SimpleITK.GetImageFromArray(np.full(SIZE, 500, dtype=np.uint16))
        for k in range(12):
            SimpleITK.WriteImage(counts, str(folder / f"view{k}.tif"))
        with pytest.raises(VolumeError, match="whole numbers from 500 to 500, whose scale nothing says"):
            read_projections(folder, geometry)
        logs = read_projections(folder, geometry, i0=1000.0)
        torch.testing.assert_close(logs.data, torch.full((12, *SIZE), math.log(2.0)))


def test_a_scene_of_r2_gaussian(tmp_path: Path) -> None:
    scanner = {"mode": "cone", "DSD": 8.0, "DSO": 5.0, "nDetector": SIZE, "sDetector": [0.15, 0.14]}
    scanner |= {"sVoxel": [2, 2, 2], "offDetector": [0, 0]}
    for k in range(4):
        np.save(tmp_path / f"{k}.npy", integrals()[k].numpy())
    views = [{"file_path": f"{k}.npy", "angle": angle} for k, angle in enumerate(ANGLES)]
    meta = tmp_path / "meta_data.json"
    meta.write_text(json.dumps({"scanner": scanner, "proj_train": views}))
    with pytest.raises(VolumeError, match="pass unit_mm="):
        read_projections(tmp_path)
    found = read_projections(tmp_path, unit_mm=100.0)
    torch.testing.assert_close(found.geometry.views, circle().views)
    torch.testing.assert_close(found.data, integrals())
    flat = {**scanner, "mode": "parallel"}
    meta.write_text(json.dumps({"scanner": flat, "proj_train": views}))
    assert read_projections(tmp_path, unit_mm=100.0).geometry.pixel_mm == pytest.approx((200 / 5, 200 / 7))
    meta.write_text(json.dumps({"scanner": {**scanner, "offDetector": [0, 1]}, "proj_train": views}))
    with pytest.raises(VolumeError, match="offDetector"):
        read_projections(tmp_path, unit_mm=100.0)


def naf(**changes: Any) -> dict[str, Any]:
    content = {"DSD": 800.0, "DSO": 500.0, "nDetector": [7, 5], "dDetector": [2.0, 3.0], "mode": "cone"}
    content |= {"train": {"angles": np.array(ANGLES), "projections": integrals().numpy()}, "numTrain": 4}
    return {**content, "image": np.zeros((2, 2, 2)), "offDetector": [0.0, 0.0], **changes}


def test_a_pickle_of_naf(tmp_path: Path) -> None:
    path = tmp_path / "chest_50.pickle"
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(naf(), protocol=protocol))
        found = read_projections(path)
        torch.testing.assert_close(found.geometry.views, circle().views)
        torch.testing.assert_close(found.data, integrals())


class Evil:
    """Calls something when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil"),))


def test_a_pickle_calls_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pickle"
    path.write_bytes(pickle.dumps(naf(extra=Evil())))
    with pytest.raises(VolumeError, match=r"the pickle names pathlib\S*"):
        read_projections(path)
    assert not (tmp_path / "evil").exists()
    for damaged in (b"", pickle.dumps(naf())[:-40], pickle.dumps([1, 2]), b"\x80\x04K."):
        path.write_bytes(damaged)
        with pytest.raises(VolumeError, match="not a pickle of NAF"):
            read_projections(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"angles": [0.0, 90.0, 180.0]}, "they look like degrees"),
        ({"angles": [0.0, 0.01, 0.02]}, "were radians taken for degrees"),
        ({"sid": 800.0, "sdd": 500.0}, "expected 0 < sid < sdd"),
        ({"sid": 0.5, "sdd": 0.8}, "it looks like metres, times 1000"),
        ({"sdd": None}, "expected both, or none for a parallel beam"),
    ],
)
def test_wrong_units_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(VolumeError, match=message):
        circle(**changes)


def test_views_that_are_none() -> None:
    good = circle().views
    for row, value, message in (
        (2, good[1, 3], "1 of 4 views have steps per column and per row that are parallel, or 0: 1"),
        (3, torch.zeros(3).double(), "parallel, or 0"),
        (0, good[1, 1], "a source in the detector"),
        (1, torch.tensor([torch.nan, 0, 0]).double(), "not finite"),
    ):
        views = good.clone()
        views[1, row] = value
        with pytest.raises(VolumeError, match=message):
            ProjectionGeometry(views, SIZE)
    with pytest.raises(VolumeError, match="a direction whose length is not 1"):
        ProjectionGeometry(good, SIZE, "parallel")


def test_data_that_do_not_fit() -> None:
    geometry, data = circle(), integrals()
    for wrong, message in (
        (data[:3], "3 projections and a geometry of 4 views"),
        (data.mT, "rows and columns are exchanged"),
        (data[..., :5], r"\(5, 5\) pixels \(rows, columns\), the geometry \(5, 7\)"),
        (torch.where(data > 2.9, torch.nan, data), r"pixels are NaN or infinite, in views \["),
        (data * torch.tensor([1.0, 1, 0, 1])[:, None, None], "view 2 is 0 everywhere"),
        (data * 100, "Are these intensities"),
    ):
        with pytest.raises(VolumeError, match=message):
            Projections(wrong, geometry)
    bright = torch.ones(4, 5, 7)
    bright[..., 2:5] = 0.2
    with pytest.raises(VolumeError, match="largest at the detector's sides"):
        Projections(bright, geometry)


def test_intensities(tmp_path: Path) -> None:
    np.save(tmp_path / "counts.npy", (1e4 * np.exp(-integrals().numpy())).astype(np.float32))
    found = read_projections(tmp_path / "counts.npy", circle(), i0=1e4)
    torch.testing.assert_close(found.data, integrals(), atol=1e-5, rtol=1e-5)
    np.save(tmp_path / "counts.npy", -np.ones((4, *SIZE), dtype=np.float32))
    with pytest.raises(VolumeError, match="140 intensities are negative"):
        read_projections(tmp_path / "counts.npy", circle(), i0=1e4)
    counts = 1e4 * np.exp(-integrals().numpy())
    np.save(tmp_path / "counts.npy", counts.clip(max=6000.0))
    with pytest.raises(VolumeError, match=r"are exactly 6000, below i0, 10000: the detector was saturated"):
        read_projections(tmp_path / "counts.npy", circle(), i0=1e4)
    np.save(tmp_path / "counts.npy", counts)
    with pytest.raises(VolumeError, match="are above i0, 2000, by more than noise"):
        read_projections(tmp_path / "counts.npy", circle(), i0=2000)
    with pytest.raises(VolumeError, match="pass geometry="):
        read_projections(tmp_path / "counts.npy")
    with pytest.raises(VolumeError, match="no such file"):
        read_projections(tmp_path / "none.npy", circle())


def test_binned_pixels_are_means_at_their_middles() -> None:
    geometry = circle(size=(4, 6))
    data = torch.rand(4, 4, 6) + 0.1
    found = Projections(data, geometry).binned(2)
    assert found.geometry.size == (2, 3)
    torch.testing.assert_close(found.data[1, 0, 1], data[1, :2, 2:4].mean())
    _, corner, column, row = geometry.views[1]
    torch.testing.assert_close(found.geometry.views[1, 1], corner + 0.5 * column + 0.5 * row)
    with pytest.raises(VolumeError, match="expected fewer"):
        geometry.binned(5)
