"""Tables of vectors in Parquet: a row per scan, those that failed too, and what the run was in the file's metadata."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medgmae.cli.features.results import Finished, Row, Tensors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pyarrow import Table

# What results say of a scan, and as what; columns of a manifest are label_NAME, after them.
_TEXTS = ("path", "series", "study", "patient", "description", "contrasts", "key")
_VECTOR = "vector"
_OF_ERRORS = ("name", "path", "error")
_LABEL = "label_"
_ROWS_PER_GROUP = 8192


def require_pyarrow() -> None:
    """Raise a usage error where Parquet cannot be written."""
    if importlib.util.find_spec("pyarrow") is None:
        raise click.UsageError("Parquet needs pyarrow, which is not installed: pip install medgmae[parquet]")


def write_table(
    place: Path, rows: Sequence[Row], errors: Sequence[Mapping[str, str]], facts: Mapping[str, Any], width: int
) -> None:
    """Rows, then one for each error, whose vector of ``width`` numbers is NaN: Arrow before 26 cannot read a list of a
    fixed size that is null. Read again and compared."""
    from pyarrow import parquet

    table = _table(rows, errors, facts, width)
    parquet.write_table(table, place, compression="zstd", use_dictionary=False, row_group_size=_ROWS_PER_GROUP)
    read = parquet.read_table(place, memory_map=True)
    same = read.drop_columns(_VECTOR).equals(table.drop_columns(_VECTOR))
    if not same or read.schema.metadata != table.schema.metadata or _bits(read) != _bits(table):
        raise OSError("what was written reads back as something else")


def read_table(path: Path) -> Finished:
    """What :func:`write_table` has written."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, memory_map=True)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None
    facts = json.loads((table.schema.metadata or {})[b"medgmae"])
    if not {_VECTOR, "error", *_TEXTS} <= set(table.column_names):
        raise ValueError(f"{path} has not the columns of a table of features")
    values = _values(table)
    width = values.shape[1]

    def tensors(at: int) -> Tensors:
        import torch

        return lambda: {"pooled": torch.from_numpy(values[at].copy())}

    said = table.drop_columns(_VECTOR).to_pylist()
    done = [(at, one) for at, one in enumerate(said) if one["error"] is None]
    failed = [{name: one[name] for name in _OF_ERRORS if one[name] is not None} for one in said if one["error"]]
    return Finished({**facts, "errors": failed}, [Row(one["name"], _said(one, width), tensors(at)) for at, one in done])


def _values(table: Table) -> NDArray[np.float32]:
    """The vectors of a table, (rows, numbers)."""
    column = table.column(_VECTOR).combine_chunks()
    values: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, column.type.list_size)


def _bits(table: Table) -> bytes:
    return _values(table).tobytes()


def _said(cells: Mapping[str, Any], width: int) -> dict[str, Any]:
    """What results say of a scan, from the cells of its row."""
    said = {name: cells[name] for name in (*_TEXTS, "place") if cells[name] is not None}
    if "contrasts" in said:
        said["contrasts"] = json.loads(said["contrasts"])
    labels = {name.removeprefix(_LABEL): text for name, text in cells.items() if name.startswith(_LABEL)}
    seconds, state = cells["seconds"], cells["state"]
    return {**said, **({"labels": labels} if labels else {}), "features": width, "map": None, "seconds": seconds,
            "state": state}  # fmt: skip


def _table(rows: Sequence[Row], errors: Sequence[Mapping[str, str]], facts: Mapping[str, Any], width: int) -> Table:
    import numpy as np
    import pyarrow as pa

    vectors = np.full((len(rows) + len(errors), width), np.nan, np.float32)
    for vector, row in zip(vectors, rows, strict=False):  # those of errors stay as they are
        vector[:] = row.tensors()["pooled"].numpy()
    said: list[Mapping[str, Any]] = [*(row.said for row in rows), *errors]

    def column(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array([one.get(name) for one in said], kind)

    names = [*(row.name for row in rows), *(one.get("name") for one in errors)]
    columns = {"name": pa.array(names, pa.string())}
    for name in _TEXTS:
        columns[name] = (
            column(name, pa.string()) if name != "contrasts" else pa.array(map(_contrasts, said), pa.string())
        )
    for name in sorted({label: None for row in rows for label in row.said.get("labels", {})}):
        columns[f"{_LABEL}{name}"] = pa.array([one.get("labels", {}).get(name) for one in said], pa.string())
    columns |= {"error": column("error", pa.string()), "seconds": column("seconds", pa.float64())}
    columns |= {"place": column("place", pa.int64()), "state": column("state", pa.list_(pa.int64()))}
    columns[_VECTOR] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width)
    return pa.table(columns).replace_schema_metadata({"medgmae": json.dumps(facts)})


def _contrasts(said: Mapping[str, Any]) -> str | None:
    return json.dumps(said["contrasts"]) if "contrasts" in said else None
