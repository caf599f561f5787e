"""DICOM series and enhanced multi-frame images whose bytes are fine and whose meaning is not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import dicom_files as files
import numpy as np
from meaning_text import Case
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
PACKED = (RLELossless, JPEGLSLossless)


def _voxels(rng: random.Random, kind: str) -> np.ndarray:
    shape = (rng.randint(3, 6), 8 + 2 * rng.randint(0, 3), 10)
    return np.random.default_rng(rng.randrange(1 << 30)).integers(0, 200, shape).astype(kind)


def _compress(one: Dataset, rng: random.Random) -> None:
    """Compresses the pixels; JPEG-LS has no room for so few of them where they are noise."""
    try:
        one.compress(rng.choice(PACKED))
    except RuntimeError:
        one.compress(RLELossless)


def _affine() -> np.ndarray:
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = files.ROW * files.SPACING[2], files.COLUMN * files.SPACING[1]
    affine[:3, 2], affine[:3, 3] = files.NORMAL * files.SPACING[0], files.FIRST
    return affine


# Each is done to one slice of a series; all of them must be refused, or leave the volume as it is where they say so.
def _wrong(one: Dataset, rng: random.Random) -> str:
    what = rng.choice((
        "short", "long", "spacing0", "no spacing", "one spacing", "no orientation", "zero orientation", "skewed",
        "scaled axes", "no position", "nan position", "slope0", "slope text", "half rescale", "rows",
        "columns", "samples", "bits", "high", "photometric", "frames", "table", "no pixels", "reference", "moved",
        "turned", "samples3", "representation", "two spacings", "inf", "study", "modality", "dose", "no rescale",
    ))  # fmt: skip
    values: dict[str, dict[str, Any]] = {
        "short": {"PixelData": one.PixelData[:-20]}, "long": {"PixelData": one.PixelData + bytes(20)},
        "spacing0": {"PixelSpacing": [0, rng.choice((0, 1))]}, "one spacing": {"PixelSpacing": 1},
        "two spacings": {"PixelSpacing": [1, 1, 1]}, "zero orientation": {"ImageOrientationPatient": [0] * 6},
        "skewed": {"ImageOrientationPatient": [1, 0, 0, 0.5, 0.8660254, 0]},
        "scaled axes": {"ImageOrientationPatient": [2, 0, 0, 0, 2, 0]}, "slope0": {"RescaleSlope": 0},
        "rows": {"Rows": one.Rows - 1}, "columns": {"Columns": one.Columns * 2}, "samples": {"SamplesPerPixel": 2},
        "samples3": {"SamplesPerPixel": 3}, "bits": {"BitsAllocated": rng.choice((1, 12, 64, 0))},
        "high": {"HighBit": rng.choice((3, 31))}, "photometric": {"PhotometricInterpretation": "PALETTE COLOR"},
        "frames": {"NumberOfFrames": rng.choice((2, 10**9))}, "reference": {"FrameOfReferenceUID": "1.2.3"},
        "moved": {"ImagePositionPatient": files.position(rng.choice((0.4, 40, -7)))},
        "turned": {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, "representation": {"PixelRepresentation": 7},
        "study": {"StudyInstanceUID": "1.9"}, "modality": {"Modality": "PT"}, "dose": {"DoseGridScaling": "0.5"},
    }  # fmt: skip
    for name, value in values.get(what, {}).items():
        setattr(one, name, value)
    missing = {
        "no spacing": "PixelSpacing", "no orientation": "ImageOrientationPatient",
        "no position": "ImagePositionPatient",
        "half rescale": rng.choice(("RescaleSlope", "RescaleIntercept")), "no pixels": "PixelData",
    }  # fmt: skip
    if what in missing:
        delattr(one, missing[what])
    if what == "no rescale":
        del one.RescaleSlope, one.RescaleIntercept
    texts = {"nan position": "ImagePositionPatient", "slope text": "RescaleSlope", "inf": "RescaleIntercept"}
    if what in texts:
        one[texts[what]]._value = {"nan position": "nan\\0\\0", "slope text": "1x", "inf": "1e999"}[what]
    if what == "table":
        item = Dataset()
        item.LUTDescriptor, item.ModalityLUTType, item.LUTData = [1, 0, 16], "HU", [1]
        one.ModalityLUTSequence = Sequence([item])
    return what


def series_case(rng: random.Random, folder: Path) -> Case:
    """A folder of slices, of which one is wrong, lies elsewhere or is stored in another way."""
    kind, syntax = rng.choice(("i2", "u2", "u1", "i2")), rng.choice(SYNTAXES)
    voxels = _voxels(rng, kind)
    if syntax == ExplicitVRBigEndian and kind == "u1":
        syntax = ExplicitVRLittleEndian
    what = rng.choice(
        ("plain", "packed", "scale", "mono", "bits", "wrong", "wrong", "wrong", "cut", "missing", "twice", "tilt")
    )
    target, truth = rng.randrange(len(voxels)), voxels.astype(np.float64) - 24
    refuse = what not in ("plain", "packed", "scale", "mono", "bits")
    if refuse or what == "packed":
        syntax = ExplicitVRLittleEndian
    path = folder / "ct"
    path.mkdir()
    detail = ""
    for k, plane in enumerate(voxels):
        one = files.make_slice(plane, k, syntax=syntax, number=k)
        if what == "scale":
            slope, inter = rng.choice(((1, -1024), (0.5, 3.25), (2, 0), (-1, 7))), 0
            one.RescaleSlope, one.RescaleIntercept = slope
            truth[k] = plane * float(slope[0]) + float(slope[1]) + inter
        if what == "mono":
            one.PhotometricInterpretation = "MONOCHROME1"
        if what == "bits" and kind[1] == "2":
            one.BitsStored, one.HighBit = 12, 11
            noise = np.random.default_rng(k).integers(0, 15, plane.shape).astype("<u2") << 12
            one.PixelData = (
                (
                    plane.astype(plane.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")).view(
                        ">u2" if syntax == ExplicitVRBigEndian else "<u2"
                    )
                    | noise
                )
                .astype(">u2" if syntax == ExplicitVRBigEndian else "<u2")
                .tobytes()
            )
        if what == "tilt":
            one.ImagePositionPatient = [float(v) for v in files.FIRST + 2.5 * k * files.NORMAL + 0.7 * k * files.COLUMN]
        if what == "wrong" and k == target:
            detail = _wrong(one, rng)
        if what == "missing" and k == 1:
            continue
        if what == "packed":
            _compress(one, rng)
        name = path / f"{rng.randrange(1 << 30)}.dcm"
        files.save(one, name)
        if what == "twice" and k == target:
            one.SOPInstanceUID += "9"
            files.save(one, path / "again.dcm")
        if what == "cut" and k == target:
            content = name.read_bytes()
            name.write_bytes(content[: rng.randrange(140, len(content) - 1)])
    if detail == "reference" and len(voxels) < 2:
        refuse = False
    if what == "missing" and len(voxels) == 3:  # two slices, twice as far apart, are a stack too
        return Case(path, None, None, False, "series missing one of three")
    return Case(path, truth[None], _affine(), refuse, f"series {what} {detail}")


def _spoil(one: Dataset, rng: random.Random) -> str:
    """Makes an enhanced image wrong."""
    shared, each = one.SharedFunctionalGroupsSequence[0], one.PerFrameFunctionalGroupsSequence
    frame = each[rng.randrange(len(each))]
    what = rng.choice((
        "short", "long", "count", "groups", "no position", "same position", "moved", "turned", "spacing0", "skewed",
        "scale", "scale both", "scale one", "time", "tilt", "table", "no groups", "two shared", "no spacing",
        "spacing one", "colours", "stack", "nan", "empty", "top",
    ))  # fmt: skip
    turned, place = [1, 0, 0, 0, 1, 0], frame.PlanePositionSequence[0]
    if what in ("short", "long"):
        one.PixelData = one.PixelData[:-20] if what == "short" else one.PixelData + bytes(20)
    elif what in ("count", "stack"):
        one.NumberOfFrames = rng.choice((len(each) - 1, len(each) + 1, 10**6, 0))
    elif what == "groups":
        each.pop()
    elif what == "no position":
        del frame.PlanePositionSequence
    elif what in ("same position", "time"):
        other = next(item for item in each if item is not frame)
        place.ImagePositionPatient = other.PlanePositionSequence[0].ImagePositionPatient
    elif what == "moved":
        place.ImagePositionPatient = files.position(rng.choice((0.4, 40, -7)))
    elif what in ("turned", "skewed"):
        holder = frame if what == "turned" else shared
        holder.PlaneOrientationSequence = files._group(
            ImageOrientationPatient=turned if what == "turned" else [1, 0, 0, 0.5, 0.87, 0]
        )
    elif what == "spacing0":
        shared.PixelMeasuresSequence[0].PixelSpacing = [0, 1]
    elif what == "no spacing":
        del shared.PixelMeasuresSequence
    elif what == "spacing one":
        frame.PixelMeasuresSequence = files._group(PixelSpacing=[3, 3], SliceThickness=1)
    elif what in ("scale", "scale one", "scale both"):
        frame.PixelValueTransformationSequence = files._group(RescaleSlope=2, RescaleIntercept=5, RescaleType="HU")
        if what == "scale one":
            del shared.PixelValueTransformationSequence
    elif what == "tilt":
        for k, item in enumerate(each):
            shift = files.FIRST + 2.5 * k * files.NORMAL + 0.7 * k * files.COLUMN
            item.PlanePositionSequence[0].ImagePositionPatient = [float(f"{v:.8g}") for v in shift]
    elif what == "table":
        one.ModalityLUTSequence = files._group(LUTDescriptor=[1, 0, 16], ModalityLUTType="HU", LUTData=[1])
    elif what == "no groups":
        del one.PerFrameFunctionalGroupsSequence
    elif what == "two shared":
        one.SharedFunctionalGroupsSequence.append(Dataset())
    elif what == "colours":
        one.PhotometricInterpretation = "RGB"
    elif what == "nan":
        place["ImagePositionPatient"]._value = "nan\\nan\\nan"
    elif what == "empty":
        place.ImagePositionPatient = None
    else:
        one.RescaleSlope, one.RescaleIntercept = 2, 1
    return what


def frames_case(rng: random.Random, folder: Path) -> Case:
    """An enhanced multi-frame image, right in an unusual way or wrong in one; as a file, or in a folder."""
    kind = rng.choice(("i2", "u2"))
    voxels = _voxels(rng, kind)
    what = rng.choice(("plain", "shuffled", "scales", "packed", "mono", "wrong", "wrong", "wrong", "wrong", "cut"))
    syntax = rng.choice((ExplicitVRLittleEndian, ImplicitVRLittleEndian)) if what != "wrong" else ExplicitVRLittleEndian
    order = list(range(len(voxels)))
    if what != "plain":
        rng.shuffle(order)
    truth, scales, detail = voxels.astype(np.float64) - 24, None, ""
    if what == "scales":
        scales = [(rng.choice((0.5, 1.0, 2.0)), float(rng.randint(-1000, 10))) for _ in order]
        for (slope, inter), k in zip(scales, order, strict=True):
            truth[k] = voxels[k] * slope + inter
    one = files.make_enhanced(voxels, order, syntax, scales)
    if what == "mono":
        one.PhotometricInterpretation = "MONOCHROME1"
    if what == "packed":
        _compress(one, rng)
    if what == "wrong":
        detail = _spoil(one, rng)
    path = folder / "image.dcm"
    files.save(one, path)
    if what == "cut":
        content = path.read_bytes()
        path.write_bytes(content[: rng.randrange(140, len(content) - 1)])
    return Case(
        path if rng.random() < 0.7 else folder,
        truth[None],
        _affine(),
        what in ("wrong", "cut"),
        f"frames {what} {detail}",
    )
