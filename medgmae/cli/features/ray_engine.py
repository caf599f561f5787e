"""The engine of a cluster: Ray's actors hold the model, and scans go to them. Their files must be where every node
finds them under the same path."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import threading
from dataclasses import replace
from typing import Any

import click

import medgmae
from medgmae.cli.features.extraction import Extractor, Result, absolute
from medgmae.cli.features.schedule import Died, Event, Finished, Joined
from medgmae.cli.options import Machine, use_threads

_START_WITHIN = 300.0  # seconds in which the first worker must be there


class Actor:
    """A worker: one scan is read while the model works on another."""

    def __init__(self, work: tuple[Extractor, Machine]) -> None:
        extractor, self.machine = work
        self.lock = threading.Lock()
        use_threads(self.machine.threads)
        self.extractor = replace(extractor, model=extractor.model.to(self.machine.device))

    def process(self) -> int:
        """The id of its process, when the model is there."""
        return os.getpid()

    def extract(self, scan: medgmae.data.Scan) -> Result:
        """The features of a scan."""
        use_threads(self.machine.threads)  # which torch keeps for each thread by itself
        prepared = self.extractor.prepare(scan)
        with self.lock:
            return self.extractor.features(prepared)


class RayEngine:
    """Actors of a cluster that exists (``address``, or RAY_ADDRESS), or of one that is started on this machine."""

    depth = 2

    def __init__(self, extractor: Extractor, machine: Machine, workers: int | None, address: str | None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise click.UsageError("--engine ray needs Ray, which is not installed: pip install medgmae[cluster]")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a hospital's runs leaves it unasked
        import ray

        self.ray: Any = ray
        _check_address(address)
        self.needs = {"num_gpus": 1} if machine.device.startswith("cuda") else {"num_cpus": machine.threads or 1}
        try:
            self.ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise click.ClickException(
                f"no Ray cluster at {address or 'this machine'}: {error}; expected host:port of a head node"
            ) from error
        self.count = workers or self._room()
        self.work = self.ray.put((extractor, machine))
        self.waited = 0.0
        self.processes: dict[int, int] = {}
        self._actors: dict[int, Any] = {}
        self._starting: dict[Any, int] = {}
        self._reading: dict[Any, tuple[int, int]] = {}
        for worker in range(self.count):
            self._start(worker)

    def _room(self) -> int:
        """How many workers the cluster has room for."""
        (kind, each), *_ = self.needs.items()
        return max(1, int(self.ray.cluster_resources().get({"num_gpus": "GPU", "num_cpus": "CPU"}[kind], 0) // each))

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.ray.shutdown()

    def _start(self, worker: int) -> None:
        """Ask for an actor, which joins when the cluster has room for it."""
        made = self.ray.remote(max_concurrency=self.depth, **self.needs)(Actor)
        self._actors[worker] = made.remote(self.work)
        self._starting[self._actors[worker].process.remote()] = worker

    def submit(self, worker: int, number: int, scan: medgmae.data.Scan) -> None:
        """Send a scan to an actor."""
        self._reading[self._actors[worker].extract.remote(absolute(scan))] = worker, number

    def next(self) -> Event:
        """Wait until an actor has joined, is done with a scan, or has died."""
        limit = None if self.processes else _START_WITHIN
        ready, _ = self.ray.wait([*self._reading, *self._starting], num_returns=1, timeout=limit)
        if not ready:
            raise click.ClickException(
                f"no worker has started within {_START_WITHIN:.0f} s; expected a node with {self.needs} free"
            )
        return self._event(ready[0])

    def _event(self, ref: Any) -> Event:
        starting = self._starting.pop(ref, None)
        worker, number = self._reading.pop(ref) if starting is None else (starting, -1)
        try:
            outcome = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if starting is not None:  # the model cannot be where the actor is
                raise click.ClickException(f"a worker cannot hold the model: {cause}") from error
            return Finished(worker, number, cause)
        except self.ray.exceptions.RayError as error:
            return self._lost(worker, error)
        if starting is not None:
            self.processes[worker] = outcome
            return Joined(worker)
        return Finished(worker, number, outcome)

    def _lost(self, worker: int, error: Exception) -> Died:
        """Take an actor for dead, and ask for another."""
        self._reading = {ref: place for ref, place in self._reading.items() if place[0] != worker}
        self._starting = {ref: one for ref, one in self._starting.items() if one != worker}
        self.ray.kill(self._actors.pop(worker))
        self._start(worker)
        return Died(worker, f"the worker that held it died ({type(error).__name__})")


def _check_address(address: str | None) -> None:
    """Raise an error for a head node that does not answer, for which Ray would wait for minutes.

    Raises:
        click.ClickException: nobody listens there.
    """
    if address in (None, "auto", "local") or "://" in str(address):
        return
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdecimal():
        raise click.BadParameter(f"{address!r} is not of the form host:port, such as head:6379", param_hint="--address")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass
    except (OSError, OverflowError) as error:
        raise click.ClickException(
            f"no Ray cluster at {address}: {error}; expected host:port of a head node, as ray start --head says it"
        ) from error
