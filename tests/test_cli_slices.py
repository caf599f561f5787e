"""``medgmae slices``: images of scans, the table of where they come from, and the way back."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_python
from cli_runs import dicom_series, limited, small_scan, small_scans
from click.testing import Result
from PIL import Image
from test_cli import run

import medgmae
from medgmae.cli.batches import file_names
from medgmae.data import Grid, Scan, Volume
from medgmae.data.slices import read_manifest, take, to_volume

TURN = np.linalg.qr(np.array([[0.9, 0.3, -0.2], [-0.3, 0.95, 0.1], [0.2, -0.1, 1.0]]))[0]


def slices(*args: str | Path) -> Result:
    return run("slices", *args)


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "slices.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files_in(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


@pytest.fixture
def oblique(tmp_path: Path) -> Path:
    data = torch.arange(5 * 6 * 7, dtype=torch.int16).reshape(1, 5, 6, 7)
    Volume(data, Grid((5, 6, 7), (3.0, 0.9, 1.2), (100.1, -20.3, 5.7), TURN)).save(tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def test_a_scan_becomes_grey_images(oblique: Path, tmp_path: Path) -> None:
    result = slices(oblique, "--out", tmp_path / "out", "--input", "window=[0,200]", "--plane", "coronal")
    assert result.exit_code == 0, result.stderr
    scan = medgmae.read_volume(oblique)
    every = take(medgmae.data.window(scan, (0, 200)), "coronal")
    assert "1 of 1 scans" in result.stdout
    rows = rows_of(tmp_path / "out")
    assert [(row["name"], row["path"], row["plane"], row["index"]) for row in rows] == [
        ("scan", str(oblique), "coronal", str(i)) for i in range(len(every))
    ]
    for row, one in zip(rows, every, strict=True):
        stored = np.asarray(Image.open(tmp_path / "out" / row["file"]))
        assert np.array_equal(stored, np.rint(one.data[0, 0].double().numpy() * 255))
    assert files_in(tmp_path / "out") == ["scan/" + f"coronal_{i:04}.png" for i in range(len(every))] + ["slices.csv"]


@pytest.mark.parametrize("options", [("--bits", "16"), ("--format", "nii.gz")])
def test_label_maps_come_back_exactly(oblique: Path, tmp_path: Path, options: tuple[str, str]) -> None:
    out = tmp_path / "out"
    assert slices(oblique, "--out", out, "--labels", "--plane", "sagittal", *options).exit_code == 0
    scan = medgmae.read_volume(oblique)
    found = []
    for record in read_manifest(out / "slices.csv"):
        if options[1] == "16":
            found.append(record.volume(np.asarray(Image.open(record.file))))
        else:
            found.append(medgmae.read_volume(record.file))
    assert torch.equal(to_volume(found, scan).data.int(), scan.data.int())


def test_several_channels(tmp_path: Path) -> None:
    Volume(torch.rand(4, 3, 5, 6), Grid((3, 5, 6))).save(tmp_path / "mr.nii.gz")
    out = tmp_path / "out"
    assert slices(tmp_path / "mr.nii.gz", "--out", out, "--input", "channels=4", "--index", "middle").exit_code == 0
    assert [row["channel"] for row in rows_of(out)] == ["0", "1", "2", "3"]
    assert files_in(out)[0] == "mr/axial_0001_c0.png"
    nifti = ("--format", "nii.gz", "--overwrite")
    assert slices(tmp_path / "mr.nii.gz", "--out", out, "--input", "channels=4", *nifti).exit_code == 0
    assert files_in(out) == [f"mr/axial_{i:04}.nii.gz" for i in range(3)] + ["slices.csv"]
    assert medgmae.read_volume(out / "mr/axial_0000.nii.gz", channels=4).shape == (4, 1, 5, 6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("all", [0, 1, 2, 3, 4]), ("middle", [2]), ("1,-1,1", [1, 4]), ("1:4", [1, 2, 3]), ("::2", [0, 2, 4])],
)
def test_which_slices(oblique: Path, tmp_path: Path, text: str, expected: list[int]) -> None:
    assert slices(oblique, "--out", tmp_path / "out", "--plane", "stored", "--index", text).exit_code == 0
    assert [int(row["index"]) for row in rows_of(tmp_path / "out")] == expected


def test_slices_that_are_not_there(oblique: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text, said in (("7", "no slice 7; expected -5 to 4"), ("9:12", "none of the 5 slices")):
        result = slices(oblique, "--out", out, "--plane", "stored", "--index", text)
        assert (result.exit_code, said in result.stderr) == (1, True), result.stderr
        assert "nothing was written" in result.stdout
    for text in ("x", "1:2:0", "", "1,,2"):
        assert slices(oblique, "--out", out, "--index", text).exit_code == 2
    assert files_in(out) == []


def test_the_published_slice(oblique: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert slices(oblique, "--out", out, "--recipe", "selfmedmae_uva").exit_code == 0
    expected = medgmae.data.slices.selfmedmae_uva(medgmae.read_volume(oblique)).data[0, 0]
    assert np.array_equal(np.asarray(Image.open(out / "scan/stored_0002.png")), expected)
    for more in (("--plane", "coronal"), ("--labels",), ("--input", "window=[0,1]")):
        assert slices(oblique, "--out", out, "--recipe", "selfmedmae_uva", "--overwrite", *more).exit_code == 2


def test_folders_series_and_what_cannot_be_read(tmp_path: Path) -> None:
    top, out = tmp_path / "top", tmp_path / "out"
    small_scan(top / "a/scan.nii.gz")
    small_scan(top / "b/scan.nii.gz", 1)
    dicom_series(top / "c", "1.2.3.1", description="Lung")
    dicom_series(top / "c", "1.2.3.2")
    (top / "broken.nii").write_bytes(b"no scan")
    (top / "notes.txt").write_text("x")
    result = slices(top, "--out", out, "--index", "middle", "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [Path(one["path"]).name for one in facts["errors"]] == ["broken.nii"]
    assert [Path(one["path"]).name for one in facts["skipped"]] == ["notes.txt"]
    assert len(facts["scans"]) == len(rows_of(out)) == 4
    assert {row["series"] for row in rows_of(out)} == {"", "1.2.3.1", "1.2.3.2"}
    assert len({row["file"] for row in rows_of(out)}) == 4
    listed = slices(top, "--list", "--series", "lung")
    assert "1.2.3.1" in listed.stdout
    assert "1.2.3.2" not in listed.stdout


def test_a_table_of_scans_carries_its_columns(oblique: Path, tmp_path: Path) -> None:
    table = tmp_path / "cases.csv"
    table.write_text("path,id,outcome\nscan.nii.gz,case 1,1\n")
    assert slices(table, "--out", tmp_path / "out", "--index", "0").exit_code == 0
    (row,) = rows_of(tmp_path / "out")
    assert (row["name"], row["outcome"], row["file"]) == ("case 1", "1", "case_1/axial_0000.png")
    (record,) = read_manifest(tmp_path / "out/slices.csv")
    assert record.labels["outcome"] == "1"
    table.write_text("path,plane\nscan.nii.gz,x\n")
    result = slices(table, "--out", tmp_path / "other")
    assert (result.exit_code, "'plane' is a column of the results" in result.stderr) == (2, True)


def test_nothing_is_replaced_unasked(oblique: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert slices(oblique, "--out", out, "--index", "0").exit_code == 0
    before = (out / "slices.csv").read_bytes()
    result = slices(oblique, "--out", out, "--index", "1")
    assert (result.exit_code, "--overwrite" in result.stderr) == (2, True)
    (out / "slices.csv").unlink()
    result = slices(oblique, "--out", out, "--index", "1")
    assert (result.exit_code, "scan exists; --overwrite replaces it" in result.stderr) == (1, True)
    assert files_in(out) == ["scan/axial_0000.png"]
    assert slices(oblique, "--out", out, "--index", "1", "--overwrite").exit_code == 0
    assert files_in(out) == ["scan/axial_0001.png", "slices.csv"]
    assert (out / "slices.csv").read_bytes() != before


def test_the_folder_is_not_searched_itself(tmp_path: Path) -> None:
    scans = small_scans(tmp_path / "scans", 1)
    result = slices(scans, "--out", scans / "out")
    assert (result.exit_code, "choose another --out" in result.stderr) == (2, True)
    assert slices(scans).exit_code == 2
    assert slices(scans, "--out", tmp_path / "none/out").exit_code == 1


_STOPS = """
import os, sys
import medgmae
from medgmae.data import slices
real, calls = slices.take, []
def counted(*args, **options):
    calls.append(args)
    if len(calls) == 3:
        os.kill(os.getpid(), 9)
    return real(*args, **options)
slices.take = counted
from medgmae.cli import main
main(sys.argv[1:])
"""


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    scans, out = small_scans(tmp_path / "scans", 4), tmp_path / "out"
    killed = warm_python.run("-c", _STOPS, "slices", scans, "--out", out)
    assert killed.returncode == -9
    assert not (out / "slices.csv").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("000[01]/*.png")}
    assert len(kept) == 16
    other = slices(scans, "--out", out, "--index", "0")
    assert (other.exit_code, "results of another run" in other.stderr) == (2, True)
    assert slices(scans, "--out", out).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(rows_of(out)) == 32
    assert not (out / "slices.csv.partial").exists()


def test_a_full_disk_leaves_no_half_of_a_scan(tmp_path: Path) -> None:
    data = torch.rand(1, 3, 200, 200, generator=torch.Generator().manual_seed(0))
    Volume(data, Grid((3, 200, 200))).save(tmp_path / "a.nii")
    out = tmp_path / "out"
    command = ["-m", "medgmae", "slices", tmp_path / "a.nii", "--out", out]
    done = warm_python.run(*command, limits=limited(20_000))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not (out / "a").exists()
    assert not (out / "slices.csv").exists()


def test_names_of_folders_lead_nowhere_else() -> None:
    names = ["../../etc/x", "a/b", "a_b", "A_B", "..", "-x", "slices.csv", "é ü", "x" * 300, "\\xff"]
    found = file_names([Scan(Path(name), name=name) for name in names], "slices.csv")
    assert found == ["_.._etc_x", "a_b", "a_b#2", "A_B#3", "scan", "_-x", "_slices.csv", "é_ü", "x" * 100, "_xff"]
