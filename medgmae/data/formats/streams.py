"""Voxels from files piece by piece, so that no second copy of a scan is in memory, with nothing missing and nothing
invented: a stream that ends early, or whose checksum does not hold, is an error.
"""

from __future__ import annotations

import bz2
import os
import stat
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medgmae.data.formats.image import Limits, named_shape, unread
from medgmae.data.geometry import VolumeError

Packing = Literal["raw", "gzip", "zlib", "bzip2"]
MAX_INFLATION = 1032
"""Deflate cannot shrink data more than this."""

_BLOCK = 1 << 18  # bytes of a file, and voxels, that are handled at a time
_EXTRA = 1 << 20  # bytes that may follow the voxels in a packed file
# torch lacks arithmetic on unsigned types above 8 bits
_WIDER = {"u2": "i4", "u4": "i8", "u8": "i8"}


class Part(NamedTuple):
    """Where voxels lie: from byte ``offset`` of a file on, or of what it holds unpacked; in raw files -1 stands for the
    last bytes."""

    path: Path
    packing: Packing = "raw"
    start: int = 0  # byte of the file at which the packed stream starts
    offset: int = 0
    packed: int | None = None  # bytes of the packed stream, where a header says so
    tail: bool = False  # whether the format has other data after raw voxels


def regular(path: Path) -> os.stat_result:
    """The status of a file.

    Raises:
        VolumeError: a device, a pipe, a socket: reading these may never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise VolumeError(f"{path} is not a regular file (a device, a pipe or a folder?); expected a file on disk")
    return status


def is_gzip(start: bytes) -> bool:
    """Whether a file's first bytes are those of a gzip file."""
    return start[:3] == b"\x1f\x8b\x08"


class Stream:
    """The bytes of one part of a file, unpacked in order."""

    def __init__(self, part: Part) -> None:
        regular(part.path)
        self.part = part
        self.trailing = 0
        """Bytes after the end of the packed stream."""
        self._file = part.path.open("rb")
        self._file.seek(part.start)
        self._member: Any = None  # the decompressor, while it runs
        self._packed = b""  # read, and not yet given to a decompressor
        self._total = 0  # bytes unpacked
        self._ended = False
        self._end = part.start  # byte of the file after the last member that was seen whole

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def fill(self, view: memoryview) -> None:
        """Fills ``view`` with the next bytes.

        Raises:
            VolumeError: the stream ends before, or is broken.
        """
        at = 0
        while at < len(view):
            if self.part.packing == "raw":
                size = self._file.readinto(view[at:])
            else:
                piece = self.unpack(min(len(view) - at, 4 * _BLOCK))
                size = len(piece)
                view[at : at + size] = piece
            if not size:
                raise VolumeError(f"the file is truncated: its voxels end {len(view) - at} bytes too early, or more")
            at += size

    def unpack(self, limit: int) -> bytes:
        """At most ``limit`` bytes, and none only at the end of an intact stream."""
        while not self._ended:
            if self._member is None:
                self._next_member()
                continue
            piece = self._decompress(limit)
            if self._member.eof:
                self._packed, self._member = self._member.unused_data, None
            self._total += len(piece)
            if piece:
                return piece
        return b""

    def _decompress(self, limit: int) -> bytes:
        data, self._packed = self._packed, b""
        if not data and getattr(self._member, "needs_input", True):
            data = getattr(self._member, "unconsumed_tail", b"") or self._file.read(_BLOCK)
            if not data:
                raise VolumeError(
                    f"the file is truncated: its {self.part.packing} stream stops after {self._total} bytes, without "
                    "its end and checksum; expected an intact file"
                )
        try:
            return bytes(self._member.decompress(data, limit))
        except (zlib.error, OSError) as error:
            raise VolumeError(
                f"the {self.part.packing} stream is broken after {self._total} bytes ({error}); expected an intact file"
            ) from None

    def _next_member(self) -> None:
        """Starts the first member of the stream, or the next one if the bytes that follow are one: tools that work in
        parallel write several, some of them empty. Zeros are padding; other bytes are no part of the stream."""
        self._packed += self._file.read(_BLOCK)
        self._end = self._file.tell() - len(self._packed)
        began = self._end > self.part.start
        if began:
            while not self._packed.strip(b"\0") and (more := self._file.read(_BLOCK)):
                self._packed = more
            self._packed = self._packed.lstrip(b"\0")
        magic = {"gzip": b"\x1f\x8b\x08", "bzip2": b"BZh"}.get(self.part.packing)
        if began and (magic is None or not self._packed.startswith(magic)):
            self.trailing = len(self._packed) + os.fstat(self._file.fileno()).st_size - self._file.tell()
            self._ended = True
        elif self.part.packing == "bzip2":
            self._member = bz2.BZ2Decompressor()
        else:
            self._member = zlib.decompressobj(wbits=31 if self.part.packing == "gzip" or is_gzip(self._packed) else 15)

    def finish(self) -> None:
        """Reads what follows the voxels in a packed stream, whose checksum comes last.

        Raises:
            VolumeError: a checksum that is missing or does not hold, far more bytes than the header says, or a packed
                stream of another length than the header says.
        """
        extra = 0
        while self.part.packing != "raw" and (piece := self.unpack(_BLOCK)):
            extra += len(piece)
            if extra > _EXTRA:
                raise VolumeError("the unpacked file goes on long after its voxels; expected those of the header only")
        length = self._end - self.part.start
        if self.part.packed not in (None, length):
            raise VolumeError(
                f"the packed voxels have {length} bytes, and the header says {self.part.packed}; expected "
                "an intact file"
            )


def first_bytes(path: Path, count: int) -> bytes:
    """The first bytes of a file, unpacked if it is a gzip file; fewer if it is shorter."""
    with path.open("rb") as file:
        start = file.read(count)
    if not is_gzip(start):
        return start
    content = b""
    with Stream(Part(path, "gzip")) as stream:
        while len(content) < count and (piece := stream.unpack(count - len(content))):
            content += piece
    return content


def _start(part: Part, needed: int, what: str) -> int:
    """The byte at which ``needed`` raw bytes of a part start, after a look at whether the file can hold ``what``."""
    size = regular(part.path).st_size
    start = size - needed if part.offset < 0 else part.start + part.offset
    if part.packing == "raw" and (start < 0 or start + needed > size):
        raise VolumeError(
            f"the file is truncated: {part.path.name} has {size} bytes, expected {max(start, 0) + needed} for {what} "
            "voxels"
        )
    if part.packing in ("gzip", "zlib") and needed > MAX_INFLATION * size + 1024:
        raise VolumeError(
            f"the header claims {what} voxels, more than {size} zipped bytes can hold; expected a size that fits the "
            "file"
        )
    return start


class Stored(NamedTuple):
    """How voxels are stored: ``channels`` interleaved (fastest) or, by default, one after the other; the true value is
    ``slope * stored + inter``, or what is stored without a scale."""

    dtype: np.dtype[Any]
    shape: tuple[int, int, int, int]  # (C, D, H, W)
    interleaved: bool = False
    scale: tuple[float, float] | None = None


def target_type(stored: Stored) -> np.dtype[Any]:
    """The type in memory."""
    kind = stored.dtype.newbyteorder("=").str[1:]
    return np.dtype("f4" if stored.scale is not None else _WIDER.get(kind, kind))


def scaled(block: NDArray[Any], slope: float, inter: float) -> NDArray[np.float32]:
    """``slope * block + inter``, calculated in double precision.

    Raises:
        VolumeError: finite values that float32 cannot hold.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        exact = block.astype(np.float64)
        finite = np.isfinite(exact)
        exact *= slope
        exact += inter
        single = exact.astype(np.float32)
    if not (np.isfinite(single) | ~finite).all():
        worst = np.abs(exact[finite]).max()
        raise VolumeError(f"voxels reach {worst:.4g} after scaling by {slope:g} and {inter:g}, beyond float32 (3.4e38)")
    return single


def settled(block: NDArray[Any], stored: Stored) -> NDArray[Any]:
    """Stored voxels as what they are in memory."""
    if stored.scale is not None:
        return scaled(block, *stored.scale)
    if stored.dtype.kind == "u" and stored.dtype.itemsize == 8 and block.size and block.max() > np.iinfo(np.int64).max:
        raise VolumeError("the voxels are unsigned 64-bit integers beyond the signed range; expected smaller numbers")
    return block


def read_voxels(parts: Sequence[Part], stored: Stored, limits: Limits) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Voxels (C, D, H, W) of one file, or of several that hold equal shares of them; and what is odd about the files.

    Raises:
        VolumeError: more voxels than allowed, fewer bytes than voxels, or a broken stream.
    """
    target = target_type(stored)
    share = int(np.prod(stored.shape, dtype=object)) // len(parts)
    needed = share * stored.dtype.itemsize
    starts = [_start(part, needed, named_shape(stored.shape)) for part in parts]
    limits.check(stored.shape, target)
    if not limits.voxels:
        return unread(stored.shape, target), ()
    voxels = np.empty(stored.shape, target)
    channels = stored.shape[0]
    flat = voxels.reshape(channels, -1) if stored.interleaved else voxels.reshape(1, -1)
    as_stored = stored.scale is None and target == stored.dtype.newbyteorder("=") and len(flat) == 1
    step = max(1, _BLOCK // len(flat)) * len(flat)
    buffer = np.empty(0 if as_stored else min(step, share), stored.dtype)
    notes = []
    for number, (part, start) in enumerate(zip(parts, starts, strict=True)):
        with Stream(part._replace(start=start) if part.packing == "raw" else part) as stream:
            if part.packing != "raw":
                _skip(stream, part.offset)
            for first in range(number * share, (number + 1) * share, step):
                size = min(step, (number + 1) * share - first)
                if as_stored:
                    stream.fill(flat[0, first : first + size].view(np.uint8).data)
                else:
                    block = buffer[:size]
                    stream.fill(block.view(np.uint8).data)
                    columns = slice(first // len(flat), (first + size) // len(flat))
                    flat[:, columns] = settled(block, stored).reshape(-1, len(flat)).T
            stream.finish()
            more = part.path.stat().st_size - start - needed if part.packing == "raw" and not part.tail else 0
            if more or stream.trailing:
                what = f"the {part.packing} stream" if stream.trailing else "the voxels"
                notes.append(f"{stream.trailing or more} bytes after {what} in {part.path.name} are ignored")
    if as_stored and not stored.dtype.isnative:
        voxels.byteswap(inplace=True)
    return voxels, tuple(notes)


def _skip(stream: Stream, count: int) -> None:
    """Passes over unpacked bytes."""
    while count > 0:
        piece = stream.unpack(min(count, _BLOCK))
        if not piece:
            raise VolumeError("the file is truncated: it ends before its voxels")
        count -= len(piece)
