"""Which worker gets which scan, and what becomes of a scan whose worker dies: the same for every engine.

An engine has workers that come, take scans and may die. What it is made of (this process, processes, a cluster) is
its own business: it takes scans with ``submit`` and says with ``next`` what has happened.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import click

import medgmae
from medgmae.cli.features.extraction import Result

TRIES = 2  # workers that a scan may take down with it
_BARREN = 20  # deaths without any result between them: the workers are the trouble, not the scans


@dataclass(frozen=True)
class Joined:
    """A worker is there and takes scans."""

    worker: int


@dataclass(frozen=True)
class Finished:
    """A worker is done with a scan: its result, or the error that says why there is none."""

    worker: int
    number: int
    outcome: Result | Exception


@dataclass(frozen=True)
class Died:
    """A worker is gone, and what it held with it; the engine may bring another of the same number."""

    worker: int
    reason: str


Event: TypeAlias = "Joined | Finished | Died"


class Engine(Protocol):
    """Workers, of which each takes up to ``depth`` scans at a time: those beyond the first are read meanwhile."""

    depth: int

    def submit(self, worker: int, number: int, scan: medgmae.data.Scan) -> None:
        """Give a scan to a worker that is there; ``number`` is how the engine names the scan afterwards."""

    def next(self) -> Event:
        """Wait until something happens."""


class WorkerDiedError(OSError):
    """A scan that was set aside: the workers that held it died."""


def results(engine: Engine, scans: Sequence[medgmae.data.Scan]) -> Iterator[tuple[int, Result | Exception]]:
    """What comes of every scan, by its number, as it comes.

    A worker that dies costs the scans that it held, and these are tried again, each by itself in a worker: one that
    takes a second worker down is set aside, and its neighbours are not blamed for it.

    Raises:
        click.ClickException: workers die again and again and nothing gets done.
    """
    waiting, again = deque(range(len(scans))), deque[int]()
    held: dict[int, list[int]] = {}
    blamed: Counter[int] = Counter()
    left, barren = len(scans), 0

    def give(worker: int, queue: deque[int]) -> None:
        number = queue.popleft()
        held[worker].append(number)
        engine.submit(worker, number, scans[number])

    while left:
        for level in range(engine.depth):  # every worker gets a first scan before one gets a second
            for worker, numbers in held.items():
                if again and not numbers:
                    give(worker, again)
                elif waiting and len(numbers) == level and not any(blamed[number] for number in numbers):
                    give(worker, waiting)
        event = engine.next()
        if isinstance(event, Joined):
            held[event.worker] = []
        elif isinstance(event, Finished):
            held[event.worker].remove(event.number)
            left, barren = left - 1, 0
            yield event.number, event.outcome
        else:
            barren += 1
            for number in held.pop(event.worker, []):
                blamed[number] += 1
                if blamed[number] < TRIES:
                    again.append(number)
                else:
                    left -= 1
                    yield number, WorkerDiedError(f"{event.reason}, {TRIES} times; the scan is set aside")
            if left and barren >= _BARREN:
                raise click.ClickException(
                    f"{_BARREN} workers died one after the other and none did a scan: {event.reason}"
                )
