"""Text headers of MetaImage and NRRD: their fields, their numbers, and the data files that they name.

Nothing of a header reaches a native reader: SimpleITK's give names of data files to ``sprintf``, fill what is missing
from a compressed stream with what lies in memory, and read any file that a header names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

from medgmae.data.formats.image import Limits
from medgmae.data.formats.streams import regular
from medgmae.data.geometry import VolumeError

LONGEST = 1 << 16
"""Bytes of a header: a DICOM dump in a MetaImage header can be long, but not this long."""

MOST_FILES = 10_000
"""Data files that a header may name."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_PATTERN = re.compile(r"(?P<before>[^%]*)%(?P<width>0[1-9])?d(?P<after>[^%]*?)(?P<range>(\s+-?\d{1,9}){2,4})")


def is_text_header(start: bytes) -> bool:
    """Whether a file's first bytes are those of a NRRD or MetaImage header."""
    return start[:4] == b"NRRD" or re.match(rb"\s*(ObjectType|NDims|Comment)\s*=", start) is not None


def fields_of(lines: Iterable[bytes], separator: str) -> dict[str, str]:
    """The fields of a header by their name in lower case.

    Raises:
        VolumeError: bytes that are no text, or a field that stands there twice.
    """
    fields: dict[str, str] = {}
    for line in lines:
        if re.search(rb"[^\t\r\x20-\x7e\x80-\xff]", line):
            raise VolumeError("the header holds control characters; expected text")
        key, separated, value = line.decode("utf-8", "surrogateescape").partition(separator)
        key = key.strip().lower()
        if not separated or line.startswith(b"#"):
            continue
        if key in fields:
            raise VolumeError(f"the header has the field {key!r} twice; expected it once")
        fields[key] = value.strip()
    return fields


def numbers(
    name: str, text: str, count: int, *, positive: bool = False, whole: bool = False, blank: bool = False
) -> list[float]:
    """The ``count`` finite numbers in ``text``; ``blank`` allows nan, NRRD's word for none.

    Raises:
        VolumeError: other words, another count, numbers that are not positive or whole where they must be.
    """
    words = text.split()
    blanks = [blank and word.lower().strip("+-") == "nan" for word in words]
    matched = all(none or _NUMBER.fullmatch(word) for word, none in zip(words, blanks, strict=True))
    values = [float(word) for word in words] if matched else []
    valid = [
        none or (math.isfinite(v) and (v > 0 or not positive) and (v % 1 == 0 or not whole))
        for v, none in zip(values, blanks if matched else [], strict=True)
    ]
    if len(values) != count or not all(valid):
        kind = f"{'positive' if positive else 'finite'} {'whole ' if whole else ''}numbers"
        raise VolumeError(f"the {name} is {text!r} (x, y, z); expected {count} {kind}")
    return values


def whole_numbers(name: str, text: str, count: int) -> list[int]:
    """The ``count`` positive whole numbers in ``text``."""
    return [int(v) for v in numbers(name, text, count, positive=True, whole=True)]


def rank_of(name: str, text: str | None) -> int:
    """The number of axes that a field names."""
    if text is None or text not in ("1", "2", "3", "4", "5"):
        raise VolumeError(f"the header's {name} is {text!r}; expected a number of axes from 1 to 5")
    return int(text)


def spatial_shape(sizes: list[int]) -> tuple[int, int, int, int]:
    """(C, D, H, W) of sizes in file order (x, y, z), or (x, y, z, frames).

    Raises:
        VolumeError: fewer axes, or more that are longer than one voxel.
    """
    shape = " x ".join(map(str, sizes))
    kept = list(sizes)
    while len(kept) > 3 and kept[-1] == 1:
        kept.pop()
    if len(kept) not in (3, 4):
        raise VolumeError(f"the image is {len(kept)}-D, {shape}; expected a 3-D volume")
    return (kept[3] if len(kept) == 4 else 1, kept[2], kept[1], kept[0])


def data_file(header: Path, name: str, limits: Limits) -> Path:
    """The data file that a header names.

    A header comes from somebody else, and could name any file of the machine that reads it, whose content would then be
    passed on as voxels.

    Raises:
        VolumeError: a file that does not exist, is not a regular file, is the header itself, or lies elsewhere than
            beside or below the header, links followed, unless that is allowed.
    """
    path = header.parent / name
    try:
        inside = path.resolve().is_relative_to(header.parent.resolve())
        if not (inside or limits.allow_outside):
            raise VolumeError(
                f"the header names the data file {name!r}, which lies outside its folder; expected it beside or below "
                "the header (if you trust the header: read_volume(..., allow_outside=True))"
            )
        if not path.exists():
            raise VolumeError(
                f"the header names the data file {name!r}, which does not exist; expected it beside the header"
            )
        regular(path)
        if path.samefile(header):
            raise VolumeError("the header names itself as the data file; expected another file, or LOCAL")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links that go round in a circle
        if isinstance(error, VolumeError):
            raise
        raise VolumeError(f"the header names the data file {name!r}, which cannot be opened: {error}") from None
    return path


def numbered_names(text: str, count: int) -> list[str]:
    """The names that ``text`` stands for: a plain ``%d`` or ``%0Nd``, then the first and the last number and the step.

    Raises:
        VolumeError: another pattern, or one that does not stand for ``count`` files.
    """
    match = _PATTERN.fullmatch(text)
    bounds = [int(word) for word in match["range"].split()] if match else []
    first, last, step = (*bounds, 1)[:3] if bounds else (0, 0, 0)
    if match is None or step == 0:
        raise VolumeError(
            f"the header names the data files {text!r}; expected one %d or %0Nd with N from 1 to 9, the first and the "
            "last number, and a step that is not 0"
        )
    if count > MOST_FILES:
        raise VolumeError(f"the header names {count} data files; expected at most {MOST_FILES}")
    span = range(first, last + (1 if step > 0 else -1), step)
    if len(span) != count:
        raise VolumeError(f"the header names {len(span)} data files, {text!r}; expected {count}, one per slice")
    width = int(match["width"] or 0)
    return [f"{match['before']}{number:0{width}d}{match['after']}" for number in span]


def slice_files(header: Path, names: list[str], count: int, limits: Limits) -> list[Path]:
    """The files of single slices.

    Raises:
        VolumeError: more or fewer files than slices, one of them twice, or what :func:`data_file` raises.
    """
    if len(names) != count:
        raise VolumeError(f"the header lists {len(names)} data files; expected {count}, one per slice")
    paths = [data_file(header, name, limits) for name in names]
    if len({path.resolve() for path in paths}) != count:
        raise VolumeError("the header lists a data file twice; expected one file per slice")
    return paths
