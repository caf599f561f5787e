"""Files of features: safetensors hold vectors and maps, csv and npy vectors. A file appears when it is complete."""

from __future__ import annotations

import csv
import json
import os
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".csv", ".npy")


class TensorWriter:
    """A safetensors file with ``NAME/pooled`` and ``NAME/map``, float32; the facts are JSON under the key "medgmae".

    The format begins with a list of all that follows, so the tensors wait in a temporary file beside it: however many
    scans there are, one is in memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.body = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - closed by finish
        self.entries: dict[str, Any] = {}

    def add(self, name: str, scan: Path, **tensors: Tensor | None) -> None:
        """Append the tensors of one scan, named after their keywords; None is left out."""
        for part, tensor in tensors.items():
            if tensor is not None:
                start = self.body.tell()
                self.body.write(tensor.contiguous().numpy().astype("<f4", copy=False).tobytes())
                span = [start, self.body.tell()]
                self.entries[f"{name}/{part}"] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": span}

    def finish(self, facts: dict[str, Any]) -> None:
        """Write the file; without any scan there is none."""
        if self.entries:
            metadata = {"format": "pt", "medgmae": json.dumps(facts)}
            header = json.dumps({"__metadata__": metadata, **self.entries}).encode()
            header += b" " * (-len(header) % 8)
            with _replacing(self.path, "wb") as file:
                file.write(struct.pack("<Q", len(header)) + header)
                self.body.seek(0)
                shutil.copyfileobj(self.body, file, 1 << 20)
        self.body.close()


class VectorWriter:
    """A csv or npy file of pooled vectors, one row per scan.

    csv: columns name, path, f0, f1 ... with 9 digits, which is exact for float32. npy: an array (n, F) of float32, and
    the facts, names and paths in the same order, in a .json beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.scans: list[str] = []
        self.vectors: list[Tensor] = []

    def add(self, name: str, scan: Path, **tensors: Tensor | None) -> None:
        """Append the ``pooled`` vector of one scan."""
        vector = tensors["pooled"]
        assert vector is not None
        self.names.append(name)
        self.scans.append(str(scan))
        self.vectors.append(vector)

    def finish(self, facts: dict[str, Any]) -> None:
        """Write the file; without any scan there is none."""
        if self.vectors and self.path.suffix.lower() == ".csv":
            self._write_csv()
        elif self.vectors:
            self._write_npy(facts)

    def _write_csv(self) -> None:
        with _replacing(self.path, "w") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(["name", "path", *(f"f{i}" for i in range(len(self.vectors[0])))])
            for name, scan, vector in zip(self.names, self.scans, self.vectors, strict=True):
                lines.writerow([name, scan, *(f"{value:.9g}" for value in vector.tolist())])

    def _write_npy(self, facts: dict[str, Any]) -> None:
        import numpy as np

        with _replacing(self.path, "wb") as file:
            np.save(file, np.stack([vector.numpy() for vector in self.vectors]))
        with _replacing(self.path.with_suffix(".json"), "w") as file:
            json.dump({"names": self.names, "paths": self.scans, **facts}, file, indent=2)


@contextmanager
def _replacing(path: Path, mode: str) -> Iterator[IO[Any]]:
    """A file that takes its name when it is complete, and vanishes when writing fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    options: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with partial.open(mode, **options) as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A short name per path: its stem, or as many of its last parts as set it apart from the others."""
    names = [_stem(path) for path in paths]
    for depth in range(1, 1 + max((len(path.parts) for path in paths), default=0)):
        count = Counter(names)
        names = ["/".join(p.parts[-depth:]) if count[n] > 1 else n for n, p in zip(names, paths, strict=True)]
    return names


def _stem(path: Path) -> str:
    """The file's name without its ending; a folder's name."""
    if path.is_dir():
        return path.name
    return path.name[:-7] if path.name.lower().endswith(".nii.gz") else path.stem
