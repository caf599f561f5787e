"""Folders and tables that try to lose a scan or to stop a run: what tests/fuzz/fuzz_folders.py found, and a short run
of it."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import pytest
import warm_python
from cli_runs import dicom_series, happening, saved_nano, small_scan
from click.testing import Result
from test_cli import run

import medgmae
from medgmae.data import Listing, Scan, files_of, find_scans, unique_names

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_nano(tmp_path_factory.mktemp("model") / "nano")


def features(*args: str | Path) -> Result:
    return run("features", "--threads", "1", *args)


def slices_of(listing: Listing) -> list[int]:
    return [len(scan.files or ()) for scan in listing.scans]


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_the_fuzzer_of_folders_finds_nothing_in_a_short_run(count: int) -> None:
    """The full run has 10,000 cases: python tests/fuzz/fuzz_folders.py --count 10000."""
    script = ROOT / "tests/fuzz/fuzz_folders.py"
    done = warm_python.run(script, "--count", str(count), "--seed", "11", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} cases, 0 findings" in done.stdout


def test_a_part_of_a_series_behind_a_link_is_read(tmp_path: Path, model: str) -> None:
    dicom_series(tmp_path / "case/one", "1.2.3.1", range(4))
    dicom_series(tmp_path / "elsewhere", "1.2.3.1", range(4, 9))
    (tmp_path / "case/two").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "case/two/loop").symlink_to(tmp_path / "case")
    assert slices_of(find_scans([tmp_path / "case"])) == [9]
    assert medgmae.read_volume(tmp_path / "case").size[0] == 9
    assert features(tmp_path / "case", "--model", model, "--out", tmp_path / "f.csv").exit_code == 0


def test_a_series_is_read_from_its_own_files(tmp_path: Path, model: str) -> None:
    """Not from a copy of it below, hidden files, or a broken file in a folder of its own."""
    dicom_series(tmp_path / "case", "1.2.3.1")
    dicom_series(tmp_path / "case/copy", "1.2.3.1")
    dicom_series(tmp_path / "case/.trash", "1.2.3.1")
    result = features(tmp_path / "case", "--model", model, "--out", tmp_path / "f.csv")
    assert result.exit_code == 0, result.stderr
    assert len((tmp_path / "f.csv").read_text().splitlines()) == 3
    (tmp_path / "case/broken").mkdir()
    (tmp_path / "case/broken/1.dcm").write_bytes(b"x" * 300)
    result = features(tmp_path / "case", "--model", model, "--out", tmp_path / "g.csv")
    assert "2 of 3 scans" in result.stdout
    shutil.rmtree(tmp_path / "case/copy")
    shutil.rmtree(tmp_path / "case/broken")
    assert medgmae.read_volume(tmp_path / "case").size[0] == 4


def test_copies_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    dicom_series(tmp_path / "one", "1.2.3.1", range(6))
    dicom_series(tmp_path / "two", "1.2.3.1", range(3))
    dicom_series(tmp_path / "two", "1.2.3.2")
    listing = find_scans([tmp_path])
    assert [scan.series for scan in listing.scans] == ["1.2.3.2"]
    assert "lies in 2 folders that have some of its slices in common" in listing.errors[0]["error"]


def test_names_that_cannot_be_looked_at_stop_no_run(tmp_path: Path, model: str) -> None:
    small_scan(tmp_path / "scans/a.nii")
    (tmp_path / "scans/link").symlink_to("y" * 300)
    long = "z" * 300
    result = features(tmp_path / "scans", long, "--model", model, "--out", tmp_path / "f.csv")
    assert result.exit_code == 1
    assert "1 of 2 scans" in result.stdout
    assert f"{long}: cannot be read: File name too long" in result.stderr
    (tmp_path / "t.csv").write_text(f"path\nscans/a.nii\n{long}\na\0b\n")
    result = features(tmp_path / "t.csv", "--model", model, "--out", tmp_path / "g.csv")
    assert "1 of 3 scans" in result.stdout


@pytest.mark.skipif(os.getuid() == 0, reason="nothing is closed to root; the fuzzer becomes another user")
def test_closed_folders_and_files_are_errors(tmp_path: Path) -> None:
    for name in ("a/x.nii", "b/y.nii", "c/unknown"):
        small_scan(tmp_path / f"{name}.nii").rename(tmp_path / name)
    closed = {tmp_path / "a": 0o400, tmp_path / "b": 0, tmp_path / "c/unknown": 0}
    for path, mode in closed.items():
        path.chmod(mode)
    listing = find_scans([tmp_path])
    for path in closed:
        path.chmod(0o700)
    assert listing.scans == []
    assert len(listing.errors) == 3


def test_an_id_with_control_characters(tmp_path: Path, model: str) -> None:
    dicom_series(tmp_path / "case", "1.2.3.9")
    for path in (tmp_path / "case").iterdir():
        path.write_bytes(path.read_bytes().replace(b"1.2.3.9\0", b"1.\r\x1b[2J\0"))
    result = features(tmp_path / "case", "--model", model, "--out", tmp_path / "f.csv")
    assert result.exit_code == 0, result.stderr
    with (tmp_path / "f.csv").open(newline="") as file:
        assert [row["series"] for row in csv.DictReader(file)] == ["1.\\x0d\\x1b[2J"]
    assert "\x1b" not in features(tmp_path / "case", "--list").stdout
    assert features(tmp_path / "case", "--list", "--series", "1.\\x0d*").exit_code == 0


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_cells_of_a_table_are_kept_as_they_are(ends: str, tmp_path: Path, model: str) -> None:
    small_scan(tmp_path / "a.nii")
    cells = ["form\x0bfeed", "\u2028", "two\rlines", "two\r\nlines", "a;b"]
    lines = ['"a,b";path;c;d;e;f', ";".join([f'"{cells[0]}"', "a.nii", *(f'"{cell}"' for cell in cells[1:])])]
    (tmp_path / "t.csv").write_bytes(ends.join([*lines, ""]).replace('"form', "form").replace('feed"', "feed").encode())
    result = features(tmp_path / "t.csv", "--model", model, "--out", tmp_path / "f.csv")
    assert result.exit_code == 0, result.stderr
    with (tmp_path / "f.csv").open(newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    assert [row[name] for name in ("a,b", "c", "d", "e", "f")] == cells


def test_a_scan_that_changes_or_vanishes_meanwhile(tmp_path: Path, model: str) -> None:
    """The others are done, and what was kept of it is not taken for the new one."""
    for i in range(4):
        small_scan(tmp_path / f"scans/{i}.nii", i)
    second, command = tmp_path / "scans/1.nii", ["features", tmp_path / "scans", "--model", model, "--threads", "1"]
    done = happening(2, f"os.truncate({str(second)!r}, 400)", *command, "--out", tmp_path / "f.csv")
    assert done.returncode == 1
    assert "3 of 4 scans" in done.stdout
    assert "1.nii was changed while it was read" in done.stderr
    done = happening(2, f"os.unlink({str(second)!r})", *command, "--out", tmp_path / "g.csv")
    assert "3 of 4 scans" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_scan_for_which_the_memory_is_too_small_is_left_out(tmp_path: Path, model: str) -> None:
    for i in range(3):
        small_scan(tmp_path / f"scans/{i}.nii", i)
    action = "import torch; torch.empty(1 << 60, dtype=torch.uint8)"
    done = happening(2, action, "features", tmp_path / "scans", "--model", model, "--out", tmp_path / "f.csv")
    assert done.returncode == 1
    assert "2 of 3 scans" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_data_file_that_has_changed_is_read_again(tmp_path: Path, model: str) -> None:
    header = "NDims = 3\nDimSize = 8 8 8\nElementSpacing = 1 1 1\nElementType = MET_UCHAR\nElementDataFile = {}.raw\n"
    (tmp_path / "scans").mkdir()
    for i in range(3):
        (tmp_path / f"scans/{i}.mhd").write_text(header.format(i))
        (tmp_path / f"scans/{i}.raw").write_bytes(bytes(range(i, i + 128)) * 4)
    command = ["features", tmp_path / "scans", "--model", model, "--threads", "1", "--out", tmp_path / "f.csv"]
    happening(3, "os._exit(9)", *command)
    (tmp_path / "scans/0.raw").write_bytes(bytes(range(77, 205)) * 4)
    again = happening(9, "pass", *command)
    assert "1 of 3 scans were done by an earlier run" in again.stderr


def test_the_files_of_a_scan(tmp_path: Path) -> None:
    names = ("a.img", "b.raw", "s1.raw", "s2.raw", "c.nii")
    for name in names:
        (tmp_path / name).touch()
    texts = {"a.hdr": "", "b.mhd": "ElementDataFile = b.raw\n", "d.nhdr": "NRRD0005\ndata file: s%d.raw 1 2\n",
             "e.mhd": "ElementDataFile = gone.raw\n"}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert [path.name for path in files_of(tmp_path / "a.hdr")] == ["a.hdr", "a.img"]
    assert [path.name for path in files_of(tmp_path / "a.img")] == ["a.hdr", "a.img"]
    assert [path.name for path in files_of(tmp_path / "b.mhd")] == ["b.mhd", "b.raw"]
    assert {path.name for path in files_of(tmp_path / "d.nhdr")} == {*names, *texts}
    assert files_of(tmp_path / "e.mhd") == [tmp_path / "e.mhd"]
    assert files_of(tmp_path / "c.nii") == [tmp_path / "c.nii"]


def test_packed_pairs_are_found(tmp_path: Path) -> None:
    for name in ("a.hdr.gz", "a.img.gz", "b.mgh.gz"):
        (tmp_path / name).touch()
    listing = find_scans([tmp_path])
    assert [scan.name for scan in listing.scans] == ["a", "b"]
    assert listing.unexpected == 0


def test_numbered_names_are_unique() -> None:
    paths = [Path("/c/1"), Path("/c/1"), Path("/c/1#2"), Path("/d/1#2")]
    assert len(set(unique_names(paths))) == 4


def test_torn_settings_of_a_run_are_said(tmp_path: Path, model: str) -> None:
    small_scan(tmp_path / "a.nii")
    partial = tmp_path / "f.csv.partial"
    partial.mkdir()
    (partial / "0.safetensors").touch()
    (partial / "run.json").write_bytes(b"\xff\xfe{")
    command = [tmp_path / "a.nii", "--model", model, "--out", tmp_path / "f.csv"]
    result = features(*command)
    assert result.exit_code == 2
    assert "holds results of another run" in " ".join(result.stderr.split())
    assert features(*command, "--overwrite").exit_code == 0


def test_a_row_says_what_it_is_of() -> None:
    assert Scan(Path("a"), "1\n2").described["series"] == "1\\x0a2"
