"""Which scans are meant by what a person names: folders, files, a table or a list of paths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from medgmae.data.geometry import VolumeError
from medgmae.data.listing import Listing
from medgmae.data.manifest import found_path, read_manifest
from medgmae.data.names import shown
from medgmae.data.nnunet import is_nnunet, list_nnunet
from medgmae.data.scans import find_scans


def list_scans(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    contrasts: Sequence[str] | None = None,
    series: Sequence[str] = (),
    arrays: bool = False,
) -> Listing:
    """The scans of one source or of several, each once, in the order given, with names that set them apart.

    Args:
        sources: folders, which are searched to their ends, and files; one folder of nnU-Net's, with dataset.json and
            imagesTr, whose cases are listed; or one .csv table (see :func:`read_manifest`);
            or one .txt list of folders and files, a line each, relative to the list's folder: lines that are empty or
            begin with # are passed over.
        contrasts: names of the channels of a case: a folder that holds files of several of them is one scan.
        series: of DICOM, only series whose id or description matches one of these patterns, such as ``"*lung*"``.
        arrays: whether .npy and .npz files in folders are scans; those that are named always are.

    Raises:
        VolumeError: a table that is none, with the row that is wrong; a list that is empty; patterns that match no
            series.
    """
    paths = [Path(sources)] if isinstance(sources, str | os.PathLike) else [Path(one) for one in sources]
    ending = paths[0].suffix.lower() if len(paths) == 1 and paths[0].is_file() else ""
    if ending == ".csv":
        if series:
            raise VolumeError("series is for folders; a table says it in a column named series")
        return read_manifest(paths[0])
    if len(paths) == 1 and is_nnunet(paths[0]):
        return list_nnunet(paths[0], contrasts)
    return find_scans(_listed(paths[0]) if ending == ".txt" else paths, contrasts, series, arrays)


def _listed(file: Path) -> list[Path]:
    """The paths in a list."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise VolumeError(f"{shown(file)} is not UTF-8 ({error}); save the list as text in UTF-8") from None
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    paths = [found_path(file.parent, line) for line in lines if line and not line.startswith("#")]
    if not paths:
        raise VolumeError(f"{shown(file)} names no scans; expected a path per line")
    return paths
