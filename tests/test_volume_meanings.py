"""Headers that contradict themselves or say what other programs pass over: refused, or read with a warning."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from pydicom.uid import JPEGLSLossless

from medgmae.data import VolumeError, read_volume

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
import dicom_files as files

VOXELS = np.random.default_rng(0).integers(0, 200, (5, 8, 10)).astype(np.int16)


@pytest.mark.parametrize(
    ("at", "packed", "words"),
    [
        (108, struct.pack("<f", 348), "byte 348; expected 352"),  # the voxels would begin with the mark of extensions
        (344, b"n+1x", r"magic is b'n\+1x'"),
    ],
)
def test_nifti_headers_as_nibabel_refuses_them(at: int, packed: bytes, words: str, tmp_path: Path) -> None:
    content = bytearray(nibabel.Nifti1Image(VOXELS, np.eye(4)).to_bytes())
    content[at : at + len(packed)] = packed
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises((nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError)):
        nibabel.load(tmp_path / "a.nii")
    with pytest.raises(VolumeError, match=words):
        read_volume(tmp_path / "a.nii")


def nrrd(folder: Path, tail: bytes = b"", **changes: str) -> Path:
    fields = {
        "type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "10 8 5", "endian": "little",
        "space directions": "(1,0,0) (0,1,0) (0,0,1)", "kinds": "domain domain domain", "encoding": "raw",
        **{name.replace("_", " "): value for name, value in changes.items()},
    }  # fmt: skip
    lines = [f"{name}: {value}\n" for name, value in fields.items() if value]
    path = folder / "a.nrrd"
    path.write_bytes(("NRRD0005\n" + "".join(lines) + "\n").encode() + VOXELS.tobytes() + tail)
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": "rps"}, "space is 'rps'"),
        ({"kinds": "domain domain time"}, "has a direction in space and is of the kind 'time'"),
        ({"space_units": "um um um"}, "expected millimetres"),
    ],
)
def test_nrrd_headers_that_are_refused(changes: dict[str, str], words: str, tmp_path: Path) -> None:
    assert read_volume(nrrd(tmp_path)).size == (5, 8, 10)
    with pytest.raises(VolumeError, match=words):
        read_volume(nrrd(tmp_path, **changes))


def test_what_is_passed_over_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_volume(nrrd(tmp_path, tail=bytes(60)))
    assert "60 bytes after the voxels in a.nrrd are ignored" in caplog.text
    places = {"space": "", "space_directions": "", "spacings": "1 1 1", "axis_mins": "1 2 3"}
    assert read_volume(nrrd(tmp_path, **places)).origin == (0.0, 0.0, 0.0)
    assert "the header has axis mins and no space origin" in caplog.text


def only(number: int, change: Callable[[Any], None]) -> list[files.Change]:
    return [change if k == number else (lambda one: None) for k in range(len(VOXELS))]


def without_rescaling(one: Any) -> None:
    del one.RescaleSlope, one.RescaleIntercept


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_rescaling, "slices of mixed rescaling"),
        (lambda one: setattr(one, "StudyInstanceUID", "1.9"), "slices of mixed study"),
        (lambda one: setattr(one, "Modality", "PT"), "slices of mixed modality"),
        (lambda one: setattr(one, "DoseGridScaling", "0.5"), "a radiotherapy dose"),
    ],
)
def test_slices_whose_numbers_mean_different_things(change: files.Change, words: str, tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=words):
        read_volume(files.write_series(tmp_path / "ct", VOXELS, only(2, change)))


def test_slices_of_different_units(tmp_path: Path) -> None:
    def of_unit(unit: str) -> files.Change:
        return lambda one: setattr(one, "Units", unit)

    units = [of_unit("BQML")] * 4
    assert read_volume(files.write_series(tmp_path / "same", VOXELS, units)).size[0] == 5
    with pytest.raises(VolumeError, match=r"mixed units in series .*: BQML in 4 file"):
        read_volume(files.write_series(tmp_path / "mixed", VOXELS, [*units, of_unit("CNTS")]))


def test_compressed_numbers_of_more_bits_than_the_header_says(tmp_path: Path) -> None:
    def lying(stored: int) -> files.Change:
        def change(one: Any) -> None:
            one.compress(JPEGLSLossless)
            one.BitsStored, one.HighBit, one.PixelRepresentation = stored, stored - 1, 0

        return change

    voxels = np.random.default_rng(0).integers(0, 200, (5, 32, 32)).astype(np.uint16)
    right = read_volume(files.write_series(tmp_path / "right", voxels, [lying(8)] * 5))
    np.testing.assert_array_equal(right.data[0].numpy(), voxels.astype(int) - 24)
    with pytest.raises(VolumeError, match="expected numbers of 6 bits"):
        read_volume(files.write_series(tmp_path / "wrong", voxels, [lying(6)] * 5))
