"""``medgmae features``: real scans to files, broken scans beside them, and what the files say about themselves."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import locale
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import load_file
from test_cli import run

import medgmae
from medgmae.data import find_scans, unique_names

ROOT = Path(__file__).parent.parent
CT, MR = ROOT / "examples/data/ct_abdomen.nii.gz", ROOT / "examples/data/mr_brain_t1.nii.gz"
NANO = "vit_nano_patch8_32"
CARD = "vit_base_patch16_96.medgmae"  # 1.5 mm, RAS, [-175, 250], array x, y, z


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with weights and a card of preprocessing, as save_pretrained leaves it."""
    torch.manual_seed(0)
    model: Any = medgmae.create_model(NANO)
    model.pretrained_cfg = medgmae.weight_card(CARD).to_json()
    return medgmae.save_pretrained(model, tmp_path_factory.mktemp("model") / "nano")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a card."""
    torch.manual_seed(0)
    return medgmae.save_pretrained(medgmae.create_model(NANO), tmp_path_factory.mktemp("model") / "bare")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A folder of three small scans, one of them cut off in the middle, and a file that is no scan."""
    folder = tmp_path / "scans"
    folder.mkdir()
    volume = medgmae.read_volume(CT)
    for name, start in [("b.nii.gz", 0), ("a.mha", 30), ("cut.nii.gz", 50)]:
        part = medgmae.data.crop_or_pad(volume, (40, 48, 36), start=(start, 20, 20))
        medgmae.write_volume(part, folder / name)
    whole = (folder / "cut.nii.gz").read_bytes()
    (folder / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "readme.txt").write_text("not a scan")
    return folder


def features(*args: str | Path) -> Result:
    return run("features", *args)


def expand(paths: list[Path], contrasts: list[str] | None = None) -> list[Path]:
    return [scan.path for scan in find_scans(paths, contrasts).scans]


def test_safetensors_hold_what_extract_features_gives(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    result = features(CT, MR, "--model", f"local-dir:{saved}", "--out", out, "--overlap", "0.25", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == f"2 of 2 scans: {out}"
    model = medgmae.create_model(f"local-dir:{saved}")
    prepare = medgmae.create_transform(model, whole=True)
    tensors = load_file(out)
    assert sorted(tensors) == [f"{name}/{part}" for name in ("ct_abdomen", "mr_brain_t1") for part in ("map", "pooled")]
    with safe_open(out, "pt") as file:
        facts = json.loads(file.metadata()["medgmae"])
    for path, name in [(CT, "ct_abdomen"), (MR, "mr_brain_t1")]:
        wanted = medgmae.extract_features(model, prepare(path), overlap=0.25)
        assert wanted.map is not None
        assert torch.equal(tensors[f"{name}/pooled"], wanted.pooled)
        assert torch.equal(tensors[f"{name}/map"], wanted.map.data)
        said = facts["scans"][name]["map"]
        assert said["shape"] == list(wanted.map.data.shape)
        np.testing.assert_allclose(said["spacing"], wanted.map.spacing)
        np.testing.assert_allclose(said["origin"], wanted.map.origin)
        np.testing.assert_allclose(said["direction"], wanted.map.direction)
        assert facts["scans"][name]["path"] == str(path)
    assert facts["architecture"] == NANO
    assert facts["weights"] == f"local-dir:{saved}"
    assert facts["input"]["orientation"] == "RAS"
    assert facts["overlap"] == 0.25


def test_written_geometry_is_the_scans(bare: Path, tmp_path: Path) -> None:
    """From the file alone, without this library: the map's first voxel lies in the scan's first patch."""
    out = tmp_path / "f.safetensors"
    options = ["--window", "whole", "--input", "window=[-1000,1000]"]
    assert features(CT, "--model", f"local-dir:{bare}", "--out", out, *options).exit_code == 0
    with safe_open(out, "pt") as file:
        said = json.loads(file.metadata()["medgmae"])["scans"]["ct_abdomen"]["map"]
    image = sitk.ReadImage(str(CT))
    size = np.array(image.GetSize())
    before = (size + -size % 8) // 2 - size // 2  # the middle voxel stays the middle voxel
    for index in [(0, 0, 0), (3, 5, 7)]:  # x, y, z
        dhw = np.array(index[::-1]) * np.array(said["spacing"])
        world = np.array(said["origin"]) + np.array(said["direction"]) @ dhw
        centre = (np.array(index) * 8 - before + 3.5).tolist()
        np.testing.assert_allclose(world, image.TransformContinuousIndexToPhysicalPoint(centre), atol=1e-3)


def in_a_terminal(*args: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout, and what a terminal 100 columns wide gets on stderr."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))
    command = [sys.executable, "-m", "medgmae", *map(str, args)]
    shown = bytearray()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, cwd=ROOT) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # Linux says EIO where the other side is closed
            while chunk := os.read(ours, 4096):
                shown += chunk
        stdout = process.communicate(timeout=120)[0]
    os.close(ours)
    return process.returncode, stdout, shown.decode()


def test_broken_scans_are_reported_and_the_rest_goes_on(bare: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.csv"
    code, stdout, stderr = in_a_terminal(
        "features", scans, tmp_path / "absent.nii", "--model", f"local-dir:{bare}", "--out", out, "--json"
    )
    assert code == 1, stderr
    facts = json.loads(stdout)
    assert [Path(error["path"]).name for error in facts["errors"]] == ["absent.nii", "cut.nii.gz"]
    assert sorted(facts["scans"]) == ["a", "b"]
    assert stderr.count("Error: ") == 2
    assert "cut.nii.gz" in stderr
    assert "Traceback" not in stderr
    assert "scans: 100%" in stderr
    assert "windows:" in stderr
    rows = list(csv.reader(out.read_text().splitlines()))
    assert rows[0][:4] == ["name", "path", "series", "f0"]
    assert [row[0] for row in rows[1:]] == ["a", "b"]
    assert [row[1] for row in rows[1:]] == [str(scans / "a.mha"), str(scans / "b.nii.gz")]


def test_csv_and_npy_hold_the_same_vectors(bare: Path, scans: Path, tmp_path: Path) -> None:
    (scans / "cut.nii.gz").unlink()
    for suffix in ("CSV", "npy", "safetensors"):
        out = tmp_path / f"f.{suffix}"
        assert features(scans, "--model", NANO, "--weights", bare, "--out", out).exit_code == 0
    tensors = load_file(tmp_path / "f.safetensors")
    array = np.load(tmp_path / "f.npy")
    sidecar = json.loads((tmp_path / "f.json").read_text())
    rows = list(csv.reader((tmp_path / "f.CSV").read_text().splitlines()))[1:]
    assert sidecar["names"] == ["a", "b"]
    assert [Path(path).name for path in sidecar["paths"]] == ["a.mha", "b.nii.gz"]
    assert array.dtype == np.float32
    for i, name in enumerate(["a", "b"]):
        np.testing.assert_array_equal(array[i], tensors[f"{name}/pooled"].numpy())
        np.testing.assert_array_equal(np.array(rows[i][3:], dtype=np.float32), array[i])


def test_nothing_readable_writes_nothing(bare: Path, tmp_path: Path) -> None:
    for suffix in ("csv", "npy", "safetensors"):
        out = tmp_path / f"f.{suffix}"
        result = features(ROOT / "README.md", "--model", f"local-dir:{bare}", "--out", out, "--json")
        assert result.exit_code == 1
        assert json.loads(result.stdout)["out"] is None
    assert list(tmp_path.iterdir()) == []


def test_untrained_models_need_the_word(tmp_path: Path) -> None:
    out = tmp_path / "f.csv"
    result = features(CT, "--model", NANO, "--out", out)
    assert result.exit_code == 2
    assert "untrained" in result.stderr
    assert "--random-weights" in result.stderr
    assert not out.exists()
    result = features(CT, "--model", NANO, "--out", out, "--random-weights", "--window", "64", "--resize", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["weights"] == "random"


def test_preprocessing_is_the_cards_or_a_note_says_what_it_is(saved: Path, bare: Path, tmp_path: Path) -> None:
    def block(*args: str | Path) -> tuple[dict[str, Any], str]:
        result = features(CT, "--out", tmp_path / "f.csv", "--window", "64", "--resize", "--json", "--overwrite", *args)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)["input"], result.stderr

    card, said = block("--model", f"local-dir:{saved}")
    assert (card["spacing"], card["window"], "Note" in said) == ([1.5, 1.5, 1.5], [-175, 250], False)
    default, said = block("--model", f"local-dir:{bare}")
    assert (default["spacing"], default["window"], "Note" in said) == (None, {"percentiles": [0.5, 99.5]}, True)
    borrowed, said = block("--model", f"local-dir:{bare}", "--input-of", "vit_base_patch16_96.glmae")
    assert (borrowed["window"], "Note" in said) == ([-1000, 1000], False)
    changes = ["--input", "spacing=[6,6,6]", "--input", "orientation=LPS", "--input", "normalize=zscore"]
    changed, said = block("--model", f"local-dir:{bare}", *changes)
    assert (changed["spacing"], changed["resample"]["to"], changed["orientation"]) == ([6, 6, 6], "spacing", "LPS")
    assert "Note" not in said


def test_a_tag_with_the_file_that_its_card_is_about(tmp_path: Path) -> None:
    tag = "vit_base_patch16_96.glmae"  # only a person can download it
    torch.manual_seed(3)
    model = medgmae.create_model("vit_base_patch16_96")
    torch.save({"student": model.state_dict()}, tmp_path / "checkpoint.pth")
    out, options = tmp_path / "f.npy", ["--window", "32", "--resize", "--json"]
    result = features(CT, "--model", tag, "--weights", tmp_path / "checkpoint.pth", "--out", out, *options)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["input"]["window"] == [-1000, 1000]
    scan = medgmae.create_transform(tag, whole=True)(CT)
    wanted = medgmae.extract_features(model, scan, window=32, resize=True).pooled
    np.testing.assert_array_equal(np.load(out)[0], wanted.numpy())


def test_dicom_folders(bare: Path, tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(-500, 500, (12, 32, 40)).astype(np.int16))
    folder, before = tmp_path / "patients/one", locale.setlocale(locale.LC_ALL)
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z in range(12):
        plane = image[:, :, z]
        for key, value in {
            "0008|0060": "CT",
            "0020|000d": "1.2.3.4",
            "0020|000e": "1.2.3.4.5",
            "0008|0018": f"1.2.3.4.5.{z + 1}",
            "0020|0032": f"0\\0\\{3 * z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(z),
        }.items():
            plane.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{z:03}.dcm"))
        writer.Execute(plane)
    locale.setlocale(locale.LC_ALL, before)  # the writer has set "C", in which later tests could read no UTF-8
    shutil.copytree(folder, tmp_path / "patients/two")
    assert [path.name for path in expand([tmp_path / "patients"])] == ["one", "two"]
    result = features(tmp_path / "patients", "--model", f"local-dir:{bare}", "--out", tmp_path / "f.npy", "--json")
    assert result.exit_code == 0, result.stderr
    assert sorted(json.loads(result.stdout)["scans"]) == ["one", "two"]
    array = np.load(tmp_path / "f.npy")
    np.testing.assert_array_equal(array[0], array[1])


def test_scans_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b/x.nii", "b/y.NII.GZ", "b/notes.txt", "a/x.nii", "empty"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch() if "." in name else (tmp_path / name).mkdir()
    paths = expand([tmp_path / "b/y.NII.GZ", tmp_path, tmp_path / "b"])
    names = ["b/y.NII.GZ", "a/x.nii", "b/x.nii"]
    assert [str(path.relative_to(tmp_path)) for path in paths] == names


def test_cases_of_several_contrasts(tmp_path: Path) -> None:
    names = ["t1", "t2", "t1ce", "flair"]
    mr = medgmae.data.crop_or_pad(medgmae.read_volume(MR), (32, 32, 32))
    for case in ("one", "two", "broken"):
        (tmp_path / "cases" / case).mkdir(parents=True)
        for factor, name in enumerate(names, 1):
            medgmae.write_volume(mr.with_data(mr.data.short() * factor), tmp_path / f"cases/{case}/p_{name}.nii.gz")
    (tmp_path / "cases/broken/p_flair.nii.gz").unlink()
    assert [path.name for path in expand([tmp_path / "cases"], names)] == ["broken", "one", "two"]
    assert len(expand([tmp_path / "cases"])) == 11
    torch.manual_seed(0)
    model: Any = medgmae.create_model(NANO, in_chans=4)
    block = {"channels": 4, "contrasts": names, "window": {"percentiles": [0, 100], "per": "channel"}}
    model.pretrained_cfg = {**medgmae.weight_card(CARD).to_json(), "input": block}
    saved, out = medgmae.save_pretrained(model, tmp_path / "model"), tmp_path / "f.safetensors"
    result = features(tmp_path / "cases", "--model", f"local-dir:{saved}", "--out", out)
    assert result.exit_code == 1
    assert "broken: no file for the contrast 'flair' among: p_t1.nii.gz, p_t1ce.nii.gz, p_t2.nii.gz" in result.stderr
    tensors = load_file(out)
    assert sorted(tensors) == ["one/map", "one/pooled", "two/map", "two/pooled"]
    ready = medgmae.create_transform(block)({name: tmp_path / f"cases/two/p_{name}.nii.gz" for name in names})
    assert torch.equal(ready.data[3], ready.data[0])  # each contrast is scaled by its own range
    assert torch.equal(tensors["two/pooled"], medgmae.extract_features(model.eval(), ready).pooled)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/ct.nii.gz", "b/mr.mha"], ["ct", "mr"]),
        (["a/ct.nii.gz", "a/ct.mha", "a/x.nii"], ["ct.nii.gz", "ct.mha", "x"]),
        (["a/ct.nii.gz", "b/ct.nii.gz"], ["a/ct.nii.gz", "b/ct.nii.gz"]),
        (["p/a/ct.nii", "q/a/ct.nii", "q/b/ct.nii"], ["p/a/ct.nii", "q/a/ct.nii", "b/ct.nii"]),
    ],
)
def test_names_are_short_and_unique(paths: list[str], names: list[str]) -> None:
    assert unique_names([Path(path) for path in paths]) == names


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--out", "f.txt"], "must end in", 2),
        (["--out", "no/such/f.csv"], "does not exist", 2),
        (["--out", "f.csv", "--map"], "pooled vectors only", 2),
        (["--out", "f.safetensors", "--no-map", "--no-pooled"], "nothing to write", 2),
        (["--out", "f.csv", "--window", "whole", "--resize"], "needs a window", 2),
        (["--out", "f.csv", "--window", "1,2"], "one size per axis", 1),
        (["--out", "f.csv", "--window", "x"], "not a size", 2),
        (["--out", "f.csv", "--overlap", "1"], "overlap", 2),
        (["--out", "f.csv", "--device", "cuda:99"], "cannot be used", 2),
        (["--out", "f.csv", "--device", "toaster"], "cannot be used", 2),
        (["--out", "f.csv", "--input", "windoe=[0,1]"], "windoe", 1),
        (["--out", "f.csv", "--input-of", "vit.none"], "no weights are known", 1),
        (["--out", "f.csv", "--random-weights", "--weights", "x.pth"], "contradict", 2),
        (["--out", "f.csv", "--weights", "x.pth"], "brings its own weights", 1),
        (["--out", "f.csv", "--model", NANO, "--weights", "x.pth"], "no such file", 1),
        (["--out", "f.csv", "--model", "vit_nano"], "untrained", 2),
        (["--out", "f.csv", "--model", "vit_nano.demo"], "unknown model 'vit_nano'", 1),
    ],
)
def test_wrong_use(
    options: list[str], message: str, code: int, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = features(CT, "--model", f"local-dir:{bare}", *options)
    assert message in " ".join(result.stderr.split())
    assert result.exit_code == code
    assert result.stdout in ("", "nothing was written\n")
    assert list(tmp_path.iterdir()) == []
