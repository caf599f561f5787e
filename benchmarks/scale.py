"""Many scans through a cluster: what one scan costs here, and simulated runs that say where a cluster saturates.

`--measure` measures the constants of this machine, in processor time of one thread, so that other work on the machine
counts little, and writes results/scale.json; without it they are taken from there. The simulation moves scans one by
one through what they need, in the order in which `medgmae features --engine ray` asks for it:

  storage   streams that share the bandwidth of the file system: bytes of the file / bandwidth of a stream
  readers   processor time to inflate and prepare, two scans at a time in each worker
  devices   one for each worker, model seconds per scan, one scan at a time
  driver    one process that takes every result and puts it on disk

A worker dies now and then, which costs the scans that it holds and the time to start another. What is busy most of the
time is what the run waits for.

    OMP_NUM_THREADS=1 python benchmarks/scale.py [--measure] [--scans 20000]
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import platform
import random
import runpy
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import medgmae
from medgmae.cli.features.extraction import Result
from medgmae.cli.features.parquet import write_table
from medgmae.cli.features.results import Row
from medgmae.cli.journal import Journal

HERE = Path(__file__).parent
RESULTS = HERE / "results/scale.json"
MODELS = ("vit_tiny_patch8_64", "vit_base_patch16_96", "vim_small_patch16_160", "vit_large_patch16_256")


# Constants


def processor_time(work: Callable[[], Any], repeats: int = 3) -> float:
    """Median of the processor seconds of ``work`` in this process."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return round(statistics.median(times), 3)


def measured() -> dict[str, Any]:
    """What reading, preparing, one window of each model, a result on disk and a row in a table cost here."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scan = folder / "scan.nii.gz"
        runpy.run_path(str(HERE / "io.py"))["make_scan"](scan)
        prepare = medgmae.create_transform("vit_tiny_patch8_64.demo", whole=True)
        read = {"bytes": scan.stat().st_size, "seconds": processor_time(lambda: prepare(scan))}
        listed = medgmae.data.list_scans(scan).scans[0]
        journal = Journal(folder / "f.parquet")
        journal.folder.mkdir()
        vector = torch.rand(768)
        result = Result({"features": 768, "map": None, "seconds": 0.1}, {"pooled": vector}, [1, 2, 3])
        times = []
        for _ in range(50):  # by the clock: the disk's part is what counts
            start = time.perf_counter()
            journal.put(listed, result.state, result.facts, result.tensors)
            times.append(time.perf_counter() - start)
        rows = {width: _row_bytes(folder / f"{width}.parquet", width) for width in (192, 384, 768, 1024)}
    windows = {}
    for model_name in MODELS:
        model: Any = medgmae.create_model(model_name).eval()
        window = torch.rand(1, model.in_chans, *model.img_size)
        with torch.inference_mode():
            seconds = processor_time(lambda model=model, window=window: model.forward_features(window), 1)  # type: ignore[misc]
        windows[model_name] = {"window": list(model.img_size), "width": model.num_features, "seconds": seconds}
    machine = {"cpu": _cpu(), "instructions": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"scan": read, "result_seconds": round(statistics.median(times), 4), "row_bytes": rows,
            "windows": windows, "machine": machine, "versions": versions}  # fmt: skip


def _row_bytes(path: Path, width: int) -> int:
    """Bytes of a scan in a table of 4096."""
    generator = torch.Generator().manual_seed(0)

    def row(number: int) -> Row:
        vector = torch.randn(width, generator=generator)
        said = {"path": f"/archive/2024/{number % 97:02}/{number:08}/ct.nii.gz", "key": f"{number * 7919:024x}"}
        return Row(
            f"{number:08}",
            {**said, "seconds": 1.0, "state": [1, 10**8 + number, 10**18 + number]},
            lambda: {"pooled": vector},
        )

    write_table(path, [row(number) for number in range(4096)], [], {}, width)
    return round(path.stat().st_size / 4096)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


# Simulation


@dataclass(frozen=True)
class Cluster:
    """Workers, each with a device and readers, and what they share."""

    workers: int
    readers: int  # cores that read, in each worker
    model: float  # seconds of the device per scan
    bandwidth: float  # bytes per second, of the file system
    stream: float  # bytes per second, of one reader of it
    scan_bytes: float
    prepare: float  # processor seconds per scan
    result: float  # seconds of the driver per scan
    deaths: float  # per worker and hour
    restart: float  # seconds until there is another worker


class Resource:
    """``count`` places; who finds none free waits in line. ``busy`` is the time that places were taken."""

    def __init__(self, run: Run, count: int) -> None:
        self.run, self.free, self.count = run, count, count
        self.line: deque[tuple[float, Callable[[], None]]] = deque()
        self.busy = 0.0

    def take(self, seconds: float, then: Callable[[], None]) -> None:
        """Hold a place for some time, and go on."""
        if not self.free:
            self.line.append((seconds, then))
            return
        self.free -= 1
        self.busy += seconds
        self.run.after(seconds, lambda: self._leave(then))

    def _leave(self, then: Callable[[], None]) -> None:
        self.free += 1
        if self.line:
            self.take(*self.line.popleft())
        then()


class Run:
    """One run: events in the order of their time."""

    def __init__(self, cluster: Cluster, scans: int, seed: int = 0) -> None:
        self.cluster, self.left, self.waiting = cluster, scans, scans
        self.now, self.lost, self.draws = 0.0, 0, random.Random(seed)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.count = 0
        streams = max(1, int(cluster.bandwidth / cluster.stream))
        self.storage, self.driver = Resource(self, streams), Resource(self, 1)
        self.devices = [Resource(self, 1) for _ in range(cluster.workers)]
        self.cores = [Resource(self, cluster.readers) for _ in range(cluster.workers)]
        self.life = [0] * cluster.workers  # how often each worker has died
        self.there = [False] * cluster.workers

    def after(self, seconds: float, then: Callable[[], None]) -> None:
        """Have something happen later."""
        self.count += 1
        heapq.heappush(self.events, (self.now + seconds, self.count, then))

    def simulate(self) -> dict[str, float]:
        """Hours, and of each resource the share of the time that it was busy."""
        for worker in range(self.cluster.workers):
            self._live(worker)
        while self.left and self.events:
            self.now, _, then = heapq.heappop(self.events)
            then()
        shares = {
            "storage": self.storage.busy / self.storage.count,
            "readers": statistics.mean(one.busy for one in self.cores) / self.cluster.readers,
            "devices": statistics.mean(one.busy for one in self.devices),
            "driver": self.driver.busy,
        }
        return {"seconds": self.now, "lost": self.lost, **{name: busy / self.now for name, busy in shares.items()}}

    def _live(self, worker: int) -> None:
        life, self.there[worker] = self.life[worker], True
        for _ in range(2 * self.cluster.readers):
            self._next(worker, life)
        if self.cluster.deaths:
            self.after(self.draws.expovariate(self.cluster.deaths / 3600), lambda: self._die(worker))

    def _die(self, worker: int) -> None:
        self.life[worker] += 1
        self.there[worker] = False
        self.after(self.cluster.restart, lambda: self._live(worker))

    def _next(self, worker: int, life: int) -> None:
        """A worker takes a scan and does it; where it has died meanwhile, the scan is given out again."""
        if not self.waiting or not self.there[worker] or self.life[worker] != life:
            return
        self.waiting -= 1
        one = self.cluster
        jitter = self.draws.uniform(0.5, 1.5)  # scans are not alike

        def alive(then: Callable[[], None]) -> Callable[[], None]:
            def step() -> None:
                if self.life[worker] == life:
                    then()
                else:
                    self.waiting, self.lost = self.waiting + 1, self.lost + 1
                    self._next(worker, self.life[worker])

            return step

        def done() -> None:
            self.left -= 1

        def computed() -> None:
            self.driver.take(one.result, done)
            self._next(worker, life)

        def prepared() -> None:
            self.devices[worker].take(one.model * jitter, alive(computed))

        def read() -> None:
            self.cores[worker].take(one.prepare * jitter, alive(prepared))

        self.storage.take(one.scan_bytes * jitter / one.stream, alive(read))


def clusters(constants: dict[str, Any]) -> dict[str, Cluster]:
    """What is simulated: the scan and the driver as measured; model seconds, bandwidths and deaths are supposed."""
    base = Cluster(
        workers=1,
        readers=2,
        model=1.0,
        bandwidth=2e9,
        stream=2e8,
        scan_bytes=constants["scan"]["bytes"],
        prepare=constants["scan"]["seconds"],
        result=constants["result_seconds"],
        deaths=0.02,
        restart=60.0,
    )
    told = {"1 worker, 2 readers, 1 s": base, "1 worker, 8 readers, 1 s": replace(base, readers=8)}
    for workers in (4, 16, 64):
        told[f"{workers} workers, 8 readers, 1 s"] = replace(base, workers=workers, readers=8)
    told["64 workers, 8 readers, 1 s, 20 GB/s"] = replace(base, workers=64, readers=8, bandwidth=2e10)
    told["256 workers, 8 readers, 1 s, 100 GB/s"] = replace(base, workers=256, readers=8, bandwidth=1e11)
    told["16 workers, 8 readers, 0.1 s"] = replace(base, workers=16, readers=8, model=0.1)
    told["16 workers, 8 readers, 1 s, a death each hour"] = replace(base, workers=16, readers=8, deaths=1.0)
    return told


def main() -> None:
    """Prints a table; with --measure writes results/scale.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", action="store_true", help="the constants of this machine, which takes minutes")
    parser.add_argument("--scans", type=int, default=20_000, help="of each simulated run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    constants = measured() if options.measure else json.loads(RESULTS.read_text())["constants"]
    runs = {}
    for name, cluster in clusters(constants).items():
        told = Run(cluster, options.scans).simulate()
        rate = options.scans / told["seconds"]
        runs[name] = {
            "scans_per_second": round(rate, 2),
            "hours_for_1e5": round(1e5 / rate / 3600, 1),
            "days_for_1e7": round(1e7 / rate / 86400, 1),
            "lost": told["lost"],
            **{key: round(told[key], 2) for key in ("storage", "readers", "devices", "driver")},
        }
    options.out.write_text(json.dumps({"constants": constants, "scans": options.scans, "runs": runs}, indent=1) + "\n")
    print(json.dumps(constants))
    for name, one in runs.items():
        print(f"{name:48} {one}")


if __name__ == "__main__":
    main()
