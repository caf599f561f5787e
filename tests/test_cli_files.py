"""Files that commands write: whole and readable or not at all, and nothing in their place is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import warm_python
from cli_runs import limited, saved_nano, small_scan
from click.testing import Result
from test_cli import run

import medgmae

CROP = ["--input", "window=[0,1]"]
GAUSSIANS = ["--model", "gmae_vit_nano_patch8_32", "--random-weights"]


def commands(folder: Path) -> dict[str, list[str | Path]]:
    """A command per kind of file; the files are folder/out.*"""
    scan = small_scan(folder / "scan.nii.gz", size=32)
    fit = ["fit", scan, "--gaussians", "20", "--steps", "1", "--threads", "1", *CROP, "--out", folder / "out.ply"]
    return {
        "fit": [*fit, "--recon", folder / "out.mha", "--png", folder / "out.png"],
        "reconstruct": ["reconstruct", scan, *GAUSSIANS, *CROP, "--out", folder / "out.nii.gz", "--ply",
                        folder / "out.ply", "--png", folder / "out.png"],
        "latent-map": ["latent-map", scan, *GAUSSIANS, *CROP, "--out", folder / "out.nrrd", "--png",
                       folder / "out.png"],
    }  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["fit", "reconstruct", "latent-map"])
def test_files_that_are_there_are_replaced_when_told_to(name: str, tmp_path: Path) -> None:
    command = commands(tmp_path)[name]
    assert run(*command).exit_code == 0
    before = contents(tmp_path)
    outs = sorted(set(before) - {"scan.nii.gz"})
    for out in outs:  # each of them alone is enough
        for path in tmp_path.glob("out.*"):
            path.unlink()
        (tmp_path / out).write_text("mine")
        result = run(*command)
        assert result.exit_code == 2
        assert f"{tmp_path / out} exists; choose another name, or --overwrite" in " ".join(result.stderr.split())
        assert contents(tmp_path) == {"scan.nii.gz": before["scan.nii.gz"], out: b"mine"}
    result = run(*command, "--overwrite", "--json")
    assert result.exit_code == 0, result.stderr
    assert contents(tmp_path).keys() == before.keys()
    assert b"mine" not in contents(tmp_path).values()
    assert json.loads(result.stdout)["out"] == str(tmp_path / command[command.index("--out") + 1])


@pytest.mark.parametrize("name", ["fit", "reconstruct", "latent-map"])
def test_a_scan_is_never_overwritten(name: str, tmp_path: Path) -> None:
    command = commands(tmp_path)[name]
    scan = tmp_path / "scan.nii.gz"
    before = scan.read_bytes()
    (tmp_path / "same").symlink_to(tmp_path)
    option = "--recon" if name == "fit" else "--out"
    command[command.index(option) + 1] = tmp_path / "same/scan.nii.gz"
    result = run(*command, "--overwrite")
    assert result.exit_code == 2
    assert "is an input" in result.stderr
    assert scan.read_bytes() == before


@pytest.mark.parametrize("name", ["fit", "reconstruct", "latent-map"])
def test_a_full_disk_leaves_what_was_there(name: str, tmp_path: Path) -> None:
    command = commands(tmp_path)[name]
    for option in ("--out", "--ply", "--png", "--recon"):
        if option in command:
            Path(command[command.index(option) + 1]).write_text("mine")
    before = contents(tmp_path)
    done = warm_python.run("-m", "medgmae", *command, "--overwrite", limits=limited(300))
    assert done.returncode == 1
    assert "was not written: " in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("limit", [200, 40000])
def test_volumes_are_whole_or_not_there(limit: int, tmp_path: Path) -> None:
    """SimpleITK's writers do not all notice that the disk is full."""
    code = """
import sys, click, torch
from pathlib import Path
from medgmae.cli.files import write_volume
from medgmae.data import Grid, Volume
volume = Volume(torch.rand(1, 24, 24, 24), Grid((24, 24, 24), (1, 1, 1)))  # 55,296 bytes
for ending in ("nii", "nii.gz", "mha", "mhd", "nrrd"):
    try:
        write_volume(volume, Path(sys.argv[1], f"out.{ending}"), False)
    except click.ClickException as error:
        assert "was not written" in str(error)
    else:
        raise AssertionError(ending)
"""
    done = warm_python.run("-c", code, tmp_path, limits=limited(limit))
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_header_and_its_voxels_come_together(tmp_path: Path) -> None:
    command = commands(tmp_path)["latent-map"]
    command[command.index("--out") + 1] = tmp_path / "out.mhd"
    assert run(*command).exit_code == 0
    assert sorted(path.name for path in tmp_path.glob("out.*")) == ["out.mhd", "out.png", "out.raw"]
    assert medgmae.read_volume(tmp_path / "out.mhd").size == (32, 32, 32)
    (tmp_path / "out.mhd").unlink()
    (tmp_path / "out.png").unlink()
    result = run(*command)
    assert result.exit_code == 1
    assert "out.raw exists" in result.stderr


def test_convert_replaces_a_folder_when_told_to(tmp_path: Path) -> None:
    model = Path(saved_nano(tmp_path / "model").removeprefix("local-dir:")) / "model.safetensors"

    def convert(*options: str) -> Result:
        return run("convert", model, tmp_path / "out", "--model", "vit_nano_patch8_32", *options)

    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    assert convert().exit_code == 0
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]
    whole = contents(tmp_path / "out")
    assert sorted(whole) == ["README.md", "config.json", "model.safetensors"]
    (tmp_path / "out/config.json").write_text("mine")
    refused = convert()
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert (tmp_path / "out/config.json").read_text() == "mine"
    assert convert("--overwrite").exit_code == 0
    assert contents(tmp_path / "out") == whole
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


def test_convert_on_a_full_disk(tmp_path: Path) -> None:
    model = Path(saved_nano(tmp_path / "model").removeprefix("local-dir:")) / "model.safetensors"
    command = ["convert", model, tmp_path / "out", "--model", "vit_nano_patch8_32"]
    done = warm_python.run("-m", "medgmae", *command, limits=limited(20000))
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert sorted(os.listdir(tmp_path)) == ["model"]
    assert run(*command).exit_code == 0
    read = medgmae.create_model(f"local-dir:{tmp_path / 'out'}").state_dict()
    assert all(
        torch.equal(tensor, read[name])
        for name, tensor in medgmae.create_model(f"local-dir:{tmp_path / 'model'}").state_dict().items()
    )
