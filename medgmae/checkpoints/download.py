"""Download of one file from a plain address: resumed, checked, moved into place whole, by one process at a time."""

from __future__ import annotations

import errno
import http.client
import io
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.hashes import HashMismatchError, check_hashes, discard, remember, verify

TIMEOUT = 30.0  # seconds without a byte from the server
ATTEMPTS = 5
BACKOFF = 1.0  # seconds before the second attempt; doubles with each one after it
_CHUNK = 1 << 18
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_MOVE = "set HF_HOME, or pass cache_dir=, to a folder with room that you may write to"

_log = logging.getLogger("medgmae")


class _Interrupted(Exception):
    """The connection ended before the file did."""


def download(
    url: str,
    target: Path,
    *,
    root: Path,
    md5: str | None,
    sha256: str | None,
    size: int | None,
    progress: bool,
    again: bool = False,
) -> Path:
    """Fetch ``url`` to ``target`` unless a checked copy is there already.

    The bytes gather in ``<target>.part``, which survives an interruption and is continued by the next call.

    Args:
        url: address of the file.
        target: where the file goes.
        root: our cache folder, see :func:`medgmae.checkpoints.hashes.verify`.
        md5: expected digest or ``None``.
        sha256: expected digest or ``None``.
        size: size in bytes, if known.
        progress: show a progress bar.
        again: fetch even if a copy is there, which stays until the new one is whole.

    Raises:
        WeightsError: offline, no connection, refused, disk full, cache not writable, wrong content.
    """
    if not again and _is_there(target, root, md5, sha256):
        return target
    _refuse_offline(url, target)
    from filelock import FileLock

    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        lock.acquire()
    try:
        if again:
            _part(target).unlink(missing_ok=True)
        if again or not _is_there(target, root, md5, sha256):  # another process may have fetched it while we waited
            _fetch(url, target, md5, sha256, size, progress)
            remember(target, root=root, md5=md5, sha256=sha256)
    finally:
        lock.release()
    return target


def _part(target: Path) -> Path:
    """Where the bytes of an unfinished download gather."""
    return target.with_name(target.name + ".part")


@contextmanager
def writing(folder: Path, remedy: str = _MOVE) -> Iterator[None]:
    """Turn an error of the file system into one that says what to do about it."""
    try:
        yield
    except OSError as error:
        raise WeightsError(disk_message(folder, error, remedy)) from error


def disk_message(folder: Path, error: OSError, remedy: str = _MOVE) -> str:
    """What went wrong in ``folder``, and what to do."""
    problem = "the disk is full" if error.errno in _FULL else f"cannot write ({error.strerror or error})"
    return f"{folder}: {problem}; {remedy}"


def _is_there(target: Path, root: Path, md5: str | None, sha256: str | None) -> bool:
    if not target.exists():
        return False
    try:
        verify(target, root=root, md5=md5, sha256=sha256)
    except HashMismatchError as error:
        raise HashMismatchError(f"{error}; {after_discard(target)}") from None
    return True


def after_discard(path: Path) -> str:
    """Remove a bad file and say so."""
    if discard(path):
        return "the file was removed, call again to fetch it anew"
    return "the file could not be removed (read-only cache): delete it, or set HF_HOME to another folder"


def _refuse_offline(url: str, target: Path) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise WeightsError(
            f"{target} should be fetched from {url}, but HF_HUB_OFFLINE is set; unset it once, or copy the file there "
            "from a machine that has it"
        )


def _fetch(url: str, target: Path, md5: str | None, sha256: str | None, size: int | None, progress: bool) -> None:
    part = _part(target)
    resumed = part.exists()
    _stream_all(url, part, target.name, size, progress)
    try:
        check_hashes(part, md5=md5, sha256=sha256)
    except HashMismatchError as error:
        part.unlink()
        if not resumed:
            raise HashMismatchError(f"{error}, from {url}; nothing was kept") from None
        _log.warning("%s does not continue what an earlier download left behind; starting over", url)
        _fetch(url, target, md5, sha256, size, progress)
        return
    with writing(target.parent):
        os.replace(part, target)


def _stream_all(url: str, part: Path, name: str, size: int | None, progress: bool) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from tqdm.auto import tqdm

    hidden = not progress or are_progress_bars_disabled()
    with tqdm(desc=name, total=size, unit="B", unit_scale=True, unit_divisor=1024, disable=hidden) as bar:
        for attempt in range(ATTEMPTS):
            time.sleep(BACKOFF * 2 ** (attempt - 1) if attempt else 0)
            try:
                return _stream(url, part, bar)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in _AGAIN:
                    raise WeightsError(f"{url}: the server answers {error.code} {error.reason}") from error
                failure: Exception = error
            except (_Interrupted, http.client.HTTPException, OSError) as error:
                failure = error
            _log.info("%s: %s (attempt %d of %d)", url, failure, attempt + 1, ATTEMPTS)
    kept = part.stat().st_size if part.exists() else 0
    raise WeightsError(
        f"{url}: {failure}; gave up after {ATTEMPTS} attempts. {kept} bytes are kept in {part}; call again to go on"
    ) from failure


def _stream(url: str, part: Path, bar: Any) -> None:
    """One request: append what the server sends to ``part``."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "medgmae"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # asked for what lies behind the end
            error.close()
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink()
            raise _Interrupted("what an earlier download left behind is longer than the file") from error
        raise
    with response:
        if response.status != 206:
            have = 0  # the server ignores ranges and sends everything
        length = response.headers.get("Content-Length")
        end = have + int(length) if length else None
        bar.total, bar.n = end or bar.total, have
        _check_space(part.parent, end - have if end else 0)
        with _opened(part, "ab" if have else "wb") as stream:
            while chunk := response.read1(_CHUNK):
                with writing(part.parent):
                    _write(stream, chunk)
                bar.update(len(chunk))
            with writing(part.parent):
                os.fsync(stream.fileno())
    if end and part.stat().st_size < end:
        raise _Interrupted(f"the connection ended at byte {part.stat().st_size} of {end}")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(
            f"{folder}: the download needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; {_MOVE}"
        )


def _opened(part: Path, mode: str) -> io.FileIO:
    with writing(part.parent):
        return io.FileIO(part, mode)  # unbuffered: closing it has nothing left to write, so it cannot fail


def _write(stream: io.FileIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[stream.write(rest) :]
