"""Scans to prepared volumes on disk: what is in them, and that no moment of an end loses or harms anything."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
import warm_python
from prepared_scans import INPUT, Listed, ball, prepared_arrays, saved

import medgmae
from medgmae.data import VolumeError
from medgmae.data.preparing import prepare_scans
from medgmae.data.store import is_prepared, open_prepared, partition


def prepared(scans: list[Listed], out: Path, **options: Any) -> Any:
    return prepare_scans(scans, out, options.pop("input", INPUT), progress=False, **options)


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans that take long enough to prepare that a run can be ended in between; packing them takes seconds."""
    folder = tmp_path_factory.mktemp("twelve")
    saved(folder, 12, (60, 128, 128))
    return folder


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.b2nd")}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_and_geometry_are_those_of_the_preparation(tmp_path: Path, dtype: str) -> None:
    scans = [replace(scan, labels={"organ": "liver"}) for scan in saved(tmp_path / "scans", 2)]
    done = prepared(scans, tmp_path / "out", dtype=dtype)
    opened = open_prepared(tmp_path / "out")
    assert opened == done
    assert opened.input["window"] == [-175, 250]
    assert opened.dtype == dtype
    for scan, volume in zip(scans, opened.scans, strict=True):
        expected = medgmae.create_transform(INPUT, whole=True)(scan.path)
        found = volume.volume()
        assert found.grid == expected.grid == volume.grid
        assert found.data.dtype == torch.float32
        assert found.source == str(scan.path) == volume.source
        assert (volume.name, volume.labels, volume.channels) == (scan.name, {"organ": "liver"}, 1)
        assert volume.spacing == (1.5, 1.5, 1.5)
        if dtype == "float32":
            assert torch.equal(found.data, expected.data)
        else:
            torch.testing.assert_close(found.data, expected.data, rtol=2**-11, atol=2**-25)
        assert volume.foreground == pytest.approx(float((expected.data > 0).float().mean()))
        part = volume.read((3, 4, 5), (2, 6, 7))
        assert torch.equal(part, found.data[:, 3:5, 4:10, 5:12])


@pytest.mark.parametrize("normalize", ["zscore", "zscore_nonzero", "zscore_all"])
def test_normalised_volumes_are_those_of_the_preparation(tmp_path: Path, normalize: str) -> None:
    scans = saved(tmp_path / "scans", 1)
    size = [40, 24, 24]  # longer than the volume along one axis
    block = {**INPUT, "size": size, "crop": ["foreground", "center"], "normalize": normalize}
    (volume,) = prepared(scans, tmp_path / "out", input=block, dtype="float32").scans
    expected = medgmae.create_transform(block, whole=True)(scans[0].path)
    assert torch.equal(volume.volume().data, expected.data)
    assert volume.grid == expected.grid
    plain = medgmae.create_transform({**block, "normalize": "none"}, whole=True)(scans[0].path)
    mask = (plain.data > 0).float().sum()
    assert volume.foreground * expected.data.numel() == pytest.approx(float(mask))


def test_cases_of_several_contrasts(tmp_path: Path) -> None:
    case = tmp_path / "case"
    case.mkdir()
    for number, name in enumerate(["t1", "t2"]):
        ball((12, 12, 12), number).save(case / f"case_{name}.nii.gz")
    block = {"channels": 2, "contrasts": ["t1", "t2"], "window": {"percentiles": [0, 100], "per": "channel"}}
    expected = medgmae.create_transform(block, whole=True)(case)

    class Case(Listed):
        @property
        def source(self) -> dict[str, Path]:
            return {"t2": case / "case_t2.nii.gz", "t1": case / "case_t1.nii.gz"}

    for number, scan in enumerate([Listed(case), Case(case)]):
        (volume,) = prepared([scan], tmp_path / f"out{number}", input=block, dtype="float32").scans
        assert volume.channels == 2
        assert volume.name == "case"
        assert torch.equal(volume.volume().data, expected.data)


def test_a_second_call_prepares_what_is_new(tmp_path: Path) -> None:
    scans = saved(tmp_path / "scans", 3)
    out = tmp_path / "out"
    prepared(scans[:2], out)
    before = inodes(out)
    assert len(prepared(scans, out).scans) == 3
    assert before.items() <= inodes(out).items()
    assert [scan.name for scan in open_prepared(out).scans] == ["scan 0", "scan 1", "scan 2"]
    before = inodes(out)
    moved = [replace(scan, path=tmp_path / "moved" / scan.path.name, labels={"a": "b"}) for scan in reversed(scans)]
    shutil.move(tmp_path / "scans", tmp_path / "moved")
    again = prepared(moved, out, workers=1)
    assert inodes(out) == before
    assert [(scan.source, scan.labels) for scan in again.scans] == [(str(scan.path), {"a": "b"}) for scan in moved]
    assert again == open_prepared(out)
    ball((20, 36, 32), 9).save(moved[0].path)  # replaced
    changed = prepared(moved, out)
    assert len(inodes(out)) == 4
    assert not torch.equal(changed.scans[0].volume().data, again.scans[0].volume().data)


def test_processes_give_what_one_gives(tmp_path: Path) -> None:
    scans = saved(tmp_path / "scans", 3)
    one, two = prepared(scans, tmp_path / "one"), prepared(scans, tmp_path / "two", workers=2)
    assert [scan.name for scan in one.scans] == [scan.name for scan in two.scans]
    for left, right in zip(one.scans, two.scans, strict=True):
        assert left.path.read_bytes() == right.path.read_bytes()


def test_another_block_or_type_is_refused(tmp_path: Path) -> None:
    scans = saved(tmp_path / "scans", 1)
    prepared(scans, tmp_path / "out")
    prepared(scans, tmp_path / "out", input={**INPUT, "window": (-175.0, 250.0)})  # the same in other types
    with pytest.raises(VolumeError, match=r"another input block or type.*choose another folder"):
        prepared(scans, tmp_path / "out", input={**INPUT, "window": [-1000, 400]})
    with pytest.raises(VolumeError, match="another input block or type"):
        prepared(scans, tmp_path / "out", dtype="float32")


def test_broken_scans_stop_or_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scans = saved(tmp_path / "scans", 3)
    scans[1].path.write_bytes(scans[1].path.read_bytes()[:200])
    with pytest.raises(VolumeError, match=r"1\.nii\.gz"):
        prepared(scans, tmp_path / "out")
    assert not is_prepared(tmp_path / "out")
    with caplog.at_level(logging.WARNING, "medgmae"):
        done = prepared(scans, tmp_path / "out", workers=1, skip_broken=True)
    assert [scan.name for scan in done.scans] == ["scan 0", "scan 2"]
    ((path, error),) = done.broken
    assert path == str(scans[1].path)
    assert path in error
    assert "left out" in caplog.text
    assert open_prepared(tmp_path / "out") == done


def test_bad_calls_say_so(tmp_path: Path) -> None:
    scans = saved(tmp_path / "scans", 1)
    with pytest.raises(VolumeError, match="no scans"):
        prepared([], tmp_path / "out")
    with pytest.raises(VolumeError, match="same name"):
        prepared([*scans, *scans], tmp_path / "out")
    with pytest.raises(VolumeError, match="dtype is 'int8'"):
        prepared(scans, tmp_path / "out", dtype="int8")
    with pytest.raises(VolumeError, match="unknown keys"):
        prepared(scans, tmp_path / "out", input={"spacings": 1})
    with pytest.raises(VolumeError, match=r"gone\.nii: .*No such file"):
        prepared([Listed(tmp_path / "gone.nii", "gone")], tmp_path / "out")
    with pytest.raises(VolumeError, match="no such folder"):
        open_prepared(tmp_path / "nowhere")
    with pytest.raises(VolumeError, match="not prepared, or not to its end"):
        open_prepared(tmp_path)
    with pytest.raises(VolumeError, match=r"1e\+05, beyond float16.*float32"):
        prepared_arrays(tmp_path / "large", [np.full((4, 4, 4), 1e5, np.float32)])
    large = prepared_arrays(tmp_path / "large", [np.full((4, 4, 4), 1e5, np.float32)], dtype="float32")
    assert float(large.scans[0].volume().data.max()) == 1e5


def test_volumes_without_foreground_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "medgmae"):
        prepared_arrays(tmp_path, [np.ones((4, 4, 4), np.float32), np.zeros((4, 4, 4), np.float32)])
    assert "1 of 2 prepared volumes have no voxel above pad=0, 1 for one" in caplog.text


def test_damaged_files_are_named(tmp_path: Path) -> None:
    scans = saved(tmp_path / "scans", 1)
    (scan,) = prepared(scans, tmp_path / "out").scans
    content = scan.path.read_bytes()

    def refused(content: bytes, text: str) -> None:
        scan.path.write_bytes(content)
        with pytest.raises(VolumeError, match=text) as info:
            replace(scan, bytes=len(content)).volume()
        assert str(scan.path) in str(info.value)

    scan.path.write_bytes(content[: len(content) // 2])
    for read in (scan.volume, lambda: open_prepared(tmp_path / "out")):
        with pytest.raises(VolumeError, match=f"{scan.path}: has .* bytes; expected .*: cut off"):
            read()
    refused(content[: len(content) // 2], "not a Blosc2 file, or damaged")
    refused(b"not blosc2" * 99, "not a Blosc2 file, or damaged")
    other = blosc2.asarray(np.zeros((3, 3))).to_cframe()
    refused(other, "no volume")
    start = len(content) // 2
    refused(content[:start] + bytes(100) + content[start + 100 :], "cannot be decoded")
    scan.path.unlink()
    with pytest.raises(VolumeError, match="No such file"):
        replace(scan, bytes=1).volume()
    with pytest.raises(VolumeError, match="No such file"):
        open_prepared(tmp_path / "out")
    scan.path.write_bytes(b"damaged")
    assert torch.equal(
        prepared(scans, tmp_path / "out").scans[0].volume().data, prepared(scans, tmp_path / "o").scans[0].volume().data
    )
    (tmp_path / "out/prepared.json").write_text('{"format": 1}')
    with pytest.raises(VolumeError, match=r"prepared\.json: damaged"):
        open_prepared(tmp_path / "out")


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from prepared_scans import INPUT, Listed
from medgmae.data.preparing import prepare_scans
if __name__ == "__main__":
    scans = [Listed(path, path.name) for path in sorted(Path(sys.argv[2]).glob("*.nii.gz"))]
    prepare_scans(scans, sys.argv[3], INPUT, workers=int(sys.argv[4]), progress=False)
"""


def child(scans: Path, tmp_path: Path, workers: int) -> warm_python.Process:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [script, Path(__file__).parent, scans, tmp_path / "out", str(workers)]
    with (tmp_path / "said").open("w") as errors:
        return warm_python.Process(*command, stderr=errors, new_session=True)


@pytest.mark.parametrize(("how", "workers"), [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGINT, 1)])
def test_a_run_that_was_ended_goes_on(twelve: Path, tmp_path: Path, how: signal.Signals, workers: int) -> None:
    """SIGKILL at any moment, SIGINT to the parent alone: its processes end too."""
    out = tmp_path / "out"
    run = child(twelve, tmp_path, workers)
    while len(list(out.glob("*.b2nd"))) < 2:
        assert run.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.002)
    run.send_signal(how)
    run.wait(10)
    deadline = time.monotonic() + 10
    while _alive(run.pid):
        assert time.monotonic() < deadline, "processes live on"
        time.sleep(0.05)
    kept = inodes(out)
    assert 2 <= len(kept) < 12
    assert not is_prepared(out)
    done = prepared([Listed(path, path.name) for path in sorted(twelve.glob("*.nii.gz"))], out)
    assert kept.items() <= inodes(out).items()
    assert len(done.scans) == 12
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [".lock", "prepared.json", *(scan.path.name for scan in done.scans)]
    )
    for scan in done.scans:
        scan.volume()


def test_a_process_that_was_killed_is_said(twelve: Path, tmp_path: Path) -> None:
    """As the kernel does where memory runs out."""
    run = child(twelve, tmp_path, 1)
    while not list((tmp_path / "out").glob("*.b2nd")):
        assert run.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.002)
    for process in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
        if "spawn_main" in Path(f"/proc/{process}/cmdline").read_text():
            os.kill(int(process), signal.SIGKILL)
    assert run.wait(20) == 1
    error = (tmp_path / "said").read_text()
    assert "VolumeError: a process ended while it prepared one of " in error
    assert "use fewer workers" in error


def _alive(session: int) -> bool:
    """Whether a process of that session runs."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return True
    return False


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_is_said_and_keeps_what_is_done(tmp_path: Path, workers: int) -> None:
    scans = saved(tmp_path / "scans", 2)
    out = tmp_path / "out"
    (small,) = prepared(scans[:1], out).scans
    big = tmp_path / "scans/big.nii.gz"
    ball((40, 72, 64)).save(big)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * small.bytes, limits[1]))
    try:
        with pytest.raises(VolumeError, match="the disk is full; what is done stays"):
            prepared([*scans, Listed(big, "big")], out, skip_broken=True, workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in out.iterdir() if "writing" in path.name]
    before = inodes(out)
    assert len(before) >= 1
    assert len(prepared([*scans, Listed(big, "big")], out).scans) == 3
    assert before.items() <= inodes(out).items()


def test_too_little_space_is_said_before_it_is_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = saved(tmp_path / "scans", 12)
    (first,) = prepared(scans[:1], tmp_path / "first").scans
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * first.bytes))
    with pytest.raises(VolumeError, match=r"will take about .* GB.* are free; make room"):
        prepared(scans, tmp_path / "out")
    assert 1 <= len(inodes(tmp_path / "out")) < 12


def test_one_run_at_a_time(tmp_path: Path) -> None:
    from filelock import FileLock

    scans = saved(tmp_path / "scans", 1)
    prepared(scans, tmp_path / "out")
    code = "import sys, filelock\nlock = filelock.FileLock(sys.argv[1])\nlock.acquire()\n"
    code += "print('held', flush=True)\nsys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "out/.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(VolumeError, match="another run is preparing"):
            prepared(scans, tmp_path / "out")
        other.stdin.close()
    assert FileLock(tmp_path / "out/.lock").acquire(timeout=5)


@pytest.mark.parametrize(
    ("shape", "crop"),
    [((1, 320, 512, 512), (96, 96, 96)), ((4, 155, 240, 240), (160, 160, 160)), ((1, 300, 512, 512), (1, 224, 224)),
     ((1, 5, 7, 9), (96, 96, 96)), ((1, 256, 256, 256), (256, 256, 256)), ((3, 600, 600, 600), (600, 600, 600))],
)  # fmt: skip
@pytest.mark.parametrize("itemsize", [2, 4])
def test_chunks_and_blocks_keep_their_bounds(shape: tuple[int, ...], crop: tuple[int, int, int], itemsize: int) -> None:
    chunk, block = partition(shape, crop, itemsize)
    assert np.prod(chunk) * itemsize <= 6 << 20
    assert np.prod(block) * itemsize <= 32 << 10
    assert all(1 <= b <= c <= n for b, c, n in zip(block, chunk, shape, strict=True))
    if min(crop) > 1 and min(shape[1:]) >= 96:
        assert max(block[1:]) <= 2 * min(block[1:]), "as even as the crop"
        assert np.prod(block) * itemsize >= 16 << 10
    if crop[0] == 1:
        assert chunk[1] == block[1] == 1


def test_blosc2_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = saved(tmp_path / "scans", 1)
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(ImportError, match=r"pip install 'medgmae\[train\]'"):
        prepared(scans, tmp_path / "out")
