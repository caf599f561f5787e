"""One DICOM image: how its pixels are stored, what their numbers mean, and where the slice lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgmae.data.formats.decoding import Decoder
from medgmae.data.formats.elements import BIG, DEFLATED, EXPLICIT, IMPLICIT, Dataset, opened
from medgmae.data.formats.streams import scaled
from medgmae.data.geometry import Floats, VolumeError

_RLE = "1.2.840.10008.1.2.5"
NATIVE = (IMPLICIT, EXPLICIT, BIG, DEFLATED)

_PERPENDICULAR = 1e-3  # cosines are given with as few as 4 digits
_LOSSY = "lossy compression has changed the voxels (LossyImageCompression)"
_INVERTED = "MONOCHROME1: small values are meant to be displayed bright; the values themselves are read as they are"


@dataclass(frozen=True)
class Pixels:
    """How pixels are stored. ``kind`` is what slices of one volume share: colours, or numbers of one meaning."""

    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    signed: bool
    planar: bool
    kind: str
    slope: float
    inter: float

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels in memory."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.allocated // 8}")

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest stored number that is possible."""
        return (-(1 << self.stored - 1), (1 << self.stored - 1) - 1) if self.signed else (0, (1 << self.stored) - 1)

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame that is not compressed."""
        return self.rows * self.columns * self.samples * self.allocated // 8


def _rescale(data: Dataset) -> tuple[float, float]:
    """Slope and intercept, where there are both."""
    texts = [data.text(tag) for tag in (0x00281053, 0x00281052)]
    if 0x00283000 in data.values:
        raise VolumeError(f"{data.path}: the pixels go through a table (ModalityLUTSequence); expected a slope at most")
    if 0x3004000E in data.values:
        raise VolumeError(f"{data.path}: a radiotherapy dose (DoseGridScaling); expected an image")
    if not any(texts):
        return 1.0, 0.0
    values = [data.numbers(tag, 1) for tag in (0x00281053, 0x00281052)]
    if values[0] is None or values[1] is None or values[0] == [0.0]:
        raise VolumeError(
            f"{data.path}: RescaleSlope and RescaleIntercept are {texts[0]!r} and {texts[1]!r}; expected two numbers, "
            "the slope not 0"
        )
    return values[0][0], values[1][0]


def pixels_of(data: Dataset) -> Pixels:
    """How the pixels of an image are stored.

    Raises:
        VolumeError: no pixels, or numbers that contradict each other or that are not supported.
    """
    if data.pixels is None:
        raise VolumeError(
            f"{data.path}: cannot be read as a DICOM image: it has no PixelData; expected an intact image"
        )
    rows, columns, allocated = (data.whole(tag) for tag in (0x00280010, 0x00280011, 0x00280100))
    samples, stored = data.whole(0x00280002, 1), data.whole(0x00280101, allocated)
    high, signed = data.whole(0x00280102, stored - 1), data.whole(0x00280103)
    kind, planar = data.text(0x00280004), data.whole(0x00280006, 0)
    if kind not in ("MONOCHROME1", "MONOCHROME2", "RGB") or samples != (3 if kind == "RGB" else 1) or planar > 1:
        raise VolumeError(
            f"{data.path}: the pixels are {kind or 'of no kind'} with {samples} sample(s); expected MONOCHROME1 or "
            "MONOCHROME2 with one, or RGB with three"
        )
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or high != stored - 1 or signed > 1:
        raise VolumeError(
            f"{data.path}: pixels of {stored} bits up to bit {high} in {allocated}, representation {signed}; expected "
            "8, 16 or 32 bits, the lowest of which are used"
        )
    if not rows or not columns:
        raise VolumeError(f"{data.path}: the image is {columns} x {rows}; expected at least one pixel")
    slope, inter = _rescale(data)
    return Pixels(rows, columns, samples, allocated, stored, signed == 1, planar == 1, kind, slope, inter)


def notes_of(data: Dataset, kind: str) -> list[str]:
    """What may surprise about the voxels."""
    return [_INVERTED] * (kind == "MONOCHROME1") + [_LOSSY] * (data.text(0x00282110) == "01")


def check_length(data: Dataset, pixels: Pixels, frames: int) -> None:
    """Raises unless pixels that are not compressed fill the frames, no more and no less."""
    needed, element = pixels.frame_bytes * frames, data.pixels
    assert element is not None
    if data.syntax in NATIVE and element.length not in (needed, needed + needed % 2):
        raise VolumeError(
            f"{data.path}: the pixels have {element.length} bytes; expected {needed} of {frames} frame(s) of "
            f"{pixels.columns} x {pixels.rows}: the file is truncated or its header wrong"
        )


def _native(data: Dataset, pixels: Pixels) -> NDArray[Any]:
    check_length(data, pixels, 1)
    assert data.pixels is not None
    if data.syntax == BIG and pixels.allocated == 8 and data.pixels.vr != b"OB":
        raise VolumeError(f"{data.path}: pixels of 8 bits in big-endian words of 16 (VR OW); expected bytes (OB)")
    with opened(data.path, data) as file:
        file.seek(data.pixels.at)
        content = file.read(pixels.frame_bytes)
    return np.frombuffer(content, pixels.dtype.newbyteorder(">" if data.syntax == BIG else "<"))


def decode(data: Dataset, pixels: Pixels, decoder: Decoder) -> NDArray[Any]:
    """The stored numbers (C, rows, columns) of a single frame.

    Raises:
        VolumeError: pixels that are missing, broken, or compressed without a decoder.
    """
    if data.syntax in NATIVE:
        flat = _native(data, pixels)
    elif pixels.samples == 1:
        flat = decoder.decode(data.path, (1, pixels.rows, pixels.columns), pixels.dtype).ravel()
    else:
        raise VolumeError(f"{data.path}: compressed colours ({data.syntax}); expected one number per pixel")
    if pixels.stored < pixels.allocated:  # other bits may hold an overlay, or nothing
        spare = pixels.allocated - pixels.stored
        if data.syntax not in (*NATIVE, _RLE) and (flat.max() >> pixels.stored or flat.min() < pixels.bounds[0]):
            raise VolumeError(
                f"{data.path}: the compressed pixels reach from {flat.min()} to {flat.max()}; expected numbers of "
                f"{pixels.stored} bits, as the header says"
            )
        flat = (flat.astype(pixels.dtype) << spare) >> spare
    if pixels.samples == 1:
        return flat.reshape(1, pixels.rows, pixels.columns)
    if pixels.planar:
        return flat.reshape(3, pixels.rows, pixels.columns)
    return np.moveaxis(flat.reshape(pixels.rows, pixels.columns, 3), -1, 0)


def common_type(slices: list[Pixels]) -> np.dtype[Any]:
    """The type that holds the true values of all slices: whole numbers if all slopes and intercepts are, else
    float32."""
    if any(one.slope % 1 or one.inter % 1 for one in slices):
        return np.dtype(np.float32)
    if all((one.slope, one.inter) == (1, 0) and one.dtype == slices[0].dtype for one in slices):
        first = slices[0].dtype
        return first if first.kind == "i" or first.itemsize == 1 else np.dtype(f"i{2 * first.itemsize}")
    ends = [bound * int(one.slope) + int(one.inter) for one in slices for bound in one.bounds]
    for size in (2, 4, 8):
        if -(1 << 8 * size - 1) <= min(ends) and max(ends) < 1 << 8 * size - 1:
            return np.dtype(f"i{size}")
    return np.dtype(np.float32)


def true_values(stored: NDArray[Any], pixels: Pixels, target: np.dtype[Any]) -> NDArray[Any]:
    """``slope * stored + inter`` in the type of the volume."""
    if target.kind == "f":
        return scaled(stored, pixels.slope, pixels.inter)
    values: NDArray[Any] = stored.astype(np.int64) * int(pixels.slope) + int(pixels.inter)
    return values


@dataclass(frozen=True)
class Place:
    """Where a slice lies: millimetres between columns and between rows, LPS position of its first pixel, and the unit
    vectors (columns) along its rows, along its columns and across."""

    spacing: tuple[float, float]
    origin: Floats
    direction: Floats


def place_of(data: Dataset) -> Place:
    """Where a slice lies.

    Raises:
        VolumeError: a position, orientation or spacing that is missing or cannot be.
    """

    def needed(tag: int, name: str, count: int) -> list[float]:
        values = data.numbers(tag, count)
        if values is None:
            raise VolumeError(f"{data.path}: {name} is {data.text(tag)!r}; expected {count} numbers")
        return values

    position = needed(0x00200032, "ImagePositionPatient", 3)
    vectors = np.reshape(needed(0x00200037, "ImageOrientationPatient", 6), (2, 3))
    between_rows, between_columns = needed(0x00280030, "PixelSpacing", 2)
    if min(between_rows, between_columns) <= 0:
        raise VolumeError(f"{data.path}: PixelSpacing is {data.text(0x00280030)!r}; expected positive numbers")
    if np.abs(vectors @ vectors.T - np.eye(2)).max() > _PERPENDICULAR:
        raise VolumeError(
            f"{data.path}: ImageOrientationPatient is {vectors.tolist()}; expected two "
            "perpendicular vectors of length 1"
        )
    row, column = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    normal = np.cross(row, column)
    direction = np.stack([row, column, normal / np.linalg.norm(normal)], axis=1)
    return Place((between_columns, between_rows), np.array(position), direction)
