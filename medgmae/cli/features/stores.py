"""Where results are kept: at once in the journal, and at the end in one file, or in a folder of Parquet shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.common import shown
from medgmae.cli.features import parquet, shards
from medgmae.cli.features.earlier import earlier_results, refuse_loss
from medgmae.cli.features.extraction import Result
from medgmae.cli.features.results import Finished, Row
from medgmae.cli.features.writers import write_features
from medgmae.cli.journal import Journal, key_of, state_of

Described = Callable[["medgmae.data.Scan"], Mapping[str, Any]]


class Store:
    """Rows of the scans that are done, by the scans' keys: those of earlier runs, and those of this one."""

    def __init__(self, journal: Journal, scans: Sequence[medgmae.data.Scan], described: Described) -> None:
        self.journal, self.described = journal, described
        self.scans = {key_of(scan): scan for scan in scans}
        self.rows: dict[str, Row] = {}

    def take_up(self, finished: Finished | None) -> None:
        """Take the rows of earlier runs whose scans are as they were, and what the journal holds."""
        earlier = finished.by_key if finished else {}
        for key, scan in self.scans.items():
            row = earlier.get(key)
            if row is not None and row.said["state"] == _state(scan):
                self._add(scan, row.work, row)
            elif (facts := self.journal.facts(scan)) is not None:
                self._add(scan, facts)

    def put(self, scan: medgmae.data.Scan, result: Result) -> None:
        """Keep the result of a scan; it is on disk when this returns."""
        facts = {**result.facts, "key": key_of(scan), "state": result.state}
        self.journal.put(scan, result.state, facts, result.tensors)
        self._add(scan, facts)

    def _add(self, scan: medgmae.data.Scan, facts: Mapping[str, Any], earlier: Row | None = None) -> None:
        said = {**self.described(scan), **facts}
        tensors = earlier.tensors if earlier else partial(self.journal.tensors, scan)
        self.rows[facts["key"]] = Row(scan.name, said, tensors)

    def in_order(self) -> list[Row]:
        """The rows in the order of the scans."""
        return [self.rows[key] for key in self.scans if key in self.rows]


class FileStore(Store):
    """One file, written when all scans are done; that of an earlier run of the same is gone on with."""

    def __init__(
        self,
        journal: Journal,
        scans: Sequence[medgmae.data.Scan],
        described: Described,
        description: Mapping[str, Any],
        overwrite: bool,
    ) -> None:
        super().__init__(journal, scans, described)
        self.overwrite = overwrite
        self.earlier = earlier_results(journal.out, description, overwrite)
        self.found = _identity(journal.out)
        refuse_loss(journal.out, self.earlier, set(self.scans), overwrite)
        self.take_up(self.earlier)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the file, unless nothing is new in it."""
        rows = self.in_order()
        if self.earlier and [(row.name, row.said) for row in self.earlier.rows] == [
            (one.name, one.said) for one in rows
        ]:
            return
        same = self.earlier is not None and _identity(self.journal.out) == self.found
        write_features(self.journal.out, rows, facts, self.overwrite or same)


class ShardStore(Store):
    """A folder of tables of at most ``shards.ROWS`` rows, each written when there are as many, and index.json, which
    names them. A result leaves the journal when it is in a table that the index names."""

    def __init__(
        self,
        journal: Journal,
        scans: Sequence[medgmae.data.Scan],
        described: Described,
        description: Mapping[str, Any],
        overwrite: bool,
    ) -> None:
        super().__init__(journal, scans, described)
        self.folder, self.description = journal.out, description
        found = self._found(overwrite)
        tables = {one["file"]: parquet.read_table(self.folder / one["file"]) for one in found}
        earlier = Finished({}, [row for table in tables.values() for row in table.rows])
        refuse_loss(self.folder, earlier, set(self.scans), overwrite)
        self.take_up(earlier)
        # Tables with rows that are no longer so are written anew; they stay until the index names others.
        self.shards = [one for one in found if not one["errors"] and self._holds(tables[one["file"]])]
        written = {row.said["key"] for one in self.shards for row in tables[one["file"]].rows}
        self.pending = [key for key in self.rows if key not in written]

    def _found(self, overwrite: bool) -> list[dict[str, Any]]:
        """The tables of earlier runs of the same."""
        index = shards.read_index(self.folder)
        if index is not None and Finished(index, []).is_of(self.description):
            return list(index["tables"])
        if self.folder.is_dir() and any(self.folder.iterdir()) and (index is None or not overwrite):
            what = "results of another run (other weights, options or version)" if index else "other files"
            more = ", or --overwrite to replace them" if index else ""
            raise click.UsageError(f"{shown(self.folder)} holds {what}; choose another --out{more}")
        return []

    def _holds(self, table: Finished) -> bool:
        """Whether the rows of a table are those that there should be."""
        now = [self.rows.get(row.said["key"]) for row in table.rows]
        return all(
            one is not None and (one.name, one.said) == (row.name, row.said)
            for one, row in zip(now, table.rows, strict=True)
        )

    def put(self, scan: medgmae.data.Scan, result: Result) -> None:
        """Keep the result of a scan, and write a table where there are enough."""
        super().put(scan, result)
        self.pending.append(key_of(scan))
        if len(self.pending) >= shards.ROWS:
            self._write([])
            self._index([], {})

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write what is left, and the index."""
        self._write(facts["errors"])
        self._index(facts["errors"], {name: facts[name] for name in ("skipped", "listing")})

    def _write(self, errors: Sequence[Mapping[str, str]]) -> None:
        """Write the rows that are in no table, in the order of the scans, and those of errors."""
        order = {key: place for place, key in enumerate(self.scans)}
        rows = [self.rows[key] for key in sorted(self.pending, key=order.__getitem__)]
        width = next(iter(self.rows.values())).said["features"]
        taken = {one["file"] for one in self.shards}
        self.shards += shards.write_tables(self.folder, rows, errors, self.description, width, taken)

    def _index(self, errors: Sequence[Mapping[str, str]], more: Mapping[str, Any]) -> None:
        """Name the tables that count; what they hold leaves the journal."""
        shards.write_index(self.folder, self.shards, {**self.description, "errors": errors, **more})
        for key in self.pending:
            self.journal.forget(self.scans[key])
        self.pending = []


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What tells whether a file is still the one that was read."""
    state = path.stat() if path.exists() else None
    return state and (state.st_ino, state.st_size, state.st_mtime_ns)


def _state(scan: medgmae.data.Scan) -> list[int] | None:
    try:
        return state_of(scan)
    except OSError:  # gone meanwhile: reading it says so
        return None
