"""Files of features, as ``medgmae features`` writes them, read again: one vector per scan, and what goes with it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medgmae.cli.common import shown
from medgmae.cli.features.earlier import read_results
from medgmae.cli.features.parquet import require_pyarrow
from medgmae.cli.features.writers import SUFFIXES

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST = 5  # names that a message has


@dataclass(frozen=True)
class FeatureTable:
    """names: of the scans, each once. cells: of each, the other columns of its table, as text. vectors: (n, F)
    float32."""

    names: list[str]
    cells: list[dict[str, str]]
    vectors: NDArray[Any]


def read_features(path: Path) -> FeatureTable:
    """The pooled vectors in a file of features.

    Raises:
        click.ClickException: a file that is none, or that holds no pooled vectors; names that are there twice; vectors
            that are not finite.
    """
    import numpy as np

    if path.is_dir() or path.suffix.lower() == ".parquet":
        require_pyarrow()
    read = {".csv": _csv, ".safetensors": _tensors}.get(path.suffix.lower(), _rows)
    try:
        table = read(path)
    except (ValueError, KeyError, TypeError) as error:
        raise click.ClickException(
            f"{shown(path)} is no file of features that can be read ({shown(str(error))}); expected what medgmae "
            f"features wrote ({', '.join(SUFFIXES)} or a folder of Parquet tables), with a pooled vector of every scan"
        ) from error
    seen: set[str] = set()
    twice = [name for name in table.names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    if twice:
        raise click.ClickException(f"{shown(path)} has {few(twice)} twice; expected each scan once")
    bad = [name for name, good in zip(table.names, np.isfinite(table.vectors).all(1), strict=True) if not good]
    if bad:
        raise click.ClickException(
            f"{shown(path)} has NaN or infinite features of {few(bad)}; expected finite numbers: compute them again"
        )
    return table


def few(names: Sequence[str]) -> str:
    """How many scans, and the names of the first."""
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return f"{len(names)} scan{'s' if len(names) > 1 else ''} ({', '.join(names[:_MOST])}{more})"


def _csv(path: Path) -> FeatureTable:
    """Columns name, path, series, those of a table, f0, f1 ..."""
    import numpy as np

    names: list[str] = []
    cells, vectors = [], []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, strict=True)
        columns = next(rows, [])
        first = next((k for k, name in enumerate(columns) if re.fullmatch(r"f\d+", name)), len(columns))
        if columns[:1] != ["name"] or columns[first:] != [f"f{k}" for k in range(len(columns) - first)]:
            raise ValueError(
                f"its first columns are {', '.join(columns[:4]) or 'none'}; expected name, ..., f0, f1, ..."
            )
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"row {len(names) + 2} has {len(row)} cells; expected {len(columns)}")
            names.append(row[0])
            cells.append(dict(zip(columns[1:first], row[1:first], strict=True)))
            vectors.append(np.array(row[first:], dtype=np.float64).astype(np.float32))
    return FeatureTable(names, cells, np.stack(vectors))


def _rows(path: Path) -> FeatureTable:
    """What the command itself reads where a run goes on: arrays with names beside them, Parquet, folders of it."""
    import numpy as np

    found = read_results(path)
    if found is None:
        raise ValueError("it does not say what it holds")
    names = [row.name for row in found.rows]
    vectors = np.stack([row.tensors()["pooled"].numpy() for row in found.rows])
    return FeatureTable(names, _cells([row.said for row in found.rows]), vectors)


def _tensors(path: Path) -> FeatureTable:
    """``NAME/pooled`` (F,) of each scan; facts in the metadata. The file is opened once, not for every row."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            facts = json.loads((file.metadata() or {})["medgmae"])
            names = list(facts["scans"])
            vectors = np.stack([file.get_tensor(f"{name}/pooled") for name in names])
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    return FeatureTable(names, _cells([facts["scans"][name] for name in names]), vectors)


def _cells(said: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What the results say of each scan, as the columns of a table."""
    return [{"path": one["path"], "series": one.get("series", ""), **one.get("labels", {})} for one in said]
