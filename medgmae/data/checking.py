"""A look at every scan of a data set before it is used: each is read once, in processes of their own."""

from __future__ import annotations

import hashlib
import signal
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from medgmae.data.conversion import grid_of
from medgmae.data.findings import PERCENTILES, CheckReport, Duplicates, VolumeFacts
from medgmae.data.formats.image import SHARE, Image, Limits, TooLargeError, free_memory
from medgmae.data.geometry import VolumeError
from medgmae.data.io import read_image
from medgmae.data.listing import Listing, Scan
from medgmae.data.names import shown
from medgmae.data.volume import Volume, finite

T = TypeVar("T")
_PIECE = 1 << 20  # bytes of a file that are hashed at a time


def check_scans(listing: Listing, *, headers: bool = False, workers: int = 1) -> CheckReport:
    """Read every scan and report how sizes, spacings and intensities are spread, what is there twice, and what is
    broken.

    A volume is in memory once per worker, and is given its share of a quarter of the free memory; those that need more
    are read at the end, one at a time. Volumes are the same where their files are, in any order of slices, or where
    their voxels are, under whatever header.

    Args:
        listing: of :func:`~medgmae.data.list_scans`; its errors and what it left out are in the report too.
        headers: read headers only, where the format allows it: no intensities, no comparison of voxels, and a packed
            file that is cut off is not noticed. The files of volumes that have the same number of bytes are read.
        workers: processes that read at the same time. Above 1, a script needs ``if __name__ == "__main__":``.
    """
    parts = [part for scan in listing.scans for part in _parts(scan)]
    with _Workers(workers) as pool:
        outcomes = pool.each(partial(_facts, headers=headers), parts, "reading scans")
        read = [(part, one) for part, one in zip(parts, outcomes, strict=True) if isinstance(one, VolumeFacts)]
        failed = [(part, one) for part, one in zip(parts, outcomes, strict=True) if isinstance(one, Exception)]
        duplicates, unread = _duplicates(read, pool)
    errors = [{"path": shown(part.path), "error": _text(part, error)} for part, error in [*failed, *unread]]
    return CheckReport(
        scans=len(listing.scans),
        volumes=tuple(facts for _, facts in read),
        duplicates=tuple(duplicates),
        errors=(*listing.errors, *errors),
        skipped=tuple(listing.skipped),
    )


def find_copies(scans: Sequence[Scan], *, workers: int = 1) -> list[tuple[Scan, ...]]:
    """Scans that are the same by content: the same voxels under whatever name, header, format and compression. A case
    of several contrasts is a copy where one of them is. Cases that are in two parts of a data set leak from one into
    the other.

    Voxels are the same where their type, shape, order and values are: not after resampling, a change of type or a turn
    of the axes. Only scans of the same size are read in full.

    Args:
        scans: such as ``list_scans(...).scans``, those of all parts together.
        workers: processes that read at the same time. Above 1, a script needs ``if __name__ == "__main__":``.

    Returns:
        Groups of two scans or more, which and in which they are in the order of ``scans``.

    Raises:
        VolumeError: scans that cannot be read; it says how many, and why the first cannot.
    """
    parts = [(number, part) for number, scan in enumerate(scans) for part in _parts(scan)]
    with _Workers(workers) as pool:
        sizes = _all_read(parts, pool.each(_size, [part for _, part in parts], "reading headers"))
        alike = [one for group in _groups(zip(parts, sizes, strict=True), lambda one: one[1]) for one, _ in group]
        digests = _all_read(alike, pool.each(_digest_of_voxels, [part for _, part in alike], "comparing scans"))
    first = list(range(len(scans)))  # a scan before it that is the same, or itself

    def origin(number: int) -> int:
        while first[number] != number:
            number = first[number]
        return number

    for group in _groups(zip(alike, digests, strict=True), lambda one: one[1]):
        origins = [origin(number) for (number, _), _ in group]
        for one in origins:
            first[one] = min(origins)
    return [tuple(scans[number] for number in group) for group in _groups(range(len(scans)), origin)]


def _all_read(parts: Sequence[tuple[int, Scan]], outcomes: Sequence[T | Exception]) -> list[T]:
    failed = [(part, one) for (_, part), one in zip(parts, outcomes, strict=True) if isinstance(one, Exception)]
    if failed:
        raise VolumeError(f"{len(failed)} of {len(parts)} scans cannot be read, such as {_text(*failed[0])}")
    return [one for one in outcomes if not isinstance(one, Exception)]


def _size(scan: Scan, limits: Limits) -> tuple[int, ...]:
    """Of the voxels, with the channels."""
    return read_image(scan.path, replace(limits, voxels=False), scan.series, scan.files).voxels.shape


def _digest_of_voxels(scan: Scan, limits: Limits) -> str:
    return _digest_of(read_image(scan.path, limits, scan.series, scan.files))


def _parts(scan: Scan) -> list[Scan]:
    """What is read of a scan: itself, or the file of each contrast."""
    if scan.contrasts is None:
        return [scan]
    cases = scan.contrasts.items()
    return [replace(scan, path=path, name=f"{scan.name} {name}", contrasts=None) for name, path in cases]


def _text(part: Scan, error: Exception) -> str:
    text = str(error)
    return shown(text if str(part.path) in text else f"{part.path}: {text}", keep="\n")


def _facts(scan: Scan, limits: Limits, headers: bool) -> VolumeFacts:
    """The facts of a volume.

    Raises:
        VolumeError: what ``read_volume`` raises.
    """
    files = scan.all_files()
    image = read_image(scan.path, replace(limits, voxels=not headers), scan.series, scan.files)
    try:
        grid = grid_of(image.affine, image.voxels.shape[1:])
    except VolumeError as error:
        raise VolumeError(f"{scan.path}: {error}") from None
    digest, intensities = None, None
    if not headers:
        finite(Volume(torch.from_numpy(image.voxels), grid, str(scan.path)))
        digest, intensities = _digest_of(image), _intensities(image.voxels)
    return VolumeFacts(
        name=scan.name,
        path=shown(scan.path),
        series=None if scan.series is None else shown(scan.series),
        size=grid.size,
        channels=len(image.voxels),
        frames=image.frames,
        dtype=str(image.voxels.dtype),
        spacing=tuple(round(s, 4) for s in grid.spacing),  # type: ignore[arg-type]
        orientation=grid.orientation,
        files=len(files),
        bytes=sum(file.stat().st_size for file in files),
        intensities=intensities,
        digest=digest,
        notes=image.notes,
    )


def _digest_of(image: Image) -> str:
    digest = hashlib.blake2b(f"{image.voxels.dtype} {image.voxels.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image.voxels).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _intensities(voxels: NDArray[Any]) -> dict[str, float]:
    """Percentiles of all voxels, which lose their order: a copy of them would double the memory."""
    flat = voxels.reshape(-1)
    at = {name: round(share / 100 * (len(flat) - 1)) for name, share in PERCENTILES.items()}
    flat.partition(sorted(set(at.values())))
    return {name: float(flat[place]) for name, place in at.items()}


def _duplicates(
    read: Sequence[tuple[Scan, VolumeFacts]], pool: _Workers
) -> tuple[list[Duplicates], list[tuple[Scan, Exception]]]:
    """Volumes that are the same, and those whose files can no longer be read. Files are compared only where they have
    the same number of bytes, and voxels that are the same."""
    alike = _groups(read, lambda one: (one[1].files, one[1].bytes, one[1].digest))
    compared = [one for group in alike for one in group]
    outcomes = pool.each(_digest_of_files, [part for part, _ in compared], "comparing files")
    digests = {facts.name: one for (_, facts), one in zip(compared, outcomes, strict=True) if isinstance(one, str)}
    unread = [(part, one) for (part, _), one in zip(compared, outcomes, strict=True) if isinstance(one, Exception)]
    found = []
    for group in _groups([one for one in compared if one[1].name in digests], lambda one: digests[one[1].name]):
        found.append(Duplicates("files", tuple(facts.name for _, facts in group)))
    for group in _groups([one for one in read if one[1].digest], lambda one: one[1].digest):
        names = tuple(facts.name for _, facts in group)
        if len({digests.get(name, name) for name in names}) > 1:
            found.append(Duplicates("voxels", names))
    return found, unread


def _groups(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Items that share their key with others."""
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return [group for group in groups.values() if len(group) > 1]


def _digest_of_files(scan: Scan, limits: Limits) -> str:
    """A digest of the bytes of all files of a scan, in whatever order they are named."""
    return hashlib.blake2b(b"".join(sorted(map(_digest_of_file, scan.all_files()))), digest_size=16).hexdigest()


def _digest_of_file(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.digest()


def _attempt(work: Callable[[Scan, Limits], T], scan: Scan, limits: Limits) -> T | Exception:
    """What ``work`` gives, or the error that says what is wrong with the scan."""
    try:
        return work(scan, limits)
    except (VolumeError, OSError, MemoryError) as error:
        return error


class _Workers:
    """Processes that read scans; with a count of 1, this one. They are started when there is work, and share no locks
    with this process. What has not begun is dropped where the block is left with an error or by Ctrl-C."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def each(self, work: Callable[[Scan, Limits], T], scans: Sequence[Scan], what: str) -> list[T | Exception]:
        """What ``work`` gives for every scan, or why it cannot: first as many at a time as there are workers, each with
        its share of the memory; then by themselves those that need more, and those that were under way when the system
        ended a process."""
        from tqdm.auto import tqdm

        attempt: Callable[[Scan, Limits], T | Exception] = partial(_attempt, work)
        with tqdm(total=len(scans), desc=what, unit="scan", disable=None, leave=False) as bar:
            if min(self.count, len(scans)) <= 1:
                return [(attempt(scan, Limits()), bar.update())[0] for scan in scans]
            outcomes: dict[int, T | Exception] = {}
            waiting: dict[Future[T | Exception], int] = {}
            share = Limits(free_memory() // SHARE // self.count)
            for number, scan in enumerate(scans):
                try:
                    waiting[self._started().submit(attempt, scan, share)] = number
                except BrokenProcessPool as error:
                    outcomes[number] = error
            for future in as_completed(waiting):
                outcomes[waiting[future]] = _outcome(future)
                bar.update()
            if any(isinstance(one, BrokenProcessPool) for one in outcomes.values()):
                self._stop()
            for number in sorted(outcomes):
                if isinstance(outcomes[number], TooLargeError | BrokenProcessPool):
                    outcomes[number] = self._alone(attempt, scans[number])
        return [outcomes[number] for number in range(len(scans))]

    def _alone(self, attempt: Callable[[Scan, Limits], T | Exception], scan: Scan) -> T | Exception:
        """What comes of a scan that is read while no other is."""
        outcome = _outcome(self._started().submit(attempt, scan, Limits()))
        if not isinstance(outcome, BrokenProcessPool):
            return outcome
        self._stop()
        return VolumeError(
            f"{scan.path}: the process that read it was ended, by the system for want of memory or by a crash; "
            "expected a smaller scan, or a machine with more memory"
        )

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.count, mp_context=get_context("spawn"), initializer=_begin)
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None


def _outcome(future: Future[T | Exception]) -> T | Exception:
    """What came of a task; that its process was ended is one of the outcomes."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        return error


def _begin() -> None:
    """Settings of a worker: Ctrl-C is for the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
