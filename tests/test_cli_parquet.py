"""``medgmae features`` of many scans: Parquet, runs that are gone on with, parts that are merged, series of DICOM."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import dicom_series, facts_of, saved_nano, small_scan, small_scans
from click.testing import Result
from pyarrow import parquet
from safetensors.torch import load_file
from test_cli import run

import medgmae
from medgmae.cli.features import shards

FORMATS = ["f.safetensors", "f.npy", "f.parquet", "folder"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_nano(tmp_path_factory.mktemp("model") / "nano")


@pytest.fixture
def five(tmp_path: Path) -> Path:
    return small_scans(tmp_path / "scans", 5)


def features(*args: str | Path) -> Result:
    return run("features", "--threads", "1", "--workers", "0", "--input", "window=[0,1]", *args)


def vectors(out: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Vectors by name, of whatever holds them, read without this library's readers."""
    if out.suffix == ".safetensors":
        return {
            name.removesuffix("/pooled"): tensor.numpy() for name, tensor in load_file(out).items() if "pooled" in name
        }
    if out.suffix == ".npy":
        return dict(zip(json.loads(out.with_suffix(".json").read_text())["names"], np.load(out), strict=True))
    files = (
        [out]
        if out.is_file()
        else [out / one["file"] for one in json.loads((out / "index.json").read_text())["tables"]]
    )
    rows = [row for file in files for row in parquet.read_table(file).to_pylist() if row["error"] is None]
    return {row["name"]: np.array(row["vector"], np.float32) for row in rows}


def same(one: Path, other: Path) -> bool:
    a, b = vectors(one), vectors(other)
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["f.parquet", "folder"])
def test_a_table_has_a_row_for_each_scan_and_each_error(name: str, model: str, five: Path, tmp_path: Path) -> None:
    (five / "0003.nii").write_bytes(b"no scan")
    (tmp_path / "cases.csv").write_text("path,age\n" + "".join(f"scans/{n:04}.nii,{n}\n" for n in range(5)))
    out = tmp_path / name
    assert features(tmp_path / "cases.csv", "--model", model, "--out", out).exit_code == 1
    table = parquet.read_table(out if out.is_file() else out / "shard-00000.parquet")
    assert table.schema.field("vector").type.list_size == medgmae.create_model(model).num_features
    rows = table.to_pylist()
    assert [row["name"] for row in rows] == ["0000", "0001", "0002", "0004", "0003"]
    assert [row["label_age"] for row in rows] == ["0", "1", "2", "4", None]
    assert np.isnan(rows[4]["vector"]).all()
    assert "0003.nii: unknown file type" in rows[4]["error"]
    assert all(row["error"] is None and Path(row["path"]).is_file() for row in rows[:4])
    run_of = json.loads(table.schema.metadata[b"medgmae"])
    assert run_of["weights"] == model
    assert run_of["input"]["window"] == [0, 1]
    assert features(tmp_path / "cases.csv", "--model", model, "--out", tmp_path / "g.npy").exit_code == 1
    assert same(out, tmp_path / "g.npy")


@pytest.mark.parametrize("name", FORMATS)
def test_a_finished_run_is_gone_on_with(
    name: str, model: str, five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROWS", 2)
    out, fresh = tmp_path / name, tmp_path / "fresh.npy"
    command = [five, "--model", model, "--out"]
    (five / "0001.nii").write_bytes(b"no scan")
    assert features(*command, out).exit_code == 1
    before = {path: path.stat().st_mtime_ns for path in [out, *out.glob("*")] if path.is_file()}

    again = features(*command, out)
    assert "4 of 5 scans were done by an earlier run" in again.stderr
    assert again.exit_code == 1
    small_scan(five / "0001.nii", 1)  # what was broken
    small_scan(five / "0003.nii", 99)  # what was changed
    small_scan(five / "0005.nii", 5)  # what is new
    more = features(*command, out)
    assert more.exit_code == 0, more.stderr
    assert "3 of 6 scans were done by an earlier run" in more.stderr
    assert features(*command, fresh).exit_code == 0
    assert sorted(vectors(out)) == sorted(vectors(fresh))
    assert all(np.array_equal(vectors(out)[one], vectors(fresh)[one]) for one in vectors(fresh))
    if name != "folder":
        assert same(out, fresh)  # in the same order, too
    else:  # the table whose rows are still so was left alone
        assert (out / "shard-00000.parquet").stat().st_mtime_ns == before[out / "shard-00000.parquet"]
    states = {path: path.stat().st_mtime_ns for path in [out, *out.glob("shard*")] if path.is_file()}
    assert "6 of 6 scans were done by an earlier run" in features(*command, out).stderr
    assert {path: path.stat().st_mtime_ns for path in states} == states


@pytest.mark.parametrize("name", FORMATS)
def test_results_are_not_lost_or_mixed_without_a_word(name: str, model: str, five: Path, tmp_path: Path) -> None:
    out = tmp_path / name
    assert features(five, "--model", model, "--out", out).exit_code == 0
    held = vectors(out)
    fewer = features(five / "0000.nii", "--model", model, "--out", out)
    assert fewer.exit_code == 2
    assert "holds results of 4 scan(s) that are not among these" in " ".join(fewer.stderr.split())
    other = features(five, "--model", model, "--out", out, "--overlap", "0")
    assert other.exit_code == 2
    assert "results of another run" in " ".join(other.stderr.split())
    assert list(vectors(out)) == list(held)
    assert features(five / "0000.nii", "--model", model, "--out", out, "--overwrite").exit_code == 0
    assert list(vectors(out)) == ["0000"]
    assert features(five, "--model", model, "--out", out, "--overlap", "0", "--overwrite").exit_code == 0
    assert len(vectors(out)) == 5


def test_a_folder_of_other_files_is_left_alone(model: str, five: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    for options in ([], ["--overwrite"]):
        result = features(five, "--model", model, "--out", tmp_path / "mine", *options)
        assert result.exit_code == 2
        assert "holds other files" in " ".join(result.stderr.split())
    assert "is an input" in features(five, "--model", model, "--out", five).stderr
    assert sorted(os.listdir(tmp_path)) == ["mine", "scans"]
    assert os.listdir(tmp_path / "mine") == ["letter.txt"]


def parts_of(five: Path, model: str, folder: Path, names: list[str], *options: str | Path) -> list[Path]:
    outs = [folder / name for name in names]
    for number, out in enumerate(outs, 1):
        result = features(five, "--model", model, "--out", out, "--shard", f"{number}/{len(outs)}", *options)
        assert result.exit_code in (0, 1), result.stderr
    return outs


@pytest.mark.parametrize("name", FORMATS)
def test_parts_are_merged_to_the_run_that_was_not_divided(name: str, model: str, five: Path, tmp_path: Path) -> None:
    (five / "0001.nii").write_bytes(b"no scan")
    (five / "link.nii").symlink_to("nowhere")
    parts = parts_of(five, model, tmp_path, ["a.npy", "b.parquet", "c"])
    assert [sorted(vectors(part)) for part in parts] == [["0000", "0003"], ["0004"], ["0002"]]
    whole, out = tmp_path / f"whole-{name}", tmp_path / name
    options = ["--no-map"] if name == "f.safetensors" else []
    assert features(five, "--model", model, "--out", whole, *options).exit_code == 1
    merged = run("features", "merge", *reversed(parts), "--out", out)
    assert merged.exit_code == 1, merged.stderr  # a scan had failed
    assert merged.stdout.strip() == f"4 of 5 scans: {out}"
    assert same(out, whole)
    go_on = features(five, "--model", model, "--out", out, *options)
    assert "4 of 5 scans were done by an earlier run" in go_on.stderr
    if name == "f.safetensors":
        kept = ("scans", "errors", "skipped", "listing")
        said = [{key: facts_of(path)[key] for key in kept} for path in (out, whole)]
        for facts in said:
            for one in facts["scans"].values():
                del one["seconds"]
        assert said[0] == said[1]


def test_maps_are_merged_too(model: str, five: Path, tmp_path: Path) -> None:
    parts = parts_of(five, model, tmp_path, ["a.safetensors", "b.safetensors"])
    assert features(five, "--model", model, "--out", tmp_path / "whole.safetensors").exit_code == 0
    assert run("features", "merge", *parts, "--out", tmp_path / "f.safetensors").exit_code == 0
    one, other = load_file(tmp_path / "f.safetensors"), load_file(tmp_path / "whole.safetensors")
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)
    vectors_only = run("features", "merge", *parts, "--out", tmp_path / "f.npy")
    assert vectors_only.exit_code == 2
    assert "the parts hold maps" in vectors_only.stderr


def test_parts_that_do_not_belong_together_are_refused(model: str, five: Path, tmp_path: Path) -> None:
    a, b, c = parts_of(five, model, tmp_path, ["a.npy", "b.npy", "c.npy"])
    half, table = tmp_path / "half.npy", tmp_path / "f.csv"
    assert features(five, "--model", model, "--out", half, "--shard", "1/2").exit_code == 0
    assert features(five, "--model", model, "--out", tmp_path / "whole.npy").exit_code == 0
    assert features(five, "--model", model, "--out", table, "--shard", "3/3").exit_code == 0
    assert (
        features(five, "--model", model, "--out", tmp_path / "o.npy", "--shard", "3/3", "--overlap", "0").exit_code == 0
    )
    small_scan(five / "0005.nii", 5)
    assert features(five, "--model", model, "--out", tmp_path / "later.npy", "--shard", "3/3").exit_code == 0
    for parts, message in [
        ([a, b], "part(s) 3/3 are missing; expected all 3"),
        ([a, b, c, b], "are both part 2 of 3"),
        ([a, b, half], "is one of 3 parts and"),
        ([a, b, tmp_path / "o.npy"], "are of different runs: overlap differ(s)"),
        ([a, b, tmp_path / "later.npy"], "are of different runs: listing differ(s)"),
        ([a, b, tmp_path / "whole.npy"], "is no part: it was made without --shard"),
        ([a, b, table], "does not say what it is part of"),
    ]:
        result = run("features", "merge", *parts, "--out", tmp_path / "f.npy")
        assert result.exit_code == 2, message
        assert message in " ".join(result.stderr.split())
        assert not (tmp_path / "f.npy").exists()
    assert run("features", "merge", a, b, c, "--out", a).exit_code == 2


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "a/b", "-1/3", "1/0"])
def test_a_part_that_is_none(shard: str, model: str, five: Path, tmp_path: Path) -> None:
    result = features(five, "--model", model, "--out", tmp_path / "f.npy", f"--shard={shard}")
    assert result.exit_code == 2
    assert "is not a part such as 1/8" in " ".join(result.stderr.split())


def test_series_have_their_uids_and_nobodys_name(model: str, tmp_path: Path) -> None:
    patient = {"0010|0010": "Doe^Jane", "0010|0020": "ID-4711"}
    dicom_series(tmp_path / "archive/x/1", "1.2.3.4.5", **patient)
    dicom_series(tmp_path / "archive/x/1", "1.2.3.4.6", **patient)
    dicom_series(tmp_path / "archive/y/2", "1.2.9.5", **{**patient, "0020|000d": "1.2.9"})
    out, table = tmp_path / "f.parquet", tmp_path / "f.csv"
    for one in (out, table):
        assert features(tmp_path / "archive", "--model", model, "--out", one).exit_code == 0
    rows = parquet.read_table(out).to_pylist()
    assert [(row["study"], row["series"]) for row in rows] == [
        ("1.2.3.4", "1.2.3.4.5"),
        ("1.2.3.4", "1.2.3.4.6"),
        ("1.2.9", "1.2.9.5"),
    ]
    assert table.read_text().splitlines()[0].startswith("name,path,series,study,f0,")
    for one in (out, table):
        assert b"4711" not in one.read_bytes()
        assert b"Doe" not in one.read_bytes()
    assert [row["patient"] for row in rows] == [None] * 3
    asked = tmp_path / "asked.csv"
    assert features(tmp_path / "archive", "--model", model, "--out", asked, "--patient-id").exit_code == 0
    assert asked.read_text().count(",ID-4711,") == 3
    assert "Doe" not in asked.read_text()
