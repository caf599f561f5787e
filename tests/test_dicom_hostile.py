"""DICOM whose tags mislead: classic slices, enhanced multi-frame images, compressed pixels, and pydicom's own files."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import warm_python
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from medgmae.data import VolumeError, read_volume
from medgmae.data.formats.decoding import Decoder
from medgmae.data.formats.elements import read_elements
from medgmae.data.formats.slices import common_type, decode, pixels_of, true_values

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests/fuzz"))
import dicom_files as files  # noqa: E402

VOXELS = np.random.default_rng(0).integers(-1000, 1000, (5, 8, 10)).astype(np.int16)
NATIVE = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
TEST_FILES = Path(pydicom.__file__).parent / "data/test_files"
PACKAGED = sorted(path for path in TEST_FILES.rglob("*") if path.is_file() and path.suffix not in (".zip", ".gz"))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


def assert_right(volume: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(volume.data[0].numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(volume.spacing, files.SPACING, atol=1e-9)
    np.testing.assert_allclose(volume.origin, files.FIRST, atol=1e-9)
    np.testing.assert_allclose(volume.direction, np.stack([files.NORMAL, files.COLUMN, files.ROW], 1), atol=1e-9)


@pytest.mark.parametrize("syntax", NATIVE, ids=lambda uid: uid.name)
@pytest.mark.parametrize("dtype", ["i2", "u2", "i4"])
def test_transfer_syntaxes_and_types(tmp_path: Path, syntax: pydicom.uid.UID, dtype: str) -> None:
    voxels = np.abs(VOXELS).astype(dtype)
    assert_right(read_volume(files.write_series(tmp_path / "ct", voxels, syntax=syntax)), voxels.astype(int) - 24)


def changed(**tags: Any) -> files.Change:
    def change(one: pydicom.Dataset) -> None:
        for name, value in tags.items():
            if value is None:
                delattr(one, name)
            else:
                setattr(one, name, value)

    return change


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"PixelData": VOXELS[0].tobytes()[:-2]}, "158 bytes; expected 160"),
        ({"PixelData": VOXELS[0].tobytes() * 2}, "320 bytes; expected 160"),
        ({"PixelData": None}, "no PixelData"),
        ({"PixelSpacing": [0, 0.7]}, "PixelSpacing"),
        ({"PixelSpacing": None}, "PixelSpacing is ''"),
        ({"ImageOrientationPatient": None}, "ImageOrientationPatient is ''"),
        ({"ImageOrientationPatient": [0] * 6}, "perpendicular"),
        ({"ImageOrientationPatient": [1, 0, 0, 0.6, 0.8, 0]}, "perpendicular"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient is ''"),
        ({"RescaleSlope": 0}, "the slope not 0"),
        ({"RescaleIntercept": None}, "expected two numbers"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR"),
        ({"BitsAllocated": 12}, "bits"),
        ({"FrameOfReferenceUID": "1.2"}, "mixed frame of reference"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "mixed kind of pixels"),
        ({"NumberOfFrames": "2"}, "1 of them multi-frame"),
    ],
)
def test_a_slice_that_is_wrong_is_refused(tmp_path: Path, tags: dict[str, Any], words: str) -> None:
    folder = files.write_series(tmp_path / "ct", VOXELS, change=[changed(), changed(), changed(**tags)])
    with pytest.raises(VolumeError, match=words):
        read_volume(folder)


def test_values_are_those_of_the_tags(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inverted = [changed(PhotometricInterpretation="MONOCHROME1", LossyImageCompression="01")] * 5
    assert_right(read_volume(files.write_series(tmp_path / "mono1", VOXELS, change=inverted)), VOXELS - 24)
    assert [record.message.split(": ")[1].split(" ")[0] for record in caplog.records] == ["MONOCHROME1", "lossy"]
    assert all(str(tmp_path / "mono1") in record.message for record in caplog.records)
    bits = [
        changed(BitsStored=12, HighBit=11, PixelData=(plane & 0xFFF | 0x5000).astype("<i2").tobytes())
        for plane in VOXELS
    ]
    assert_right(read_volume(files.write_series(tmp_path / "bits", VOXELS, change=bits)), VOXELS - 24)
    scales = [changed(RescaleSlope=slope, RescaleIntercept=slope * 3) for slope in (1, 2, 0.5, 4, 1)]
    expected = np.stack([plane * s + 3 * s for plane, s in zip(VOXELS, (1, 2, 0.5, 4, 1), strict=True)])
    assert_right(read_volume(files.write_series(tmp_path / "scales", VOXELS, change=scales)), expected)


LARGE = np.random.default_rng(1).integers(0, 3000, (3, 64, 64)).astype(np.uint16)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: uid.name)
def test_compressed_slices_and_frames(tmp_path: Path, syntax: pydicom.uid.UID) -> None:
    if syntax == JPEG2000Lossless and "pylibjpeg" not in pydicom.pixels.get_encoder(syntax).available_plugins:
        pytest.skip("nothing here writes JPEG 2000")
    packed = [lambda one: one.compress(syntax)] * 3
    folder = files.write_series(tmp_path / "ct", LARGE, change=packed)
    assert_right(read_volume(folder), LARGE.astype(int) - 24)
    enhanced = files.make_enhanced(LARGE, [2, 0, 1])
    enhanced.compress(syntax)
    files.save(enhanced, tmp_path / "enhanced.dcm")
    assert_right(read_volume(tmp_path / "enhanced.dcm"), LARGE.astype(int) - 24)
    if syntax != RLELossless:  # a stream that ends early has no end
        one = pydicom.dcmread(folder / "1.dcm")
        frame = next(pydicom.encaps.generate_frames(one.PixelData, number_of_frames=1))
        one.PixelData = pydicom.encaps.encapsulate([frame[: len(frame) // 2]])
        files.save(one, folder / "1.dcm")
        with pytest.raises(VolumeError, match=r"1\.dcm: cannot be read: .*truncated"):
            read_volume(folder)


def test_a_decoder_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medgmae.data.formats import decoding

    program = tmp_path / "dies.py"
    program.write_text("import os, sys\nsys.stdin.buffer.readline()\nos.abort()\n")
    monkeypatch.setattr(decoding, "_PROGRAM", program)
    folder = files.write_series(tmp_path / "ct", LARGE, change=[lambda one: one.compress(RLELossless)] * 3)
    with pytest.raises(VolumeError, match=r"0\.dcm: cannot be read: .*the decoder ended with code -6"):
        read_volume(folder)


WITHOUT = """
import sys
for name in ("highdicom", "pydicom"):
    sys.modules[name] = None
from medgmae.data import read_volume, VolumeError
for path in sys.argv[1:]:
    try:
        print(read_volume(path))
    except VolumeError as error:
        print(repr(str(error)))
"""


def test_without_the_extra_plain_slices_are_read_and_others_refused_with_the_remedy(tmp_path: Path) -> None:
    files.write_series(tmp_path / "plain", VOXELS)
    files.write_series(tmp_path / "packed", VOXELS, change=[lambda one: one.compress(RLELossless)] * 5)
    files.save(files.make_enhanced(VOXELS), tmp_path / "enhanced.dcm")
    done = warm_python.run("-c", WITHOUT, *(tmp_path / name for name in ("plain", "packed", "enhanced.dcm")))
    assert done.returncode == 0, done.stderr
    plain, packed, enhanced = done.stdout.splitlines()
    assert "Volume((1, 5, 8, 10)" in plain
    assert "packed" in packed
    assert "medgmae[dicom]" in packed
    assert "enhanced.dcm" in enhanced
    assert "medgmae[dicom]" in enhanced


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 0, 4, 1, 2]])
def test_frames_lie_where_their_positions_say(tmp_path: Path, order: list[int]) -> None:
    scales = [(1 + 0.5 * k, -10.0 * k) for k in order]
    files.save(files.make_enhanced(VOXELS, order, scales=scales), tmp_path / "enhanced.dcm")
    expected = np.stack([VOXELS[k] * (1 + 0.5 * k) - 10 * k for k in range(5)])
    assert_right(read_volume(tmp_path / "enhanced.dcm"), expected)
    assert_right(read_volume(tmp_path), expected)  # a folder that holds one such file


def per_frame(number: int, **groups: Any) -> files.Change:
    def change(one: pydicom.Dataset) -> None:
        for name, values in groups.items():
            setattr(one.PerFrameFunctionalGroupsSequence[number], name, files._group(**values))

    return change


def tilted(one: pydicom.Dataset) -> None:
    for k, frame in enumerate(one.PerFrameFunctionalGroupsSequence):
        place = files.FIRST + 2.5 * k * files.NORMAL + 0.6 * k * files.COLUMN
        frame.PlanePositionSequence[0].ImagePositionPatient = [f"{v:.8g}" for v in place]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (per_frame(2, PlanePositionSequence={"ImagePositionPatient": files.position(7)}), "regularly-spaced"),
        (per_frame(2, PlanePositionSequence={"ImagePositionPatient": files.position(1)}), "Multiple frames"),
        (per_frame(2, PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}), "for 1 of 5 frames"),
        (
            per_frame(2, PixelValueTransformationSequence={"RescaleSlope": 2, "RescaleIntercept": 0}),
            "for 1 of 5 frames",
        ),
        (tilted, "regularly-spaced"),
        (changed(PixelData=VOXELS.tobytes()[:-2]), "798 bytes; expected 800"),
        (changed(NumberOfFrames=6, PixelData=VOXELS.tobytes() + VOXELS[0].tobytes()), "5 for 6 frames"),
        (changed(PerFrameFunctionalGroupsSequence=None), "cannot be made one volume"),
        (changed(RescaleSlope=2, RescaleIntercept=0), "given for the file and in"),
        (changed(FrameOfReferenceUID=None), "frame-of-reference"),
        (changed(BitsStored=8, HighBit=7), "expected -128 to 127"),
    ],
)
def test_frames_that_are_no_regular_stack_are_refused(tmp_path: Path, change: files.Change, words: str) -> None:
    one = files.make_enhanced(VOXELS)
    change(one)
    files.save(one, tmp_path / "enhanced.dcm")
    with pytest.raises(VolumeError, match=words):
        read_volume(tmp_path / "enhanced.dcm")


def test_two_time_points_are_refused(tmp_path: Path) -> None:
    files.save(files.make_enhanced(VOXELS, [0, 0, 1, 1, 2, 2]), tmp_path / "enhanced.dcm")
    with pytest.raises(VolumeError, match="Multiple frames found at one or more plane positions"):
        read_volume(tmp_path / "enhanced.dcm")


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: str(path.relative_to(TEST_FILES)))
def test_every_file_that_pydicom_ships_has_the_pixels_that_pydicom_reads_or_is_refused(path: Path) -> None:
    """A single slice is no volume; its pixels are those that a series would take."""
    with pytest.raises(VolumeError, match=re.escape(str(path))):
        read_volume(path)
    with contextlib.suppress(VolumeError):
        assert_as_pydicom(path)


def assert_as_pydicom(path: Path) -> None:
    data = read_elements(path)
    pixels = pixels_of(data)
    with Decoder() as decoder:
        values = true_values(decode(data, pixels, decoder), pixels, common_type([pixels]))
    dataset = pydicom.dcmread(path)
    expected = dataset.pixel_array.astype(np.float64)
    if "RescaleSlope" in dataset:
        expected = expected * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    np.testing.assert_allclose(np.moveaxis(values, 0, -1) if len(values) > 1 else values[0], expected, rtol=1e-6)


# How many series of these folders form a regular stack.
READ_SERIES = {"98892001": 1, "98892003": 0, "77654033": 0}


@pytest.mark.parametrize("folder", list(READ_SERIES))
def test_series_that_pydicom_ships(folder: str) -> None:
    from medgmae.data.formats.dicom import find_series

    read = 0
    for series in find_series(TEST_FILES / "dicomdirtests" / folder):
        try:
            volume = read_volume(TEST_FILES / "dicomdirtests" / folder, series=series.uid)
        except VolumeError:
            continue
        datasets = [pydicom.dcmread(one.path) for one in series.slices]
        normal = volume.direction[:, 0]
        datasets.sort(key=lambda one: float(np.array(one.ImagePositionPatient, dtype=float) @ normal))
        expected = [
            d.pixel_array * float(d.get("RescaleSlope", 1)) + float(d.get("RescaleIntercept", 0)) for d in datasets
        ]
        np.testing.assert_allclose(volume.data[0].numpy(), np.stack(expected), rtol=1e-6)
        read += 1
    assert read == READ_SERIES[folder]


@pytest.mark.parametrize("kind", ["text", "gzip", "series", "frames"])
def test_the_fuzzer_of_meanings_finds_nothing_in_a_short_run(kind: str) -> None:
    """The full run has 10,000 cases of each kind: python tests/fuzz/fuzz_meanings.py KIND --count 10000."""
    script = ROOT / "tests/fuzz/fuzz_meanings.py"
    done = warm_python.run(script, kind, "--count", "25", "--seed", "11", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = dict(line.rsplit(maxsplit=1) for line in done.stdout.splitlines()[:2])
    assert int(outcomes[f"{kind} refused"]) > 3
    assert int(outcomes[f"{kind} volume"]) > 3
