"""One case in several contrasts: a file each, recognised by its name, that become the channels of one volume."""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from medgmae.data.geometry import Floats, Grid, VolumeError
from medgmae.data.io import read_volume
from medgmae.data.volume import ScanLike, Volume, as_volume, finite

Scan: TypeAlias = "str | os.PathLike[str] | ScanLike"
"""A scan on disk (a file, or a DICOM folder) or in memory."""

# How files are named: BraTS up to 2021 and from 2023 on, the Medical Segmentation Decathlon, BIDS.
_SPELLINGS = {"t1": {"t1w", "t1n"}, "t2": {"t2w"}, "t1ce": {"t1c", "t1gd"}, "flair": {"t2f"}}


def open_scan(scan: Scan, channels: int | None = None) -> Volume:
    """A scan as a volume of finite voxels: read if it is on disk, converted if it is of another library."""
    return read_volume(scan, channels=channels) if isinstance(scan, str | os.PathLike) else finite(as_volume(scan))


def _named_in(path: Path, contrasts: Sequence[str]) -> list[str]:
    """The contrasts that the name of a file or folder has words of."""
    words = set(re.split(r"[^a-z0-9]+", path.name.lower()))
    return [name for name in contrasts if words & {name.lower(), *_SPELLINGS.get(name, ())}]


def find_contrasts(folder: str | os.PathLike[str], contrasts: Sequence[str]) -> dict[str, Path]:
    """The files, or DICOM folders, of one case by contrast: those in whose name the contrast stands as a word.

    ``BraTS_001_t1ce.nii.gz`` is ``t1ce``; so are ``t1c`` and ``t1gd``, as ``t1n`` and ``t1w`` are ``t1``, ``t2w`` is
    ``t2`` and ``t2f`` is ``flair``. A name with words of several contrasts belongs to none.

    Raises:
        VolumeError: a contrast without a file or with several; the message lists what the folder holds.
    """
    folder = Path(folder)
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files_of: dict[str, list[Path]] = {name: [] for name in contrasts}
    for entry in entries:
        named = _named_in(entry, contrasts)
        if len(named) == 1:
            files_of[named[0]].append(entry)
    for name, files in files_of.items():
        if len(files) != 1:
            names = [entry.name for entry in entries]
            listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
            held = " and ".join(file.name for file in files) if files else "no file"
            raise VolumeError(
                f"{folder}: {held} for the contrast {name!r} among: {listed or 'nothing'}; expected one file each for "
                f"{', '.join(contrasts)}, with that word in its name, or a mapping {{{name!r}: file, ...}}"
            )
    return {name: files[0] for name, files in files_of.items()}


def read_contrasts(case: Mapping[str, Scan], contrasts: Sequence[str]) -> list[Volume]:
    """The volumes (1, D, H, W) of one case, in the order of ``contrasts``, each on its own grid.

    Args:
        case: a scan by contrast, in any order: file, DICOM folder, or what :func:`~medgmae.data.as_volume` takes.
        contrasts: names of the channels, in order.

    Raises:
        VolumeError: a contrast is missing, unknown or given twice; a file whose name says another contrast (read
            it with ``read_volume`` first if the name is wrong); more than one channel; contrasts that lie apart in
            space; and what ``read_volume`` raises.
    """
    _check_names(list(case), contrasts)
    volumes: list[Volume] = []
    for name in contrasts:
        given = case[name]
        for other in contrasts[: len(volumes)]:
            if given is case[other] or (_path(given) is not None and _path(given) == _path(case[other])):
                raise VolumeError(f"{other!r} and {name!r} are the same scan, {_source(given)}; expected one for each")
        _check_file_name(name, given, contrasts)
        volume = open_scan(given, channels=1)
        if volume.channels != 1:
            raise VolumeError(f"{name!r}, {volume.source}: {volume.channels} channels; expected one per contrast")
        if volumes and not _overlap(volumes[0].grid, volume.grid):
            raise VolumeError(
                f"{name!r}, {volume.source}, has no place in common with {contrasts[0]!r}, {volumes[0].source}; "
                "expected scans of one case in one frame of reference"
            )
        volumes.append(volume)
    return volumes


def same_place(one: Grid, other: Grid) -> bool:
    """Whether two grids have the same voxels: corners within a fiftieth of a voxel, since headers are rounded."""
    if one.size != other.size:
        return False
    apart = np.linalg.norm(one.world(_corners(one)) - other.world(_corners(other)), axis=1)
    return bool(apart.max() <= 0.02 * min(one.spacing))


def _check_names(given: Sequence[str], contrasts: Sequence[str]) -> None:
    missing = [name for name in contrasts if name not in given]
    unknown = [name for name in given if name not in contrasts]
    if missing or unknown:
        near = [difflib.get_close_matches(str(name).lower(), missing, n=1, cutoff=0.5) for name in unknown]
        hints = [f"did you mean {match[0]!r} by {name!r}?" for name, match in zip(unknown, near, strict=True) if match]
        raise VolumeError(
            f"the case has the contrasts {list(given)}: {missing} missing, {unknown} unknown; expected exactly "
            f"{list(contrasts)}{'; ' if hints else ''}{' '.join(hints)}"
        )


def _check_file_name(name: str, given: Scan, contrasts: Sequence[str]) -> None:
    """Contrasts that were mixed up look like any other scans: only the file's name shows it."""
    path = _path(given)
    named = [] if path is None else _named_in(path, contrasts)
    if named and name not in named:
        raise VolumeError(
            f"{name!r} is given the file {path}, whose name says {' and '.join(map(repr, named))}; expected the file "
            f"of {name!r} (if the name is wrong, pass read_volume(file) in its place)"
        )


def _path(given: Scan) -> Path | None:
    return Path(given).absolute() if isinstance(given, str | os.PathLike) else None


def _source(given: Scan) -> str:
    return str(given) if isinstance(given, str | os.PathLike) else as_volume(given).source


def _corners(grid: Grid) -> Floats:
    """Indices (8, 3) of the outer edges of a grid's voxels."""
    return np.array(list(itertools.product(*((-0.5, n - 0.5) for n in grid.size))))


def _overlap(one: Grid, other: Grid) -> bool:
    """Whether the boxes around two grids, along the axes of the first, have a voxel in common."""
    index = one.index(other.world(_corners(other)))
    return bool((index.min(0) < np.array(one.size) - 0.5).all() and (index.max(0) > -0.5).all())
