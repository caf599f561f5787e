"""The data elements of one DICOM file: enough of PS3.5 to know what a slice is, where it lies, and its pixels.

Headers are read here, with every length checked against the file, so that a slice that is cut off, or whose pixels are
fewer than its rows and columns, is seen as such. Pixels that are compressed are left to pydicom.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from medgmae.data.formats.streams import regular
from medgmae.data.geometry import VolumeError

IMPLICIT, EXPLICIT, BIG, DEFLATED = (f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".2", ".1.99"))
PIXELS = 0x7FE00010

_LONG_VRS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_SHORT_VRS = {
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS",
    b"ST", b"TM", b"UI", b"UL", b"US",
}  # fmt: skip
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_FRAME_GROUPS = (0x52009229, 0x52009230)  # shared and per-frame functional groups
_MOST_ELEMENTS = 1_000_000  # in a file, those within sequences too: seconds of work
_DEEPEST = 64  # levels of sequences
_LONGEST = 1 << 12  # bytes of a value that is kept
_LARGEST_INFLATED = 1 << 30
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Element(NamedTuple):
    """Tag as one number, value representation (empty where it is implicit), and where the value lies."""

    tag: int
    vr: bytes
    at: int
    length: int


class Dataset(NamedTuple):
    """A file's elements of the top level, up to the pixels.

    Attributes:
        syntax: UID of the transfer syntax.
        values: short values by tag.
        pixels: the element with the pixels, or ``None``.
        framed: whether functional groups were seen, those of an enhanced multi-frame image.
    """

    path: Path
    syntax: str
    values: dict[int, bytes]
    pixels: Element | None
    framed: bool

    def text(self, tag: int) -> str:
        """The value of an element of text; empty when there is none."""
        return self.values.get(tag, b"").decode("latin-1").strip("\0 ")

    def numbers(self, tag: int, count: int) -> list[float] | None:
        """The ``count`` finite decimal numbers of an element, or ``None`` when it is missing, empty or anything
        else."""
        words = [word.strip() for word in self.text(tag).split("\\")]
        if len(words) != count or not all(map(_DECIMAL.fullmatch, words)):
            return None
        values = [float(word) for word in words]
        return values if all(map(math.isfinite, values)) else None

    def whole(self, tag: int, missing: int | None = None) -> int:
        """The value of an element of one unsigned 16-bit number.

        Raises:
            VolumeError: none there, and no value for that; or another length.
        """
        value = self.values.get(tag)
        if not value and missing is not None:
            return missing
        if value is None or len(value) != 2:
            raise VolumeError(
                f"{self.path}: cannot be read as a DICOM image: element {_name(tag)} is missing or broken"
            )
        return int.from_bytes(value, "big" if self.syntax == BIG else "little")


def _name(tag: int) -> str:
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


class _Walk:
    """Reads elements one after the other, and refuses what reaches beyond the file."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self.file, self.end, self.count = file, end, 0

    def next(self, explicit: bool, order: str) -> Element | None:
        """The next element, its value not yet read; ``None`` at the end of the file."""
        self.count += 1
        if self.count > _MOST_ELEMENTS:
            raise VolumeError(f"the file has more than {_MOST_ELEMENTS} elements; expected an image")
        head = self.file.read(8)
        if not head:
            return None
        if len(head) < 8:
            raise VolumeError("the file is cut off within an element")
        group, number = struct.unpack(order + "HH", head[:4])
        tag, vr = group << 16 | number, b""
        if group == 0xFFFE or not explicit:
            length = struct.unpack(order + "I", head[4:])[0]
        else:
            vr = head[4:6]
            if vr in _SHORT_VRS:
                length = struct.unpack(order + "H", head[6:])[0]
            elif vr in _LONG_VRS:
                length = int.from_bytes(self.file.read(4), "big" if order == ">" else "little")
            else:
                raise VolumeError(f"element {_name(tag)} has the unknown value representation {vr!r}")
        at = self.file.tell()
        if length != _UNDEFINED and at + length > self.end:
            raise VolumeError(
                f"the file is cut off: element {_name(tag)} has {length} bytes, and {max(0, self.end - at)} are left"
            )
        return Element(tag, vr, at, length)

    def group(self) -> int:
        """The group of the next element, little endian, which is not read yet."""
        here = self.file.tell()
        group = int.from_bytes(self.file.read(2), "little")
        self.file.seek(here)
        return group

    def skip(self, element: Element, explicit: bool, order: str) -> None:
        """Passes over a value; one of undefined length is walked through to its end."""
        if element.length != _UNDEFINED:
            self.file.seek(element.at + element.length)
            return
        if explicit and element.vr not in (b"SQ", b"UN"):
            raise VolumeError(f"element {_name(element.tag)} has no length; expected one")
        # what a sequence of unknown representation holds is implicit
        levels = [(_SEQUENCE_END, explicit and element.vr == b"SQ")]
        while levels:
            inner = self.next(levels[-1][1], order)
            if inner is None or len(levels) > _DEEPEST:
                raise VolumeError(f"the sequence {_name(element.tag)} does not end, or is nested too deeply")
            if inner.tag == levels[-1][0]:
                levels.pop()
            elif inner.tag == _ITEM and levels[-1][0] == _SEQUENCE_END:
                if inner.length == _UNDEFINED:
                    levels.append((_ITEM_END, levels[-1][1]))
                else:
                    self.file.seek(inner.at + inner.length)
            elif inner.tag >> 16 == 0xFFFE or levels[-1][0] == _SEQUENCE_END:
                raise VolumeError(f"the sequence {_name(element.tag)} holds {_name(inner.tag)}; expected an item")
            elif inner.length == _UNDEFINED:
                levels.append((_SEQUENCE_END, levels[-1][1] and inner.vr == b"SQ"))
            else:
                self.file.seek(inner.at + inner.length)


def has_prefix(path: Path) -> bool:
    """Whether a file starts as DICOM part 10 files do."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _meta(walk: _Walk) -> dict[int, bytes]:
    """The elements of group 2, which are always explicit and little endian."""
    values: dict[int, bytes] = {}
    walk.file.seek(132)
    while walk.group() == 2 and (element := walk.next(explicit=True, order="<")) is not None:
        if element.length == _UNDEFINED or element.tag in values:
            raise VolumeError(f"element {_name(element.tag)} has no length, or stands there twice")
        values[element.tag] = walk.file.read(min(element.length, _LONGEST))
        walk.file.seek(element.at + element.length)
    return values


def opened(path: Path, dataset: Dataset | None = None) -> BinaryIO:
    """The bytes that the positions of a data set's elements count in: the file, or what is inflated of it."""
    if dataset is None or dataset.syntax != DEFLATED:
        return path.open("rb")
    with path.open("rb") as file:
        _meta(_Walk(file, regular(path).st_size))
        return _inflated(file)


def _inflated(file: BinaryIO) -> BinaryIO:
    member = zlib.decompressobj(wbits=-15)
    try:
        content = member.decompress(file.read(), _LARGEST_INFLATED)
    except zlib.error as error:
        raise VolumeError(f"the deflated data set is broken: {error}") from None
    if not member.eof:
        raise VolumeError("the deflated data set is cut off, or has more than a gigabyte")
    return io.BytesIO(content)


def _elements(walk: _Walk, explicit: bool, order: str) -> Iterator[Element]:
    """The elements of the top level; the caller may read a value before it asks for the next one."""
    while (element := walk.next(explicit, order)) is not None:
        yield element
        if element.tag == PIXELS:
            return
        walk.skip(element, explicit, order)


def _parse(path: Path) -> Dataset:
    with path.open("rb") as raw:
        if raw.read(132)[128:] != b"DICM":
            raise VolumeError("the file does not start as DICOM files do, with 128 bytes and DICM")
        walk = _Walk(raw, regular(path).st_size)
        meta = _meta(walk)
        syntax = meta.get(0x00020010, b"").decode("latin-1").strip("\0 ")
        if not syntax.startswith("1.2.840.10008.1.2"):
            raise VolumeError(f"the transfer syntax is {syntax or 'missing'}; expected one of the DICOM standard")
        if syntax == DEFLATED:
            content = _inflated(raw)
            end = content.seek(0, io.SEEK_END)
            content.seek(0)
            walk = _Walk(content, end)
        values, pixels, framed = {0x00020002: meta.get(0x00020002, b"")}, None, False
        for element in _elements(walk, syntax != IMPLICIT, ">" if syntax == BIG else "<"):
            if element.tag in values:
                raise VolumeError(f"element {_name(element.tag)} stands there twice")
            if element.tag == PIXELS:
                pixels = element
            elif element.tag in _FRAME_GROUPS:
                framed = True
            elif element.length <= _LONGEST:
                values[element.tag] = walk.file.read(element.length)
                walk.file.seek(element.at)
            else:
                values[element.tag] = b""
        return Dataset(path, syntax, values, pixels, framed)


def read_elements(path: Path) -> Dataset:
    """The elements of a DICOM file.

    Raises:
        VolumeError: the file is cut off, or is not DICOM by its structure.
    """
    try:
        return _parse(path)
    except VolumeError as error:
        raise VolumeError(f"{path}: cannot be read as a DICOM image: {error}; expected an intact file") from None
