"""Download of one file: resumed, checked, moved into place whole, by one process at a time."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgmae.checkpoints import wire
from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.hashes import Digests, HashMismatchError, check_hashes, discard, remember, verify
from medgmae.checkpoints.json_files import refuse_folder
from medgmae.checkpoints.wire import Attempts, Interrupted, answer, shown

_WAIT = 3.0  # seconds for another process before a message says so
_FULL = {errno.ENOSPC, errno.EDQUOT}
_MOVE = "set HF_HOME, or pass cache_dir=, to a folder with room that you may write to"

_log = logging.getLogger("medgmae")


@dataclass(frozen=True)
class Item:
    """One file to be fetched.

    Attributes:
        url: its address.
        target: where it goes.
        digests: what it is compared with; may be empty.
        size: in bytes, if known.
        headers: of the requests, a token for instance.
        part: where the bytes gather; ``<target>.part`` by default.
        lock: file that keeps two processes apart; ``<target>.lock`` by default.
        answered: whether the server is known to answer, see :class:`~medgmae.checkpoints.wire.Attempts`.
    """

    url: str
    target: Path
    digests: Digests
    size: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    part: Path | None = None
    lock: Path | None = None
    answered: bool = False

    @property
    def unfinished(self) -> Path:
        """Where the bytes gather."""
        return self.part or self.target.with_name(f"{self.target.name}.part")


def download(item: Item, root: Path, *, progress: bool, again: bool = False) -> Path:
    """Fetch a file unless a checked copy is there already.

    The bytes gather in a file of their own, which survives an interruption and is continued by the next call.

    Args:
        item: what to fetch.
        root: our cache folder, see :func:`medgmae.checkpoints.hashes.verify`.
        progress: show a progress bar.
        again: fetch even if a copy is there, which stays until the new one is whole.

    Raises:
        WeightsError: offline, no connection, disk full, cache not writable, wrong content.
        HfHubHTTPError: the server refuses.
    """
    target = item.target
    if not again and _is_there(item, root):
        return target
    _refuse_offline(item)
    from filelock import FileLock

    lock_path = item.lock or target.with_name(f"{target.name}.lock")
    with writing(target.parent):
        for path in (target, item.unfinished, lock_path):
            path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path)
        _acquire(lock, item)
    try:
        if again:
            with writing(target.parent):
                item.unfinished.unlink(missing_ok=True)
        if again or not _is_there(item, root):  # another process may have fetched it while we waited
            _fetch(item, progress)
            remember(target, item.digests, root)
    finally:
        lock.release()
    return target


def _acquire(lock: Any, item: Item) -> None:
    """Wait for the lock; the system opens that of a process which was killed."""
    from filelock import Timeout

    try:
        lock.acquire(timeout=_WAIT)
    except Timeout:
        _log.warning("%s: another process fetches it, waiting for that (%s)", item.url, lock.lock_file)
        lock.acquire()


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


def _is_there(item: Item, root: Path) -> bool:
    with writing(item.target.parent):  # a closed folder, a name that is too long
        if not item.target.exists():
            return False
    verify_or_discard(item.target, item.digests, root)
    return True


def verify_or_discard(path: Path, digests: Digests, root: Path) -> None:
    """:func:`~medgmae.checkpoints.hashes.verify` a file of a cache; one that fails is removed.

    Raises:
        HashMismatchError: a digest differs; the message says what became of the file.
        WeightsError: it cannot be read.
    """
    refuse_folder(path)
    try:
        verify(path, digests, root)
    except HashMismatchError as error:
        raise HashMismatchError(f"{error}; {after_discard(path)}") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from error


def after_discard(path: Path) -> str:
    """Remove a bad file and say so."""
    if discard(path):
        return "the file was removed, call again to fetch it anew"
    return "the file could not be removed (read-only cache): delete it, or set HF_HOME to another folder"


def _refuse_offline(item: Item) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise WeightsError(
            f"{item.url}: not on this machine, but HF_HUB_OFFLINE is set; unset it once, {_by_hand(item)}"
        )


def _by_hand(item: Item) -> str:
    """What helps without a connection; opens the folder for it."""
    name = item.target.name
    try:
        item.target.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return f'or copy the file from a machine that has it and load it by its path: pretrained="/path/to/{name}"'
    return (
        f"or copy the file from a machine that has it to {item.target}, where it is found and checked (from anywhere "
        f'else it is loaded by its path: pretrained="/path/to/{name}")'
    )


def _fetch(item: Item, progress: bool) -> None:
    part = item.unfinished
    refuse_folder(part)
    resumed = part.exists()
    _stream_all(item, progress)
    try:
        check_hashes(part, item.digests)
    except HashMismatchError as error:
        part.unlink()
        if not resumed:
            remedy = "nothing was kept: the file was removed, call again to fetch it anew"
            raise HashMismatchError(f"{error}, from {item.url}; {remedy}") from None
        _log.warning("%s does not continue what an earlier download left behind; starting over", item.url)
        _fetch(item, progress)
        return
    with writing(item.target.parent):
        os.replace(part, item.target)


def _stream_all(item: Item, progress: bool) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from tqdm.auto import tqdm

    part, hidden = item.unfinished, not progress or are_progress_bars_disabled()
    attempts = Attempts(answered=item.answered)
    most = _length(part)  # a server that starts over each time brings something only beyond this
    name = item.target.name
    with tqdm(desc=name, total=item.size, unit="B", unit_scale=True, unit_divisor=1024, disable=hidden) as bar:
        while True:
            try:
                return _stream(item, bar, attempts)
            except Interrupted as failure:
                kept = _length(part)
                progressed, most = kept - most >= wire.LEAST, max(kept, most)
                try:
                    attempts.failed(Interrupted(str(failure), progress=progressed, wait=failure.wait))
                except WeightsError as error:
                    raise WeightsError(_gave_up(item, error, kept, attempts.answered)) from failure


def _gave_up(item: Item, error: WeightsError, kept: int, answered: bool) -> str:
    if not answered and not kept:
        return f"{item.url}: {error}. Check the connection and call again, {_by_hand(item)}"
    return f"{item.url}: {error}. {kept} bytes are kept in {item.unfinished}; call again to go on"


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _stream(item: Item, bar: Any, attempts: Attempts) -> None:
    """One request: append what the server sends."""
    from huggingface_hub.errors import HfHubHTTPError

    part = item.unfinished
    have = _length(part)
    if have and have == item.size:
        return
    wanted = {"Range": f"bytes={have}-"} if have else {}
    try:
        with answer("GET", item.url, {**item.headers, **wanted}, attempts) as response:
            _append(item, response, have, bar)
    except HfHubHTTPError as error:
        if error.response.status_code != 416 or not have:  # asked for what lies behind the end
            raise
        if item.size is None and error.response.headers.get("Content-Range") == f"bytes */{have}":
            return
        part.unlink()
        raise Interrupted("what an earlier download left behind is longer than the file") from error
    except Interrupted as failure:
        if _length(part) > have:
            end = f" of {bar.total}" if bar.total else ""
            raise Interrupted(f"the connection ended at byte {_length(part)}{end}", wait=failure.wait) from failure
        raise


def _append(item: Item, response: Any, have: int, bar: Any) -> None:
    part = item.unfinished
    if response.status_code not in (200, 206):
        raise WeightsError(
            f"{item.url}: the server answers {response.status_code} {response.reason_phrase}, no file; call again later"
        )
    coding = response.headers.get("Content-Encoding", "identity")
    if coding != "identity":
        raise WeightsError(
            f"{item.url}: the server sends it compressed ({shown(coding)}), which was not asked for; check whether a "
            "proxy answers in its place, or fetch the file by hand and load it by its path"
        )
    start = have if response.status_code == 206 else 0  # a server that ignores ranges sends everything
    length = response.headers.get("Content-Length", "")
    end = start + int(length) if length else item.size
    if response.status_code == 206:
        place = re.fullmatch(rf"bytes {start}-[0-9]+/([0-9]{{1,18}}|\*)", response.headers.get("Content-Range", ""))
        if place is None:
            part.unlink(missing_ok=True)
            raise Interrupted("the server continues at another place than it was asked to")
        end = int(place[1]) if place[1] != "*" else end
    if item.size is not None and end != item.size:
        raise WeightsError(f"{item.url}: the server sends {end} bytes of a file of {item.size}; call again later")
    bar.total, bar.n = end, start
    _check_space(part.parent, end - start if end else 0)
    with _opened(part, "ab" if start else "wb") as stream:
        for chunk in _in_time(response):
            with writing(part.parent):
                _write(stream, chunk)
            bar.update(len(chunk))
            if end is not None and bar.n > end:
                part.unlink()
                raise WeightsError(f"{item.url}: the server sends more than the {end} bytes that it announced")
        with writing(part.parent):
            os.fsync(stream.fileno())
    if end is not None and _length(part) < end:
        raise Interrupted(f"the connection ended at byte {_length(part)} of {end}")


def _in_time(response: Any) -> Iterator[bytes]:
    """The bytes of an answer, while enough of them come: the time limit of a read begins again with each."""
    since, few = time.monotonic(), 0
    for chunk in response.iter_raw():
        yield chunk
        few += len(chunk)
        if few >= wire.LEAST:
            since, few = time.monotonic(), 0
        elif time.monotonic() - since > wire.TIMEOUT:
            raise Interrupted(f"the server sends fewer than {wire.LEAST} bytes in {wire.TIMEOUT:.0f} seconds")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WeightsError(
            f"{folder}: the download needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; {_MOVE}"
        )


def _opened(part: Path, mode: str) -> io.FileIO:
    with writing(part.parent):
        return io.FileIO(part, mode)  # unbuffered: closing it has nothing left to write, so it cannot fail


def _write(stream: io.FileIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[stream.write(rest) :]
