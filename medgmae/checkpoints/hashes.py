"""Hashes of weight files, computed once and remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from medgmae.checkpoints.cards import WeightsError

_CHUNK = 1 << 22


class HashMismatchError(WeightsError):
    """A file is not the one that its card, or the hub, announced."""


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Our own cache folder: ``cache_dir``, or ``medgmae`` beside the Hugging Face caches (moved by ``HF_HOME``)."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "medgmae"


def file_hashes(path: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Hexadecimal digests of a file, read once for all of ``names`` (``"md5"``, ``"sha256"``)."""
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in names}
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            for digest in digests.values():
                digest.update(buffer[:count])
    return {name: digest.hexdigest() for name, digest in digests.items()}


def check_hashes(path: Path, *, md5: str | None = None, sha256: str | None = None) -> None:
    """Compare a file with the digests it should have; those given as ``None`` are not looked at.

    Raises:
        HashMismatchError: one differs.
    """
    expected = {name: digest for name, digest in (("md5", md5), ("sha256", sha256)) if digest}
    digests = file_hashes(path, tuple(expected))
    for name, digest in expected.items():
        if digests[name] != digest:
            raise HashMismatchError(f"{path}: wrong content: expected {name} {digest}, found {digests[name]}")


def verify(path: Path, *, root: Path, md5: str | None = None, sha256: str | None = None) -> None:
    """:func:`check_hashes`, skipped for a file that passed before and has kept its size and time.

    Args:
        path: the file.
        root: our cache folder, where passes are remembered; if it cannot be written, the next call checks again.
        md5: expected digest or ``None``.
        sha256: expected digest or ``None``.

    Raises:
        HashMismatchError: a digest differs.
    """
    if not (md5 or sha256):
        return
    if _recall(_memo_path(path, root)) != _state(path, md5, sha256):
        check_hashes(path, md5=md5, sha256=sha256)
        remember(path, root=root, md5=md5, sha256=sha256)


def remember(path: Path, *, root: Path, md5: str | None = None, sha256: str | None = None) -> None:
    """Note that a file has these digests, for :func:`verify`; a cache that cannot be written is left alone."""
    memo = _memo_path(path, root)
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=memo.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(_state(path, md5, sha256), stream)
        os.replace(name, memo)


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


def _state(path: Path, md5: str | None, sha256: str | None) -> dict[str, Any]:
    real = path.resolve()
    status = real.stat()
    return {"path": str(real), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "md5": md5, "sha256": sha256}


def _recall(memo: Path) -> Any:
    try:
        return json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
