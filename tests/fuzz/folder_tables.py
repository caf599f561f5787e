"""Tables of scans as people and programs write them, and some that are wrong."""

from __future__ import annotations

import csv
import io
import os
import random
from dataclasses import dataclass
from pathlib import Path

from folder_trees import Row

from medgmae.data import shown

CELLS = (
    "", "61", "COPD, mild", "two\nlines", "two\r\nlines", 'q"uote', "a;b", "=1+1", "-1", "üñ", "\x0b", "\x85", "\u2028",
    " blank ", "\t", "'", "nan", "\x1b[2J", "x" * 5000, "\\x41",
)  # fmt: skip
IDS = (
    "p",
    "a/b",
    "a,b",
    "new\nline",
    "..",
    "=1+1",
    " ",
    "pooled",
    "x/pooled",
    "\x07",
    "\\x41",
    "三",
    "-",
    "__metadata__",
)


@dataclass
class Line:
    """A line of a table: its scan, None where that is not there, the name and labels of its row."""

    row: Row | None
    name: str
    labels: dict[str, str]


@dataclass
class Table:
    """A table; ``wrong`` says why it must be refused as a whole, ``ids`` whether it gives names."""

    path: Path
    lines: list[Line]
    ids: bool
    wrong: str


def make_table(rng: random.Random, folder: Path, rows: list[Row]) -> Table:
    """A table of these scans, and of some that are not there."""
    ids = rng.random() < 0.7
    labels = rng.sample(["age", "sex", "two\nlines", "a,b", "ü", "f", "fx1", 'q"', "Path"], rng.randint(0, 4))
    columns = ["path", "series", *(["id"] if ids else []), *labels]
    rng.shuffle(columns)
    lines, cells = [], []
    for number, row in enumerate([*rows, *([None] if rng.random() < 0.3 else [])]):
        said = {label: rng.choice(CELLS) for label in labels}
        name = f"{rng.choice(IDS)}{number}"
        lines.append(Line(row, name, {**({"id": name} if ids else {}), **said}))
        path = (
            _written(rng, folder, row.path) if row else rng.choice(("gone.nii", "z" * 300, "/gone/a.nii", "no\0.nii"))
        )
        cells.append({**said, "id": name, "path": path, "series": (row.series if row else "") or ""})
    wrong = (
        rng.choice(("twice", "columns", "cells", "no path", "empty", "bytes", "quote", "f0", "id"))
        if rng.random() < 0.2
        else ""
    )
    if wrong == "id" and not ids:
        wrong = ""
    if wrong == "twice":
        cells.append(dict(cells[0]))
        if lines[0].row is None:
            wrong = ""
            cells.pop()
    if wrong == "id":
        cells[-1]["id"] = ""
    if wrong == "f0":
        columns.append("f0")
    if wrong == "columns":
        columns = [name.replace("path", "file") for name in columns]
    for cell in cells:
        cell.update({name: "1" for name in columns if name not in cell})
    separator = rng.choice(",;\t")
    text = io.StringIO(newline="")
    ends = rng.choice(("\n", "\r\n", "\r"))
    # csv.writer leaves carriage returns bare where they are no part of its line end
    csv.writer(text, delimiter=separator, lineterminator=ends, quoting=csv.QUOTE_ALL).writerows(
        [columns, *([cell[name] for name in columns] for cell in cells)]
    )
    content = text.getvalue()
    content += {"cells": f"1{separator * len(columns)}1{ends}", "quote": '"open'}.get(wrong, "")
    raw = content.encode()
    raw = b"\xef\xbb\xbf" * (rng.random() < 0.4) + raw + ends.encode() * rng.randint(0, 2)
    raw = {"bytes": raw + b"\xff\xfe", "empty": b"", "no path": raw.replace(b"path", b"peth")}.get(wrong, raw)
    stem = rng.choice(("t", " t", "ü", os.fsdecode(b"\xe9")))
    path = folder / f"{stem}.{rng.choice(('csv', 'CSV'))}"
    path.write_bytes(raw)
    return Table(path, lines, ids, wrong)


def _written(rng: random.Random, folder: Path, path: Path) -> str:
    """A path as a table has it: absolute or relative, as it stands where that is UTF-8."""
    if rng.random() < 0.5:
        path = path.relative_to(folder)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return shown(path)
    return str(path) if rng.random() < 0.5 else shown(path)
