"""The text headers of MetaImage and NRRD, looked at before SimpleITK does.

Its readers use the absolute value of a negative spacing without a warning, and crash on some broken fields; what they
parse is therefore checked first. The rest of the two formats is left to them.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from medgmae.data.formats.nifti import MAX_BYTES
from medgmae.data.geometry import VolumeError

_LONGEST = 1 << 16  # bytes: a DICOM dump in a MetaImage header can be long, but not this long
_META_DATA = re.compile(rb"^ElementDataFile[ \t]*=[^\n]*\n", re.MULTILINE)
_BLANK = re.compile(rb"\r?\n\r?\n")
_RANKS = range(1, 6)


def is_text_header(start: bytes) -> bool:
    """Whether a file's first bytes are those of a NRRD or MetaImage header."""
    return start[:4] == b"NRRD" or re.match(rb"\s*(ObjectType|NDims|Comment)\s*=", start) is not None


def _fields(text: bytes, separator: str) -> dict[str, str]:
    if re.search(rb"[^\t\r\n\x20-\x7e\x80-\xff]", text):
        raise VolumeError("the header holds control characters; expected text")
    fields = {}
    for line in text.decode("latin-1").splitlines():
        key, separated, value = line.partition(separator)
        if separated and not line.startswith("#"):
            fields[key.strip().lower()] = value.strip()
    return fields


def _numbers(name: str, text: str, count: int, positive: bool, blank: bool = False) -> None:
    """Raises unless ``text`` is ``count`` finite numbers, positive when so asked; ``blank`` allows nan, NRRD's word
    for none."""
    try:
        values = [float(word) for word in text.split()]
    except ValueError:
        values = []
    valid = [(blank and math.isnan(v)) or (math.isfinite(v) and (v > 0 or not positive)) for v in values]
    if len(values) != count or not all(valid):
        raise VolumeError(
            f"the {name} is {text!r} (x, y, z); expected {count} {'positive' if positive else 'finite'} numbers"
        )


def _rank(name: str, text: str | None) -> int:
    if text is None or not text.isdecimal() or int(text) not in _RANKS:
        raise VolumeError(
            f"the header's {name} is {text!r}; expected a number of axes from {_RANKS[0]} to {_RANKS[-1]}"
        )
    return int(text)


def _check_meta(start: bytes) -> str:
    end = _META_DATA.search(start)
    if not end:
        raise VolumeError(
            "the header has no ElementDataFile line: expected one; the file is truncated, or not a MetaImage"
        )
    fields = _fields(start[: end.end()], "=")
    rank = _rank("NDims", fields.get("ndims"))
    if "dimsize" not in fields or "elementtype" not in fields:
        raise VolumeError("the header has no DimSize or no ElementType; expected both")
    for name in ("dimsize", "elementspacing", "elementsize"):
        if name in fields:
            _numbers("size" if name == "dimsize" else "spacing", fields[name], rank, positive=True)
    for name in ("offset", "position", "origin", "centerofrotation"):
        if name in fields:
            _numbers(name, fields[name], rank, positive=False)
    for name in ("transformmatrix", "rotation", "orientation"):
        if name in fields:
            _numbers(name, fields[name], rank * rank, positive=False)
    _numbers("number of channels", fields.get("elementnumberofchannels", "1"), 1, positive=True)
    return fields["elementdatafile"]


def _check_nrrd(start: bytes) -> str:
    end = _BLANK.search(start)
    fields = _fields(start[: end.start()] if end else start, ":")
    rank = _rank("dimension", fields.get("dimension"))
    _numbers("size", fields.get("sizes", ""), rank, positive=True)
    if "spacings" in fields:
        _numbers("spacing", fields["spacings"], rank, positive=True, blank=True)
    return fields.get("data file", fields.get("datafile", "LOCAL"))


def check_text_header(path: Path) -> int:
    """Bytes on disk that hold the voxels of a MetaImage or NRRD.

    Raises:
        VolumeError: a header that is not text, fields of the wrong length, a spacing that is not positive, or a data
            file that does not exist.
    """
    with path.open("rb") as file:
        start = file.read(_LONGEST)
    name = _check_nrrd(start) if start[:4] == b"NRRD" else _check_meta(start)
    own = int(path.stat().st_size)
    if name.upper() == "LOCAL":
        return own
    if name.startswith("LIST") or "%" in name:  # several files: left to the reader
        return MAX_BYTES
    if not (path.parent / name).is_file():
        raise VolumeError(
            f"the header names the data file {name!r}, which does not exist; expected it beside the header"
        )
    return own + int((path.parent / name).stat().st_size)
