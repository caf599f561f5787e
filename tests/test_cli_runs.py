"""``medgmae features`` over many scans, when it is killed, interrupted, out of space, cut off, or started twice."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_python
from cli_runs import facts_of, happening, limited, saved_nano, small_scan, small_scans
from click.testing import Result
from safetensors.torch import load_file
from test_cli import run

from medgmae.cli.journal import journal_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_nano(tmp_path_factory.mktemp("model") / "nano")


@pytest.fixture
def nine(tmp_path: Path) -> Path:
    return small_scans(tmp_path / "scans", 9)


def features(*args: str | Path) -> Result:
    return run("features", "--threads", "1", *args)


def same_tensors(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


ENDS = ["os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGTERM)",
        "signal.raise_signal(signal.SIGINT)", "raise RuntimeError('a defect')"]  # fmt: skip


@pytest.mark.parametrize("action", ENDS)
def test_what_is_done_when_a_run_ends_is_kept(action: str, model: str, nine: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "f.safetensors", tmp_path / "whole.safetensors"
    command = ["features", nine, "--model", model, "--threads", "1"]
    ended = happening(8, action, *command, "--out", out)
    assert ended.returncode != 0
    assert not out.exists()
    kept = sorted((tmp_path / "f.safetensors.partial").glob("*.safetensors"))
    assert len(kept) == 7
    assert load_file(kept[0]).keys() == {"pooled", "map"}
    if "SIGINT" in action:
        assert "7 scans are kept in" in ended.stderr
        assert "Traceback" not in ended.stderr

    again = happening(3, "raise RuntimeError('two are left, this is the third')", *command, "--out", out)
    assert again.returncode == 0, again.stderr
    assert "7 of 9 scans were done by an earlier run" in again.stderr
    assert features(nine, "--model", model, "--out", whole).exit_code == 0
    assert same_tensors(out, whole)
    assert list(facts_of(out)["scans"]) == list(facts_of(whole)["scans"])
    assert sorted(os.listdir(tmp_path)) == ["f.safetensors", "scans", "whole.safetensors"]


def test_results_of_another_run_are_not_mixed_in(model: str, nine: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.csv"
    happening(4, "os._exit(9)", "features", nine, "--model", model, "--out", out)
    other = saved_nano(tmp_path / "other")
    weights = Path(other.removeprefix("local-dir:")) / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-2] ^= 1
    weights.write_bytes(changed)
    for options in (["--model", other], ["--model", model, "--overlap", "0"]):
        result = features(nine, "--out", out, *options)
        assert result.exit_code == 2
        assert "holds results of another run (3 file(s)" in " ".join(result.stderr.split())
        assert "go on" not in result.stderr
    small_scan(nine / "0000.nii", 99)  # a scan that has changed since is computed anew
    result = features(nine, "--out", out, "--model", model)
    assert "2 of 9 scans were done by an earlier run" in result.stderr
    happening(4, "os._exit(9)", "features", nine, "--model", model, "--out", out, "--overwrite")
    result = features(nine, "--out", out, "--model", other, "--overwrite")
    assert result.exit_code == 0
    assert "earlier run" not in result.stderr


def test_a_kept_result_that_was_cut_off_is_computed_again(model: str, nine: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.npy"
    happening(4, "os._exit(9)", "features", nine, "--model", model, "--out", out)
    kept = sorted((tmp_path / "f.npy.partial").glob("*.safetensors"))
    kept[0].write_bytes(kept[0].read_bytes()[:-5])
    kept[1].write_bytes(b"")
    result = features(nine, "--model", model, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "1 of 9 scans were done" in result.stderr
    assert np.load(out).shape[0] == 9


@pytest.mark.parametrize("out", ["f.safetensors", "f.csv", "f.npy"])
def test_files_that_are_there_are_left_alone(out: str, model: str, tmp_path: Path) -> None:
    scan, file = small_scan(tmp_path / "a.nii"), tmp_path / out
    victim = file.with_suffix(".json") if out == "f.npy" else file
    victim.write_text("mine")
    result = features(scan, "--model", model, "--out", file)
    assert result.exit_code == 2
    assert f"{victim} exists" in " ".join(result.stderr.split())
    assert victim.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["a.nii", victim.name]
    assert features(scan, "--model", model, "--out", file, "--overwrite").exit_code == 0
    assert victim.read_bytes() != b"mine"
    assert os.stat(file).st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_table_of_scans_is_not_overwritten(model: str, tmp_path: Path) -> None:
    small_scan(tmp_path / "a.nii")
    (tmp_path / "cases.csv").write_text("path\na.nii\n")
    table = tmp_path / "cases.csv"
    result = features(table, "--model", model, "--out", table, "--overwrite")
    assert result.exit_code == 2
    assert "is an input" in result.stderr
    assert table.read_text() == "path\na.nii\n"


def test_a_file_that_comes_to_be_meanwhile_is_left_alone(model: str, nine: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.csv"
    done = happening(5, f"open({str(out)!r}, 'w').write('mine')", "features", nine, "--model", model, "--out", out)
    assert done.returncode == 1
    assert "exists; --overwrite replaces it" in done.stderr
    assert out.read_text() == "mine"
    assert "9 scans are kept" in done.stderr


@pytest.mark.parametrize(("limit", "done"), [(500, 0), (6000, 9)], ids=["within the first", "at the end"])
def test_a_full_disk(limit: int, done: int, model: str, nine: Path, tmp_path: Path) -> None:
    """Nothing is lost and nothing half-written is left; with space again, the same command ends well."""
    command = ["features", nine, "--model", model, "--out", tmp_path / "f.safetensors"]
    full = happening(99, "pass", *command, limits=limited(limit))
    assert full.returncode == 1
    assert "File too large" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (tmp_path / "f.safetensors").exists()
    assert len(list(tmp_path.glob("f.safetensors.partial/*.safetensors"))) == done
    again = happening(10 - done, "raise RuntimeError('more than were left')", *command)
    assert again.returncode == 0, again.stderr
    assert len(load_file(tmp_path / "f.safetensors")) == 18
    assert sorted(os.listdir(tmp_path)) == ["f.safetensors", "scans"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away(stream: str, model: str, nine: Path, tmp_path: Path) -> None:
    (nine / "0004.nii").write_bytes(b"no scan")  # something to say on stderr in the middle
    out = tmp_path / "f.csv"
    command = ["-m", "medgmae", "features", nine, "--model", model, "--out", out, "--json"]
    command += ["--input", "window=[0,1]"]  # or else a note comes first
    reader, writer = os.pipe()
    with (tmp_path / "said").open("w") as other:
        streams = {"stdout": other, "stderr": other, stream: writer}
        process = warm_python.Process(*command, **streams)
    os.close(writer)
    os.close(reader)
    assert process.wait(120) == 1
    assert "Traceback" not in (tmp_path / "said").read_text()
    if stream == "stdout":
        assert len(out.read_text().splitlines()) == 9  # written before it is told
    else:
        assert len(list((tmp_path / "f.csv.partial").glob("*.safetensors"))) == 4
        result = features(nine, "--model", model, "--out", out, "--input", "window=[0,1]")
        assert "4 of 9 scans were done" in result.stderr
        assert len(out.read_text().splitlines()) == 9


def test_two_runs_on_one_file(model: str, nine: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.csv"
    with journal_of(out) as journal:
        result = features(nine, "--model", model, "--out", out)
        assert result.exit_code == 1
        assert "another run is writing" in result.stderr
        assert journal.folder.is_dir()
    assert not journal.folder.exists()
    assert features(nine, "--model", model, "--out", out).exit_code == 0


def test_two_processes_at_once(model: str, nine: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    with tempfile.TemporaryFile("w+") as errors:
        command = ["-m", "medgmae", "features", nine, "--model", model, "--out", out]
        runs = [warm_python.Process(*command, stderr=errors) for _ in range(2)]
        codes = sorted(process.wait(120) for process in runs)
        errors.seek(0)
        said = errors.read()
    assert codes[0] == 0, said
    assert codes[1] in (0, 1), said  # all is done, or it is being written
    assert len(load_file(out)) == 18
    assert sorted(os.listdir(tmp_path)) == ["f.safetensors", "scans"]


def test_a_folder_that_cannot_be_written_is_said_before_the_work(model: str, nine: Path) -> None:
    result = features(nine, "--model", model, "--out", "/proc/f.csv")
    assert result.exit_code == 1
    assert "/proc/f.csv cannot be written" in result.stderr


@pytest.mark.slow
def test_two_thousand_scans(model: str, tmp_path: Path) -> None:
    scans, out = small_scans(tmp_path / "scans", 2000), tmp_path / "f.safetensors"
    command = ["features", scans, "--model", model, "--threads", "1", "--out", out, "--json"]
    assert happening(1500, "os._exit(9)", *command, timeout=1800).returncode == 9
    done = happening(502, "raise RuntimeError('more than were left')", *command, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "1499 of 2000 scans" in done.stderr
    assert len(json.loads(done.stdout)["scans"]) == 2000
    assert len(load_file(out)) == 4000
