"""DICOM images made for tests: classic slices and enhanced multi-frame files, each field of which can be set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

ROW, COLUMN = np.array([0.8, 0.6, 0.0]), np.array([-0.36, 0.48, 0.8])
NORMAL = np.cross(ROW, COLUMN)
FIRST = np.array([10.0, -20.0, 5.0])
SPACING = (2.5, 0.8, 0.7)  # between slices, rows, columns
STUDY = "1.2.826.0.1.3680043.2.1125.1"

Change = Callable[[Dataset], None]


def position(k: float, step: float = SPACING[0]) -> list[str]:
    """ImagePositionPatient of slice ``k``."""
    return [f"{v:.8g}" for v in FIRST + k * step * NORMAL]


def _image(uid: str, number: int, sop_class: UID, syntax: UID, plane: np.ndarray) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, f"{uid}.{number + 1}"
    meta.TransferSyntaxUID = syntax
    one = FileDataset(
        "image", {}, file_meta=meta, preamble=b"\0" * 128,
        is_implicit_VR=syntax == ImplicitVRLittleEndian, is_little_endian=syntax != ExplicitVRBigEndian,
    )  # fmt: skip
    one.SOPClassUID, one.SOPInstanceUID, one.Modality = sop_class, f"{uid}.{number + 1}", "CT"
    one.SeriesInstanceUID, one.StudyInstanceUID, one.SeriesDescription = uid, STUDY, "made for a test"
    one.FrameOfReferenceUID = f"{STUDY}.9"
    one.Rows, one.Columns = plane.shape[-2:]
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated = one.BitsStored = 8 * plane.dtype.itemsize
    one.HighBit, one.PixelRepresentation = one.BitsStored - 1, int(plane.dtype.kind == "i")
    big = syntax == ExplicitVRBigEndian
    one.PixelData = plane.astype(plane.dtype.newbyteorder(">" if big else "<")).tobytes()
    one["PixelData"].VR = "OW"
    return one


def save(one: FileDataset, path: Path) -> None:
    """Writes a file, whatever it holds."""
    one.save_as(path, enforce_file_format=True)


def make_slice(
    plane: np.ndarray, k: float, uid: str = "1.2.3.4", syntax: UID = ExplicitVRLittleEndian, number: int = 0
) -> FileDataset:
    """One slice of a series, at place ``k`` of an oblique stack."""
    one = _image(uid, number, CTImageStorage, syntax, plane)
    one.PixelSpacing = list(SPACING[1:])
    one.ImageOrientationPatient = [f"{v:.8g}" for v in (*ROW, *COLUMN)]
    one.ImagePositionPatient = position(k)
    one.RescaleSlope, one.RescaleIntercept, one.SliceThickness = 1, -24, 99
    return one


def write_series(folder: Path, voxels: np.ndarray, change: Sequence[Change] = (), **options: Any) -> Path:
    """A folder with a file per slice; ``change`` alters the data set of the slice of the same number, if there is
    one."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, plane in enumerate(voxels):
        one = make_slice(plane, k, number=k, **options)
        for alter in change[k : k + 1]:
            alter(one)
        save(one, folder / f"{k}.dcm")
    return folder


def _group(**values: Any) -> Items:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return Items([item])


def make_enhanced(
    voxels: np.ndarray,
    order: Sequence[int] | None = None,
    syntax: UID = ExplicitVRLittleEndian,
    scales: Sequence[tuple[float, float]] | None = None,
) -> FileDataset:
    """An enhanced CT whose frames are ``voxels[order]``, each where its slice lies; ``scales`` are slope and intercept
    per frame, else they are shared."""
    order = list(range(len(voxels)) if order is None else order)
    one = _image("1.2.3.4", 0, EnhancedCTImageStorage, syntax, voxels[order])
    one.NumberOfFrames = len(order)
    one.ImageType, one.InstanceNumber, one.ContentDate, one.ContentTime = ["ORIGINAL", "PRIMARY"], 1, "20200101", "0101"
    shared = Dataset()
    shared.PlaneOrientationSequence = _group(ImageOrientationPatient=[f"{v:.8g}" for v in (*ROW, *COLUMN)])
    shared.PixelMeasuresSequence = _group(PixelSpacing=list(SPACING[1:]), SliceThickness=SPACING[0])
    if scales is None:
        shared.PixelValueTransformationSequence = _group(RescaleSlope=1, RescaleIntercept=-24, RescaleType="HU")
    one.SharedFunctionalGroupsSequence = Items([shared])
    frames = []
    for number, k in enumerate(order):
        frame = Dataset()
        frame.PlanePositionSequence = _group(ImagePositionPatient=position(k))
        frame.FrameContentSequence = _group(
            DimensionIndexValues=[1, k + 1], StackID="1", InStackPositionNumber=k + 1, TemporalPositionIndex=1
        )
        if scales is not None:
            slope, inter = scales[number]
            frame.PixelValueTransformationSequence = _group(
                RescaleSlope=slope, RescaleIntercept=inter, RescaleType="HU"
            )
        frames.append(frame)
    one.PerFrameFunctionalGroupsSequence = Items(frames)
    organization = Dataset()
    organization.DimensionOrganizationUID = f"{STUDY}.8"
    one.DimensionOrganizationSequence = Items([organization])
    pointers = []
    for tag in (0x00209056, 0x00209057):
        pointer = Dataset()
        pointer.DimensionOrganizationUID = f"{STUDY}.8"
        pointer.DimensionIndexPointer, pointer.FunctionalGroupPointer = tag, 0x00209111
        pointers.append(pointer)
    one.DimensionIndexSequence = Items(pointers)
    return one
