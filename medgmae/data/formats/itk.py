"""SimpleITK: imported when first used, kept quiet, and checked where it accepts broken files."""

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

from medgmae.data.geometry import VolumeError

_log = logging.getLogger("medgmae")
# MetaImage's reader reports these, then returns what it has.
_FATAL = ("Uncompress failed", "data not read completely")
_WRITABLE = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd")
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
    messages = ""
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
            messages = capture.read().decode("utf-8", "replace").strip()
    if messages:
        _log.debug("the reader says: %s", messages)
    if any(phrase in messages for phrase in _FATAL):
        raise VolumeError(f"the voxels are truncated or broken ({messages.splitlines()[0]}); expected an intact file")


def reason(error: Exception) -> str:
    """The informative lines of an ITK message."""
    lines = [
        line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception thrown")
    ]
    return re.sub(r"\(0x[0-9a-f]+\)", "", " ".join(lines[-3:])) or type(error).__name__


def named(path: Path) -> str:
    """A path as SimpleITK takes it, which ends the process over a name that is not UTF-8.

    Raises:
        VolumeError: such a name.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise VolumeError(
            f"{path}: SimpleITK, which this file is for, takes names in UTF-8 only; rename it, or use NIfTI, whose "
            "names are free"
        ) from None
    return str(path)


def write_image(image: Any, path: Path) -> None:
    """Writes a ``SimpleITK.Image`` in the format of the suffix, compressed but for ``.nii`` and ``.mhd``.

    Raises:
        VolumeError: an unknown suffix, a folder that does not exist, or a file that cannot be written.
    """
    if not path.name.lower().endswith(_WRITABLE):
        raise VolumeError(f"{path}: unknown suffix; expected one of {', '.join(_WRITABLE)}")
    if not path.parent.is_dir():
        raise VolumeError(f"{path}: the folder {path.parent} does not exist")
    try:
        with quiet():
            simpleitk().WriteImage(image, named(path), useCompression=path.suffix.lower() not in (".nii", ".mhd"))
    except RuntimeError as error:
        raise VolumeError(f"{path}: cannot be written: {reason(error)}") from None
