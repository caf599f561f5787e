"""Names of files as text that every output can hold, and back; short names that set scans apart."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

# What the names of scan files end in; DICOM files are known by their content.
SCAN_ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr", ".mgz", ".mgh", ".mgh.gz", ".hdr", ".hdr.gz")


def shown(path: str | os.PathLike[str], keep: str = "") -> str:
    """A path as text: bytes that are not UTF-8 and control characters, but for those in ``keep``, as ``\\xNN``.

    A name that holds such a text itself has its backslash as ``\\x5c``, so that :func:`path_of` always finds back.
    """
    text = re.sub(r"\\(?=x[0-9a-f]{2})", r"\\x5c", os.fspath(path))
    return "".join(_escaped(one) if one not in keep else one for one in text)


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp"):
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def path_of(text: str) -> Path:
    """The path that :func:`shown` gave as this text."""
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), os.fsencode(text))
    return Path(os.fsdecode(raw))


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A short name per path: its stem, or as many of its last parts as set it apart from the others."""
    names = [_stem(path) for path in paths]
    for depth in range(1, 1 + max((len(path.parts) for path in paths), default=0)):
        count = Counter(names)
        if len(count) == len(names):
            break
        names = ["/".join(p.parts[-depth:]) if count[n] > 1 else n for n, p in zip(names, paths, strict=True)]
    seen: Counter[str] = Counter()
    for i, name in enumerate(names):  # a series, and a folder of its name beside it
        seen[name] += 1
        while seen[name] > 1 and f"{name}#{seen[name]}" in names:
            seen[name] += 1
        names[i] = f"{name}#{seen[name]}" if seen[name] > 1 else name
    return [shown(name) for name in names]


def _stem(path: Path) -> str:
    """The file's name without the ending of a scan; a folder's name, and that of a series."""
    for ending in (*SCAN_ENDINGS, ".dcm", ".ima", ".npy", ".npz"):
        if path.name.lower().endswith(ending) and len(path.name) > len(ending):
            return path.name[: -len(ending)]
    return path.name
