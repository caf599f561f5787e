"""Which scans are meant by what a person names: folders, files, a table or a list of paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medgmae.data.geometry import VolumeError
from medgmae.data.manifest import read_manifest
from medgmae.data.scans import Listing, find_scans


def list_scans(
    sources: str | Path | Sequence[str | Path], contrasts: Sequence[str] | None = None, series: Sequence[str] = ()
) -> Listing:
    """The scans of one source or of several, each once, in the order given, with names that set them apart.

    Args:
        sources: folders, which are searched to their ends, and files; or one .csv table (see :func:`read_manifest`).
        contrasts: names of the channels of a case: a folder that holds files of several of them is one scan.
        series: of DICOM, only series whose id or description matches one of these patterns, such as ``"*lung*"``.

    Raises:
        VolumeError: a table that is none, with the row that is wrong; patterns that match no series.
    """
    paths = [Path(sources)] if isinstance(sources, str | Path) else [Path(one) for one in sources]
    if len(paths) == 1 and paths[0].suffix.lower() == ".csv" and paths[0].is_file():
        if series:
            raise VolumeError("series is for folders; a table says it in a column named series")
        return read_manifest(paths[0])
    return find_scans(paths, contrasts, series)
