"""Arrays of numpy (.npy, .npz), read without numpy's loader, which trusts their headers.

The layout is that of https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html. A header is a Python
literal; it is matched with a pattern, so that nothing in it is evaluated, and only plain numbers have a match.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medgmae.data.formats.headers import LONGEST
from medgmae.data.formats.image import Image, Limits, unread
from medgmae.data.formats.streams import MAX_INFLATION, Stored, regular, settled, target_type
from medgmae.data.geometry import VolumeError

ENDINGS = (".npy", ".npz")
_MAGIC = b"\x93NUMPY"
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_BLOCK = 1 << 18  # voxels that are handled at a time
_ASSUMED = "an array has no geometry: voxels of 1 mm along the axes of the body (LPS) are assumed"
_KEYS = {
    "descr": r"'descr'\s*:\s*'([^']*)'",
    "order": r"'fortran_order'\s*:\s*(True|False)",
    "shape": r"'shape'\s*:\s*\(([\d\s,L]*)\)",
}
_TYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")


class Header(NamedTuple):
    """What the header of an array says: type and shape of its numbers, their order, and the bytes of the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    length: int


def is_array(start: bytes) -> bool:
    """Whether a file's first bytes are those of an .npy or .npz file."""
    return start.startswith((_MAGIC, *_ZIP))


def rank_of_array(path: Path) -> int:
    """The number of axes of the array in a file.

    Raises:
        VolumeError: a file that holds no array, or several.
    """
    with _opened(path) as (file, _):
        return len(_header(file).shape)


def read_array(path: Path, limits: Limits) -> Image:
    """An array (D, H, W) or (C, D, H, W): of an .npy file, the only one of an .npz file, or its "volume".

    Raises:
        VolumeError: another rank, other numbers than integers and floats, a header that does not fit the file.
    """
    with _opened(path) as (file, size):
        header = _header(file)
        shape = header.shape
        if len(shape) not in (3, 4) or 0 in shape:
            raise VolumeError(f"the array has shape {shape}; expected (D, H, W) or (C, D, H, W)")
        channels, d, h, w = (1, *shape) if len(shape) == 3 else shape
        needed = int(np.prod(shape, dtype=object)) * header.dtype.itemsize
        if header.length + needed > size:
            raise VolumeError(
                f"the file is truncated: the array has {size - header.length} bytes; expected {needed} for its shape "
                f"{shape} of {header.dtype}"
            )
        stored = Stored(header.dtype, (channels, d, h, w))
        limits.check(stored.shape, target_type(stored))
        if limits.voxels:
            voxels = _filled(file, stored, header.fortran, len(shape))
        else:
            voxels = unread(stored.shape, target_type(stored))
    more = size - header.length - needed
    notes = [_ASSUMED, *([f"{more} bytes after the array are ignored"] if more else [])]
    return Image(voxels, np.eye(4), channels if channels > 1 else 0, tuple(notes))


def _filled(file: IO[bytes], stored: Stored, fortran: bool, rank: int) -> NDArray[Any]:
    """The voxels (C, D, H, W) that follow in a file."""
    flat = np.empty(int(np.prod(stored.shape)), target_type(stored))
    for first in range(0, len(flat), _BLOCK):
        count = min(_BLOCK, len(flat) - first)
        content = file.read(count * stored.dtype.itemsize)
        if len(content) < count * stored.dtype.itemsize:
            raise VolumeError(f"the file is truncated: the array ends within its numbers, after {first} of {len(flat)}")
        flat[first : first + count] = settled(np.frombuffer(content, stored.dtype), stored)
    if file.read(1) and isinstance(file, zipfile.ZipExtFile):  # the checksum is looked at where a member ends
        raise VolumeError("the archive goes on after the array; expected one array per member")
    if not fortran:
        return flat.reshape(stored.shape)
    spatial = stored.shape[4 - rank :]
    return np.ascontiguousarray(flat.reshape(spatial[::-1]).T).reshape(stored.shape)


def _header(file: IO[bytes]) -> Header:
    """The header at the start of an array; the file is then at its numbers."""
    start = file.read(8)
    if start[:6] != _MAGIC:
        raise VolumeError(f"the array starts with {start!r}; expected an .npy file")
    width = {1: 2, 2: 4}.get(start[6] if len(start) == 8 else 0)
    if width is None:
        raise VolumeError(f"the array is of version {start[6:]!r} of the format; expected 1 or 2, as of plain numbers")
    length = int.from_bytes(file.read(width), "little")
    if length > LONGEST:
        raise VolumeError(f"the array's header has {length} bytes; expected at most {LONGEST}")
    content = file.read(length)
    text = content.decode("latin1").strip()
    values = {}
    rest = text.replace('"', "'")
    for key, pattern in _KEYS.items():
        if (match := re.search(pattern, rest)) is None:
            raise VolumeError(
                f"the array's header is {text[:200]!r}; expected plain numbers, with 'descr', 'fortran_order' and "
                "'shape' (objects and records are not voxels)"
            )
        values[key], rest = match[1], rest[: match.start()] + rest[match.end() :]
    sizes = [one.strip().removesuffix("L") for one in values["shape"].split(",") if one.strip()]
    whole = all(re.fullmatch(r"\d{1,18}", one) for one in sizes)
    if len(content) < length or not re.fullmatch(r"\{[\s,]*\}", rest) or not whole:
        raise VolumeError(f"the array's header is {text[:200]!r}, which is broken; expected one that numpy writes")
    if not _TYPE.fullmatch(values["descr"]):
        raise VolumeError(f"the array's numbers are {values['descr']!r}; expected integers, floats or bool")
    kind = values["descr"].replace("b1", "u1")  # bytes of 0 and 1
    return Header(np.dtype(kind), tuple(map(int, sizes)), values["order"] == "True", 8 + width + length)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The bytes of the array in a file, and how many they are.

    Raises:
        VolumeError: an archive without one array that is meant, or one that is broken.
    """
    size = regular(path).st_size
    with path.open("rb") as file:
        if file.read(4) not in _ZIP:
            file.seek(0)
            yield file, size
            return
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as archive:
                member = _chosen(archive)
                with archive.open(member) as content:
                    yield content, member.file_size
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error) as error:
            raise VolumeError(f"the archive is broken ({error}); expected an intact .npz file") from None


def _chosen(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The array of an archive that is meant."""
    arrays = {one.filename.removesuffix(".npy"): one for one in archive.infolist() if one.filename.endswith(".npy")}
    member = arrays.get("volume") or (next(iter(arrays.values())) if len(arrays) == 1 else None)
    if member is None:
        names = ", ".join(list(arrays)[:8]) or "none"
        more = f" and {len(arrays) - 8} more" if len(arrays) > 8 else ""
        raise VolumeError(
            f"the archive holds the arrays: {names}{more}; expected one, or one named volume: "
            "numpy.savez(file, volume=array)"
        )
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise VolumeError(f"{member.filename} is encrypted or packed otherwise than numpy does; expected savez")
    if member.file_size > MAX_INFLATION * member.compress_size + 1024:
        raise VolumeError(
            f"the archive claims {member.file_size} bytes of {member.filename}, more than {member.compress_size} "
            "zipped bytes can hold; expected a size that fits the file"
        )
    return member
