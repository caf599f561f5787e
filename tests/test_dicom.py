"""DICOM folders: series, order of slices, gaps, mixtures, and files that are no images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medgmae.data import VolumeError, read_volume

VOXELS = np.random.default_rng(0).integers(-1000, 1000, (6, 8, 10)).astype(np.int16)
ROW, COLUMN = np.array([0.8, 0.6, 0.0]), np.array([-0.36, 0.48, 0.8])
NORMAL = np.cross(ROW, COLUMN)


def write_slice(
    path: Path, plane: np.ndarray, position: np.ndarray, uid: str, slope: float = 1.0, **tags: object
) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    one.SOPClassUID, one.SOPInstanceUID, one.Modality = CTImageStorage, meta.MediaStorageSOPInstanceUID, "CT"
    one.SeriesInstanceUID, one.StudyInstanceUID, one.SeriesDescription = uid, "1.2.3", "made for a test"
    one.Rows, one.Columns = plane.shape
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated = one.BitsStored = 16
    one.HighBit, one.PixelRepresentation = 15, 1
    one.PixelSpacing = [0.8, 0.7]  # between rows, between columns
    one.ImageOrientationPatient = [f"{v:.8g}" for v in (*ROW, *COLUMN)]
    one.ImagePositionPatient = [f"{v:.8g}" for v in position]
    one.RescaleSlope, one.RescaleIntercept, one.SliceThickness = slope, -24, 99
    one.PixelData = plane.tobytes()
    for name, value in tags.items():
        setattr(one, name, value)
    one.save_as(path, enforce_file_format=True)


def position(k: float, step: float = 2.5) -> np.ndarray:
    return np.array([10.0, -20.0, 5.0]) + k * step * NORMAL


def write_series(folder: Path, order: tuple[int, ...] = (3, 0, 5, 1, 4, 2), uid: str = "1.2.3.4") -> Path:
    """Slices under names that say nothing about where they lie."""
    folder.mkdir(exist_ok=True)
    for name, k in enumerate(order):
        write_slice(folder / f"{uid}-{name}.dcm", VOXELS[k], position(k), uid)
    return folder


def test_slices_are_sorted_and_the_geometry_is_that_of_the_tags(tmp_path: Path) -> None:
    volume = read_volume(write_series(tmp_path / "ct"))
    np.testing.assert_array_equal(volume.data[0].numpy(), VOXELS - 24)
    np.testing.assert_allclose(volume.spacing, (2.5, 0.8, 0.7), atol=1e-6)
    np.testing.assert_allclose(volume.origin, (10, -20, 5), atol=1e-6)
    np.testing.assert_allclose(volume.direction, np.stack([NORMAL, COLUMN, ROW], 1), atol=1e-6)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "ct")))
    image = reader.Execute()
    np.testing.assert_array_equal(volume.data[0].numpy(), sitk.GetArrayFromImage(image))
    for index in ((0, 0, 0), (5, 7, 9), (2.5, 1, 0)):
        expected = image.TransformContinuousIndexToPhysicalPoint([float(v) for v in index[::-1]])
        np.testing.assert_allclose(volume.grid.world(index), expected, atol=1e-4)


def test_several_series_are_listed_and_one_can_be_chosen(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "study")
    write_series(folder, order=(0, 1, 2), uid="1.2.3.5")
    with pytest.raises(VolumeError) as caught:
        read_volume(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "2 DICOM series" in message
    assert "1.2.3.4  CT  6 file(s) of 10x8  'made for a test'" in message
    assert "1.2.3.5  CT  3 file(s)" in message
    assert read_volume(folder, series="1.2.3.5").size == (3, 8, 10)
    with pytest.raises(VolumeError, match=r"no series '1\.2'.*\n.*1\.2\.3\.4"):
        read_volume(folder, series="1.2")


def test_a_missing_slice_and_uneven_spacing_are_said(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=r"missing or unevenly spaced.*5\.000 mm between .* where most are 2\.500 mm"):
        read_volume(write_series(tmp_path / "gap", order=(0, 1, 3, 4, 5)))
    folder = write_series(tmp_path / "mixed", order=(0, 1, 2, 3))
    for k in (1, 2):
        write_slice(folder / f"thick{k}.dcm", VOXELS[k], position(3 + 2 * k), "1.2.3.4")
    with pytest.raises(VolumeError, match=r"2 such gap\(s\) in 6 slices"):
        read_volume(folder)


def test_small_rounding_of_positions_is_no_gap(tmp_path: Path) -> None:
    for k in range(6):
        write_slice(tmp_path / f"{k}.dcm", VOXELS[k], position(k) + 0.01 * (k % 2) * NORMAL, "1.2.3.4")
    assert read_volume(tmp_path).size == (6, 8, 10)


def test_two_slices_in_one_place(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "twice")
    write_slice(folder / "again.dcm", VOXELS[2], position(2), "1.2.3.4")
    with pytest.raises(VolumeError, match=r"again\.dcm.*same position|same position.*again"):
        read_volume(folder)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"PixelSpacing": [0.9, 0.7]}, "mixed spacing in the plane"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, "mixed orientation"),
    ],
)
def test_mixed_geometry(tmp_path: Path, tags: dict[str, object], words: str) -> None:
    folder = write_series(tmp_path / "mixed", order=(0, 1, 2))
    write_slice(folder / "other.dcm", VOXELS[3], position(3), "1.2.3.4", **tags)
    with pytest.raises(VolumeError, match=rf"{words} in series 1\.2\.3\.4: .* in 3 file\(s\), .* in 1 file\(s\)"):
        read_volume(folder)


def test_mixed_size(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "mixed", order=(0, 1, 2))
    write_slice(folder / "other.dcm", VOXELS[3, :4], position(3), "1.2.3.4")
    with pytest.raises(VolumeError, match="mixed size"):
        read_volume(folder)


def test_a_tilted_gantry_is_refused(tmp_path: Path) -> None:
    for k in range(6):
        write_slice(tmp_path / f"{k}.dcm", VOXELS[k], position(k) + 0.6 * k * COLUMN, "1.2.3.4")
    with pytest.raises(VolumeError, match=r"shift sideways by 3\.00 mm"):
        read_volume(tmp_path)


def test_rescaling_that_differs_between_slices(tmp_path: Path) -> None:
    for k in range(3):
        write_slice(tmp_path / f"{k}.dcm", VOXELS[k], position(k), "1.2.3.4", slope=(1.0, 0.5, 0.25)[k])
    expected = np.stack([VOXELS[k] * (1.0, 0.5, 0.25)[k] - 24 for k in range(3)])
    np.testing.assert_allclose(read_volume(tmp_path).data[0].numpy(), expected, atol=1e-3)


def test_other_files_are_passed_over_and_broken_slices_are_not(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "ct")
    (folder / "notes.txt").write_text("hello")
    (folder / "sub").mkdir()
    bundled = Path(pydicom.__file__).parent / "data/test_files"
    shutil.copy(bundled / "reportsi.dcm", folder / "report.dcm")
    shutil.copy(bundled / "rtplan.dcm", folder / "sub/plan.dcm")
    assert read_volume(folder).size == (6, 8, 10)
    path = folder / "1.2.3.4-0.dcm"
    content = path.read_bytes()
    for broken in (content[:-20], content[:150], b""):
        path.write_bytes(broken)
        with pytest.raises(VolumeError, match="cannot be read"):
            read_volume(folder)


def test_folders_without_a_volume(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(VolumeError, match="holds no files; expected the slices of a DICOM series"):
        read_volume(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(VolumeError, match=r"1 file\(s\), none of them a DICOM image"):
        read_volume(tmp_path)
    write_slice(tmp_path / "one.dcm", VOXELS[0], position(0), "1.2")
    with pytest.raises(VolumeError, match="single 2-D slice"):
        read_volume(tmp_path)
    with pytest.raises(VolumeError, match=r"one DICOM slice.*folder"):
        read_volume(tmp_path / "one.dcm")
    assert capfd.readouterr().err == ""


def test_a_study_of_pydicom_lists_its_series() -> None:
    folder = Path(pydicom.__file__).parent / "data/test_files/dicomdirtests"
    with pytest.raises(VolumeError) as caught:
        read_volume(folder / "98892003")
    lines = str(caught.value).splitlines()
    assert len(lines) > 2
    assert " MR " in lines[1]
