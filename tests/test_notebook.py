"""What a notebook shows of a volume: facts, and pictures that a radiologist would hold the same way round."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from medgmae.data import Grid, Volume, reorient


def pictures(volume: Volume, folder: Path) -> dict[str, tuple[np.ndarray, int, int]]:
    """Pixels, width and height of the three pictures, decoded by SimpleITK."""
    pattern = r'base64,([^"]+)" width="(\d+)" height="(\d+)".*?<figcaption>(\w+)<'
    shown = {}
    for code, width, height, name in re.findall(pattern, volume._repr_html_()):
        (folder / f"{name}.png").write_bytes(base64.b64decode(code))
        pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{name}.png")))
        assert pixels.dtype == np.uint8
        shown[name] = pixels, int(width), int(height)
    assert list(shown) == ["axial", "coronal", "sagittal"]
    return shown


def body() -> Volume:
    """RAS, 20 x 30 x 40 voxels (x, y, z) with bright voxels at the patient's right, front and top."""
    data = torch.zeros(1, 40, 30, 20)
    data[0, :, :, -1] = 50  # right
    data[0, :, -1, :] = 100  # front
    data[0, -1, :, :] = 150  # top
    direction = np.array([[0.0, 0, -1], [0, -1, 0], [1, 0, 0]])
    volume = Volume(data, Grid((40, 30, 20), (2.0, 1.0, 3.0), direction=direction))
    assert volume.orientation == "RAS"
    return volume


@pytest.mark.parametrize("code", ["RAS", "LPS", "SAR", "PIL"])
def test_the_patient_is_seen_from_the_front_and_the_feet(code: str, tmp_path: Path) -> None:
    shown = pictures(reorient(body(), code), tmp_path)
    axial, coronal, sagittal = (shown[name][0] for name in ("axial", "coronal", "sagittal"))
    assert axial.shape == (30, 20)
    assert (axial[1:, 0] > axial[1:, 1]).all()  # right on the left
    assert (axial[0] > axial[1]).all()  # front at the top
    assert (coronal[1:, 0] > coronal[1:, 1]).all()
    assert (coronal[0] > coronal[1]).all()  # head at the top
    assert (sagittal[1:, 0] > sagittal[1:, 1]).all()  # front on the left
    assert (sagittal[0] > sagittal[1]).all()
    # 80 mm are 160 pixels, whatever the voxels.
    assert [shown[name][1:] for name in shown] == [(120, 60), (120, 160), (60, 160)]


def test_facts() -> None:
    text = body()._repr_html_()
    for fact in ("(1, 40, 30, 20)", "float32", "2 x 1 x 3 mm", "80 x 30 x 60 mm", "RAS", "0 to 150"):
        assert fact in text
    named = Volume(torch.zeros(1, 2, 2, 2), source="<b>&scan.nii")._repr_html_()
    assert "&lt;b&gt;&amp;scan.nii" in named
    assert "<b>" not in named
    assert len(repr(body())) < 120


def test_pictures_stay_small() -> None:
    volume = Volume(torch.rand(1, 400, 300, 500), Grid((400, 300, 500), (0.5, 2.0, 0.7)))
    assert len(volume._repr_html_()) < 120_000


@pytest.mark.parametrize(
    ("data", "shown_range"),
    [
        (torch.full((1, 4, 5, 6), float("nan")), "no finite voxel, 120 voxels NaN or infinite"),
        (torch.tensor([0.0, float("nan"), 2.0, float("inf")]).reshape(1, 1, 2, 2), "0 to 2, 2 voxels NaN"),
        (torch.full((1, 4, 5, 6), 7, dtype=torch.int16), "7 to 7"),
        (torch.ones(1, 4, 5, 6, dtype=torch.bool), "1 to 1"),
        (torch.rand(1, 4, 5, 6).bfloat16().requires_grad_(), " to "),
        (torch.arange(8).reshape(1, 1, 1, 8), "0 to 7"),
        (torch.arange(8).reshape(1, 8, 1, 1), "0 to 7"),
        (torch.randn(192, 3, 4, 5), " to "),
    ],
    ids=["nan", "holes", "constant", "bool", "half", "a line", "a column", "features"],
)
def test_odd_volumes_are_shown(data: torch.Tensor, shown_range: str, tmp_path: Path) -> None:
    volume = Volume(data, Grid(data.shape[1:], (5.0, 1.0, 2.0)))
    assert shown_range in volume._repr_html_()
    for _, width, height in pictures(volume, tmp_path).values():
        assert 1 <= width <= 160
        assert 1 <= height <= 160
