"""The files that a scan is made of: a header may name others, which hold its voxels."""

from __future__ import annotations

import re
from pathlib import Path

from medgmae.data.formats.headers import LONGEST
from medgmae.data.formats.nifti import header_of_pair

_NAMED = re.compile(rb"^(?:ElementDataFile[ \t]*=|data ?file[ \t]*:)[ \t]*([^\r\n]+)", re.MULTILINE | re.IGNORECASE)


def files_of(path: Path) -> list[Path]:
    """The files that reading this one reads, as far as they are there: itself, and those that its header names. All
    files beside a header that has a list or a pattern of them."""
    path = header_of_pair(path)
    name = path.name.lower()
    if name.endswith((".hdr", ".hdr.gz")):
        stem = path.name[: -4 if name.endswith(".hdr") else -7]
        beside = [path.with_name(stem + ending) for ending in (".img", ".img.gz", ".IMG", ".IMG.gz")]
    elif name.endswith((".mhd", ".nhdr")):
        with path.open("rb") as file:
            named = _NAMED.search(file.read(LONGEST))
        text = named[1].decode("utf-8", "surrogateescape").strip() if named else ""
        single = "%" not in text and not text.startswith("LIST") and "\0" not in text
        beside = [path.parent / text] if single else list(path.parent.iterdir())
    else:
        beside = []
    return [path, *(one for one in beside if one != path and one.is_file())]
