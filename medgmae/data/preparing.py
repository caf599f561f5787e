"""Scans to prepared volumes on disk, once: in parallel, atomic, and going on where an earlier run ended."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from medgmae.data.formats.itk import simpleitk
from medgmae.data.geometry import VolumeError, sizes
from medgmae.data.input_block import padding
from medgmae.data.preparation import Preparation
from medgmae.data.scan_task import ListedScan, Task, described, prepare, state_of, task_of
from medgmae.data.store import (
    DTYPES,
    SUFFIX,
    WRITING,
    Facts,
    PreparedFolder,
    PreparedScan,
    blosc2_module,
    digest_of,
    read_facts,
    write_table,
)
from medgmae.ops.progress import progress_bar

_log = logging.getLogger("medgmae")
_TRUSTED = 8  # prepared volumes after which their size is taken as known


def prepare_scans(
    scans: Iterable[ListedScan],
    out: str | os.PathLike[str],
    input: Mapping[str, Any],
    *,
    workers: int = 0,
    skip_broken: bool = False,
    dtype: str = "float16",
    crop: int | Sequence[int] | None = None,
    progress: bool | None = None,
) -> PreparedFolder:
    """Prepare scans as an input block says, the whole field of view of each, into a folder of Blosc2 files.

    A second call goes on where one ended, at whatever moment: a file is whole or not there, and is found again by its
    source's path, size and time, or else by a hash of its content. ``prepared.json``, written last, lists the scans of
    the latest call; files of other scans are left where they are, for a call that lists them again.

    Args:
        scans: as ``find_scans`` lists them, with names that differ.
        out: the folder; one process at a time writes into it.
        input: the ``input`` block of a weight card or recipe; see ``create_transform``.
        workers: processes beside this one; 0 prepares in this one. They are started afresh (spawn), so a script that
            asks for any needs ``if __name__ == "__main__":``.
        skip_broken: leave out scans that cannot be read or prepared, and count them in ``broken``; else the first one
            is an error.
        dtype: ``"float16"``, which keeps 11 bits (a relative error of at most 2^-11), or ``"float32"``.
        crop: voxels (d, h, w) of the crops that will be read, by which the files are laid out; any others can be read
            too. By default the block's ``size``, or 96.
        progress: whether to show a bar; None: where a person can see it.

    Raises:
        VolumeError: scans that are broken, doubled or none; a block that is not valid; a folder that holds volumes of
            another block or type, or that another run is writing; a disk that is full, or will be. What is done stays.
        ImportError: Blosc2 is not installed.
    """
    blosc2_module()
    block: dict[str, Any] = json.loads(json.dumps(Preparation(input, whole=True).input))  # as it is read back
    if dtype not in DTYPES:
        raise VolumeError(f"dtype is {dtype!r}; expected one of {list(DTYPES)}")
    size = sizes(crop if crop is not None else block["size"] or 96)
    out, threads = Path(out), 1 if workers else torch.get_num_threads()
    tasks = [task_of(scan, out, block, dtype, size, threads) for scan in scans]
    _check_names(tasks)
    with _writing(out), _alone(out):
        run = _Run(tasks, _kept(out, digest_of(block, dtype)), skip_broken)
        with progress_bar(len(tasks), "preparing", progress, unit="scan") as bar:
            bar.update(len(run.done))
            for _ in run.in_processes(workers) if workers else run.here():
                bar.update()
        prepared = PreparedFolder(out, block, run.prepared(), dtype, run.broken())
        write_table(prepared)
    _warn(prepared)
    return prepared


class _Run:
    """The scans of one call: those that are done, those to do, those that are broken; by their place in the list."""

    def __init__(self, tasks: Sequence[Task], kept: Mapping[str, Facts], skip_broken: bool) -> None:
        self.tasks, self.skip_broken = tasks, skip_broken
        self.states = [state_of(task) for task in tasks]
        self.done: dict[int, PreparedScan] = {}
        self.errors: dict[int, VolumeError] = {}
        for place, (task, state) in enumerate(zip(tasks, self.states, strict=True)):
            facts = kept.get(task.identity)
            if facts is not None and facts.origin["state"] == state:
                self.done[place] = described(facts.scan, task)
        self.waiting = [place for place in range(len(tasks)) if place not in self.done]

    def prepared(self) -> list[PreparedScan]:
        """In the order of the list."""
        return [self.done[place] for place in sorted(self.done)]

    def broken(self) -> list[tuple[str, str]]:
        """Path and error of what was left out, in the order of the list."""
        return [(str(self.tasks[place].path), str(self.errors[place])) for place in sorted(self.errors)]

    def here(self) -> Iterator[None]:
        """One scan after the other in this process."""
        for place in self.waiting:
            self._check_space()
            try:
                self.done[place] = prepare(self.tasks[place])
            except VolumeError as error:
                self._fail(place, error)
            yield

    def in_processes(self, workers: int) -> Iterator[None]:
        """Scans in processes of their own; when this ends early, so do they."""
        left = list(reversed(self.waiting))
        flying: dict[Future[PreparedScan], int] = {}
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
        try:
            while left or flying:
                while left and len(flying) < 2 * workers:  # one at work and one to come each: little to undo at an end
                    self._check_space()
                    place = left.pop()
                    flying[pool.submit(prepare, self.tasks[place])] = place
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    self._collect(future, flying)
                    del flying[future]
                    yield
        except BaseException:
            for process in list(pool._processes.values()):  # a scan may take minutes; Python 3.14 has kill_workers()
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _collect(self, future: Future[PreparedScan], flying: Mapping[Future[PreparedScan], int]) -> None:
        place = flying[future]
        try:
            self.done[place] = future.result()
        except VolumeError as error:
            self._fail(place, error)
        except BrokenProcessPool:
            paths = ", ".join(str(self.tasks[one].path) for one in flying.values())
            raise VolumeError(
                f"a process ended while it prepared one of {paths}: memory may have run out; expected room for a scan "
                "in each process: use fewer workers. A script that has no `if __name__ == '__main__':` ends them too"
            ) from None

    def _fail(self, place: int, error: VolumeError) -> None:
        if not self.skip_broken:
            raise error
        self.errors[place] = error
        _log.warning("left out: %s", error)

    def _check_space(self) -> None:
        """Stop before the disk is full: what is done tells how much the rest takes. The first few scans may be unlike
        the others, so that only half of what they foretell is counted."""
        read = sum(self.states[place][1] for place in self.done)
        if read == 0:
            return
        per_byte = sum(scan.bytes for scan in self.done.values()) / read
        rest = sum(self.states[place][1] for place in self.waiting if place not in self.done)
        needed = per_byte * rest * (1.0 if len(self.done) >= _TRUSTED else 0.5)
        out = self.tasks[0].out
        free = shutil.disk_usage(out).free
        if needed > free:
            raise VolumeError(
                f"{out}: the rest of the scans will take about {per_byte * rest / 1e9:.3g} GB, by those that are done, "
                f"and {free / 1e9:.3g} GB are free; make room, or choose another folder. What is done stays"
            )


def _check_names(tasks: Sequence[Task]) -> None:
    if not tasks:
        raise VolumeError("no scans to prepare; expected at least one")
    first: dict[str, Task] = {}
    for task in tasks:
        other = first.setdefault(task.name, task)
        if other is not task:
            raise VolumeError(
                f"{other.path} and {task.path} have the same name {task.name!r}; expected names of their own"
            )


def _kept(out: Path, digest: str) -> dict[str, Facts]:
    """What earlier calls have prepared, by the scan's identity; what they left half written is removed."""
    for leftover in out.glob(f".*{WRITING}"):
        leftover.unlink(missing_ok=True)
    kept: dict[str, Facts] = {}
    for path in sorted(out.glob(f"*{SUFFIX}")):
        try:
            facts = read_facts(path)
        except VolumeError:  # damaged since: it is written again
            continue
        if facts.origin["digest"] != digest:
            raise VolumeError(
                f"{out}: {path.name} was prepared as {facts.origin['dtype']} with another input block or type: "
                f"{json.dumps(facts.origin['input'])}; choose another folder, or remove this one"
            )
        kept[facts.origin["identity"]] = facts
    return kept


def _start_worker() -> None:
    """One thread to each process; Ctrl-C is the parent's to handle, and no process outlives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    simpleitk().ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder for this process."""
    from filelock import FileLock, Timeout

    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise VolumeError(
            f"{out}: another run is preparing scans into it; wait for it, or choose another folder"
        ) from None
    except NotImplementedError:
        _log.warning("%s is on a file system without locks: start one run at a time", out)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turn an error of the file system into one that says what to do."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        problem = "the disk is full" if full else f"cannot be written: {error.strerror or error}"
        raise VolumeError(
            f"{out}: {problem}; what is done stays: make room or choose another folder, and prepare again"
        ) from None


def _warn(prepared: PreparedFolder) -> None:
    bare = [scan.name for scan in prepared.scans if scan.foreground == 0]
    if bare:
        _log.warning(
            "%d of %d prepared volumes have no voxel above pad=%g, %s for one: crops of them are drawn evenly",
            len(bare),
            len(prepared.scans),
            padding(prepared.input),
            bare[0],
        )
