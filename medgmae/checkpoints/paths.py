"""Paths as users write them: what cannot be one is said at once, with what to write instead."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from medgmae.checkpoints.cards import WeightsError

_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]+):/")


def check_source(source: object) -> None:
    """Raise TypeError for a source of weights that is neither text nor a path."""
    if not isinstance(source, str | os.PathLike) or not isinstance(os.fspath(source), str):
        raise TypeError(
            f"weights are named by text or a path, or given as a dictionary of tensors, got {type(source).__name__}; "
            "of a model pass its state_dict(), of bytes os.fsdecode(...)"
        )


def as_path(place: str | os.PathLike[str]) -> Path:
    """The path that a user means, ``~`` being a home folder.

    Raises:
        TypeError: neither text nor a path of text.
        WeightsError: empty, an address, or a name that no file can have.
    """
    check_source(place)
    text = os.fspath(place)
    shown = text if len(text) <= 200 else f"{text[:200]}..."
    address = _ADDRESS.match(text)
    if address and not os.path.exists(text):
        if address["scheme"].lower() == "file":
            raise WeightsError(f"{shown}: an address, expected a path; leave out 'file://'")
        raise WeightsError(
            f"{shown}: an address, expected a path; download the file and pass its path, or name a repository of the "
            "Hugging Face hub as 'hf-hub:org/repo'"
        )
    if not text or "\0" in text:
        raise WeightsError(f"{shown!r} is not a path; expected that of a file or folder")
    try:
        path = Path(text).expanduser()
        path.stat()
    except RuntimeError as error:
        raise WeightsError(f"{shown}: no such home folder; write the path in full") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise WeightsError(f"{shown}: {len(text)} characters are too long for a path; check it") from error
    return path
