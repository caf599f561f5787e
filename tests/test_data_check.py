"""``medgmae data check``: what it says of scans is what is in them, in whatever number of processes it reads them."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from cli_runs import dicom_series, small_scan
from test_cli import run

import medgmae
from medgmae.cli.data import data_group
from medgmae.data import CheckReport, Grid, Scan, Volume, VolumeError, check_scans, checking, find_copies, list_scans
from medgmae.data.formats.image import Limits

SIZE = (6, 7, 8)


def scan(
    path: Path, data: Any = None, spacing: tuple[float, ...] = (2.0, 1.0, 1.0), size: tuple[int, ...] = SIZE
) -> Path:
    """A scan of small integers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if data is None:
        data = np.random.default_rng(len(path.name)).integers(0, 1000, size)
    Volume(torch.as_tensor(np.asarray(data, np.int16))[None], Grid(size, spacing)).save(path)
    return path


def checked(*sources: Path, **options: Any) -> CheckReport:
    return check_scans(list_scans(sources, arrays=True), **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Scans of several formats, copies of some, broken ones, and what is none."""
    top = tmp_path / "scans"
    scan(top / "a.nii.gz")
    shutil.copy(top / "a.nii.gz", top / "a_copy.nii.gz")
    scan(top / "b.nrrd", medgmae.read_volume(top / "a.nii.gz").data[0])  # the voxels of a
    dicom_series(top / "c", "1.2.3.1", range(5))
    shutil.copytree(top / "c", top / "d")
    for number, path in enumerate(sorted((top / "d").iterdir())):
        path.rename(path.with_name(f"{9 - number}.dcm"))  # the same slices in another order
    np.save(top / "e.npy", np.arange(1000, dtype=np.float32).reshape(10, 10, 10))
    np.save(top / "features.npy", np.zeros((3, 4)))
    (top / "cut.nii.gz").write_bytes((top / "a.nii.gz").read_bytes()[:-20])
    (top / "none.nii").write_bytes(b"nothing")
    (top / "notes.txt").touch()
    return top


NAMES = ["a", "a_copy", "b", "e", "c", "d"]


def test_facts_are_the_files(folder: Path) -> None:
    report = checked(folder)
    assert [one.name for one in report.volumes] == NAMES
    for one in report.volumes:
        volume = medgmae.read_volume(one.path)
        assert (one.size, one.spacing, one.orientation) == (volume.size, volume.spacing, volume.orientation)
        assert (one.channels, one.dtype, one.frames) == (1, str(volume.dtype).removeprefix("torch."), 0)
        wanted = np.percentile(volume.numpy(), [0, 0.5, 50, 99.5, 100], method="nearest")
        assert one.intensities is not None
        np.testing.assert_allclose(list(one.intensities.values()), wanted)
    series = report.volumes[4]
    assert (series.series, series.files) == ("1.2.3.1", 5)
    assert series.bytes == sum(path.stat().st_size for path in (folder / "c").iterdir())
    assert [Path(one["path"]).name for one in report.errors] == ["cut.nii.gz", "none.nii"]
    assert "truncated" in report.errors[0]["error"]
    assert {Path(one["path"]).name for one in report.skipped} == {"features.npy", "notes.txt"}
    assert report.scans == len(NAMES) + 2


def test_duplicates_are_files_or_voxels(folder: Path) -> None:
    found = {(one.what, one.names) for one in checked(folder).duplicates}
    assert found == {("files", ("a", "a_copy")), ("files", ("c", "d")), ("voxels", ("a", "a_copy", "b"))}
    scan(folder / "f.nii.gz", size=(3, 3, 3))
    same_size = (folder / "a.nii.gz").read_bytes()
    (folder / "a_copy.nii.gz").write_bytes(same_size[:-1] + bytes([same_size[-1] ^ 1]))  # as long, and broken
    assert {one.names for one in checked(folder).duplicates} == {("c", "d"), ("a", "b")}


def test_the_spread_of_a_data_set(folder: Path) -> None:
    spread = checked(folder).distribution
    assert spread["size"]["min"] == [5, 7, 8]
    assert spread["size"]["median"] == [6, 8.5, 9]
    assert spread["size"]["counts"] == {"6 x 7 x 8": 3, "5 x 16 x 16": 2, "10 x 10 x 10": 1}
    assert spread["spacing"]["max"] == [3, 1, 1]
    assert spread["dtype"] == {"int16": 5, "float32": 1}
    assert spread["orientation"] == {"LPS": 6}
    assert spread["intensities"]["max"]["max"] == [max(999, spread["intensities"]["max"]["median"][0])]
    assert list(spread["notes"].values()) == [1]
    for n in range(9):
        scan(folder / f"more/{n}.nii", size=(2, 2, 2 + n))
    assert checked(folder).distribution["size"]["counts"] is None


def test_headers_alone(folder: Path) -> None:
    report, full = checked(folder, headers=True), checked(folder)
    facts = {one.name: one for one in report.volumes}
    for one in full.volumes:
        said = facts[one.name]
        assert (said.size, said.spacing, said.orientation, said.dtype) == (
            one.size, one.spacing, one.orientation, one.dtype,
        )  # fmt: skip
        assert said.intensities is said.digest is None
    assert "cut" in facts  # a packed stream shows its end only when it is read
    assert {one.names for one in report.duplicates} == {("a", "a_copy"), ("c", "d")}
    assert report.distribution["intensities"] is None
    (folder / "cut.nii").write_bytes(gzip.decompress((folder / "a.nii.gz").read_bytes())[:-1])
    assert "truncated" in checked(folder / "cut.nii", headers=True).errors[0]["error"]


def test_headers_need_no_memory_and_no_voxels(tmp_path: Path) -> None:
    volume = medgmae.read_volume(small_scan(tmp_path / "a.nii"))
    for name in ("b.nrrd", "c.mha", "d.nii.gz"):
        volume.save(tmp_path / name)
    np.save(tmp_path / "e.npy", volume.numpy()[0])
    for path in tmp_path.iterdir():
        image = medgmae.data.io.read_image(path, Limits(voxels=False))
        assert (image.voxels.shape, image.voxels.strides) == ((1, 8, 8, 8), (0, 0, 0, 0))


def test_what_is_worth_a_look(tmp_path: Path) -> None:
    for n in range(30):
        scan(tmp_path / f"{n:02}.nii.gz")
    scan(tmp_path / "far.nii.gz", spacing=(2.0, 1.0, 6.5))
    scan(tmp_path / "flat.nii.gz", size=(1, 7, 8))
    scan(tmp_path / "constant.nii.gz", np.full(SIZE, 7))
    turned = medgmae.data.reorient(medgmae.read_volume(tmp_path / "00.nii.gz"), "RAS")
    turned.save(tmp_path / "turned.nii.gz")
    four = Volume(torch.rand(3, *SIZE), Grid(SIZE, (2.0, 1.0, 1.0)))
    np.save(tmp_path / "four.npy", four.numpy())
    found = {one["name"]: one["reason"] for one in checked(tmp_path).outliers}
    assert found == {
        "constant": "every voxel is 7",
        "far": "a spacing of 2 x 1 x 6.5 mm, where the median is 1 x 1 x 2 mm (sorted)",
        "flat": "a single slice: 1 x 7 x 8 voxels",
        "four": "a fourth axis of 3, which are channels where that many are asked for",
        "turned": "the orientation RAS, that of 1 volume(s)",
    }


def test_every_contrast_of_a_case_is_read(tmp_path: Path) -> None:
    for name in ("t1", "t2"):
        scan(tmp_path / f"p/{name}.nii")
    (tmp_path / "cases.csv").write_text("id,path_t1,path_t2\np,p/t1.nii,p/t2.nii\n")
    report = checked(tmp_path / "cases.csv")
    assert ([one.name for one in report.volumes], report.scans) == (["p t1", "p t2"], 1)


def test_processes_say_what_one_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of scans that do not fit into a worker's share of the memory: they are read by themselves."""
    expected = checked(folder)
    monkeypatch.setattr(checking, "free_memory", lambda: 2 * checking.SHARE * 4500)  # bytes
    asked = []
    alone = checking._Workers._alone
    monkeypatch.setattr(
        checking._Workers, "_alone", lambda pool, work, part: asked.append(part.name) or alone(pool, work, part)
    )
    assert checked(folder, workers=2) == expected
    assert asked == ["c", "d"]


def ending(part: Scan, limits: Limits) -> str:
    """What a worker does whose memory the system takes at one of the scans."""
    if part.name == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
    return part.name


def test_a_process_that_is_ended_costs_one_scan() -> None:
    scans = [Scan(Path(name), name=name) for name in ("a", "bad", "b", "c")]
    with checking._Workers(2) as pool:
        outcomes = pool.each(ending, scans, "")
    assert [one for one in outcomes if isinstance(one, str)] == ["a", "b", "c"]
    assert "bad: the process that read it was ended" in str(outcomes[1])


# the command


def test_every_option_has_help() -> None:
    for command in data_group.commands.values():
        assert command.help
        assert all(option.help for option in command.params if isinstance(option, click.Option))


def test_the_command_reports_and_fails_where_something_is_broken(folder: Path, tmp_path: Path) -> None:
    result = run("data", "check", folder, "--workers", "1", "--png", tmp_path / "spread.png")
    assert result.exit_code == 1
    assert "6 volumes can be read" in result.stdout
    assert "2 broken" in result.stdout
    for line in (
        "sizes: 6 x 7 x 8 (3); 5 x 16 x 16 (2); 10 x 10 x 10 (1)",
        "orientations: LPS (6)",
        "Same files: a, a_copy",
        "Same voxels in other files: a, a_copy, b",
    ):
        assert line in result.stdout
    assert "none.nii: unknown file type" in result.stderr
    assert "Skipped, an array of 2 axes, not 3 or 4" in result.stderr
    assert (tmp_path / "spread.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("cut.nii.gz", "none.nii"):
        (folder / name).unlink()
    good = run("data", "check", folder, "--json", "--workers", "1")
    assert good.exit_code == 0, good.stderr
    facts = json.loads(good.stdout)
    assert facts == json.loads(json.dumps(checked(folder).to_json()))
    assert set(facts) == {"scans", "distribution", "outliers", "duplicates", "errors", "skipped", "volumes"}


def test_a_source_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    nothing = run("data", "check", tmp_path / "empty", "--png", tmp_path / "a.png")
    assert nothing.exit_code == 1
    assert "no scan in this folder" in nothing.stderr
    assert "0 volumes can be read" in nothing.stdout
    assert not (tmp_path / "a.png").exists()
    assert run("data", "check", tmp_path / "empty", "--json").exit_code == 1
    (tmp_path / "t.csv").write_text("file\na.nii\n")
    for args in (["check", tmp_path / "t.csv"], ["check"], ["check", tmp_path, "--workers", "0"], ["chek"]):
        assert run("data", *args).exit_code == 2
    (tmp_path / "old.png").touch()
    assert "--overwrite" in run("data", "check", tmp_path, "--png", tmp_path / "old.png").stderr


def test_the_figure_counts_every_volume(folder: Path) -> None:
    report = checked(folder)
    figure = medgmae.visualize.check_figure(report)
    for axes in figure.axes:
        assert sum(bar.get_height() for bar in axes.patches) == 3 * len(report.volumes)
    headers = medgmae.visualize.check_figure(checked(folder, headers=True))
    assert [text.get_text() for text in headers.axes[2].texts] == ["intensities were not read"]
    with pytest.raises(TypeError, match=r"what check_scans\(listing\) gives; got list"):
        medgmae.visualize.check_figure([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of no volumes"):
        medgmae.visualize.check_figure(CheckReport(0, (), (), (), ()))


def test_copies_are_the_same_voxels_under_any_name(folder: Path) -> None:
    (folder / "cut.nii.gz").unlink()
    (folder / "none.nii").unlink()
    other = medgmae.read_volume(folder / "a.nii.gz").data[0].clone()
    other[3, 3, 3] += 1
    scan(folder / "nearly_a.nii.gz", other)
    scans = list_scans([folder], arrays=True).scans
    assert [[one.name for one in group] for group in find_copies(scans)] == [["a", "a_copy", "b"], ["c", "d"]]
    assert find_copies(scans[::-1], workers=2) == [group[::-1] for group in find_copies(scans)[::-1]]
    assert find_copies([]) == find_copies(scans[:1]) == []


def test_cases_with_one_contrast_in_common_are_copies(tmp_path: Path) -> None:
    """Through b, a and c are one group."""
    paths = {
        name: scan(tmp_path / f"{name}.nii") for name in ("one", "longer", "longest_", "other____", "distinct____")
    }
    one, two, three, four, five = paths.values()
    both = lambda name, t1, t2: Scan(t1, name=name, contrasts={"t1": t1, "t2": t2})  # noqa: E731
    cases = [both("a", one, two), both("lone", five, five), both("b", three, two), both("c", four, three)]
    assert [[case.name for case in group] for group in find_copies(cases)] == [["a", "b", "c"]]


def test_scans_that_cannot_be_compared_are_said(folder: Path) -> None:
    scans = list_scans([folder], arrays=True).scans
    scans = [one for one in scans if one.name != "none"]
    with pytest.raises(VolumeError, match=r"1 of \d scans cannot be read, such as .*cut.nii.gz"):
        find_copies(scans)
