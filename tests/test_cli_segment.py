"""``medgmae segment``: label maps on the scan's own grid, tables of volumes, runs that go on, wrong use."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_python
from cli_runs import dicom_series
from click.testing import Result
from test_cli import run

import medgmae
from medgmae.data import Grid, Volume

NAMES = ["background", "liver", "spleen", "left kidney"]
INPUT = {"modality": "CT", "orientation": "RAS", "spacing": [1.5, 1.5, 1.5], "resample": {"to": "spacing"}}


def rows_of(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "volumes.csv").read_text().splitlines()))


def segment(*args: str | Path) -> Result:
    return run("segment", *args, "--threads", "1")


@pytest.fixture(scope="module")
def unetr(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model with weights, named classes and preprocessing."""
    torch.manual_seed(0)
    model: Any = medgmae.create_model("unetr_vit_nano_patch8_32", num_classes=4, img_size=16)
    model.label_names = NAMES
    model.pretrained_cfg = {**medgmae.weight_card("vit_tiny_patch8_64.demo").to_json(), "input": INPUT}
    return f"local-dir:{medgmae.save_pretrained(model, tmp_path_factory.mktemp('model') / 'unetr')}"


def scan_file(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = torch.randn(1, 12, 17, 20, generator=torch.Generator().manual_seed(seed))
    Volume(data, Grid((12, 17, 20), (2.0, 1.0, 1.5), (3.0, -4.0, 5.0))).save(path)
    return path


def test_the_files_are_the_librarys(unetr: str, tmp_path: Path) -> None:
    scan, out = scan_file(tmp_path / "a.nii.gz"), tmp_path / "out"
    result = segment(scan, "--model", unetr, "--out", out, "--png", "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    model: Any = medgmae.create_model(unetr)
    source = medgmae.read_volume(scan)
    prepared = medgmae.create_transform(model, whole=True)(scan)
    expected = medgmae.segment_scan(model.eval(), prepared, like=source).labels
    written = medgmae.read_volume(out / "a.nii.gz")
    assert torch.equal(written.data.to(torch.uint8), expected.data)
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-5)
    assert len(expected.data.unique()) > 1
    classes = facts["scans"]["a"]["classes"]
    assert [one["name"] for one in classes] == NAMES[1:]
    for one in classes:
        assert one["voxels"] == int((expected.data == one["label"]).sum())
        assert one["ml"] == pytest.approx(one["voxels"] * 3.0 / 1000)  # 2 x 1 x 1.5 mm
    assert json.loads((out / "volumes.json").read_text())["scans"] == facts["scans"]
    rows = rows_of(out)
    assert [(row["class"], int(row["voxels"])) for row in rows] == [(one["name"], one["voxels"]) for one in classes]
    assert (out / "a.png").stat().st_size > 10_000
    assert sorted(path.name for path in out.iterdir()) == ["a.nii.gz", "a.png", "volumes.csv", "volumes.json"]


def test_masks_are_channels(unetr: str, tmp_path: Path) -> None:
    scan, out = scan_file(tmp_path / "a.nii.gz"), tmp_path / "out"
    result = segment(scan, "--model", unetr, "--out", out, "--multilabel", "--format", "nrrd", "--json", "--png")
    assert result.exit_code == 0, result.stderr
    masks = medgmae.read_volume(out / "a.nrrd", channels=4)
    classes = json.loads(result.stdout)["scans"]["a"]["classes"]
    assert [one["voxels"] for one in classes] == [int(mask.sum()) for mask in masks.data]
    assert [one["name"] for one in classes] == NAMES


def test_a_dicom_series_becomes_a_dicom_segmentation(unetr: str, tmp_path: Path) -> None:
    import highdicom

    study = {"0008|0020": "20200101", "0008|0030": "120000", "0010|0020": "p1", "0020|0052": "1.2.3.9"}
    dicom_series(tmp_path / "study", "1.2.3.4.5", range(6), **study)
    scan_file(tmp_path / "b.nii.gz")
    common = ["--model", unetr, "--input", "spacing=[3,1,1]"]
    plain = segment(tmp_path / "study", *common, "--out", tmp_path / "maps")
    assert plain.exit_code == 0, plain.stderr
    result = segment(
        tmp_path / "study", tmp_path / "b.nii.gz", *common, "--out", tmp_path / "out", "--format", "dicom-seg"
    )
    assert result.exit_code == 1
    assert "is not a DICOM series" in result.stderr
    assert result.stderr.count("Error") == 1, result.stderr
    (file,) = (tmp_path / "out").glob("*.seg.dcm")
    read = highdicom.seg.segread(file)
    (labels,) = (tmp_path / "maps").glob("*.nii.gz")
    expected = medgmae.read_volume(labels)
    present = [k for k in (1, 2, 3) if (expected.data == k).any()]
    assert present
    assert read.PatientID == "p1"
    assert [item.SegmentLabel for item in read.SegmentSequence] == NAMES[1:]
    found = read.get_volume(combine_segments=True)
    back = Volume(torch.from_numpy(found.array.astype(np.uint8))[None], Grid.from_affine(found.affine, found.shape))
    back = medgmae.data.resample_like(back, expected, interpolation="nearest")
    assert torch.equal(back.data, expected.data.to(torch.uint8))


def test_a_scan_that_cannot_be_read_is_left_out(unetr: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "scans", tmp_path / "out"
    for seed in range(3):
        scan_file(folder / f"{seed}.nii.gz", seed)
    args = ["segment", folder, "--model", unetr, "--out", out, "--threads", "1"]
    (folder / "3.nii.gz").write_bytes(b"no scan")
    failed = run(*args)
    assert failed.exit_code == 1
    assert "3.nii.gz" in failed.stderr
    assert len(rows_of(out)) == 3 * 3
    again = run(*args)
    assert again.exit_code == 2
    assert "volumes.json exists" in again.stderr
    (folder / "3.nii.gz").unlink()
    assert run(*args, "--overwrite").exit_code == 0


def test_a_killed_run_goes_on(unetr: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "scans", tmp_path / "out"
    for seed in range(3):
        scan_file(folder / f"{seed}.nii.gz", seed)
    args = ["segment", str(folder), "--model", unetr, "--out", str(out), "--threads", "1"]
    code = (
        "import os, signal, sys, medgmae\n"
        "real, calls = medgmae.segment_scan, []\n"
        "def counted(*args, **options):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args, **options)\n"
        "medgmae.segment_scan = counted\n"
        "from medgmae.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    killed = warm_python.run("-c", code, *args)
    assert killed.returncode == -9, killed.stderr
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["0.nii.gz", "1.nii.gz"]
    before = (out / "0.nii.gz").stat().st_mtime_ns
    done = run(*args)
    assert done.exit_code == 0, done.stderr
    assert "2 of 3 scans were done by an earlier run" in done.stderr
    assert (out / "0.nii.gz").stat().st_mtime_ns == before
    assert len(rows_of(out)) == 3 * 3


def test_tables_of_scans_lists_and_skipped_files(unetr: str, tmp_path: Path) -> None:
    scan_file(tmp_path / "scans" / "a.nii.gz")
    (tmp_path / "scans" / "b.dcm").write_bytes(b"no scan")
    listed = run("segment", tmp_path / "scans", "--model", unetr, "--list", "--json")
    assert [one["name"] for one in json.loads(listed.stdout)["scans"]] == ["a"]
    assert not (tmp_path / "out").exists()
    strict = segment(tmp_path / "scans", "--model", unetr, "--out", tmp_path / "out", "--strict")
    assert (strict.exit_code, "b.dcm" in strict.stderr) == (1, True)
    table = tmp_path / "table.csv"
    table.write_text("id,path,labels\ncase 7/x,scans/a.nii.gz,3\n")
    result = segment(table, "--model", unetr, "--out", tmp_path / "from_table", "--json")
    assert result.exit_code == 0, result.stderr
    (facts,) = json.loads(result.stdout)["scans"].values()
    assert (facts["labels"], facts["file"]) == ({"id": "case 7/x", "labels": "3"}, "case_7_x.nii.gz")
    assert (tmp_path / "from_table" / "case_7_x.nii.gz").exists()
    assert {row["file"] for row in rows_of(tmp_path / "from_table")} == {"case_7_x.nii.gz"}


def test_wrong_use(unetr: str, tmp_path: Path) -> None:
    scan = scan_file(tmp_path / "scans" / "a.nii.gz")
    encoder = segment(scan, "--model", "vit_tiny_patch8_64.demo", "--out", tmp_path / "out")
    assert (encoder.exit_code, "says nothing of single voxels" in encoder.stderr) == (2, True)
    nowhere = segment(scan, "--model", unetr)
    assert (nowhere.exit_code, "missing option '--out'" in nowhere.stderr) == (2, True)
    inside = segment(tmp_path / "scans", "--model", unetr, "--out", tmp_path / "scans" / "labels")
    assert (inside.exit_code, "would take results for scans" in inside.stderr) == (2, True)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"mine")
    kept = segment(scan, "--model", unetr, "--out", tmp_path / "out")
    assert (kept.exit_code, "a.nii.gz exists" in kept.stderr) == (2, True)
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == b"mine"
    own = segment(scan, "--model", unetr, "--out", scan.parent, "--overwrite")
    assert (own.exit_code, "is an input" in own.stderr) == (2, True)
