"""Input blocks whose steps run in an order of their own: what each rule does, and that training sees the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medgmae import create_transform
from medgmae.data import (
    Grid,
    Volume,
    VolumeError,
    crop_foreground,
    percentiles,
    prepare_scans,
    read_volume,
    standardize,
    zscore,
)
from medgmae.data.input_block import ORDER, padding
from medgmae.data.scans import find_scans
from medgmae.training.cases import View
from medgmae.training.settings import ViewSettings

CROP_FIRST = ["window", "foreground", "resample", "center", "normalize"]
PRIMUS = {
    "modality": "MR", "size": [16, 16, 16], "spacing": [1, 1, 1], "crop": ["foreground", "center"],
    "foreground": {"above": None}, "normalize": "zscore",
    "resample": {"to": "spacing", "interpolation": "bspline", "origin": "edges"},
    "order": ["foreground", "normalize", "resample", "window", "center"],
}  # fmt: skip
CEILED = {
    "size": [9, 8, 12], "crop": ["center"], "centering": "ceil", "pad": -1.0, "window": [0, 100], "range": [-1, 1],
}  # fmt: skip


def head(spacing: tuple[float, float, float] = (2.0, 1.5, 1.5)) -> Volume:
    """A bright ball of noise in a field of zeros."""
    axes = torch.meshgrid(torch.arange(10.0), torch.arange(14.0), torch.arange(15.0), indexing="ij")
    inside = sum((axis - n) ** 2 for axis, n in zip(axes, (5, 7, 8), strict=True)) < 18
    noise = torch.rand(10, 14, 15, generator=torch.Generator().manual_seed(0)) * 50 + 50
    return Volume((noise * inside)[None], Grid((10, 14, 15), spacing))


def test_steps_run_in_their_order() -> None:
    scan = head()
    found = create_transform(PRIMUS)(scan)
    box = zscore(crop_foreground(scan, nonzero=True))
    assert (found.size, box.size) == ((16, 16, 16), (9, 9, 9))
    inner = create_transform({**PRIMUS, "crop": ["foreground"]})(scan)
    assert inner.size == (18, 14, 14)  # 9 * 2 and 9 * 1.5 = 13.5 to the even number
    np.testing.assert_allclose(inner.grid.spacing, (1.0, 9 * 1.5 / 14, 9 * 1.5 / 14))
    after = create_transform({**PRIMUS, "crop": ["foreground"], "order": list(ORDER)})(scan)
    assert abs(float(after.data.mean())) < 1e-5 < abs(float(inner.data.mean()))  # only then over the resampled voxels


def test_padding_follows_a_normalisation_that_comes_first() -> None:
    found = create_transform({**PRIMUS, "size": [24, 12, 12], "pad": -7.0})(head())
    assert bool((found.data[0, :3] == -7).all())
    assert bool((found.data[0, 3:-3] != -7).all())


@pytest.mark.parametrize("tilt", [0.0, 1e-7])
def test_isotropic_spacing(tilt: float) -> None:
    """Scans of equal spacings are left as they are, if the rule says so; a digit decides, and is never seen else."""
    scan = head((0.5, 0.5, 0.5 + tilt))
    rule = {"to": "isotropic", "least": 0.75, "origin": "edges"}
    kept = create_transform({"resample": {**rule, "equal": "keep"}})(scan)
    assert kept.size == ((10, 14, 15) if tilt == 0 else (7, 9, 10))
    assert create_transform({"resample": rule})(scan).size == (7, 9, 10)
    assert create_transform({"resample": {"to": "isotropic"}})(head()).size == (13, 14, 15)


def test_a_number_of_patches_is_not_exceeded() -> None:
    scan = Volume(torch.rand(1, 40, 41, 42))
    block: dict[str, Any] = {"multiple": [4, 4, 4], "resample": {"to": "isotropic", "origin": "edges"}}
    for patches in (1000, 999, 400, 27, 1):
        found = create_transform(
            {**block, "resample": {**block["resample"], "patches": patches}, "crop": ["multiple"]}
        )(scan)
        count = int(np.prod([n // 4 for n in found.size]))
        assert count <= patches
        assert all(n % 4 == 0 for n in found.size)
        assert count > patches / 2 or patches == 1
    with pytest.raises(VolumeError, match=r"has \(3, 5, 5\) voxels; expected \[4, 4, 4\] or more"):
        create_transform({"multiple": [4, 4, 4], "crop": ["multiple"]})(Volume(torch.rand(1, 3, 5, 5)))


@pytest.mark.parametrize(("keep", "values"), [("truncate", [0, -2, 0, 2]), (True, [0, -3, 0, 2]), (False, None)])
def test_integers_between_voxels(keep: str | bool, values: list[int] | None) -> None:
    scan = Volume(torch.tensor([0, -5, 5, 0], dtype=torch.int16).reshape(1, 1, 1, 4), Grid((1, 1, 4), 1.0))
    rule = {"to": "spacing", "origin": "first_voxel", "keep_dtype": keep}
    found = create_transform({"resample": rule, "spacing": [1, 1, 0.5]})(scan)
    between = found.data.flatten()[[0, 1, 3, 5]]
    expected = torch.tensor(values or [0, -2.5, 0, 2.5]).float()
    if keep is True:  # halves go to the even number
        expected = torch.tensor([0.0, -2.0, 0.0, 2.0])
    assert torch.equal(between, expected)
    exact = found.data.flatten()[::2]
    assert torch.equal(exact, scan.data.flatten().float())


def test_truncation_is_not_rounding() -> None:
    scan = Volume(torch.tensor([-3, 0, 3], dtype=torch.int16).reshape(1, 1, 1, 3), Grid((1, 1, 3), 3.0))
    found = {
        keep: create_transform(
            {"resample": {"to": "spacing", "origin": "first_voxel", "keep_dtype": keep}, "spacing": [1, 1, 1.75]}
        )(scan).data.flatten()
        for keep in ("truncate", True, False)
    }
    torch.testing.assert_close(found[False], torch.tensor([-3.0, -1.25, 0.5, 2.25])[: len(found[False])])
    assert torch.equal(found["truncate"], found[False].trunc())
    assert torch.equal(found[True], found[False].round())


def test_a_body_without_what_lies_beside_it() -> None:
    scan = head()
    data = scan.data.clone()
    data[..., 0] = 80  # a table, one voxel thick
    assert crop_foreground(scan.with_data(data)).size == (10, 14, 13)
    block = {"crop": ["foreground"], "foreground": {"above": 0, "within": 3}}
    found = create_transform(block)(scan.with_data(data))
    assert found.size == crop_foreground(scan, margin=1).size == (10, 11, 11)
    assert found.origin == crop_foreground(scan, margin=1).origin
    with pytest.raises(VolumeError, match="no voxel above 0 with most of the 39 x 39 x 39 voxels around it"):
        create_transform({**block, "foreground": {"within": 39}})(scan)


@pytest.mark.parametrize("within", [3, 5, 13, 21])
def test_the_box_filter_counts_right(within: int) -> None:
    mask = torch.rand(30, 17, 25, generator=torch.Generator().manual_seed(1)) > 0.2
    counts = torch.nn.functional.conv3d(
        mask[None, None].double(), torch.ones(1, 1, *[within] * 3).double(), padding=within // 2
    )
    most = torch.nonzero(counts[0, 0] > within**3 / 2)
    assert len(most)
    expected = most.max(0).values - most.min(0).values + 1
    assert crop_foreground(Volume(mask[None].float()), 0.5, within=within).size == tuple(expected.tolist())


def test_statistics_of_a_foreground() -> None:
    scan = head()
    bright = scan.data[scan.data > scan.data.mean()]
    assert percentiles(scan, (0, 50), of="above_mean") == (
        float(bright.min()),
        pytest.approx(float(bright.median()), abs=1),
    )
    scores = create_transform({"normalize": {"of": "above_mean"}})(scan).data
    torch.testing.assert_close(scores, (scan.data - bright.mean()) / bright.std(correction=0), atol=1e-5, rtol=1e-5)
    assert torch.equal(scores, zscore(scan, of="nonzero").data)  # the same voxels in this scan
    assert not create_transform({"normalize": {"of": "above_mean"}})(Volume(torch.full((1, 2, 2, 2), 3.0))).data.any()
    fixed = create_transform({"normalize": {"mean": 10, "std": 4}})(scan)
    torch.testing.assert_close(fixed.data, (scan.data - 10) / 4)
    with pytest.raises(VolumeError, match="the standard deviation is -1"):
        standardize(scan, 0, -1)


@pytest.mark.parametrize(("old", "new", "start"), [(7, 4, 2), (4, 7, -2), (6, 4, 1), (5, 5, 0)])
def test_centering_rounds_up_as_torchio_does(old: int, new: int, start: int) -> None:
    scan = Volume(torch.arange(1.0, old + 1).reshape(1, 1, 1, old))
    block = {"size": [1, 1, new], "crop": ["center"], "pad": -1}
    cut = create_transform({**block, "centering": "ceil"})(scan).data.flatten().tolist()
    assert cut == [i + 1 if 0 <= i < old else -1 for i in range(start, start + new)]
    floor = -((new - old) // 2) if new > old else (old - new) // 2
    cut = create_transform({**block, "centering": "floor"})(scan).data.flatten().tolist()
    assert cut == [i + 1 if 0 <= i < old else -1 for i in range(floor, floor + new)]


def test_the_least_intensity_pads() -> None:
    block = {**CEILED, "pad": "minimum"}
    scan = head().with_data(head().data + 30)
    found = create_transform(block)(scan)
    assert found.data.min() == found.data[0, 0, 0, 0] == pytest.approx(30 / 50 - 1)
    assert create_transform(block).pad == padding(block) == -1.0
    assert padding({"window": [-5, 5], "range": "same", "pad": "minimum"}) == -5.0


@pytest.mark.parametrize("block", [PRIMUS, CEILED, {**CEILED, "normalize": "zscore"}], ids=["primus", "ceil", "zscore"])
def test_prepared_scans_and_their_views_are_what_a_transform_gives(block: dict[str, Any], tmp_path: Path) -> None:
    scan = head()
    scan.save(tmp_path / "scan.nii.gz")
    stored = read_volume(tmp_path / "scan.nii.gz")
    view = View.of(ViewSettings(kind="center", size=tuple(block["size"])), block, block["size"], (1, 1, 1))
    folder = prepare_scans(
        find_scans([tmp_path / "scan.nii.gz"]).scans,
        tmp_path / "prepared",
        view.prepared,
        dtype="float32",
        progress=False,
    )
    expected = create_transform(view.input)(stored)
    torch.testing.assert_close(view.whole(folder.scans[0]).data, expected.data, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(view.whole(folder.scans[0]).origin, expected.origin, atol=1e-6)
    whole = prepare_scans(
        find_scans([tmp_path / "scan.nii.gz"]).scans, tmp_path / "whole", block, dtype="float32", progress=False
    )
    share = float((scan.data > 0).float().mean())
    share *= scan.data.numel() / 9**3 if block is PRIMUS else 1  # of the box, or of the field of view
    assert whole.scans[0].foreground == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize("kind", ["center", "resize", "windows"])
def test_views_of_scans_that_are_taken_whole(kind: Any) -> None:
    """The view says which part is seen, in place of the whole patches that a card takes."""
    block = {
        "size": [8, 8, 8], "multiple": [4, 4, 4], "crop": ["foreground", "multiple"],
        "resample": {"to": "isotropic", "origin": "edges", "patches": 60},
    }  # fmt: skip
    view = View.of(ViewSettings(kind=kind), block, (8, 8, 8), (4, 4, 4))
    found = create_transform(view.input, whole=kind == "windows")(head())
    assert found.size == (8, 8, 8) if kind != "windows" else min(found.size) > 8
    assert "multiple" not in view.prepared["crop"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int16])
def test_percentiles_of_any_type(dtype: torch.dtype) -> None:
    scan = Volume(torch.arange(101).reshape(1, 1, 1, 101).to(dtype))
    assert percentiles(scan, (10, 90)) == (10.0, 90.0)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"order": ["window", "resample"]}, r"input.order is \['window', 'resample'\]; expected all of"),
        ({"order": "window"}, "input.order"),
        ({"resample": {"to": "isotropic", "least": -1}}, r"input.resample.least is -1; expected millimetres"),
        ({"resample": {"to": "isotropic", "patches": 5}}, "input.multiple is null"),
        ({"resample": {"to": "isotropic", "equal": "skip"}}, "input.resample.equal is 'skip'"),
        ({"resample": {"to": "isotropic", "rounding": "up"}}, "input.resample.rounding"),
        ({"crop": ["multiple"]}, "input.multiple is null"),
        ({"crop": ["center", "multiple"], "size": [1] * 3, "multiple": [1] * 3}, "one of 'center' and 'multiple'"),
        ({"foreground": {"within": 4}}, "input.foreground.within is 4; expected an odd number"),
        ({"foreground": {"above": "air"}}, "input.foreground.above is 'air'"),
        ({"foreground": {"below": 1}}, r"input.foreground has unknown keys \['below'\]"),
        ({"foreground": 0}, "input.foreground is 0"),
        ({"normalize": {"mean": 1}}, "input.normalize is {'mean': 1}"),
        ({"normalize": {"mean": 1, "std": 0}}, "input.normalize"),
        ({"normalize": {"of": "body"}}, "input.normalize"),
        ({"window": {"percentiles": [1, 99], "of": "body"}}, "input.window"),
        ({"range": "keep"}, "input.range is 'keep'; expected two numbers"),
        ({"centering": "round"}, "input.centering"),
        ({"pad": "edge"}, "input.pad is 'edge'; expected a number or 'minimum'"),
        ({"pad": "minimum"}, "input.pad is 'minimum'; expected a number, or a window"),
        ({"pad": "minimum", "window": [0, 1], "normalize": "zscore"}, "input.pad is 'minimum'"),
    ],
)
def test_blocks_that_are_refused(block: dict[str, Any], words: str) -> None:
    with pytest.raises(VolumeError, match=words):
        create_transform(block)
