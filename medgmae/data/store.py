"""Prepared volumes on disk: one Blosc2 file each, of which a crop decodes only the blocks that it touches.

A file NAME.b2nd is a Blosc2 array (C, D, H, W) of float16 or float32; its variable-length metadata hold ``"medgmae"``,
facts as JSON, and ``"foreground"``, the table that crops are centred by. ``prepared.json`` beside them lists the
volumes in order, and is written when all are there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from medgmae._version import __version__
from medgmae.data.foreground import ForegroundTable
from medgmae.data.geometry import Grid, VolumeError
from medgmae.data.volume import Volume

TABLE = "prepared.json"
SUFFIX = ".b2nd"
WRITING = ".writing"
DTYPES = ("float16", "float32")
_FORMAT = 1
_FACTS, _FOREGROUND = "medgmae", "foreground"
_CHUNK_BYTES = 6 << 20
_BLOCK_BYTES = 32 << 10  # decoded block and coder's tables stay in a core's cache
_OPEN_FILES = 64  # per process
_AGAIN = "prepare the folder again; what is whole is kept"


def blosc2_module() -> Any:
    """Blosc2, which is optional.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import blosc2
    except ImportError as error:
        raise ImportError(
            "prepared volumes need Blosc2, which is not installed: pip install 'medgmae[train]'"
        ) from error
    return blosc2


@dataclass(frozen=True)
class PreparedScan:
    """One prepared volume; the file is opened when it is read, in whichever process.

    Attributes:
        path: the Blosc2 file.
        name: the scan's own.
        source: the file or folder that it was made of, for messages.
        grid: where its voxels lie.
        channels: C.
        labels: what the listing said of the scan.
        bytes: size of the file.
        foreground: share of foreground voxels, 0 to 1.
    """

    path: Path
    name: str
    source: str
    grid: Grid
    channels: int
    labels: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    foreground: float = 0.0

    @property
    def size(self) -> tuple[int, int, int]:
        """Voxels (d, h, w)."""
        return self.grid.size

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between voxel centres (d, h, w)."""
        return self.grid.spacing

    def read(self, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """Voxels (C, *size) in float32 from voxel ``start`` (d, h, w) on.

        Raises:
            VolumeError: a part that reaches beyond the volume, or a file that is missing, cut off or damaged.
        """
        ends = [s + n for s, n in zip(start, size, strict=True)]
        if any(s < 0 or n < 1 or e > m for s, n, e, m in zip(start, size, ends, self.size, strict=True)):
            raise VolumeError(
                f"{self.path}: the part from {tuple(start)} of {tuple(size)} voxels reaches beyond the volume, which "
                f"has {self.size}"
            )
        array = _array_of(self.path, self.bytes)
        voxels = np.empty((self.channels, *size), array.dtype)
        try:
            array.get_slice_numpy(voxels, ((0, *start), (self.channels, *ends)))
        except (RuntimeError, ValueError) as error:
            raise VolumeError(f"{self.path}: damaged, its voxels cannot be decoded ({error}); {_AGAIN}") from None
        return torch.from_numpy(voxels).float()

    def volume(self) -> Volume:
        """All of it, with its geometry.

        Raises:
            VolumeError: a file that is missing, cut off or damaged.
        """
        return Volume(self.read((0, 0, 0), self.size), self.grid, self.source)

    def foreground_table(self) -> ForegroundTable:
        """Where its foreground is.

        Raises:
            VolumeError: a file that is missing, cut off or damaged.
        """
        array = _array_of(self.path, self.bytes)
        return ForegroundTable.from_bytes(array.schunk.vlmeta[_FOREGROUND], self.size)


@dataclass(frozen=True)
class PreparedFolder:
    """Prepared volumes.

    Attributes:
        folder: where they are.
        input: the input block that they were prepared by.
        scans: the volumes, in the order in which they were listed.
        dtype: ``"float16"`` or ``"float32"``.
        broken: path and error of scans that were skipped.
    """

    folder: Path
    input: dict[str, Any]
    scans: list[PreparedScan]
    dtype: str = "float16"
    broken: list[tuple[str, str]] = field(default_factory=list)


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether this is a folder of prepared volumes, complete."""
    return (Path(path) / TABLE).is_file()


def open_prepared(folder: str | os.PathLike[str]) -> PreparedFolder:
    """The volumes of a folder that was prepared; their files are looked at, not read.

    Raises:
        VolumeError: no such folder, one that is not complete, or a volume that is missing or cut off.
    """
    folder = Path(folder)
    try:
        table = json.loads((folder / TABLE).read_bytes())
        if table["format"] != _FORMAT:
            raise VolumeError(
                f"{folder / TABLE}: format {table['format']!r}; expected {_FORMAT}: prepare the scans again, or "
                "use the version of medgmae that did"
            )
        scans = [_scan_of(folder, row) for row in table["scans"]]
        broken = [(one["path"], one["error"]) for one in table["broken"]]
        opened = PreparedFolder(folder, table["input"], scans, table["dtype"], broken)
    except FileNotFoundError:
        state = "no such folder" if not folder.is_dir() else f"has no {TABLE}: not prepared, or not to its end"
        raise VolumeError(f"{folder}: {state}; expected a folder that prepare_scans has completed") from None
    except OSError as error:
        raise VolumeError(f"{folder / TABLE}: cannot be read: {error.strerror or error}") from None
    except VolumeError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise VolumeError(f"{folder / TABLE}: damaged ({type(error).__name__}: {error}); {_AGAIN}") from None
    for scan in opened.scans:
        _status(scan.path, scan.bytes)
    return opened


class Facts(NamedTuple):
    """What a file says of itself: the scan, and what it was made of and how."""

    scan: PreparedScan
    origin: dict[str, Any]


def read_facts(path: Path) -> Facts:
    """The facts of one file.

    Raises:
        VolumeError: a file that is missing, cut off, damaged or of something else.
    """
    array, size = _array_of(path), _status(path).st_size
    try:
        facts = json.loads(array.schunk.vlmeta[_FACTS])
        return Facts(_scan_of(path.parent, {**facts["scan"], "file": path.name, "bytes": size}), facts["origin"])
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise VolumeError(f"{path}: no facts of a prepared volume in it ({error!r}); {_AGAIN}") from None


def write_prepared(
    path: Path,
    volume: Volume,
    table: ForegroundTable,
    about: Mapping[str, Any],
    *,
    dtype: str,
    crop: Sequence[int],
    threads: int,
) -> PreparedScan:
    """Write one volume, whole or not at all; ``about`` has ``name``, ``labels``, ``source`` and ``origin``.

    Raises:
        VolumeError: voxels that the type cannot hold.
        OSError: the disk is full, or cannot be written.
    """
    blosc2 = blosc2_module()
    largest = float(volume.data.abs().max())
    most = float(np.finfo(dtype).max)
    if largest > most:
        raise VolumeError(
            f"{volume.source}: voxels reach {largest:.4g}, beyond {dtype} ({most:.4g}); prepare with "
            'dtype="float32", or with a window'
        )
    voxels = volume.data.numpy().astype(dtype, order="C")
    chunks, blocks = partition(voxels.shape, crop, voxels.itemsize)
    array = blosc2.asarray(voxels, chunks=chunks, blocks=blocks, cparams=_compression(blosc2, threads))
    share = float(table.counts.sum(dtype=np.int64)) / math.prod(volume.size)
    scan = PreparedScan(
        path, about["name"], about["source"], volume.grid, volume.channels, dict(about["labels"]), foreground=share
    )
    facts = {"medgmae": __version__, "scan": _row_of(scan), "origin": about["origin"]}
    array.schunk.vlmeta[_FACTS] = json.dumps(facts)
    array.schunk.vlmeta[_FOREGROUND] = table.to_bytes()
    content: bytes = array.to_cframe()
    write_whole(path, content)
    return replace(scan, bytes=len(content))


def write_table(prepared: PreparedFolder) -> None:
    """Write ``prepared.json``, which makes the folder complete."""
    table = {
        "format": _FORMAT,
        "medgmae": __version__,
        "input": prepared.input,
        "dtype": prepared.dtype,
        "scans": [_row_of(scan) for scan in prepared.scans],
        "broken": [{"path": path, "error": error} for path, error in prepared.broken],
    }
    write_whole(prepared.folder / TABLE, json.dumps(table, indent=1).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and through to the disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{WRITING}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def digest_of(input: Mapping[str, Any], dtype: str) -> str:
    """What tells volumes that were prepared one way from those of another."""
    return hashlib.sha256(json.dumps([_floats(input), dtype], sort_keys=True).encode()).hexdigest()[:16]


def _floats(value: Any) -> Any:
    """A block with 1 and 1.0, and lists and tuples, alike."""
    if isinstance(value, Mapping):
        return {key: _floats(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_floats(one) for one in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def partition(shape: Sequence[int], crop: Sequence[int], itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunks and blocks (C, D, H, W) for crops of about this size.

    A block is what is decoded, whole: it grows along the axis of which it covers the smallest share of the crop, up to
    32 KiB, so that it is flat for flat crops, and stays small beside those of 96 and more. A chunk is what the file has
    an index of: the crop in whole blocks, within 6 MiB, as many channels as go in.
    """
    limit = [min(n, m) for n, m in zip(crop, shape[1:], strict=True)]
    block = [1, 1, 1]
    while growing := [axis for axis in range(3) if block[axis] < limit[axis]]:
        axis = min(growing, key=lambda axis: (block[axis] / limit[axis], -axis))
        grown = [min(2 * n, limit[axis]) if k == axis else n for k, n in enumerate(block)]
        if math.prod(grown) * itemsize > _BLOCK_BYTES:
            break
        block = grown
    counts = [-(-m // b) for m, b in zip(limit, block, strict=True)]
    while math.prod(counts) * math.prod(block) * itemsize > _CHUNK_BYTES:
        counts = [-(-n // 2) if n == max(counts) else n for n in counts]
    chunk = [min(c * b, n) for c, b, n in zip(counts, block, shape[1:], strict=True)]
    channels = max(1, min(shape[0], _CHUNK_BYTES // (math.prod(chunk) * itemsize)))
    return (channels, *chunk), (1, *(min(b, c) for b, c in zip(block, chunk, strict=True)))


def _compression(blosc2: Any, threads: int) -> dict[str, Any]:
    """By the measurements in benchmarks/loader.py."""
    return {"codec": blosc2.Codec.LZ4HC, "filters": [blosc2.Filter.SHUFFLE], "clevel": 5, "nthreads": threads}


def _scan_of(folder: Path, row: Mapping[str, Any]) -> PreparedScan:
    grid = Grid(row["size"], row["spacing"], row["origin"], row["direction"])
    path = folder / Path(row["file"]).name  # a table of somebody else names no file elsewhere
    return PreparedScan(
        path, row["name"], row["source"], grid, row["channels"], row["labels"], row["bytes"], row["foreground"]
    )


def _row_of(scan: PreparedScan) -> dict[str, Any]:
    return {
        "file": scan.path.name,
        "name": scan.name,
        "source": scan.source,
        "size": list(scan.size),
        "spacing": list(scan.spacing),
        "origin": list(scan.grid.origin),
        "direction": scan.grid.direction.tolist(),
        "channels": scan.channels,
        "labels": scan.labels,
        "bytes": scan.bytes,
        "foreground": scan.foreground,
    }


def _status(path: Path, expected: int | None = None) -> os.stat_result:
    """The status of a file, whose size is checked where it is known: one that was cut off must not be mapped."""
    try:
        status = path.stat()
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read: {error.strerror or error}; {_AGAIN}") from None
    if expected is not None and status.st_size != expected:
        raise VolumeError(
            f"{path}: has {status.st_size} bytes; expected {expected}: cut off or replaced; remove it and {_AGAIN}"
        )
    return status


def _array_of(path: Path, expected: int | None = None) -> Any:
    """The array of a file, which stays open for the next crop."""
    status = _status(path, expected)
    return _opened(path, status.st_ino, status.st_size, status.st_mtime_ns, os.getpid())


@functools.lru_cache(maxsize=_OPEN_FILES)
def _opened(path: Path, *state: int) -> Any:
    """The array of a file, mapped where the platform can; ``state`` tells this file from one that has replaced it, and
    this process from one that was forked."""
    blosc2 = blosc2_module()
    mapped = {} if sys.platform == "win32" else {"mmap_mode": "r"}
    try:
        array = blosc2.open(str(path), mode="r", dparams={"nthreads": 1}, **mapped)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise VolumeError(f"{path}: not a Blosc2 file, or damaged ({error}); remove it and {_AGAIN}") from None
    if not isinstance(array, blosc2.NDArray) or array.ndim != 4 or str(array.dtype) not in DTYPES:
        raise VolumeError(f"{path}: no volume (C, D, H, W) of {' or '.join(DTYPES)}; remove it and {_AGAIN}")
    return array
