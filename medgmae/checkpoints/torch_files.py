"""Files of ``torch.save``, both layouts: what they hold, and tensors whose values are mapped from the file.

A tensor is a view of the file's own bytes, private to this process: what is written to it stays in memory.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.formats import begins_as_text, foreign_zip
from medgmae.checkpoints.meanings import DamagedError, Described, ForeignError, Storage
from medgmae.checkpoints.pickles import MAX_BYTES, ForbiddenError, read_pickle

# The directory of a zip file: 60,000 tensors take 4 MB.
MAX_DIRECTORY = 4 << 20

MAX_DIMENSIONS = 16

_BIG_ENDIAN = "its bytes are not in little-endian order; save it again on a machine with the usual order"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class Place(NamedTuple):
    """Where in the file the bytes of a storage are."""

    start: int
    size: int


class TorchFile:
    """What a file holds.

    Args:
        content: its pickle as plain data, see :mod:`medgmae.checkpoints.pickles`.
        memory: the file's bytes.
        places: key of a storage to its place.
    """

    def __init__(self, content: Any, memory: mmap.mmap, places: dict[str, Place]) -> None:
        self.content = content
        self._memory, self._places = memory, places
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def tensor(self, described: Described) -> Tensor | str:
        """The tensor of a description, or why it cannot be had."""
        if described.refused:
            return described.refused
        sizes = (*described.size, *described.stride) if _are_tuples(described.size, described.stride) else (None,)
        if len(sizes) > 2 * MAX_DIMENSIONS or not all(type(n) is int for n in (*sizes, described.offset)):
            return "of an impossible shape; fetch the file again"
        if not isinstance(described.storage, Storage) or not isinstance(described.dtype, torch.dtype):
            return "without values or a known dtype"
        storage, dtype = described.storage, described.dtype
        place = self._places.get(storage.key)
        if place is None:
            return "not in the file, though its name is; fetch the file again"
        if place.size != storage.values * storage.dtype.itemsize or place.size % dtype.itemsize:
            return f"{place.size} bytes in the file, expected {storage.values} x {storage.dtype}; fetch the file again"
        try:
            if math.prod(described.size) == 0:
                return torch.empty(described.size, dtype=dtype)
            return self._values(storage.key, dtype).as_strided(described.size, described.stride, described.offset)
        except (RuntimeError, ValueError, TypeError, OverflowError):
            return "larger than its place in the file; fetch the file again"

    def _values(self, key: str, dtype: torch.dtype) -> Tensor:
        """All values of a storage, (n,)."""
        if (key, dtype) not in self._flat:
            start, size = self._places[key]
            if start % dtype.itemsize:  # as in the legacy layout: not where a processor wants numbers to be
                flat = torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=start).clone().view(dtype)
            else:
                flat = torch.frombuffer(self._memory, dtype=dtype, count=size // dtype.itemsize, offset=start)
            self._flat[key, dtype] = flat
        return self._flat[key, dtype]


def _are_tuples(*values: Any) -> bool:
    return all(isinstance(value, (tuple, list)) for value in values)


def read_torch_file(path: Path) -> TorchFile:
    """Read a file of ``torch.save`` without running anything in it.

    Raises:
        WeightsError: it is no such file, damaged, or names objects that are not read.
    """
    text = ""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise DamagedError("the file is empty")
            text = begins_as_text(file.read(60))
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            zipped = memory[:4] == b"PK\x03\x04"
            return _read_zip(file, memory) if zipped else _read_legacy(memory)
    except ForbiddenError as error:
        raise WeightsError(
            f"{path}: refused, because it holds objects that run code when they are read: {error}. "
            "Only tensors, plain containers, argparse.Namespace and numpy scalars are read. If you trust the "
            "file, open it yourself, keep the state dictionary and save that with torch.save"
        ) from error
    except ForeignError as error:
        raise WeightsError(f"{path}: {error}") from error
    except OSError as error:
        raise WeightsError(f"{path}: cannot be mapped into memory ({error.strerror or error})") from error
    except Exception as error:  # zipfile, mmap and struct raise over ten kinds for damaged files
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        first = f"it is text, which begins with {text!r}" if text else first
        raise WeightsError(f"{path}: cannot be read as a PyTorch checkpoint ({first}); fetch it again") from error


def _read_zip(file: BinaryIO, memory: mmap.mmap) -> TorchFile:
    _check_directory_size(memory)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise DamagedError("two entries have one name")
        if what := foreign_zip(entries):
            raise ForeignError(what)
        roots = [
            name.removesuffix("/data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(roots) != 1:
            raise DamagedError(f"expected one entry data.pkl, found {len(roots)}")
        root = roots[0]
        order = entries.get(f"{root}/byteorder")
        places = {name: _place(memory, entry) for name, entry in entries.items()}
        if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):  # compares the checksum
            raise ForeignError(_BIG_ENDIAN)
        pickle = entries[f"{root}/data.pkl"]
        if pickle.file_size > MAX_BYTES:
            raise DamagedError(f"its pickle has {pickle.file_size} bytes, a checkpoint's has less than {MAX_BYTES}")
        content = read_pickle(io.BytesIO(archive.read(pickle))).content
    start = f"{root}/data/"
    return TorchFile(content, memory, {n.removeprefix(start): p for n, p in places.items() if n.startswith(start)})


def _check_directory_size(memory: mmap.mmap) -> None:
    """Raise before :mod:`zipfile` builds an object for each of millions of entries.

    torch.save ends its files with the end record, without a comment; in large ones the long form stands before it.
    """
    end = len(memory) - 22
    if end < 0 or memory[end : end + 4] != b"PK\x05\x06" or memory[end + 20 :] != b"\0\0":
        raise DamagedError("it has no end of a zip file: it is cut, or something stands behind it")
    size = struct.unpack("<I", memory[end + 12 : end + 16])[0]
    if end >= 76 and memory[end - 20 : end - 16] == b"PK\x06\x07":
        if struct.unpack("<Q", memory[end - 12 : end - 4])[0] != end - 76:
            raise DamagedError("its directory is not where the file says")
        size = struct.unpack("<Q", memory[end - 36 : end - 28])[0]
    if size > MAX_DIRECTORY:
        raise DamagedError(f"its directory has {size} bytes, a checkpoint's has less than {MAX_DIRECTORY}")


def _place(memory: mmap.mmap, entry: zipfile.ZipInfo) -> Place:
    """Where the bytes of an entry are: the tensors' have no other check, for to sum them is to read them all."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
        raise DamagedError(f"{entry.filename!r} is compressed, which torch.save never does")
    header = memory[entry.header_offset : entry.header_offset + 30]
    name, extra = struct.unpack("<HH", header[26:])
    start = entry.header_offset + 30 + name
    sound = header.startswith(b"PK\x03\x04") and memory[start - name : start] == entry.orig_filename.encode()
    start += extra
    # What follows an entry is its sum, the next one or the directory.
    if not sound or memory[start + entry.file_size : start + entry.file_size + 2] != b"PK":
        raise DamagedError(f"{entry.filename!r} is not where the directory says")
    return Place(start, entry.file_size)


def _read_legacy(memory: mmap.mmap) -> TorchFile:
    """The layout before torch 1.6: five pickles, then the storages as the last one lists them, a count before each."""
    file = io.BytesIO(memory[:MAX_BYTES])
    magic, version, machine = (read_pickle(file, limit=1000).content for _ in range(3))
    if magic != _LEGACY_MAGIC or version != 1001:
        raise DamagedError("it is not a file of torch.save")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ForeignError(_BIG_ENDIAN)
    pickled, keys = read_pickle(file), read_pickle(file).content
    if not isinstance(keys, list) or not all(type(key) is str and key in pickled.storages for key in keys):
        raise DamagedError("its list of storages is not that of its tensors")
    places, start = {}, file.tell()
    for key in keys:
        storage = pickled.storages[key]
        place = Place(start + 8, storage.values * storage.dtype.itemsize)
        if memory[start : start + 8] != struct.pack("<q", storage.values) or place.start + place.size > len(memory):
            raise DamagedError("the values of its tensors are cut or not where they should be")
        places[key] = place
        start = place.start + place.size
    return TorchFile(pickled.content, memory, places)
