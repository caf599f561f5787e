"""Engines of ``medgmae features``: which worker gets which scan, workers that die, readers ahead of the model, Ray."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from cli_runs import facts_of, saved_nano, small_scans
from safetensors.torch import load_file
from test_cli import run

import medgmae
from medgmae.cli.features import command, local
from medgmae.cli.features.extraction import Extraction, Extractor, Prepared, Preparer, Result
from medgmae.cli.features.local import InTurn, Readers
from medgmae.cli.features.ray_engine import RayEngine
from medgmae.cli.features.schedule import Died, Event, Finished, Joined, WorkerDiedError, results
from medgmae.data import Scan

TESTS = Path(__file__).parent


class Poisoned(Preparer):
    """Reading the scan 0004 ends the process that reads it."""

    def __call__(self, scan: Scan) -> Prepared:
        if scan.name == "0004":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(scan)


class FakeEngine:
    """Workers that work in turn; ``deadly`` scans take the worker down that has begun with them, and all it held."""

    def __init__(self, workers: int, depth: int, deadly: set[int], ends: dict[int, int] | None = None) -> None:
        self.depth, self.deadly, self.ends = depth, deadly, dict(ends or {})
        self.news: deque[Event] = deque(Joined(worker) for worker in range(workers))
        self.held: dict[int, list[int]] = {worker: [] for worker in range(workers)}
        self.tries: list[int] = []
        self.turn = 0

    def submit(self, worker: int, number: int, scan: Scan) -> None:
        self.held[worker].append(number)
        assert len(self.held[worker]) <= self.depth

    def next(self) -> Event:
        if self.news:
            return self.news.popleft()
        busy = [worker for worker, numbers in self.held.items() if numbers]
        self.turn += 1
        worker = busy[self.turn % len(busy)]
        number = self.held[worker][0]
        self.tries.append(number)
        if number in self.deadly or self.ends.pop(number, 0):
            self.held[worker] = []
            self.news.append(Joined(worker))
            return Died(worker, "it died")
        self.held[worker].pop(0)
        return Finished(worker, number, Result({"features": number}, {}, []))


def scans(count: int) -> list[Scan]:
    return [Scan(Path(f"{number:04}.nii"), name=f"{number:04}") for number in range(count)]


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_worker_that_dies_costs_what_it_held_and_that_is_tried_again(workers: int, depth: int) -> None:
    engine = FakeEngine(workers, depth, set(), ends={3: 1, 7: 1})
    done = dict(results(engine, scans(12)))
    assert sorted(done) == list(range(12))
    assert all(isinstance(outcome, Result) for outcome in done.values())
    assert sorted(number for number in set(engine.tries) if engine.tries.count(number) > 1) == [3, 7]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("deadly", [{4}, {0, 1, 2}, {10, 11}])
def test_a_scan_that_takes_two_workers_down_is_set_aside_and_its_neighbours_are_not(
    workers: int, deadly: set[int]
) -> None:
    engine = FakeEngine(workers, 3, deadly)
    done = dict(results(engine, scans(12)))
    assert {number for number, outcome in done.items() if isinstance(outcome, WorkerDiedError)} == deadly
    assert len(done) == 12
    for number in deadly:
        assert str(done[number]) == "it died, 2 times; the scan is set aside"
        assert engine.tries.count(number) <= 2


def test_workers_that_cannot_live_end_the_run() -> None:
    with pytest.raises(click.ClickException, match="20 workers died one after the other"):
        list(results(FakeEngine(2, 2, set(range(100))), scans(100)))


def extractor(model: str, preparer: type[Preparer] = Preparer) -> Extractor:
    how = Extraction(False, True, "model", 0.5, False, 1, False)
    block = {"channels": 1, "window": [0, 1], "range": [0.0, 1.0]}
    prepare = preparer(medgmae.create_transform(block, whole=True))
    return Extractor(medgmae.create_model(model).eval(), prepare, how)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_nano(tmp_path_factory.mktemp("model") / "nano")


@pytest.fixture
def nine(tmp_path: Path) -> Path:
    return small_scans(tmp_path / "scans", 9)


def test_readers_give_the_bits_of_one_process(model: str, nine: Path, tmp_path: Path) -> None:
    (nine / "0002.nii").write_bytes(b"no scan")
    (nine / "0007.nii").write_bytes(b"no scan either")
    outs = {workers: tmp_path / f"{workers}.safetensors" for workers in (0, 2)}
    for workers, out in outs.items():
        result = run("features", nine, "--model", model, "--threads", "1", "--out", out, "--workers", workers)
        assert result.exit_code == 1
        assert result.stderr.count("Error: ") == 2
    one, other = (load_file(out) for out in outs.values())
    assert list(one) == list(other)
    assert len(one) == 14
    assert all(torch.equal(one[name], other[name]) for name in one)
    facts = [facts_of(out) for out in outs.values()]
    assert facts[0]["errors"] == facts[1]["errors"]
    assert [error["name"] for error in facts[0]["errors"]] == ["0002", "0007"]
    assert list(facts[0]["scans"]) == list(facts[1]["scans"])


def test_a_scan_that_kills_its_reader_is_set_aside(model: str, nine: Path) -> None:
    listed = medgmae.data.list_scans(nine).scans
    with InTurn(extractor(model)) as alone:
        expected = dict(results(alone, listed))
    with Readers(extractor(model, Poisoned), 2) as engine:
        done = dict(results(engine, listed))
    assert sorted(done) == list(range(9))
    assert "2 times; the scan is set aside" in str(done.pop(4))
    for number, outcome in done.items():
        assert isinstance(outcome, Result)
        assert torch.equal(outcome.tensors["pooled"], expected[number].tensors["pooled"])


def test_voxels_come_over_where_there_is_no_shared_memory(
    model: str, nine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch>: No space left on device (28)")

    scan, prepare = medgmae.data.list_scans(nine).scans[0], extractor(model).prepare
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    sent = local._read(prepare, scan)
    assert type(sent.volume[0]).__name__ == "ndarray"
    assert torch.equal(local._received(sent).volume.data, prepare(scan).volume.data)


def test_a_defect_in_a_reader_is_not_taken_for_a_broken_scan(
    model: str, nine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "Preparer", Defective)
    result = run("features", nine, "--model", model, "--out", tmp_path / "f.npy", "--workers", 1)
    assert isinstance(result.exception, ZeroDivisionError)
    assert not list(tmp_path.glob("f.npy*"))


class Defective(Preparer):
    def __call__(self, scan: Scan) -> Prepared:
        raise ZeroDivisionError("a defect")


def in_a_cluster(monkeypatch: pytest.MonkeyPatch, submit: Callable[[RayEngine, int, int, Scan], None]) -> None:
    """Have ``submit`` called instead, in a cluster whose actors find this module."""
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent}{os.pathsep}{TESTS}")
    monkeypatch.setattr(RayEngine, "submit", submit)


# Ray leaves pipes of its own open, which Python warns of.
RAY_WARNS = pytest.mark.filterwarnings("default::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.slow
@RAY_WARNS
def test_ray_ends_well_when_a_worker_is_killed(
    model: str, nine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two actors; one is killed from outside in the middle, and one scan kills whichever reads it."""
    whole, out = tmp_path / "whole.safetensors", tmp_path / "f.safetensors"
    options = ["--model", model, "--threads", "1"]
    assert run("features", nine, *options, "--out", whole, "--workers", 0).exit_code == 0
    real, killed = RayEngine.submit, []

    def submit(engine: RayEngine, worker: int, number: int, scan: Scan) -> None:
        real(engine, worker, number, scan)
        if number == 7 and not killed:
            killed.append(engine.processes[worker])
            os.kill(engine.processes[worker], signal.SIGKILL)

    in_a_cluster(monkeypatch, submit)
    monkeypatch.setattr(command, "Preparer", Poisoned)
    result = run("features", nine, *options, "--out", out, "--engine", "ray", "--workers", 2)
    assert result.exit_code == 1, result.stderr
    assert killed
    assert result.stderr.count("Error: ") == 1
    assert "0004.nii: the worker that held it died (ActorDiedError), 2 times; the scan is set aside" in result.stderr
    expected, got = load_file(whole), load_file(out)
    assert expected.keys() - got.keys() == {"0004/map", "0004/pooled"}
    assert all(torch.equal(got[name], expected[name]) for name in got)


@RAY_WARNS
def test_ray_gives_the_bits_of_one_process(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = small_scans(tmp_path / "scans", 3)
    (scans / "0001.nii").write_bytes(b"no scan")
    monkeypatch.chdir(tmp_path)  # actors work elsewhere: relative paths must reach them
    options = ["--model", model, "--threads", "1"]
    assert run("features", "scans", *options, "--out", "whole.safetensors", "--workers", 0).exit_code == 1
    result = run("features", "scans", *options, "--out", "f.safetensors", "--engine", "ray", "--workers", 1)
    assert result.exit_code == 1, result.stderr
    assert result.stderr.count("Error: ") == 1
    expected, got = load_file("whole.safetensors"), load_file("f.safetensors")
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize(
    ("address", "message", "code"),
    [("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1", 1), ("head", "not of the form host:port", 2)],
)
def test_a_cluster_that_is_not_there_is_said(
    address: str, message: str, code: int, model: str, nine: Path, tmp_path: Path
) -> None:
    options = ["--model", model, "--out", tmp_path / "f.npy", "--engine", "ray", "--address", address]
    result = run("features", nine, *options)
    assert result.exit_code == code
    assert message in result.stderr
