"""Which scans commands find in folders and tables, what they say of the rest, and names that are not UTF-8."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_python
from cli_runs import dicom_series, facts_of, saved_nano, small_scan
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cli import run

import medgmae
from medgmae.data import Listing, find_scans, path_of, shown


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_nano(tmp_path_factory.mktemp("model") / "nano")


def features(*args: str | Path) -> Result:
    return run("features", *args)


def names(listing: Listing) -> list[str]:
    return [scan.name for scan in listing.scans]


def reasons(listing: Listing) -> dict[str, str]:
    return {Path(one["path"]).name: one["reason"] for one in listing.skipped}


# folders


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """Scans at several depths, two series in one folder, and what lies beside them."""
    top = tmp_path / "hospital"
    small_scan(top / "first.nii.gz")
    small_scan(top / "ward/a/scan.nii.gz", 1)
    small_scan(top / "ward/b/scan.mha", 2)
    dicom_series(top / "ward/c", "1.2.3.1", description="Lung 1.0")
    dicom_series(top / "ward/c", "1.2.3.2", description="Soft tissue")
    dicom_series(top / "ward/d", "1.2.3.3")
    dicom_series(top / "ward/d", "1.2.3.4", range(1), description="Scout")
    for name in ("labels.csv", "ward/a/preview.png", "ward/a/report.pdf", "ward/.DS_Store", "ward/c/._1.dcm"):
        (top / name).write_bytes(b"x")
    return top


SCANS = ["first", "scan.nii.gz", "scan.mha", "1.2.3.1", "1.2.3.2", "d"]


def test_folders_are_searched_to_their_ends(hospital: Path) -> None:
    listing = find_scans([hospital])
    assert names(listing) == SCANS
    assert [scan.series for scan in listing.scans] == [None, None, None, "1.2.3.1", "1.2.3.2", "1.2.3.3"]
    assert reasons(listing) == {
        "labels.csv": "a table or text", "preview.png": "a picture", "report.pdf": "a table or text",
        ".DS_Store": "hidden", "._1.dcm": "hidden",
        "1.2.3.4-000.dcm": "series 1.2.3.4 (CT Scout) is one 2-D image",
    }  # fmt: skip
    assert listing.unexpected == 1
    assert listing.errors == []


def test_one_row_per_series(hospital: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "f.csv"
    result = features(hospital, "--model", model, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    assert "Skipped, a picture: " in result.stderr
    facts = json.loads(result.stdout)
    assert len(facts["skipped"]) == 6
    assert facts["scans"]["1.2.3.1"]["description"] == "CT Lung 1.0"
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["name"] for row in rows] == SCANS
    assert [row["series"] for row in rows][2:] == ["", "1.2.3.1", "1.2.3.2", "1.2.3.3"]
    assert {row["path"] for row in rows[3:5]} == {str(hospital / "ward/c")}
    prepare = medgmae.create_transform({"window": {"percentiles": [0.5, 99.5]}}, whole=True)
    scan = prepare(medgmae.read_volume(hospital / "ward/c", series="1.2.3.2"))
    wanted = medgmae.extract_features(medgmae.create_model(model).eval(), scan).pooled
    found = [float(rows[4][f"f{i}"]) for i in range(len(wanted))]
    np.testing.assert_array_equal(np.array(found, np.float32), wanted.numpy())
    strict = features(hospital, "--model", model, "--out", tmp_path / "g.csv", "--strict")
    assert strict.exit_code == 1  # a series that is one picture may be what is left of a scan
    assert "6 of 6 scans" in strict.stdout


def test_list_prints_what_would_be_read_and_does_nothing(hospital: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = features(hospital, "--list")
    assert result.exit_code == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["name", *SCANS]
    assert "1.2.3.4 (CT Scout) is one 2-D image" in result.stderr
    listed = features(hospital, "--list", "--json", "--strict", "--model", "vit_large_patch16_256.tangerine")
    assert listed.exit_code == 1
    assert [scan["name"] for scan in json.loads(listed.stdout)["scans"]] == SCANS
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("pattern", "found"), [("1.2.3.2", ["c"]), ("*LUNG*", ["c"]), ("1.2.3.*", SCANS[3:])])
def test_series_are_chosen(pattern: str, found: list[str], hospital: Path) -> None:
    listing = find_scans([hospital / "ward/c", hospital / "ward/d"], series=[pattern])
    assert names(listing) == found
    assert all(
        "not chosen" in reason for reason in reasons(listing).values() if "1.2.3" in reason and "one" not in reason
    )
    result = features(hospital, "--list", "--series", "*brain*")
    assert result.exit_code == 2
    assert "CT Lung 1.0  4 file(s)" in result.stderr


def test_series_in_several_folders(tmp_path: Path) -> None:
    """Halves of a series are one scan; copies of a series are two."""
    dicom_series(tmp_path / "case/one", "1.2.3.1", range(4))
    dicom_series(tmp_path / "case/two", "1.2.3.1", range(4, 9))
    listing = find_scans([tmp_path])
    assert [(scan.path, scan.series) for scan in listing.scans] == [(tmp_path / "case", "1.2.3.1")]
    assert medgmae.read_volume(tmp_path / "case", series="1.2.3.1").size[0] == 9
    shutil.rmtree(tmp_path / "case/two")
    shutil.copytree(tmp_path / "case/one", tmp_path / "case/two")
    assert names(find_scans([tmp_path])) == ["one", "two"]
    for z in range(4):  # as some archives export: a folder per slice
        dicom_series(tmp_path / f"slices/{z}", "1.2.3.7", range(z, z + 1))
    assert [(scan.path, scan.series) for scan in find_scans([tmp_path / "slices"]).scans] == [
        (tmp_path / "slices", "1.2.3.7")
    ]
    apart = find_scans([tmp_path / "slices/0", tmp_path / "slices/1"])  # nothing but the named folders is searched
    assert apart.scans == []
    assert len(apart.skipped) == 2


def test_strict_complains_of_what_may_be_a_scan(tmp_path: Path, model: str) -> None:
    small_scan(tmp_path / "scans/a.nii")
    for name in ("notes.txt", "overview.PNG", "a.json", "a.raw", "old.npz"):
        (tmp_path / "scans" / name).touch()
    command = [tmp_path / "scans", "--model", model, "--strict", "--overwrite", "--out", tmp_path / "f.csv"]
    assert features(*command).exit_code == 0
    for name in ("b.nii.gz.part", "c.zip", "unknown"):
        (tmp_path / "scans" / name).write_bytes(b"x" * 200)
        result = features(*command)
        assert result.exit_code == 1
        assert f"not recognised as a scan: {tmp_path / 'scans' / name}" in result.stderr
        (tmp_path / "scans" / name).unlink()
    (tmp_path / "scans/link.nii").symlink_to("nowhere")
    assert "a link to nowhere" in features(*command).stderr


def test_hostile_folders_end(tmp_path: Path) -> None:
    top = tmp_path / "scans"
    small_scan(top / "a.nii")
    (top / "loop").symlink_to(top)
    (top / "up").symlink_to(tmp_path)
    os.mkfifo(top / "pipe.nii")
    deep = top.joinpath(*["d"] * 1500)  # deeper than Python may call
    subprocess.run(["mkdir", "-p", deep], check=True)
    small_scan(tmp_path / "b.nii.gz").rename(deep / "b.nii.gz")
    (top / "broken").mkdir()
    (top / "broken/1.dcm").write_bytes(b"no DICOM")
    listing = find_scans([top])
    assert names(listing) == ["a", "b"]
    assert reasons(listing) == {"pipe.nii": "not a regular file"}
    assert "cannot be read as a DICOM image" in listing.errors[0]["error"]
    assert len(find_scans([top, top / "d"]).errors) == 1
    for path in (top / "pipe.nii", tmp_path / "none.nii", tmp_path / "scans/none"):
        assert len(find_scans([path]).errors) == 1
    subprocess.run(["rm", "-r", top / "d"], check=True)  # pytest could not


def test_a_folder_of_nothing(tmp_path: Path, model: str) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans/a.txt").touch()
    result = features(tmp_path / "scans", "--model", model, "--out", tmp_path / "f.csv")
    assert result.exit_code == 1
    assert "no scan in this folder" in result.stderr
    assert os.listdir(tmp_path) == ["scans"]


_NAMES = st.sampled_from([
    "a.nii", "a.nii.gz", "b.MHA", "c.txt", "d.png", "e", "f.dcm", "g.zip", ".h", ".i.nii", "j.raw", "k.csv", "x_t1.nii",
    "x_t2.nii", "folder", "other", "l.partial", "m\udcff.nii", "n\n.nrrd", "\u4e09.mgz", "1.2.840.113",
])  # fmt: skip


@settings(deadline=None)  # an import may come first
@given(
    st.lists(st.tuples(st.lists(_NAMES, min_size=1, max_size=4), st.booleans()), min_size=1, max_size=8), st.booleans()
)
def test_no_file_is_lost_in_silence(paths: list[tuple[list[str], bool]], contrasts: bool) -> None:
    """Every file of a folder is a scan or part of one, is skipped, or is in what cannot be read."""
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        for parts, dicom in paths:
            path = top.joinpath(*parts)
            with contextlib.suppress(OSError):  # a file where a folder should be
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"\0" * 128 + b"DICM" if dicom else b"x")
        listing = find_scans([top], ["t1", "t2"] if contrasts else None)
        said = {scan.path for scan in listing.scans} | {path_of(one["path"]) for one in listing.skipped}
        unread = {path_of(one["path"]) for one in listing.errors if "no scan in this folder" not in one["error"]}
        for path in top.rglob("*"):
            assert not path.is_file() or said & {path, *path.parents} or path.parent in unread, (path, said, unread)
        assert len(names(listing)) == len(set(names(listing)))


# tables


def table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_table_of_scans(tmp_path: Path, model: str) -> None:
    for i, name in enumerate(["x/scan.nii", "y/scan.nii"]):
        small_scan(tmp_path / name, i)
    dicom_series(tmp_path / "z", "1.2.3.1")
    dicom_series(tmp_path / "z", "1.2.3.2")
    rows = ["id,path,series,age,diagnosis", "p1,x/scan.nii,,61,\"COPD, mild\"",
            f"p0,{tmp_path}/y/scan.nii,,47,", "p2,z,1.2.3.2,50,none"]  # fmt: skip
    cases = table(tmp_path / "cases.csv", "\ufeff" + "\r\n".join(rows) + "\r\n")
    for out in ("f.csv", "f.npy", "f.safetensors"):
        result = features(cases, "--model", model, "--out", tmp_path / out)
        assert result.exit_code == 0, result.stderr
    written = list(csv.DictReader((tmp_path / "f.csv").read_text().splitlines()))
    assert [row["name"] for row in written] == [row["id"] for row in written] == ["p1", "p0", "p2"]
    assert [row["diagnosis"] for row in written] == ["COPD, mild", "", "none"]
    assert list(written[0])[:7] == ["name", "path", "series", "id", "age", "diagnosis", "f0"]
    facts = facts_of(tmp_path / "f.safetensors")["scans"]
    assert facts["p1"]["labels"] == {"id": "p1", "age": "61", "diagnosis": "COPD, mild"}
    assert json.loads((tmp_path / "f.json").read_text())["scans"] == facts | {
        name: {**facts[name], "map": None, "seconds": pytest.approx(0, abs=60)} for name in facts
    }
    assert "p2/pooled" in load_file(tmp_path / "f.safetensors")
    again = features(table(tmp_path / "two.csv", "path;age\nx/scan.nii;61\ngone.nii;1\n"), "--list")
    assert again.exit_code == 1
    assert "gone.nii: no such file or folder" in again.stderr
    assert [line.split()[0] for line in again.stdout.splitlines()] == ["name", "scan"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns none; expected one named path"),
        ("file,age\na.nii,3\n", "has the columns file, age; expected one named path"),
        ("path\n", "has no rows"),
        ("path,age\na.nii\n", "row 2: 1 cells; expected 2"),
        ("path,id\na.nii,1\nb.nii,1\n", "the id '1' twice"),
        ("path,id\na.nii,1\na.nii,2\n", "twice; expected each once"),
        ("path,id\na.nii,\n", "row 2: the id is empty"),
        ("path,f0\na.nii,1\n", "'f0' is a column of the results; rename it"),
        ("path,path\na.nii,1\n", "a column has no name, or that of another"),
        ('path,age\n"a.nii,1\n', "is not a table"),
    ],
)
def test_tables_that_are_wrong(text: str, message: str, tmp_path: Path) -> None:
    for name in ("a.nii", "b.nii"):
        (tmp_path / name).touch()
    result = features(table(tmp_path / "t.csv", text), "--list")
    assert result.exit_code == 2, result.stderr
    assert message in " ".join(result.stderr.split())


def test_a_table_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"path,name\nM\xfcller.nii,1\n")
    result = features(tmp_path / "t.csv", "--list")
    assert result.exit_code == 2
    assert "is not UTF-8" in result.stderr


# names


@given(st.binary(max_size=30), st.booleans())
def test_names_come_back(raw: bytes, escape: bool) -> None:
    path = os.fsdecode(raw + (rb"\x5c\xff\\x41" if escape else b""))
    text = shown(path)
    assert text.encode().decode() == text
    assert not any(ord(one) < 32 for one in text)
    assert os.fspath(path_of(text)) == os.fspath(Path(path))


def test_only_what_cannot_be_shown_is_escaped() -> None:
    assert shown("/data/Müller, 三 (1).nii") == "/data/Müller, 三 (1).nii"
    assert shown(os.fsdecode(b"/data/M\xfcller\n.nii")) == "/data/M\\xfcller\\x0a.nii"
    assert shown("\\x41 \\x4 C:\\new") == "\\x5cx41 \\x4 C:\\new"


def test_outputs_have_names_that_readers_can_open(model: str, tmp_path: Path) -> None:
    scan = small_scan(tmp_path / "a.nii")
    out = os.fsdecode(b"/M\xfcller.safetensors")
    done = warm_python.run("-m", "medgmae", "features", scan, "--model", model, "--out", f"{tmp_path}{out}")
    assert done.returncode == 2
    assert "M\\xfcller.safetensors is not a name in UTF-8" in " ".join(done.stderr.split())
    assert os.listdir(tmp_path) == ["a.nii"]


@pytest.mark.parametrize("ending", ["safetensors", "csv", "npy"])
def test_names_that_are_not_utf8(ending: str, model: str, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/scans \xe9"))
    small_scan(tmp_path / "plain.nii.gz")
    folder.mkdir()
    for name in (b"M\xfcller.nii.gz", b"line\nbreak.nii.gz", b"plain.nii.gz"):
        shutil.copy(tmp_path / "plain.nii.gz", os.fsencode(folder) + b"/" + name)
    small_scan(tmp_path / "a.mha").rename(folder / os.fsdecode(b"M\xfcller.mha"))
    out = tmp_path / f"f\u4e09.{ending}"
    done = warm_python.run("-m", "medgmae", "features", folder, "--model", model, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 scans" in done.stdout
    escaped = ["line\\x0abreak", "M\\xfcller.mha", "M\\xfcller.nii.gz", "plain"]
    if ending == "safetensors":
        tensors = load_file(out)
        assert sorted(tensors) == sorted(f"{name}/{part}" for name in escaped for part in ("map", "pooled"))
        assert torch.equal(tensors["plain/pooled"], tensors["M\\xfcller.nii.gz/pooled"])
        paths = [facts_of(out)["scans"][name]["path"] for name in escaped]
    elif ending == "csv":
        rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
        assert sorted(row["name"] for row in rows) == sorted(escaped)
        paths = [row["path"] for row in rows]
        again = features(out, "--list", "--json")  # has a column "name", and must be told so rather than misread
        assert again.exit_code == 2
    else:
        paths = json.loads(out.with_suffix(".json").read_text())["paths"]
        assert np.load(out).shape[0] == 4
    assert {path_of(path) for path in paths} == set(folder.iterdir())
    table(tmp_path / "t.csv", "path\n" + "\n".join(paths) + "\n")
    assert features(tmp_path / "t.csv", "--list").exit_code == 0
