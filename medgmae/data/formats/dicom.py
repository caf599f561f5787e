"""A DICOM folder as one volume: choose the series, order its slices by position, and refuse what is not a regular
stack.

No file is passed over because it is broken, and no stack is put together that the tags do not describe.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medgmae.data.formats.decoding import Decoder
from medgmae.data.formats.elements import Dataset, has_prefix, read_elements
from medgmae.data.formats.frames import frames_of, read_frames
from medgmae.data.formats.image import Image, Limits, unread
from medgmae.data.formats.slices import (
    Pixels,
    Place,
    common_type,
    decode,
    notes_of,
    pixels_of,
    place_of,
    true_values,
)
from medgmae.data.geometry import VolumeError

_log = logging.getLogger("medgmae")
_GAP = 0.05  # share of the slice distance by which a gap may differ: positions are often rounded to 0.1 mm or less
_NOT_IMAGES = (
    "1.2.840.10008.1.3.10",  # media directory (DICOMDIR)
    "1.2.840.10008.5.1.4.1.1.11.",  # presentation states
    "1.2.840.10008.5.1.4.1.1.9.",  # waveforms
    "1.2.840.10008.5.1.4.1.1.66",  # raw data, registrations, segmentations, surfaces
    "1.2.840.10008.5.1.4.1.1.67",  # real-world value maps
    "1.2.840.10008.5.1.4.1.1.4.2",  # MR spectra
    "1.2.840.10008.5.1.4.1.1.88.",  # structured reports
    "1.2.840.10008.5.1.4.1.1.104.",  # encapsulated documents
    "1.2.840.10008.5.1.4.1.1.481.3",  # radiotherapy structures
    "1.2.840.10008.5.1.4.1.1.481.5",  # radiotherapy plans
    "1.3.12.2.1107.5.9.1",  # Siemens: what is no image
)


@dataclass(frozen=True)
class Slice:
    """One file of a series, a single image or several frames."""

    data: Dataset
    pixels: Pixels
    frames: int

    @property
    def path(self) -> Path:
        """The file."""
        return self.data.path

    @property
    def enhanced(self) -> bool:
        """Whether it holds a volume by itself."""
        return self.frames > 1 or self.data.framed

    @property
    def position(self) -> tuple[float, ...] | None:
        """Its place in the patient, in hundredths of a millimetre; None where it has none of its own."""
        with suppress(VolumeError):
            return tuple(place_of(self.data).origin.round(2).tolist())
        return None


@dataclass
class Series:
    """Files that share a SeriesInstanceUID."""

    uid: str
    modality: str
    description: str
    slices: list[Slice] = field(default_factory=list)

    def __str__(self) -> str:
        first = self.slices[0]
        size = f"{first.pixels.columns}x{first.pixels.rows}" + (f"x{first.frames}" if first.enhanced else "")
        return f"{self.uid}  {self.modality or '?'}  {len(self.slices)} file(s) of {size}  {self.description!r}"


def _is_dicom(path: Path) -> bool:
    """Whether a file starts as DICOM part 10 files do, or is named so: a broken slice must not pass for another
    file."""
    return has_prefix(path) or path.suffix.lower() in (".dcm", ".ima")


def _class_uid(path: Path) -> str:
    """The SOP class from the file's meta group, which is always explicit little endian; empty when there is none."""
    with path.open("rb") as file:
        start = file.read(1024)[132:]
    at = start.find(b"\x02\x00\x02\x00UI")
    if at < 0:
        return ""
    length = int.from_bytes(start[at + 6 : at + 8], "little")
    return start[at + 8 : at + 8 + length].rstrip(b"\x00 ").decode("ascii", "replace")


def _read_slice(path: Path) -> Slice:
    data = read_elements(path)
    return Slice(data, pixels_of(data), frames_of(data))


def _files(folder: Path, recursive: bool = True) -> list[Path]:
    """What may be slices, links followed, each folder once. What is hidden is other programs', such as the "._" files
    that macOS leaves on disks.

    Raises:
        VolumeError: something that cannot be looked at, and may hold slices.
    """
    found: list[Path] = []
    waiting, visited = [folder], set()
    while waiting:
        here = waiting.pop()
        try:
            state = here.stat()
            entries = list(here.iterdir()) if (state.st_dev, state.st_ino) not in visited else []
        except OSError as error:
            raise VolumeError(f"{here}: cannot be searched: {error.strerror or error}") from None
        visited.add((state.st_dev, state.st_ino))
        for path in entries:
            if path.name.startswith("."):
                continue
            try:
                mode = path.stat().st_mode
            except OSError as error:
                if os.path.islink(path) and not isinstance(error, PermissionError):  # it leads nowhere
                    continue
                raise VolumeError(f"{path}: cannot be read: {error.strerror or error}") from None
            if stat.S_ISDIR(mode) and recursive:
                waiting.append(path)
            elif stat.S_ISREG(mode):
                found.append(path)
    return sorted(found)


def find_series(folder: Path, *, recursive: bool = True) -> list[Series]:
    """Every image series in ``folder``, and in the folders in it if ``recursive``, in order of its id. Reports,
    structures and files of other kinds are passed over.

    Raises:
        VolumeError: an image file that cannot be read.
    """
    return _series_of(_files(folder, recursive))


def _series_of(files: Sequence[Path]) -> list[Series]:
    by_uid: dict[str, Series] = {}
    for path in files:
        if _is_dicom(path) and not _class_uid(path).startswith(_NOT_IMAGES):
            one = _read_slice(path)
            uid, modality, description = (one.data.text(tag) for tag in (0x0020000E, 0x00080060, 0x0008103E))
            by_uid.setdefault(uid, Series(uid, modality, description)).slices.append(one)
    return [by_uid[uid] for uid in sorted(by_uid)]


def _choose(folder: Path, series: str | None, files: Sequence[Path]) -> Series:
    all_series = _series_of(files)
    if not all_series:
        others = len(files)
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


def _one_kind(folder: Path, series: Series, places: list[Place]) -> None:
    """Raises unless all slices share size, meaning of the numbers, spacing in the plane and orientation."""
    first = places[0]
    kinds: dict[str, dict[Any, int]] = defaultdict(lambda: defaultdict(int))
    for one, place in zip(series.slices, places, strict=True):
        kinds["size"][one.pixels.columns, one.pixels.rows] += 1
        kinds["spacing in the plane"][tuple(round(s, 4) for s in place.spacing)] += 1
        turned = np.abs(place.direction - first.direction).max() > 1e-3
        kinds["orientation"][tuple((place if turned else first).direction[:, :2].T.ravel().round(3).tolist())] += 1
        kinds["kind of pixels"][one.pixels.kind] += 1
        kinds["frame of reference"][one.data.text(0x00200052)] += 1
        kinds["study"][one.data.text(0x0020000D)] += 1
        kinds["modality"][one.data.text(0x00080060)] += 1
        kinds["rescaling"]["a slope" if one.data.text(0x00281053) else "no slope"] += 1
        for name, tag in (("type of rescaling", 0x00281054), ("units", 0x00541001)):
            if text := one.data.text(tag):
                kinds[name][text] += 1
    for name, values in kinds.items():
        if len(values) > 1:
            listing = ", ".join(f"{value} in {count} file(s)" for value, count in values.items())
            raise VolumeError(
                f"{folder}: slices of mixed {name} in series {series.uid}: {listing}; expected one regular stack"
            )


def _ordered(folder: Path, series: Series, places: list[Place]) -> tuple[list[int], float]:
    """The slices, by their number, along the normal of their plane, and their distance in millimetres; raises unless
    they are evenly spaced along it."""
    normal = places[0].direction[:, 2]
    height_of = [float(place.origin @ normal) for place in places]
    order = sorted(range(len(places)), key=height_of.__getitem__)
    heights = np.array([height_of[number] for number in order])
    names = [series.slices[number].path.name for number in order]
    gaps = np.diff(heights)
    step = float(np.median(gaps))
    if gaps.min() < 1e-3:
        at = int(gaps.argmin())
        raise VolumeError(
            f"{folder}: {names[at]} and {names[at + 1]} lie at the same position; expected one slice per position "
            "(several time points or echoes?)"
        )
    uneven = np.abs(gaps - step) > max(_GAP * step, 0.02)
    if uneven.any():
        at = int(uneven.argmax())
        raise VolumeError(
            f"{folder}: slices are missing or unevenly spaced in series {series.uid}: {gaps[at]:.3f} mm between "
            f"{names[at]} and {names[at + 1]} where most are {step:.3f} mm apart "
            f"({int(uneven.sum())} such gap(s) in {len(order)} slices)"
        )
    first = places[order[0]].origin
    drift = max(
        float(np.linalg.norm(places[number].origin - first - (h - heights[0]) * normal))
        for number, h in zip(order, heights, strict=True)
    )
    if drift > 0.5 * max(places[0].spacing):
        raise VolumeError(
            f"{folder}: slices shift sideways by {drift:.2f} mm along the stack (a tilted gantry?); "
            "expected a stack along its normal"
        )
    return order, float(heights[-1] - heights[0]) / (len(order) - 1)


def _stack(folder: Path, series: Series, limits: Limits) -> Image:
    """Single images as one volume."""
    places = [place_of(one.data) for one in series.slices]
    _one_kind(folder, series, places)
    order, step = _ordered(folder, series, places)
    slices = [series.slices[number] for number in order]
    pixels, target = slices[0].pixels, common_type([one.pixels for one in slices])
    shape = (pixels.samples, len(slices), pixels.rows, pixels.columns)
    limits.check(shape, target)
    if limits.voxels:
        voxels = np.empty(shape, target)
        with Decoder() as decoder:
            for number, one in enumerate(slices):
                voxels[:, number] = true_values(decode(one.data, one.pixels, decoder), one.pixels, target)
    else:
        voxels = unread(shape, target)
    affine = np.eye(4)
    affine[:3, :3] = places[order[0]].direction * [*places[order[0]].spacing, step]
    affine[:3, 3] = places[order[0]].origin
    notes = dict.fromkeys(note for one in slices for note in notes_of(one.data, one.pixels.kind))
    return Image(voxels, affine, notes=tuple(notes))


def read_folder(folder: Path, series: str | None, limits: Limits, files: Sequence[Path] | None = None) -> Image:
    """The series of a folder, or of these ``files`` in it, slices sorted by position along the normal of their plane;
    or the one enhanced multi-frame file that it holds.

    Raises:
        VolumeError: no series, several and none chosen, or slices that do not form a regular stack.
    """
    chosen = _choose(folder, series, _files(folder) if files is None else files)
    first = chosen.slices[0]
    _log.debug("%s: series %s, %d file(s)", folder, chosen.uid, len(chosen.slices))
    enhanced = [one for one in chosen.slices if one.enhanced]
    if enhanced and len(chosen.slices) > 1:
        raise VolumeError(
            f"{folder}: series {chosen.uid} has {len(chosen.slices)} files, {len(enhanced)} of them multi-frame; "
            f"give one of these, such as {enhanced[0].path.name}"
        )
    if enhanced:
        return read_frames(first.data, limits)
    if len(chosen.slices) == 1:
        raise VolumeError(f"{first.path}: series {chosen.uid} has a single 2-D slice; expected a volume")
    return _stack(folder, chosen, limits)


def read_file(path: Path, limits: Limits) -> Image:
    """One multi-frame file.

    Raises:
        VolumeError: a single slice, or what :func:`~medgmae.data.formats.frames.read_frames` raises.
    """
    one = _read_slice(path)
    if not one.enhanced or one.frames == 1:
        raise VolumeError(f"{path}: one DICOM slice; expected a volume: give the folder of the series")
    return read_frames(one.data, limits)
