"""``medgmae score``: folders of label maps against each other."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from test_cli import run

from medgmae.data import Grid, Volume, read_volume
from medgmae.evaluation import segmentation_metrics


def label_map(path: Path, seed: int, spacing: float = 2.0, channels: int = 1, most: int = 3) -> Path:
    path.parent.mkdir(exist_ok=True)
    noise = torch.rand(channels, 8, 9, 10, generator=torch.Generator().manual_seed(seed))
    Volume((noise * most).to(torch.uint8), Grid((8, 9, 10), (spacing, 1.0, 1.0))).save(path)
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_row_per_case_and_class(tmp_path: Path) -> None:
    pairs = [
        (label_map(tmp_path / "ours" / f"{i}.nii.gz", i), label_map(tmp_path / "theirs" / f"{i}.nrrd", i + 10))
        for i in range(2)
    ]
    out = tmp_path / "scores.csv"
    args = [tmp_path / "ours", tmp_path / "theirs", "--classes", "3", "--out", out]
    result = run("score", *args, "--names", "background,liver,spleen", "--json")
    assert result.exit_code == 0, result.stderr
    rows = rows_of(out)
    assert [(row["case"], row["class"]) for row in rows] == [(i, c) for i in "01" for c in ("liver", "spleen")]
    scores = [segmentation_metrics(read_volume(a), read_volume(b), classes=3) for a, b in pairs]
    for k, row in enumerate(rows):
        for field in ("dice", "hd95", "surface_dice", "label_voxels", "predicted_voxels"):
            assert float(row[field]) == pytest.approx(float(getattr(scores[k // 2], field)[k % 2]), abs=1e-6)
    assert json.loads(result.stdout)["mean"]["dice"] == pytest.approx(sum(s.mean()["dice"] for s in scores) / 2)
    assert run("score", *args).exit_code == 2  # the table exists
    assert "hd95 (voxels)" in run("score", *args, "--voxels", "--overwrite").stdout


def test_masks_and_classes_that_are_missing(tmp_path: Path) -> None:
    label_map(tmp_path / "ours" / "a.nrrd", 1, channels=3, most=2)
    label_map(tmp_path / "theirs" / "a.nrrd", 2, channels=3, most=2)
    out = tmp_path / "scores.csv"
    result = run("score", tmp_path / "ours", tmp_path / "theirs", "--classes", "3", "--masks", "--out", out)
    assert result.exit_code == 0, result.stderr
    assert [row["class"] for row in rows_of(out)] == ["class 0", "class 1", "class 2"]
    label_map(tmp_path / "empty" / "a.nrrd", 2, most=1)
    label_map(tmp_path / "full" / "a.nrrd", 2, most=2)
    result = run(
        "score", tmp_path / "full", tmp_path / "empty", "--classes", "2", "--out", out, "--overwrite", "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert rows_of(out)[0]["dice"] == ""
    assert json.loads(result.stdout)["mean"] == {"dice": None, "hd95": None, "surface_dice": None}


def test_what_cannot_be_scored_is_said(tmp_path: Path) -> None:
    for name, spacing in (("good", 2.0), ("elsewhere", 3.0)):
        label_map(tmp_path / "ours" / f"{name}.nii.gz", 1)
        label_map(tmp_path / "theirs" / f"{name}.nii.gz", 2, spacing)
    label_map(tmp_path / "theirs" / "missing.nii.gz", 1)
    args = ["score", tmp_path / "ours", tmp_path / "theirs", "--out", tmp_path / "scores.csv"]
    result = run(*args, "--classes", "3")
    assert result.exit_code == 1
    assert "has no prediction named missing" in result.stderr
    assert "elsewhere: the prediction" in result.stderr
    assert {row["case"] for row in rows_of(tmp_path / "scores.csv")} == {"good"}
    few = run(*args, "--classes", "2", "--overwrite")
    assert (few.exit_code, "below classes=2" in few.stderr) == (1, True)
    assert "3 names for 5 classes" in run(*args, "--classes", "5", "--names", "a,b,c", "--overwrite").stderr
    (tmp_path / "none").mkdir()
    assert (
        run("score", tmp_path / "ours", tmp_path / "none", "--classes", "3", "--out", tmp_path / "x.csv").exit_code == 2
    )
