"""`medgmae features` over many scans: scans per second, and the share of time in which the model waits for one.

A scan is read and prepared (R seconds of one core), then the model works on it (M seconds of the device, which is a
core here). Done in turn, that takes R + M, and the model waits R / (R + M) of the time. With r readers on cores of
their own it takes max(M, R / r). Cases:
  windows   the three shipped scans at 2 mm, windows of 64 that touch: M is far above R
  resize    the same scans, resampled to one window each: M is of the size of R
  device    the same as a model that is elsewhere, on a GPU: M = R / 1.5, slept, so that all cores are free to read
The model has one thread, since two cores are shared by model and readers. The engines are those of the command, and
beside them threads in this process instead of processes. R is measured once, in turn, as the first thing.

Floor and prediction, written before the first run, for two cores: windows in turn waits 5 % and gains nothing; resize
is bound by both cores: the floor is (R + M) / 2 a scan, 1.6 times as fast as in turn at best; device: two readers make
a scan in R / 2 and the model needs R / 1.5, so it waits less than 10 %, against 60 % in turn. Threads: the preparation
is numpy plane by plane and holds the lock of the interpreter a third of the time, so two threads read at 1.5 times the
speed of one.

Outcome, on two cores that other work kept busy (load 8 to 11), so that rates vary by a third from run to run and only
the shares of waiting say something: windows waits 3 % in turn and with readers, as foreseen. resize: 25 % in turn, 6
% with one reader and 5 % with two, below the goal of 10 %, but no more scans per second, since the cores that readers
would have had were taken. device: 43 % in turn, 22 % with one reader, 31 % with two, 15 % with two threads: the goal
was missed, on cores that gave each process a fourth of its time. Threads were foreseen too slow: inflating and numpy
let go of the lock, and nothing is sent between processes. Processes it is all the same: a scan that crashes a reader
or takes its memory does not end the run, and a model on a GPU does not wait for the lock of the interpreter. To be
measured again on a machine that is free, and with a GPU. results/features.json has the run.

    OMP_NUM_THREADS=1 python benchmarks/features.py [--repeats 3] [--copies 4]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import medgmae
from medgmae.cli.features.extraction import Extraction, Extractor, Prepared, Preparer, Result
from medgmae.cli.features.local import InTurn, Readers
from medgmae.cli.features.schedule import Event, Finished, Joined, results

HERE = Path(__file__).parent
MODEL = "vit_tiny_patch8_64.demo"
SCANS = ("ct_thorax", "ct_abdomen", "mr_brain_t1")


class Threads:
    """The engine that is not used: readers as threads of this process."""

    depth = 2

    def __init__(self, extractor: Extractor, count: int) -> None:
        self.extractor, self.waited = extractor, 0.0
        self.pools = [ThreadPoolExecutor(1) for _ in range(count)]
        self.reading: dict[Future[Prepared], tuple[int, int]] = {}
        self.news: list[Event] = [Joined(worker) for worker in range(count)]

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self.pools:
            pool.shutdown()

    def submit(self, worker: int, number: int, scan: medgmae.data.Scan) -> None:
        """Have a scan read."""
        self.reading[self.pools[worker].submit(self.extractor.prepare, scan)] = worker, number

    def next(self) -> Event:
        """The features of the next scan that has been read."""
        if self.news:
            return self.news.pop(0)
        start = time.perf_counter()
        ready = wait(self.reading, return_when=FIRST_COMPLETED).done
        self.waited += time.perf_counter() - start
        future = min(ready, key=lambda one: self.reading[one][1])
        worker, number = self.reading.pop(future)
        return Finished(worker, number, self.extractor.features(future.result()))


class Device(Extractor):
    """A model that takes no processor: it sleeps as long as a device of its own would work."""

    def features(self, prepared: Prepared) -> Result:
        """Nothing, after a while."""
        time.sleep(READING[0] / 1.5)
        return Result({}, {"pooled": prepared.volume.data.flatten()[:8].clone()}, prepared.state)


READING = [0.0]  # seconds in which one process prepares a scan, on average; measured first
ENGINES = {
    "in turn": InTurn,
    "1 reader": lambda work: Readers(work, 1),
    "2 readers": lambda work: Readers(work, 2),
    "2 threads": lambda work: Threads(work, 2),
}


def run(engine: Any, scans: list[medgmae.data.Scan]) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Scans per second once every worker is there, the share of waiting, and the vectors in order."""
    done: dict[int, Any] = {}
    with engine:
        for number, outcome in results(engine, scans[:2]):  # starts the processes, which takes seconds once
            done[number] = outcome
        engine = renewed(engine)
        start, waited = time.perf_counter(), engine.waited
        for number, outcome in results(engine, scans):
            done[number] = outcome
        seconds, waited = time.perf_counter() - start, engine.waited - waited
    if broken := [one for one in done.values() if isinstance(one, Exception)]:
        raise broken[0]
    figures = {"scans_per_second": len(scans) / seconds, "model_waits": waited / seconds}
    return figures, [done[number].tensors["pooled"] for number in sorted(done)]


def renewed(engine: Any) -> Any:
    """The same engine for a second list of scans: its workers are there already."""
    for news, workers in (("_news", "_pools"), ("news", "pools")):
        if hasattr(engine, news):
            getattr(engine, news).extend(Joined(worker) for worker in range(len(getattr(engine, workers))))
    return engine


def compare(folder: Path, repeats: int) -> dict[str, Any]:
    """Medians per case and engine; the engines take turns."""
    scans = medgmae.data.list_scans(folder).scans
    model = medgmae.create_model(MODEL).eval()
    how = Extraction(False, True, "model", 0.0, False, 1, False)
    slide = Extractor(model, Preparer(medgmae.create_transform(MODEL, whole=True)), how)
    start = time.perf_counter()
    for scan in scans[: len(SCANS)]:
        slide.prepare(scan)
    READING[0] = (time.perf_counter() - start) / len(SCANS)
    whole = replace(slide, how=replace(how, resize=True))
    cases = {"windows": slide, "resize": whole, "device": Device(model, slide.prepare, how)}
    report: dict[str, Any] = {"seconds_to_read": round(READING[0], 3)}
    for case, work in cases.items():
        told: dict[str, list[dict[str, float]]] = {name: [] for name in ENGINES}
        first: list[torch.Tensor] = []
        for _ in range(repeats):
            for name, engine in ENGINES.items():
                figures, vectors = run(engine(work), scans if case != "windows" else scans[: len(SCANS)])
                told[name].append(figures)
                first = first or vectors
                assert all(map(torch.equal, vectors, first)), f"{case}, {name}: other bits"
        report[case] = {
            name: {key: round(statistics.median(one[key] for one in rows), 3) for key in rows[0]}
            for name, rows in told.items()
        }
    return report


def main() -> None:
    """Prints a table and writes results/features.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--copies", type=int, default=4, help="of each of the three scans")
    parser.add_argument("--out", type=Path, default=HERE / "results/features.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        for copy in range(options.copies):
            for scan in SCANS:
                shutil.copy(HERE.parent / f"examples/data/{scan}.nii.gz", Path(name) / f"{copy}-{scan}.nii.gz")
        load = os.getloadavg()[0]
        report = compare(Path(name), options.repeats)
    machine = {"cpu": cpu_name(), "instructions": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "medgmae": medgmae.__version__}
    report |= {"machine": machine | {"load_before": load}, "versions": versions, "repeats": options.repeats}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for case in ("windows", "resize", "device"):
        for name, figures in report[case].items():
            print(f"{case:8} {name:10} {figures['scans_per_second']:6.2f} scans/s, waits {figures['model_waits']:.0%}")
    print(f"{report['seconds_to_read']} s to read a scan; {machine}", file=sys.stderr)


def cpu_name() -> str:
    """The processor as the kernel names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
