"""Hashes of weight files, computed once and remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medgmae.checkpoints.cards import WeightsError

Digests = Mapping[str, str]
"""Hexadecimal digests by name: ``"md5"``, ``"sha256"``, ``"git"``."""

_NAMES = ("md5", "sha256", "git")
_CHUNK = 1 << 22


class HashMismatchError(WeightsError):
    """A file is not the one that its card, or the hub, announced."""


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Our own cache folder: ``cache_dir``, or ``medgmae`` beside the Hugging Face caches (moved by ``HF_HOME``)."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "medgmae"


def file_hashes(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Hexadecimal digests of a file, read once for all of ``names``.

    ``"md5"`` and ``"sha256"`` are as usual; ``"git"`` is the hash that git, and so the hub, gives to a small file.
    """
    digests = {name: hashlib.new("sha1" if name == "git" else name, usedforsecurity=False) for name in names}
    if "git" in digests:
        digests["git"].update(b"blob %d\0" % path.stat().st_size)
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            for digest in digests.values():
                digest.update(buffer[:count])
    return {name: digest.hexdigest() for name, digest in digests.items()}


def announced_digests(etag: str) -> Digests:
    """The digest that the hub's name of a content is: sha256 of a large file, git's hash of a small one, or none."""
    etag = etag.lower()
    if re.fullmatch("[0-9a-f]{64}", etag):
        return {"sha256": etag}
    return {"git": etag} if re.fullmatch("[0-9a-f]{40}", etag) else {}


def check_hashes(path: Path, expected: Digests) -> None:
    """Compare a file with the digests it should have.

    Raises:
        HashMismatchError: one differs.
    """
    digests = file_hashes(path, expected)
    for name, digest in expected.items():
        if digests[name] != digest:
            raise HashMismatchError(f"{path}: wrong content: expected {name} {digest}, found {digests[name]}")


def verify(path: Path, expected: Digests, root: Path) -> None:
    """:func:`check_hashes`, skipped for a file that passed before and has kept its size and time.

    Args:
        path: the file.
        expected: digests by name; none are no check.
        root: our cache folder, where passes are remembered; if it cannot be written, the next call checks again.

    Raises:
        HashMismatchError: a digest differs.
    """
    if not expected:
        return
    memo = _recall(_memo_path(path, root))
    passed = memo is not None and memo == _state(path, memo["digests"])
    if not (passed and expected.items() <= remembered(path, root).items()):
        check_hashes(path, expected)
        remember(path, expected, root)


def remember(path: Path, digests: Digests, root: Path) -> None:
    """Note that a file has these digests, for :func:`verify`; a cache that cannot be written is left alone."""
    memo = _memo_path(path, root)
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=memo.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(_state(path, digests), stream)
        os.replace(name, memo)


def remembered(path: Path, root: Path) -> Digests:
    """The digests that a file had when it was last checked, whether it still has them or not."""
    memo = _recall(_memo_path(path, root))
    return {name: digest for name, digest in memo["digests"].items() if name in _NAMES} if memo else {}


def discard(path: Path) -> bool:
    """Remove a bad file, and every link it is reached through, so that the next fetch loads it again.

    Returns:
        False if something could not be removed (a read-only cache).
    """
    chain = [path]
    while chain[-1].is_symlink():
        chain.append(chain[-1].parent / os.readlink(chain[-1]))
    try:
        for link in reversed(chain):
            link.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _memo_path(path: Path, root: Path) -> Path:
    # One small file per weight file: two processes never rewrite each other's entries.
    return root / "verified" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"


def _state(path: Path, digests: Digests) -> dict[str, Any]:
    real = path.resolve()
    status = real.stat()
    return {"path": str(real), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "digests": dict(digests)}


def _recall(memo: Path) -> dict[str, Any] | None:
    try:
        state = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and isinstance(state.get("digests"), dict) else None
