"""The gallery: encoders side by side, of models with other grids and other preprocessing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import medgmae
from medgmae.cli import main

DATA = Path(__file__).parent.parent / "examples/data"
MR = DATA / "mr_brain_t1.nii.gz"


def volume(*size: int) -> medgmae.Volume:
    return medgmae.Volume(torch.rand(1, *size), medgmae.Grid(size, (2.0, 2.0, 2.0)))


def test_two_rows_per_scan_and_a_column_per_encoder() -> None:
    scans = {"a": volume(8, 9, 10), "b": volume(12, 6, 7)}
    colours = {
        name: [scan.with_data(torch.full((3, *scan.size), level)) for scan in scans.values()]
        for name, level in (("first", 0.25), ("second", 0.75))
    }
    figure = medgmae.gallery_figure(scans, colours)
    axes = figure.axes
    assert len(axes) == 4 * 3
    assert [one.get_title() for one in axes[:3]] == ["scan", "first", "second"]
    assert [one.get_ylabel() for one in axes[::3]] == ["a, axial", "a, coronal", "b, axial", "b, coronal"]
    for row in range(4):
        for column, level in ((1, 0.25), (2, 0.75)):
            shown = axes[3 * row + column].images[0].get_array()
            assert shown.shape[-1] == 3
            assert float(shown.max()) == pytest.approx(level)


def test_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match="there is no scan"):
        medgmae.gallery_figure({}, {})
    with pytest.raises(ValueError, match="first has colours of 0 scans; expected 1"):
        medgmae.gallery_figure({"a": volume(4, 4, 4)}, {"first": []})
    with pytest.raises(TypeError, match="a must be a prepared scan"):
        medgmae.gallery_figure({"a": torch.nn.Identity()}, {})  # type: ignore[dict-item]


def test_the_command(tmp_path: Path) -> None:
    small = medgmae.create_transform({"orientation": "RAS", "resample": {"to": "spacing"}, "spacing": [6, 6, 6]})
    medgmae.write_volume(small(MR), tmp_path / "small.nii.gz")
    out = tmp_path / "gallery.png"
    arguments = ["gallery", "vit_nano_patch8_32", "primus_nano_patch8_32", "--random-weights", "--json"]
    arguments += ["--scan", str(tmp_path / "small.nii.gz"), "--out", str(out)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["models"] == ["vit_nano_patch8_32", "primus_nano_patch8_32"]
    assert out.read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(main, arguments).exit_code == 2  # the picture is there
    shipped = CliRunner().invoke(main, ["gallery", "--overwrite", "--json", *arguments[-4:]])
    assert shipped.exit_code == 0, shipped.output
    assert json.loads(shipped.stdout)["models"] == ["vit_tiny_patch8_64.demo"]
