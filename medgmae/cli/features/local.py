"""The engines of one machine: this process alone, or with processes that read ahead of the model."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

import medgmae
from medgmae.cli.features.extraction import Extractor, Prepared, Preparer
from medgmae.cli.features.schedule import Died, Event, Finished, Joined

T = TypeVar("T")


def attempt(work: Callable[[], T]) -> T | Exception:
    """What ``work`` gives, or the error that it raises."""
    try:
        return work()
    except Exception as error:
        return error


class InTurn:
    """This process reads a scan, runs the model over it, and then takes the next."""

    depth = 1

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self.waited = 0.0  # seconds in which there was nothing for the model to do
        self._given: tuple[int, medgmae.data.Scan] | None = None

    def __enter__(self) -> InTurn:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, worker: int, number: int, scan: medgmae.data.Scan) -> None:
        """Take a scan, which is worked on when ``next`` is called."""
        self._given = number, scan

    def next(self) -> Event:
        """The one worker, and afterwards what came of the scan that it was given."""
        if self._given is None:
            return Joined(0)
        (number, scan), self._given = self._given, None
        return Finished(0, number, attempt(lambda: self.extractor.features(self._prepared(scan))))

    def _prepared(self, scan: medgmae.data.Scan) -> Prepared:
        start = time.perf_counter()
        try:
            return self.extractor.prepare(scan)
        finally:
            self.waited += time.perf_counter() - start


class Readers:
    """Processes that read and prepare scans, and the model in this one, which takes whichever is ready.

    Each has two scans at most, so that at most twice as many prepared scans are in memory as there are processes. Each
    is a pool by itself: one that dies takes nothing from the others.
    """

    depth = 2

    def __init__(self, extractor: Extractor, count: int) -> None:
        self.extractor = extractor
        self.waited = 0.0
        self._pools: dict[int, ProcessPoolExecutor] = {}
        self._reading: dict[Future[Prepared], tuple[int, int]] = {}  # worker and scan
        self._news: deque[Event] = deque(Joined(worker) for worker in range(count))

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in list(self._pools):
            self._end(worker)

    def submit(self, worker: int, number: int, scan: medgmae.data.Scan) -> None:
        """Have a scan read; the process is started for its first."""
        if worker not in self._pools:
            context = multiprocessing.get_context("spawn")
            self._pools[worker] = ProcessPoolExecutor(1, context, _start_reader)
        try:
            future = self._pools[worker].submit(_read, self.extractor.prepare, scan)
        except BrokenProcessPool as error:
            future = Future()
            future.set_exception(error)
        self._reading[future] = worker, number

    def next(self) -> Event:
        """The features of the next scan that has been read."""
        if self._news:
            return self._news.popleft()
        start = time.perf_counter()
        ready = wait(self._reading, return_when=FIRST_COMPLETED).done
        self.waited += time.perf_counter() - start
        future = min(ready, key=lambda one: self._reading[one][1])
        worker, number = self._reading.pop(future)
        try:
            prepared = future.result()
        except BrokenProcessPool:
            self._end(worker)
            self._news.append(Joined(worker))
            return Died(worker, "the process that read it was ended, by the system for want of memory or by a crash")
        except Exception as error:
            return Finished(worker, number, error)
        return Finished(worker, number, attempt(lambda: self.extractor.features(_received(prepared))))

    def _end(self, worker: int) -> None:
        """End a process, whatever it is doing."""
        self._reading = {future: place for future, place in self._reading.items() if place[0] != worker}
        pool = self._pools.pop(worker)
        for process in list((pool._processes or {}).values()):  # Python 3.14 has kill_workers()
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _start_reader() -> None:
    """One thread to each reader, since there are several; Ctrl-C is the parent's to handle, and none outlives it."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read(prepare: Preparer, scan: medgmae.data.Scan) -> Prepared:
    """A prepared scan, its voxels in shared memory, or where that is too small (in containers it often is) as an array
    whose bytes are sent."""
    prepared = prepare(scan)
    data, grid, source = prepared.volume.data, prepared.volume.grid, prepared.volume.source
    try:
        voxels: Any = data.share_memory_()
    except RuntimeError:
        voxels = data.numpy()
    return replace(prepared, volume=(voxels, grid, source))


def _received(prepared: Prepared) -> Prepared:
    """What :func:`_read` has sent, as it was."""
    import torch

    voxels, grid, source = prepared.volume
    return replace(prepared, volume=medgmae.Volume(torch.as_tensor(voxels), grid, source))
