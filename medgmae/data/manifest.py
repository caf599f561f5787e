"""A table of scans: a CSV file with a column "path", or one such as "path_t1" for each of several contrasts, perhaps
"id" and "series", and columns that are carried along."""

from __future__ import annotations

import csv
import io
import os
import re
from dataclasses import replace
from pathlib import Path

from medgmae.data.geometry import VolumeError
from medgmae.data.listing import Listing, Scan
from medgmae.data.names import path_of, shown, unique_names
from medgmae.data.scans import unreachable

_WRITTEN = re.compile(r"name|f\d+")  # columns of the results themselves


def read_manifest(file: str | os.PathLike[str]) -> Listing:
    """The scans of a CSV file, in its order. Paths are relative to the file's folder; the id is the scan's name.

    A scan has its file in the column ``path``, or a file for each of several contrasts in columns that name them, such
    as ``path_t1`` and ``path_t2``. A column ``series`` says which of a DICOM folder is meant. All other columns, such
    as labels and a fold, are carried along as text.

    Separators are those of the first line: comma, semicolon or tab. Text is UTF-8; names that are not are written as
    in the results, with ``\\xNN``.

    Raises:
        VolumeError: not such a table, with the row that is wrong.
    """
    file = Path(file)
    columns, *rows = _rows(file)
    listing, places = Listing(), [name for name in columns if _is_place(name)]
    for number, cells in enumerate(rows, 2):
        row, where = dict(zip(columns, cells, strict=True)), f"{shown(file)}, row {number}"
        if empty := [name for name in (*places, "id") if not row.get(name, "-")]:
            raise VolumeError(f"{where}: the {empty[0]} is empty")
        if "path" not in places and row.get("series"):
            raise VolumeError(f"{where}: a series and several contrasts; expected a column path for a series")
        labels = {name: cell for name, cell in row.items() if name not in (*places, "series")}
        paths = {name.removeprefix("path_"): found_path(file.parent, row[name]) for name in places}
        problems = {path: problem for path in paths.values() if (problem := unreachable(path))}
        for path, problem in problems.items():
            listing.fail(path, f"{problem} ({where})")
            listing.broken_rows[number] = f"{shown(path)}: {problem}"
        if not problems:
            first, contrasts = next(iter(paths.values())), None if "path" in places else paths
            name = row.get("id", "")
            series = row.get("series") or None
            listing.scans.append(Scan(first, series, name, labels=labels, contrasts=contrasts, row=number))
    _check_unique(file, listing.scans)
    if "id" not in columns:
        names = unique_names([scan.path / scan.series if scan.series else scan.path for scan in listing.scans])
        listing.scans = [replace(scan, name=name) for scan, name in zip(listing.scans, names, strict=True)]
    return listing


def _is_place(column: str) -> bool:
    """Whether a column holds paths: of scans, or of one of their contrasts."""
    return column == "path" or (column.startswith("path_") and column != "path_")


def _rows(file: Path) -> list[list[str]]:
    """The table, which has rows, a place for scans and no column of the results."""
    rows = read_table(file)
    columns = rows[0]
    places = [name for name in columns if _is_place(name)]
    if not places:
        raise VolumeError(f"{shown(file)} has the columns {', '.join(columns) or 'none'}; expected one named path")
    taken = [name for name in columns if _WRITTEN.fullmatch(name)]
    if taken:
        raise VolumeError(f"{shown(file)}: {taken[0]!r} is a column of the results; rename it")
    if "path" in places and len(places) > 1:
        raise VolumeError(
            f"{shown(file)} has the columns {', '.join(places)}; expected path alone, or one such as path_t1 for each "
            "contrast and no path"
        )
    if len(rows) < 2:
        raise VolumeError(f"{shown(file)} has no rows")
    return rows


def read_table(file: str | os.PathLike[str]) -> list[list[str]]:
    """The cells of a CSV file as text: the names of its columns, then its rows, without empty lines; row ``n`` of
    :attr:`Scan.row` is entry ``n - 1``.

    Separators are those of the first line: comma, semicolon or tab. Text is UTF-8.

    Raises:
        VolumeError: not such a table, columns without a name or with that of another, or a row with more or fewer cells
            than there are columns.
    """
    file = Path(file)
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise VolumeError(f"{shown(file)} is not UTF-8 ({error}); save the table as CSV in UTF-8") from None
    first = re.split("[\r\n]", re.sub('"[^"]*"', "", text[:10_000]), maxsplit=1)[0]  # names may hold separators
    separator = max(",;\t", key=first.count)
    try:
        # by line ends alone: str.splitlines would also split at form feeds and other characters within a cell
        lines = io.StringIO(text, newline="")
        rows = [row for row in csv.reader(lines, delimiter=separator, strict=True) if row]
    except csv.Error as error:
        raise VolumeError(f"{shown(file)} is not a table: {error}") from None
    columns = [name.strip() for name in rows[0]] if rows else []
    if "" in columns or len(set(columns)) < len(columns):
        raise VolumeError(f"{shown(file)}: a column has no name, or that of another; rename it")
    for number, cells in enumerate(rows[1:], 2):
        if len(cells) != len(columns):
            raise VolumeError(f"{shown(file)}, row {number}: {len(cells)} cells; expected {len(columns)}")
    return [columns, *rows[1:]]


def found_path(folder: Path, text: str) -> Path:
    """A path as it stands, or where there is none such, with its ``\\xNN`` read as bytes."""
    path = folder / text
    return path if os.path.lexists(path) else folder / path_of(text)


def _check_unique(file: Path, scans: list[Scan]) -> None:
    seen: dict[object, str] = {}
    for scan in scans:
        place = (scan.path, scan.series, *(scan.contrasts or {}).values())
        for key in (scan.name, place) if scan.name else (place,):
            if key in seen:
                what = f"the id {scan.name!r}" if key == scan.name else f"the scan {shown(scan.path)}"
                raise VolumeError(f"{shown(file)} has {what} twice; expected each once")
            seen[key] = scan.name
