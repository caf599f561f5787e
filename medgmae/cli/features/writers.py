"""Files of features: safetensors hold vectors and maps, the others vectors. Each is read again before it has its name.

They are made when all scans are done; those but Parquet with the features of one scan in memory at a time.
"""

from __future__ import annotations

import csv
import io
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from medgmae.cli.common import shown
from medgmae.cli.features import parquet
from medgmae.cli.features.results import Row
from medgmae.cli.files import check_name, complete

SUFFIXES = (".safetensors", ".parquet", ".csv", ".npy")


def check_out(ctx: click.Context, param: click.Parameter, out: Path | None) -> Path | None:
    """A name that results can be written under; whether there are others is looked at when it is known of what."""
    if out is None:
        return None
    ending = out.suffix.lower()
    if ending not in ("", *SUFFIXES) or (ending and out.is_dir()) or (not ending and out.is_file()):
        raise click.BadParameter(
            f"{shown(out)} must end in one of {', '.join(SUFFIXES)}, or have no ending: a folder of Parquet tables"
        )
    check_name(out)
    if not out.parent.is_dir():
        raise click.BadParameter(f"the folder {shown(out.parent)} does not exist")
    return out


def sidecar(out: Path) -> Path | None:
    """The file that goes with ``out``: a .json beside an .npy."""
    return out.with_suffix(".json") if out.suffix.lower() == ".npy" else None


def write_features(out: Path, rows: Sequence[Row], facts: Mapping[str, Any], overwrite: bool) -> None:
    """Write the features of scans, with ``facts`` about the run, and read them again."""
    facts = {**facts, "scans": {row.name: row.said for row in rows}}
    write = {".safetensors": _tensors, ".csv": _table, ".npy": _array, ".parquet": _parquet}[out.suffix.lower()]
    with complete(out, overwrite) as place:
        write(place, rows, facts)


def _parquet(place: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """A table, which says in its rows what is said of single scans."""
    run = {name: value for name, value in facts.items() if name not in ("scans", "errors")}
    parquet.write_table(place, rows, facts["errors"], run, rows[0].said["features"])


def _tensors(place: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """``NAME/pooled`` and ``NAME/map``, float32; the facts are JSON under the key "medgmae"."""
    from safetensors import safe_open

    entries: dict[str, Any] = {}
    end = 0
    for row in rows:
        for part, tensor in sorted(row.tensors().items()):
            span = [end, end := end + 4 * tensor.numel()]
            entries[f"{row.name}/{part}"] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": span}
    metadata = {"format": "pt", "medgmae": json.dumps(facts)}
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with place.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for row in rows:
            for _, tensor in sorted(row.tensors().items()):
                file.write(tensor.numpy().astype("<f4", copy=False).tobytes())
    with safe_open(place, "pt") as read:
        shapes = {name: list(read.get_slice(name).get_shape()) for name in read.keys()}  # noqa: SIM118
        _check(shapes == {name: entry["shape"] for name, entry in entries.items()})
        _check(read.metadata() == metadata)


def _table(place: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Columns name, path, series, for DICOM study, those of a manifest, and f0, f1 ... with 9 digits, which is
    exact for float32."""
    with place.open("w", encoding="utf-8", newline="") as file:
        for row in _lines(rows):
            line = io.StringIO(newline="")
            csv.writer(line).writerow(row)  # its own line end is what makes it quote carriage returns in a cell
            file.write(line.getvalue().removesuffix("\r\n") + "\n")
    with place.open(encoding="utf-8", newline="") as file:
        for written, read in zip(_lines(rows), csv.reader(file), strict=True):
            _check(written == read)


def _lines(rows: Sequence[Row]) -> Iterator[list[str]]:
    labels = list(rows[0].said.get("labels", {}))
    more = [name for name in ("study", "patient") if any(name in row.said for row in rows)]
    for i, row in enumerate(rows):
        vector, said = row.tensors()["pooled"].tolist(), row.said
        if i == 0:
            yield ["name", "path", "series", *more, *labels, *(f"f{n}" for n in range(len(vector)))]
        places = [said["path"], *(said.get(name, "") for name in ("series", *more))]
        yield [row.name, *places, *said.get("labels", {}).values(), *(f"{x:.9g}" for x in vector)]


def _array(place: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """An array (n, F) of float32, and in a .json beside it names and paths in the same order, and the facts."""
    import numpy as np

    vectors = np.stack([row.tensors()["pooled"].numpy() for row in rows])
    about = {"names": [row.name for row in rows], "paths": [row.said["path"] for row in rows], **facts}
    beside = place.with_suffix(".json")
    with place.open("wb") as file:  # np.save adds .npy to other endings, such as .NPY
        np.save(file, vectors)
    beside.write_text(json.dumps(about, indent=2), encoding="utf-8")
    _check(np.array_equal(np.load(place, allow_pickle=False), vectors))
    _check(json.loads(beside.read_text(encoding="utf-8")) == json.loads(json.dumps(about)))


def _check(same: bool) -> None:
    if not same:
        raise OSError("what was written reads back as something else")
