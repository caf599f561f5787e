"""A folder of results: tables in Parquet, and index.json, which names those that count."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from medgmae.cli.features import parquet
from medgmae.cli.features.results import Finished, Row
from medgmae.cli.files import complete

ROWS = 4096  # of a table: some 10 MB, and at most as many files in the journal
_INDEX = "index.json"


def write_tables(
    folder: Path,
    rows: Sequence[Row],
    errors: Sequence[Mapping[str, str]],
    description: Mapping[str, Any],
    width: int,
    taken: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Write tables of at most ``ROWS`` rows, the last with those of errors, under names that are neither there nor
    ``taken``; returns what the index says of them."""
    parts = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    if errors and not parts:
        parts = [[]]
    folder.mkdir(exist_ok=True)
    used = {path.name for path in folder.glob("shard-*.parquet")} | set(taken)
    written, number = [], 0
    for place, part in enumerate(parts):
        while (name := f"shard-{number:05}.parquet") in used:
            number += 1
        used.add(name)
        failed = errors if place == len(parts) - 1 else []
        with complete(folder / name, overwrite=False) as path:
            parquet.write_table(path, part, failed, description, width)
        written.append({"file": name, "rows": len(part), "errors": len(failed)})
    return written


def write_index(folder: Path, tables: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Name the tables that count, and remove the others."""
    index = {**facts, "tables": tables, "rows": sum(one["rows"] for one in tables)}
    with complete(folder / _INDEX, overwrite=True) as path:
        path.write_text(json.dumps(index, indent=2), encoding="utf-8")
    for path in folder.glob("shard-*.parquet"):
        if path.name not in {one["file"] for one in tables}:
            path.unlink()


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder of results, if it has one."""
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return index if isinstance(index["tables"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_folder(folder: Path) -> Finished:
    """All rows of a folder of results.

    Raises:
        ValueError: it is none.
    """
    index = read_index(folder)
    if index is None:
        raise ValueError(f"{folder} has no index.json of results")
    tables = [parquet.read_table(folder / one["file"]) for one in index["tables"]]
    return Finished(index, [row for table in tables for row in table.rows])
