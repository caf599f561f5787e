"""DICOM Segmentation objects: read back by highdicom, they are the labels, in the place of the series."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import dicom_series
from torch import Tensor

import medgmae
from medgmae.data import Grid, Volume, VolumeError, resample_like, write_dicom_seg

STUDY = {"0008|0020": "20200101", "0008|0030": "120000", "0010|0020": "p1", "0020|0052": "1.2.3.9"}


@pytest.fixture(params=["", "1"], ids=["plain", "wrong spacing said"])
def series(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    said = {"0018|0088": request.param} if request.param else {}  # SpacingBetweenSlices, where the positions are right
    dicom_series(tmp_path / "study", "1.2.3.4.5", range(5), **STUDY, **said)
    return tmp_path / "study"


def read_back(path: Path, like: Volume, **options: Any) -> Tensor:
    """Labels (1, D, H, W) or masks (K, D, H, W), by geometry: the slices may lie in the file in reverse."""
    import highdicom

    found = highdicom.seg.segread(path).get_volume(**options)
    channels = torch.from_numpy(found.array.astype(np.uint8)).reshape(*found.array.shape[:3], -1).movedim(-1, 0)
    lying = Volume(channels.contiguous(), Grid.from_affine(found.affine, found.array.shape[:3]))
    assert lying.size == like.size
    return resample_like(lying, like, interpolation="nearest", outside=99).data


def test_labels_and_masks_come_back(series: Path, tmp_path: Path) -> None:
    scan = medgmae.read_volume(series)
    labels = scan.with_data(torch.randint(0, 3, (1, *scan.size), dtype=torch.uint8))
    write_dicom_seg(labels, series, tmp_path / "labels.dcm", ["one", "two"])
    assert torch.equal(read_back(tmp_path / "labels.dcm", scan, combine_segments=True), labels.data)
    masks = scan.with_data(torch.randint(0, 2, (3, *scan.size), dtype=torch.uint8))
    write_dicom_seg(masks, series, tmp_path / "masks.dcm", ["a", "b", "c"], series="1.2.3.4.5")
    assert torch.equal(read_back(tmp_path / "masks.dcm", scan), masks.data)


def test_a_segment_without_voxels_keeps_its_name(series: Path, tmp_path: Path) -> None:
    import highdicom

    scan = medgmae.read_volume(series)
    labels = scan.with_data(torch.zeros(1, *scan.size, dtype=torch.uint8))
    labels.data[0, 2, 3:5, 6:9] = 2
    write_dicom_seg(labels, series, tmp_path / "labels.dcm", ["one", "two"])
    read = highdicom.seg.segread(tmp_path / "labels.dcm")
    assert [item.SegmentLabel for item in read.SegmentSequence] == ["one", "two"]
    assert (read.PatientID, read.FrameOfReferenceUID) == ("p1", "1.2.3.9")


def test_what_cannot_be_written(series: Path, tmp_path: Path) -> None:
    scan = medgmae.read_volume(series)
    empty = torch.zeros(1, *scan.size, dtype=torch.uint8)
    cases: list[tuple[torch.Tensor, list[str], str | None, str]] = [
        (empty, ["one"], None, "nothing is labelled"),
        (empty + 2, ["one"], None, "labels from 2 to 2 and 1 names"),
        (empty + 1, [], None, "0 names"),
        ((empty + 1).repeat(2, 1, 1, 1), ["a", "b", "c"], None, r"2 channel\(s\) of labels"),
        (empty + 1, ["one"], "1.2.3", "expected one DICOM series 1.2.3, found none"),
    ]
    for data, names, uid, message in cases:
        with pytest.raises(VolumeError, match=message):
            write_dicom_seg(Volume(data, scan.grid), series, tmp_path / "a.dcm", names, series=uid)
    assert not (tmp_path / "a.dcm").exists()
