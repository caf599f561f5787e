"""Pre-training on several processes, and from the command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python
from test_cli import run
from training_runs import numbers, scans, settings_of

import medgmae
from medgmae.training import read_metrics
from medgmae.training.states import read_state


def options_of(data: Path, out: Path, **changes: Any) -> list[str]:
    """The command line of a small run."""
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = out.with_suffix(".toml")
    recipe.write_text(settings_of(**changes).toml(), encoding="utf-8")
    places = ["--device", "cpu", "--log-every", "1", "--checkpoint-every", "3", "--picture-every", "0"]
    return ["pretrain", "--recipe", str(recipe), "--data", str(data), "--out", str(out), "--threads", "1", *places]


def launched(processes: int, *args: str) -> subprocess.Popen[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "medgmae", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def warm(processes: int, folder: Path, *args: str) -> tuple[list[int], str]:
    """What ``launched`` starts, with the variables that torch's launcher sets and without its seconds of a start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    place |= {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    said = folder / "said"
    with said.open("w") as file:
        started = []
        for rank in map(str, range(processes)):
            environment = {**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank}
            started.append(warm_python.Process("-m", "medgmae", *args, stdout=file, stderr=file, env=environment))
    return [process.wait(300) for process in started], said.read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scans(tmp_path_factory.mktemp("data") / "scans")


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "alone"
    result = run(*options_of(data, out))
    assert result.exit_code == 0, result.stderr
    return out


@pytest.mark.parametrize("how", [[], pytest.param(["--sharded"], marks=pytest.mark.slow)])
def test_two_processes_do_what_one_does(data: Path, alone: Path, tmp_path: Path, how: list[str]) -> None:
    process = launched(2, *options_of(data, tmp_path / "run"), *how)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for ours, theirs in zip(numbers(tmp_path / "run"), numbers(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    expected = medgmae.create_model(f"local-dir:{alone}").state_dict()
    for name, value in medgmae.create_model(f"local-dir:{tmp_path / 'run'}").state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-4)
    assert output.count("pre-trained:") == 1
    # one process goes on with the state of two
    resumed = run("pretrain", "--out", tmp_path / "run", "--resume", "--device", "cpu")
    assert resumed.exit_code == 0, resumed.stderr


@pytest.mark.slow
def test_a_killed_process_ends_the_others(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = launched(2, *options_of(data, out, **{"training.steps": 100_000}))
    log, limit = out / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and len(read_metrics(log)) > 3):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.2)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    victim = int(children.stdout.split()[1])
    begin = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - begin < 60
    assert process.returncode != 0
    assert "rank      : 1" in output
    assert "SIGKILL" in output or "exitcode  : -9" in output
    assert str(victim) in output


def test_the_command_line_stops_resumes_and_refuses(data: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = tmp_path / "said"
    with said.open("w") as errors:
        options = options_of(data, out, **{"training.steps": 2000})
        process = warm_python.Process("-m", "medgmae", *options, stderr=errors)
    log, limit = out / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and len(read_metrics(log)) > 3):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, said.read_text()
    assert "--resume goes on" in said.read_text()
    again = run(*options_of(data, out))
    assert (again.exit_code, "holds a run" in again.stderr) == (1, True)
    other = run("pretrain", "--out", out, "--resume", "--steps", "3")
    assert (other.exit_code, "leave out --steps" in other.stderr) == (2, True)
    none = run("pretrain", "--out", tmp_path / "none", "--resume")
    assert (none.exit_code, "holds no run" in none.stderr) == (1, True)
    nothing = run("pretrain", "--model", "mae_vit_nano_patch8_32", "--out", tmp_path / "none")
    assert (nothing.exit_code, "--data" in nothing.stderr) == (2, True)


def test_the_final_settings_are_printed(tmp_path: Path) -> None:
    options = ["--print-config", "--steps", "100", "--set", "training.clip=0.5"]
    shown = run("pretrain", "--model", "gmae_vit_base_patch8_96", *options, "--batch-size", "2", "--held-out", "fold=0")
    assert shown.exit_code == 0, shown.stderr
    lines = shown.stdout.splitlines()
    for line in ('model = "gmae_vit_base_patch8_96"', "steps = 100", "clip = 0.5", "batch_size = 2", "seed = 41"):
        assert line in lines
    assert 'held_out = "fold=0"' in lines
    nowhere = run("pretrain", "--model", "mae_vit_nano_patch8_32", "--data", tmp_path)
    assert (nowhere.exit_code, "missing option '--out'" in nowhere.stderr) == (2, True)
    wrong = run("pretrain", "--model", "mae_vit_nano_patch8_32", *options, "--set", "training.momentum=1")
    assert (wrong.exit_code, "training.momentum is not a setting" in wrong.stderr) == (1, True)
    both = run("pretrain", "--model", "mae_vit_nano_patch8_32", *options, "--epochs", "1")
    assert (both.exit_code, "leave one out" in both.stderr) == (2, True)


def test_runs_are_compared(alone: Path, tmp_path: Path) -> None:
    png = tmp_path / "curves.png"
    result = run("runs", alone, alone, "--png", png, "--json")
    assert result.exit_code == 0, result.stderr
    first, second = json.loads(result.stdout)
    assert first == second
    losses = [line["loss"] for line in read_metrics(alone / "metrics.jsonl") if "loss" in line]
    assert (first["step"], first["loss"]) == (9, losses[-1])
    assert png.stat().st_size > 10_000
    refused = run("runs", alone, "--png", png)
    assert (refused.exit_code, "exists" in refused.stderr) == (2, True)
    missing = run("runs", tmp_path)
    assert (missing.exit_code, "holds no run" in missing.stderr) == (1, True)


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_numbers_go_to_trackers(data: Path, tmp_path: Path, tracker: str) -> None:
    out = tmp_path / "run"
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "medgmae", *options_of(data, out), "--log", tracker]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = {path.parent for path in out.rglob("events.out*")}
        events = EventAccumulator(str(folder))
        events.Reload()
        losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
        assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    else:
        assert list(out.rglob("run-*.wandb"))
        assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("how", [[], pytest.param(["--sharded"], marks=pytest.mark.slow)])
def test_processes_share_the_views_the_centre_and_the_teacher(data: Path, tmp_path: Path, how: list[str]) -> None:
    """Two processes with two scans each, view by view, do what one with four and all of their views at once does."""
    views: dict[str, Any] = {"local_size": [16, 8, 8], "local_views": 2, "local_mask_ratio": 0.5}
    views |= {"projector": [32, 16, 64], "patch_distillation": 0.5, "patch_projector": [32, 16, 48]}
    options = {"model_options": {"img_size": 16, "mask_ratio": 0.5}, "training.lr": 1e-4}
    changes: dict[str, Any] = {"model": "glmae_vit_nano_patch8_32", "global_local": views, **options}
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    result = run(*options_of(data, alone, **changes))
    assert result.exit_code == 0, result.stderr
    in_sequence = {**changes, "global_local": {**views, "views_at_once": 1}, "training.micro_batch": 1}
    codes, output = warm(2, tmp_path, *options_of(data, shared, **in_sequence), *how)
    assert codes == [0, 0], output
    for ours, theirs in zip(numbers(shared), numbers(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
    states = [read_state(sorted((out / "checkpoints").glob("step_*"))[-1]).model for out in (shared, alone)]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=2e-4)
    assert states[0]["center"].any()
    assert states[0]["patch_center"].any()
