"""A table of scans: a CSV file with a column "path", perhaps "id" and "series", and columns that are carried along."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path

from medgmae.data.geometry import VolumeError
from medgmae.data.names import path_of, shown, unique_names
from medgmae.data.scans import Listing, Scan, unreachable

_WRITTEN = re.compile(r"name|f\d+")  # columns of the results themselves


def read_manifest(file: Path) -> Listing:
    """The scans of a CSV file, in its order. Paths are relative to the file's folder; the id is the scan's name.

    Separators are those of the first line: comma, semicolon or tab. Text is UTF-8; names that are not are written as
    in the results, with ``\\xNN``.

    Raises:
        VolumeError: not such a table, with the row that is wrong.
    """
    rows = _rows(file)
    columns, listing = rows[0], Listing()
    for number, cells in enumerate(rows[1:], 2):
        if len(cells) != len(columns):
            raise VolumeError(f"{shown(file)}, row {number}: {len(cells)} cells; expected {len(columns)}")
        row = dict(zip(columns, cells, strict=True))
        if not row["path"] or not row.get("id", "-"):
            raise VolumeError(f"{shown(file)}, row {number}: the {'id' if row['path'] else 'path'} is empty")
        labels = {name: cell for name, cell in row.items() if name not in ("path", "series")}
        path = _found(file.parent, row["path"])
        if problem := unreachable(path):
            listing.fail(path, f"{problem} ({shown(file)}, row {number})")
        else:
            listing.scans.append(Scan(path, row.get("series") or None, row.get("id", ""), labels=labels))
    _check_unique(file, listing.scans)
    if "id" not in columns:
        names = unique_names([scan.path / scan.series if scan.series else scan.path for scan in listing.scans])
        listing.scans = [Scan(s.path, s.series, n, labels=s.labels) for s, n in zip(listing.scans, names, strict=True)]
    return listing


def _rows(file: Path) -> list[list[str]]:
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
    if "path" not in columns:
        raise VolumeError(f"{shown(file)} has the columns {', '.join(columns) or 'none'}; expected one named path")
    taken = [name for name in columns if _WRITTEN.fullmatch(name)]
    if taken or "" in columns or len(set(columns)) < len(columns):
        wrong = f"{taken[0]!r} is a column of the results" if taken else "a column has no name, or that of another"
        raise VolumeError(f"{shown(file)}: {wrong}; rename it")
    if len(rows) < 2:
        raise VolumeError(f"{shown(file)} has no rows")
    return [columns, *rows[1:]]


def _found(folder: Path, text: str) -> Path:
    """A path as it stands, or where there is none such, with its ``\\xNN`` read as bytes."""
    path = folder / text
    return path if os.path.lexists(path) else folder / path_of(text)


def _check_unique(file: Path, scans: list[Scan]) -> None:
    seen: dict[object, str] = {}
    for scan in scans:
        for key in {scan.name, (scan.path, scan.series)} - {""}:
            if key in seen:
                what = f"the id {scan.name!r}" if key == scan.name else f"the scan {shown(scan.path)}"
                raise VolumeError(f"{shown(file)} has {what} twice; expected each once")
            seen[key] = scan.name
