"""Files of features: safetensors hold vectors and maps, csv and npy vectors. Each is read again before it has its name.

They are made from the journal when all scans are done, one scan in memory at a time.
"""

from __future__ import annotations

import csv
import io
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import medgmae
from medgmae.cli.files import complete
from medgmae.cli.journal import Journal

SUFFIXES = (".safetensors", ".csv", ".npy")


def sidecar(out: Path) -> Path | None:
    """The file that goes with ``out``: a .json beside an .npy."""
    return out.with_suffix(".json") if out.suffix.lower() == ".npy" else None


def write_features(
    journal: Journal, scans: Sequence[medgmae.data.Scan], facts: Mapping[str, Any], overwrite: bool
) -> None:
    """Write the features of ``scans``, which are done, to the journal's file, and read them again."""
    write = {".safetensors": _tensors, ".csv": _table, ".npy": _array}[journal.out.suffix.lower()]
    with complete(journal.out, overwrite) as place:
        write(place, journal, scans, facts)


def _tensors(place: Path, journal: Journal, scans: Sequence[medgmae.data.Scan], facts: Mapping[str, Any]) -> None:
    """``NAME/pooled`` and ``NAME/map``, float32; the facts are JSON under the key "medgmae"."""
    from safetensors import safe_open

    entries: dict[str, Any] = {}
    end = 0
    for scan in scans:
        for part, tensor in journal.tensors(scan).items():
            span = [end, end := end + 4 * tensor.numel()]
            entries[f"{scan.name}/{part}"] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": span}
    metadata = {"format": "pt", "medgmae": json.dumps(facts)}
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with place.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for scan in scans:
            for tensor in journal.tensors(scan).values():
                file.write(tensor.numpy().astype("<f4", copy=False).tobytes())
    with safe_open(place, "pt") as read:
        shapes = {name: list(read.get_slice(name).get_shape()) for name in read.keys()}  # noqa: SIM118
        _check(shapes == {name: entry["shape"] for name, entry in entries.items()})
        _check(read.metadata() == metadata)


def _table(place: Path, journal: Journal, scans: Sequence[medgmae.data.Scan], facts: Mapping[str, Any]) -> None:
    """Columns name, path, series, those of a manifest, f0, f1 ... with 9 digits, which is exact for float32."""
    with place.open("w", encoding="utf-8", newline="") as file:
        for row in _rows(journal, scans):
            line = io.StringIO(newline="")
            csv.writer(line).writerow(row)  # its own line end is what makes it quote carriage returns in a cell
            file.write(line.getvalue().removesuffix("\r\n") + "\n")
    with place.open(encoding="utf-8", newline="") as file:
        for written, read in zip(_rows(journal, scans), csv.reader(file), strict=True):
            _check(written == read)


def _rows(journal: Journal, scans: Sequence[medgmae.data.Scan]) -> Iterator[list[str]]:
    labels = list(scans[0].labels)
    for i, scan in enumerate(scans):
        vector = journal.tensors(scan)["pooled"].tolist()
        if i == 0:
            yield ["name", "path", "series", *labels, *(f"f{n}" for n in range(len(vector)))]
        said = scan.described
        yield [scan.name, said["path"], said.get("series", ""), *scan.labels.values(), *(f"{x:.9g}" for x in vector)]


def _array(place: Path, journal: Journal, scans: Sequence[medgmae.data.Scan], facts: Mapping[str, Any]) -> None:
    """An array (n, F) of float32, and in a .json beside it names and paths in the same order, and the facts."""
    import numpy as np

    vectors = np.stack([journal.tensors(scan)["pooled"].numpy() for scan in scans])
    about = {"names": [scan.name for scan in scans], "paths": [scan.described["path"] for scan in scans], **facts}
    beside = place.with_suffix(".json")
    with place.open("wb") as file:  # np.save adds .npy to other endings, such as .NPY
        np.save(file, vectors)
    beside.write_text(json.dumps(about, indent=2), encoding="utf-8")
    _check(np.array_equal(np.load(place, allow_pickle=False), vectors))
    _check(json.loads(beside.read_text(encoding="utf-8")) == json.loads(json.dumps(about)))


def _check(same: bool) -> None:
    if not same:
        raise OSError("what was written reads back as something else")
