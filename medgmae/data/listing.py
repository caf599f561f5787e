"""A list of scans: which there are, what is left out and why, and what should have been there."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgmae.data.formats.beside import files_of
from medgmae.data.geometry import VolumeError
from medgmae.data.io import read_volume
from medgmae.data.names import shown
from medgmae.data.volume import Volume


@dataclass(frozen=True)
class Scan:
    """One row of the result: a file or folder, or one series in a folder, of which ``files`` are the slices if they are
    known, ``study`` its StudyInstanceUID and ``patient`` its PatientID, which is written only where that is asked for;
    ``labels`` are columns of a table, and ``row`` is its row there, counted from 1 with the heading. Where a table has
    a column for each of several ``contrasts``, these are their files, and ``path`` is the first of them."""

    path: Path
    series: str | None = None
    name: str = ""
    about: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] | None = None
    contrasts: dict[str, Path] | None = None
    row: int | None = None
    study: str | None = None
    patient: str | None = None

    @property
    def source(self) -> Path | dict[str, Path]:
        """What ``create_transform(...)`` takes of a scan that is no series: its path, or the files by contrast."""
        return self.contrasts or self.path

    @property
    def paths(self) -> tuple[Path, ...]:
        """The file or folder, or those of each contrast."""
        return (self.path,) if self.contrasts is None else tuple(self.contrasts.values())

    def read(self, channels: int | None = None) -> Volume:
        """``read_volume`` of a file or series.

        Raises:
            VolumeError: what ``read_volume`` raises, and a scan of several contrasts, which needs a transform.
        """
        if self.contrasts is not None:
            raise VolumeError(
                f"{self.path}: the scan has the contrasts {', '.join(self.contrasts)}, a file each; expected one file"
            )
        return read_volume(self.path, series=self.series, files=self.files, channels=channels)

    def all_files(self) -> list[Path]:
        """Every file that reading the scan reads, and of a folder every file below it."""
        if self.files is not None:
            return list(self.files)
        inside = (path.rglob("*") if path.is_dir() else files_of(path) for path in self.paths)
        return [file for files in inside for file in files if file.is_file()]

    @property
    def described(self) -> dict[str, Any]:
        """What the results say of the scan."""
        study = {} if self.study is None else {"study": shown(self.study)}
        series = {} if self.series is None else {"series": shown(self.series), **study, "description": self.about}
        parts = {} if self.contrasts is None else {"contrasts": {n: shown(p) for n, p in self.contrasts.items()}}
        return {"path": shown(self.path), **series, **parts, **({"labels": self.labels} if self.labels else {})}


@dataclass
class Listing:
    """What is read, what is left out and why, and what should have been read and cannot be; of a table also by the
    number of its row."""

    scans: list[Scan] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    unexpected: int = 0
    errors: list[dict[str, str]] = field(default_factory=list)
    broken_rows: dict[int, str] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """How many are worth starting, which takes seconds each: one for a core and for 16 scans, and 0 for one."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = min(cores, len(self.scans) // 16)
        return count if count > 1 else 0

    def skip(self, path: Path, reason: str, expected: bool = False) -> None:
        """Leave a file out; ``expected`` of what is known not to be a scan."""
        self.skipped.append({"path": shown(path), "reason": reason})
        self.unexpected += not expected

    def fail(self, path: Path, reason: str) -> None:
        """Note what should have been read."""
        self.errors.append({"path": shown(path), "error": f"{shown(path)}: {shown(reason, keep=chr(10))}"})
