"""SimpleITK at arm's length: imported when first used, kept quiet, and checked where it lets broken headers pass."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .geometry import VolumeError
from .nifti import MAX_BYTES

_log = logging.getLogger("medgmae")
# MetaImage's reader reports these, then hands out what it has.
_FATAL = ("Uncompress failed", "data not read completely")
_lock = threading.RLock()


def simpleitk() -> Any:
    """The module, untyped: its stubs cover a part of it only. The import takes a quarter of a second."""
    import SimpleITK

    return SimpleITK


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what native readers write to file descriptor 2 off the terminal, one reader at a time: it goes to the log.

    Raises:
        VolumeError: the messages say that voxels are missing, although the reader did not fail.
    """
    said = ""
    with _lock, tempfile.TemporaryFile() as capture:
        try:
            saved = os.dup(2)
        except OSError:  # no standard error to protect
            yield
            return
        try:
            os.dup2(capture.fileno(), 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            capture.seek(0)
            said = capture.read().decode("utf-8", "replace").strip()
    if said:
        _log.debug("the reader says: %s", said)
    if any(phrase in said for phrase in _FATAL):
        raise VolumeError(f"the voxels are truncated or broken: {said.splitlines()[0]}")


def reason(error: Exception) -> str:
    """The line of an ITK message that tells something."""
    lines = [
        line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception thrown")
    ]
    return re.sub(r"\(0x[0-9a-f]+\)", "", " ".join(lines[-3:])) or type(error).__name__


_SPACING = re.compile(rb"^\s*(?:ElementSpacing|ElementSize|spacings)\s*[:=]\s*(.+?)\s*$", re.MULTILINE)
_DATA_FILE = re.compile(rb"^\s*(?:ElementDataFile\s*=|data ?file\s*:)\s*(.+?)\s*$", re.MULTILINE)


def _is_spacing(text: str, nrrd: bool) -> bool:
    try:
        # NRRD writes nan for an axis that is not spatial
        return float(text) > 0 or (nrrd and text.lower() == "nan")
    except ValueError:
        return False


def check_text_header(path: Path) -> int:
    """Bytes on disk that hold a MetaImage's or NRRD's voxels.

    SimpleITK takes a negative spacing for its absolute value without a word, so the header's text is looked at here.

    Raises:
        VolumeError: a spacing that is not positive, or a data file that does not exist.
    """
    with path.open("rb") as file:
        start = file.read(1 << 14)
    nrrd, data_file = start[:4] == b"NRRD", _DATA_FILE.search(start)
    end = re.search(rb"\r?\n\r?\n", start) if nrrd else data_file
    header = start[: end.start()] if end else start
    for line in _SPACING.findall(header):
        values = line.decode("ascii", "replace")
        if not all(_is_spacing(value, nrrd) for value in values.split()):
            raise VolumeError(f"the spacing is {values!r} (x, y, z); expected positive numbers")
    own = int(path.stat().st_size)
    named = _DATA_FILE.search(header) if nrrd else data_file  # an attached NRRD names no file
    name = named.group(1).decode("utf-8", "replace") if named else "LOCAL"
    if name.upper() == "LOCAL":
        return own
    if name.startswith("LIST") or "%" in name:  # several files: left to the reader
        return MAX_BYTES
    if not (path.parent / name).is_file():
        raise VolumeError(f"the header names the data file {name!r}, which does not exist beside it")
    return own + int((path.parent / name).stat().st_size)
