"""A DICOM folder as one volume: choose the series, order its slices by position, and refuse what is not a regular
stack.

GDCM, through SimpleITK, parses and decodes; what is checked here is what its series reader only warns about.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgmae.data.formats.itk import named, quiet, reason, simpleitk
from medgmae.data.geometry import Floats, VolumeError

_log = logging.getLogger("medgmae")
_GAP = 0.05  # share of the slice distance by which a gap may differ: positions are often rounded to 0.1 mm or less
_NOT_IMAGES = (
    "1.2.840.10008.1.3.10",  # media directory (DICOMDIR)
    "1.2.840.10008.5.1.4.1.1.11.",  # presentation states
    "1.2.840.10008.5.1.4.1.1.9.",  # waveforms
    "1.2.840.10008.5.1.4.1.1.66",  # registrations, segmentations, surfaces
    "1.2.840.10008.5.1.4.1.1.88.",  # structured reports
    "1.2.840.10008.5.1.4.1.1.104.",  # encapsulated documents
    "1.2.840.10008.5.1.4.1.1.481.3",  # radiotherapy structures
    "1.2.840.10008.5.1.4.1.1.481.5",  # radiotherapy plans
)


@dataclass(frozen=True)
class Slice:
    """One file of a series: geometry as SimpleITK gives it, (x, y, z)."""

    path: Path
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: Floats
    direction: Floats
    pixel: str


@dataclass
class Series:
    """Files that share a SeriesInstanceUID."""

    uid: str
    modality: str
    description: str
    slices: list[Slice] = field(default_factory=list)

    def __str__(self) -> str:
        size = "x".join(map(str, self.slices[0].size[:2]))
        return f"{self.uid}  {self.modality or '?'}  {len(self.slices)} file(s) of {size}  {self.description!r}"


@dataclass(frozen=True)
class Stack:
    """A decoded series: voxels (C, D, H, W), spacing and origin in millimetres, direction with columns (x, y, z)."""

    voxels: NDArray[Any]
    spacing: tuple[float, float, float]
    origin: Floats
    direction: Floats


def _is_dicom(path: Path) -> bool:
    """Whether a file starts as DICOM part 10 files do, or is named so: a broken slice must not pass for another
    file."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".ima")


def _class_uid(path: Path) -> str:
    """The SOP class from the file's meta group, which is always explicit little endian; empty when there is none."""
    with path.open("rb") as file:
        start = file.read(1024)[132:]
    at = start.find(b"\x02\x00\x02\x00UI")
    if at < 0:
        return ""
    length = int.from_bytes(start[at + 6 : at + 8], "little")
    return start[at + 8 : at + 8 + length].rstrip(b"\x00 ").decode("ascii", "replace")


def _tag(reader: Any, key: str) -> str:
    return str(reader.GetMetaData(key)).strip().strip("\x00") if reader.HasMetaDataKey(key) else ""


def _read_slice(path: Path) -> tuple[Slice, str, str, str]:
    sitk = simpleitk()

    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(named(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise VolumeError(f"{path}: cannot be read as a DICOM image: {reason(error)}") from None
    direction = np.array(reader.GetDirection()).reshape(reader.GetDimension(), -1)[:3, :3]
    pixel = f"{reader.GetNumberOfComponents()} x {sitk.GetPixelIDValueAsString(reader.GetPixelID())}"
    slice_ = Slice(path, reader.GetSize(), reader.GetSpacing(), np.array(reader.GetOrigin()[:3]), direction, pixel)
    return slice_, _tag(reader, "0020|000e"), _tag(reader, "0008|0060"), _tag(reader, "0008|103e")


def _files(folder: Path, recursive: bool = True) -> list[Path]:
    """What may be slices: hidden files are other programs', such as the "._" files that macOS leaves on disks."""
    found = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def find_series(folder: Path, *, recursive: bool = True) -> list[Series]:
    """Every image series in ``folder``, and in the folders in it if ``recursive``, in order of its id. Reports,
    structures and files of other kinds are passed over.

    Raises:
        VolumeError: an image file that cannot be read.
    """
    by_uid: dict[str, Series] = {}
    for path in _files(folder, recursive):
        if _is_dicom(path) and not _class_uid(path).startswith(_NOT_IMAGES):
            with quiet():
                slice_, uid, modality, description = _read_slice(path)
            by_uid.setdefault(uid, Series(uid, modality, description)).slices.append(slice_)
    return [by_uid[uid] for uid in sorted(by_uid)]


def _choose(folder: Path, series: str | None) -> Series:
    all_series = find_series(folder)
    if not all_series:
        others = len(_files(folder))
        what = f"{others} file(s), none of them a DICOM image" if others else "no files"
        raise VolumeError(f"{folder}: the folder holds {what}; expected the slices of a DICOM series")
    listing = "\n  ".join(map(str, all_series))
    if series is not None:
        chosen = [one for one in all_series if one.uid == series]
        if not chosen:
            raise VolumeError(f"{folder}: no series {series!r}; the folder holds\n  {listing}")
        return chosen[0]
    if len(all_series) > 1:
        raise VolumeError(
            f"{folder}: {len(all_series)} DICOM series; expected one, or its id as series=...\n  {listing}"
        )
    return all_series[0]


def _one_kind(folder: Path, series: Series) -> None:
    """Raises unless all slices share size, pixel type, spacing in the plane and orientation."""
    first = series.slices[0]
    kinds: dict[str, dict[Any, int]] = defaultdict(lambda: defaultdict(int))
    for one in series.slices:
        kinds["size"][one.size] += 1
        kinds["spacing in the plane"][tuple(round(s, 4) for s in one.spacing[:2])] += 1
        turned = np.abs(one.direction - first.direction).max() > 1e-3
        kinds["orientation"][tuple((one if turned else first).direction[:, :2].T.ravel().round(3).tolist())] += 1
        kinds["number of channels"][one.pixel.split(" ")[0]] += 1
    for name, values in kinds.items():
        if len(values) > 1:
            listing = ", ".join(f"{value} in {count} file(s)" for value, count in values.items())
            raise VolumeError(
                f"{folder}: slices of mixed {name} in series {series.uid}: {listing}; expected one regular stack"
            )


def _ordered(folder: Path, series: Series) -> tuple[list[Slice], float]:
    """Slices along the normal of their plane, and their distance in millimetres; raises unless they are evenly spaced
    along it."""
    first = series.slices[0]
    normal = np.cross(first.direction[:, 0], first.direction[:, 1])
    ordered = sorted(series.slices, key=lambda one: float(one.origin @ normal))
    heights = np.array([one.origin @ normal for one in ordered])
    gaps = np.diff(heights)
    step = float(np.median(gaps))
    if gaps.min() < 1e-3:
        twice = ordered[int(gaps.argmin())].path.name, ordered[int(gaps.argmin()) + 1].path.name
        raise VolumeError(
            f"{folder}: {twice[0]} and {twice[1]} lie at the same position; expected one slice per position "
            "(several time points or echoes?)"
        )
    uneven = np.abs(gaps - step) > max(_GAP * step, 0.02)
    if uneven.any():
        at = int(uneven.argmax())
        raise VolumeError(
            f"{folder}: slices are missing or unevenly spaced in series {series.uid}: {gaps[at]:.3f} mm between "
            f"{ordered[at].path.name} and "
            f"{ordered[at + 1].path.name} where most are {step:.3f} mm apart "
            f"({int(uneven.sum())} such gap(s) in {len(ordered)} slices)"
        )
    drift = max(
        float(np.linalg.norm(one.origin - ordered[0].origin - (h - heights[0]) * normal))
        for one, h in zip(ordered, heights, strict=True)
    )
    if drift > 0.5 * max(first.spacing[:2]):
        raise VolumeError(
            f"{folder}: slices shift sideways by {drift:.2f} mm along the stack (a tilted gantry?); "
            "expected a stack along its normal"
        )
    return ordered, float(heights[-1] - heights[0]) / (len(ordered) - 1)


def _decode(paths: Sequence[Path], mixed: bool) -> NDArray[Any]:
    sitk = simpleitk()

    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([named(path) for path in paths])
    if mixed:  # rescaled slices can differ in type; the first one's would cut the others
        reader.SetOutputPixelType(sitk.sitkFloat32)
    image = reader.Execute()
    voxels = sitk.GetArrayFromImage(image)
    return np.moveaxis(voxels, -1, 0) if image.GetNumberOfComponentsPerPixel() > 1 else voxels[None]


def read_folder(folder: Path, series: str | None) -> Stack:
    """The series of a folder, slices sorted by position along the normal of their plane.

    Raises:
        VolumeError: no series, several and none chosen, or slices that do not form a regular stack.
    """
    chosen = _choose(folder, series)
    first = chosen.slices[0]
    if len(chosen.slices) == 1:
        if len(first.size) < 3 or first.size[2] == 1:
            raise VolumeError(f"{first.path}: series {chosen.uid} has a single 2-D slice; expected a volume")
        paths, spacing_z, start, direction = [first.path], first.spacing[2], first.origin, first.direction
    else:
        _one_kind(folder, chosen)
        if first.size[2:] not in ((), (1,)):
            raise VolumeError(
                f"{folder}: series {chosen.uid} has {len(chosen.slices)} multi-frame files; "
                f"give one of them, such as {first.path.name}"
            )
        ordered, spacing_z = _ordered(folder, chosen)
        paths, start = [one.path for one in ordered], ordered[0].origin
        normal = np.cross(first.direction[:, 0], first.direction[:, 1])
        direction = np.stack([first.direction[:, 0], first.direction[:, 1], normal / np.linalg.norm(normal)], axis=1)
    mixed = len({one.pixel for one in chosen.slices}) > 1
    _log.debug("%s: series %s, %d file(s)", folder, chosen.uid, len(paths))
    return Stack(_decode(paths, mixed), (first.spacing[0], first.spacing[1], spacing_z), start, direction)
