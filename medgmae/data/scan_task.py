"""One scan on disk to one prepared volume."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from medgmae.data.foreground import ForegroundTable
from medgmae.data.formats.beside import files_of
from medgmae.data.geometry import VolumeError
from medgmae.data.input_block import ends_normalized, padding
from medgmae.data.io import read_volume
from medgmae.data.preparation import Preparation
from medgmae.data.store import SUFFIX, PreparedScan, digest_of, read_facts, write_prepared
from medgmae.data.transforms import crop_or_pad, resample_like
from medgmae.data.volume import Volume

_PIECE = 1 << 22
Source: TypeAlias = "Path | Mapping[str, Path]"


class ListedScan(Protocol):
    """A scan on disk as a listing has it: a file or folder, perhaps one series of it, or with ``source`` a mapping of
    contrasts to files."""

    @property
    def path(self) -> Path:
        """The file or folder."""

    @property
    def series(self) -> str | None:
        """Of a folder, the one series that is meant."""

    @property
    def name(self) -> str:
        """What sets it apart from the others."""

    @property
    def labels(self) -> dict[str, str]:
        """Further columns of the listing."""

    @property
    def files(self) -> tuple[Path, ...] | None:
        """Of a series, its slices, where they are known."""


@dataclass(frozen=True)
class Task:
    """What a worker needs to prepare one scan."""

    path: Path
    source: Source
    series: str | None
    files: tuple[Path, ...] | None
    name: str
    labels: dict[str, str]
    out: Path
    input: dict[str, Any]
    dtype: str
    crop: tuple[int, int, int]
    threads: int

    @property
    def identity(self) -> str:
        """Which scan this is, whatever it holds."""
        parts = [f"{key}={path.absolute()}" for key, path in _contrasts(self.source).items()]
        return "\0".join([self.name, self.series or "", *parts])


def task_of(
    scan: ListedScan, out: Path, input: dict[str, Any], dtype: str, crop: tuple[int, int, int], threads: int
) -> Task:
    """The task of one scan of a listing."""
    path = Path(scan.path)
    source: Source = getattr(scan, "source", path)
    name = scan.name or path.name
    return Task(path, source, scan.series, scan.files, name, dict(scan.labels), out, input, dtype, crop, threads)


def _contrasts(source: Source) -> dict[str, Path]:
    return {"": Path(source)} if isinstance(source, str | os.PathLike) else {k: Path(v) for k, v in source.items()}


def _files(task: Task) -> list[Path]:
    """The files that a scan is made of."""
    if task.files is not None:
        return sorted(task.files)
    found: list[Path] = []
    for path in _contrasts(task.source).values():
        found += sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else files_of(path)
    return found


def state_of(task: Task) -> list[int]:
    """What changes when a scan is replaced: number, bytes and latest time of its files; zeros of one that is gone."""
    try:
        states = [path.stat() for path in _files(task)]
    except OSError:
        return [0, 0, 0]
    return [len(states), sum(one.st_size for one in states), max((one.st_mtime_ns for one in states), default=0)]


def _content(task: Task) -> str:
    """A hash of the bytes of a scan's files."""
    digest = hashlib.blake2b(digest_size=16)
    buffer = memoryview(bytearray(_PIECE))
    for path in _files(task):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    return digest.hexdigest()


def described(scan: PreparedScan, task: Task) -> PreparedScan:
    """A volume that was prepared before, with what the listing says now."""
    return replace(scan, source=str(task.path), labels=task.labels)


def prepare(task: Task) -> PreparedScan:
    """One scan, in whichever process.

    Raises:
        VolumeError: the scan is broken.
        OSError: the volume cannot be written.
    """
    try:
        state, content = state_of(task), _content(task)
        digest = digest_of(task.input, task.dtype)
        path = task.out / f"{_slug(task.name)}-{_key(task.name, content, digest)}{SUFFIX}"
        with contextlib.suppress(VolumeError):
            return described(read_facts(path).scan, task)  # the same content, moved or touched since
        volume, mask = _volume_and_foreground(task)
        if state_of(task) != state:
            raise VolumeError(f"{task.path}: was changed while it was read; expected it to stay as it is")
    except OSError as error:
        raise VolumeError(f"{task.path}: cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise VolumeError(f"{task.path}: preparing it needs more memory than this process gets") from None
    except VolumeError as error:
        text = str(error)
        raise error if str(task.path) in text else VolumeError(f"{task.path}: {text}") from None
    origin = {
        "identity": task.identity,
        "state": state,
        "content": content,
        "digest": digest,
        "input": task.input,
        "dtype": task.dtype,
    }
    about = {"name": task.name, "source": str(task.path), "labels": task.labels, "origin": origin}
    table = ForegroundTable.of(mask)
    return write_prepared(path, volume, table, about, dtype=task.dtype, crop=task.crop, threads=task.threads)


def _volume_and_foreground(task: Task) -> tuple[Volume, NDArray[np.bool_]]:
    """The prepared volume, and where any channel is above its padding before it is normalised: that is where the
    padding of a recipe is background whatever the statistics."""
    block = task.input
    given: Any = task.source
    if task.series is not None:
        given = read_volume(task.path, series=task.series, files=task.files, channels=block["channels"])
    plain = {**block, "normalize": "none"}
    if not ends_normalized(block):  # what follows the normalisation goes by its numbers
        nearest = block["resample"] and {**block["resample"], "interpolation": "nearest"}
        volume = Preparation(block, whole=True)(given)
        mask = _foreground(Preparation({**plain, "resample": nearest}, whole=True)(given), block)
        mask = resample_like(mask, volume, interpolation="nearest")
        return volume, mask.data[0].numpy().astype(bool)
    volume = Preparation(plain, whole=True)(given)
    mask = _foreground(volume, block)
    if block["normalize"] != "none":
        rest = {key: block[key] for key in ("channels", "normalize", "size", "pad", "centering")}
        centre = [step for step in block["crop"] if step == "center"]
        volume = Preparation({**rest, "crop": centre}, whole=True)(volume)
        if volume.size != mask.size:  # "zscore_all" pads short axes
            mask = crop_or_pad(mask, volume.size)
    return volume, mask.data[0].numpy().astype(bool)


def _foreground(volume: Volume, block: dict[str, Any]) -> Volume:
    return volume.with_data((volume.data > padding(block)).any(dim=0, keepdim=True))


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).lstrip(".")[-80:]


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
