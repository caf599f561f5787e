"""Pre-training: every objective learns, a run goes on exactly where it ended, and nothing goes wrong in silence."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python
from training_runs import MACHINE, numbers, outcome, run_of, scan_file, scans, settings_of

import medgmae
from medgmae.training import Machine, Run, Settings, Stopped, TrainingError, pretrain, read_metrics
from medgmae.training.batches import stacked
from medgmae.training.pretrain import start_model


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scans(tmp_path_factory.mktemp("data") / "scans")


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    return run_of(settings_of(), data, out, replace(MACHINE, picture_every=6))


def test_a_run_leaves_a_model_its_numbers_and_pictures(undisturbed: Path, data: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert {"settings.toml", "run.json", "metrics.jsonl", "checkpoints", "pictures", "model.safetensors"} <= names
    lines = read_metrics(undisturbed / "metrics.jsonl")
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [2, 4, 6, 8, 9]
    assert all(line["crops_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in losses)
    scores = [line for line in lines if "validation_psnr" in line]
    assert [line["step"] for line in scores] == [3, 6, 9]
    assert all(line["held_out"] for line in scores)
    assert [path.name for path in sorted((undisturbed / "pictures").iterdir())] == [
        f"step_0000000{step}.png" for step in (6, 9)
    ]
    start = Run(undisturbed).starts()[0]
    assert (start["scans"], start["held_out"], start["torch"]) == (2, 1, torch.__version__)
    # the model opens with its preprocessing, and fills an encoder
    model = medgmae.create_model(f"local-dir:{undisturbed}")
    assert model.pretrained_cfg["input"]["size"] == [16, 16, 16]
    assert "9 updates, 4 crops of 16 x 16 x 16 voxels" in model.pretrained_cfg["notes"]
    assert "2 scans, 1 more held out: scan0, scan1, scan2." in model.pretrained_cfg["training_data"]
    encoder = medgmae.create_model("vit_nano_patch8_32", pretrained=undisturbed, img_size=16)
    prepared = medgmae.create_transform(model, whole=True)(data / "scan0.nii.gz")
    assert medgmae.extract_features(encoder, prepared).pooled.shape == (48,)


def test_settings_that_are_written_make_the_same_run(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    again = run_of(Run(undisturbed).settings(Settings), data, tmp_path / "again")
    assert outcome(again) == outcome(undisturbed)


@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_signals_save_and_a_resumed_run_is_the_same(
    undisturbed: Path, data: Path, tmp_path: Path, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(signal, stop)
    _at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped) as stopped:
        run_of(settings_of(), data, tmp_path / "run")
    monkeypatch.undo()
    assert (stopped.value.signal, stopped.value.step) == (number, 5)
    assert len(numbers(tmp_path / "run")) < len(numbers(undisturbed))
    medgmae.create_model(f"local-dir:{tmp_path / 'run'}")
    pretrain(Run(tmp_path / "run").settings(Settings), [], tmp_path / "run", resume=True, machine=MACHINE)
    assert outcome(tmp_path / "run") == outcome(undisturbed)


def test_an_end_before_the_first_update_is_one_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medgmae.training import corpus

    monkeypatch.setattr(corpus, "prepare_scans", lambda *args, **options: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run_of(settings_of(), data, tmp_path / "run")
    monkeypatch.undo()
    run_of(settings_of(), data, tmp_path / "run")


def _at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    from medgmae.training.engine import Engine

    real = Engine.update

    def update(self: Engine, number: int, batches: Any) -> Any:
        if number == step:
            act()
        return real(self, number, batches)

    monkeypatch.setattr(Engine, "update", update)


@pytest.mark.parametrize("task", ["pretrain", pytest.param("views", marks=pytest.mark.slow)])
def test_kills_change_nothing(task: str, tmp_path: Path) -> None:
    script = Path(__file__).parent / "fuzz" / "kill_runs.py"
    done = warm_python.run(script, "--kills", "3", "--task", task, "--folder", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 findings" in done.stdout


@pytest.mark.parametrize(
    ("options", "machine"),
    [
        ({"training.micro_batch": 2}, {}),
        ({}, {"workers": 2}),
        ({"training.checkpointing": True}, {}),
        pytest.param({"training.compile": True}, {}, marks=pytest.mark.slow),
        ({}, {"checkpoint_every": 2, "keep": 1, "log_every": 3}),
    ],
)
def test_what_does_not_decide_the_outcome(
    undisturbed: Path, data: Path, tmp_path: Path, options: dict[str, Any], machine: dict[str, Any]
) -> None:
    run = run_of(settings_of(**options), data, tmp_path / "run", replace(MACHINE, **machine))
    expected = medgmae.create_model(f"local-dir:{undisturbed}").state_dict()
    for name, value in medgmae.create_model(f"local-dir:{run}").state_dict().items():
        if {"training.micro_batch", "training.compile"} & set(options):  # sums in another order
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)
        else:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("mae_vit_nano_patch8_32", {"model_options.norm_target": "unbiased"}),
        ("gmae_vit_nano_patch8_32", {}),
        ("mae_vim_nano_patch8_32", {}),
        ("mae2d_vit_nano_patch8_32", {"crops.foreground": None, "training.precision": "bf16"}),
    ],
)
def test_every_objective_learns_one_crop(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The loss of one crop with one mask falls to a stated share of what it was."""
    scan = scan_file(tmp_path / "a.nii.gz", size=(16, 16, 16))
    settings = settings_of(
        model,
        **{
            "training.steps": 60,
            "training.batch_size": 1,
            "crops.per_scan": 1,
            "training.lr": 3e-3,
            "augmentation": {},
        },
        **{"held_out": 0.0, **options},
    )
    machine = replace(MACHINE, log_every=1, checkpoint_every=60, picture_every=60)
    run = run_of(settings, scan, tmp_path / "run", machine)
    assert (run / "pictures" / "step_00000060.png").stat().st_size > 5000
    losses = [line["loss"] for line in numbers(run) if "loss" in line]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    score = numbers(run)[-1]
    assert score["held_out"] is False
    assert ("validation_ssim" in score) == (not model.startswith("mae2d"))


def test_phases_hold_the_rest_still(data: Path, tmp_path: Path) -> None:
    phases = [{"until": 9, "train": ["decoder.*"]}]
    run = run_of(settings_of(**{"training.phases": phases}), data, tmp_path / "run")
    torch.manual_seed(0)
    with_all = run_of(settings_of(), data, tmp_path / "all")
    still = medgmae.create_model(f"local-dir:{run}").state_dict()
    moved = medgmae.create_model(f"local-dir:{with_all}").state_dict()
    start = start_model(settings_of()).state_dict()
    for name, value in start.items():
        assert torch.equal(still[name], value) == (name.startswith("encoder.") or "pos_embed" in name), name
    assert not torch.equal(moved["encoder.patch_embed.proj.weight"], start["encoder.patch_embed.proj.weight"])
    with pytest.raises(TrainingError, match="no parameter matches"):
        run_of(settings_of(**{"training.phases": [{"until": 2, "train": ["nothing"]}]}), data, tmp_path / "none")


def test_a_batch_has_crops_of_one_size() -> None:
    samples = [torch.zeros(1, n, 8, 8) for n in (8, 16)]
    with pytest.raises(TrainingError, match=r"\(1, 8, 8, 8\) and \(1, 16, 8, 8\)"):
        stacked(samples)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", ["mae_vit_nano_patch8_32", "gmae_vit_nano_patch8_32", "mae_vim_nano_patch8_32"])
def test_a_gpu_does_what_the_cpu_does(data: Path, tmp_path: Path, model: str, precision: str) -> None:
    settings = settings_of(model)
    slow = run_of(settings, data, tmp_path / "cpu")
    fast = run_of(
        settings.changed({"training.precision": precision}), data, tmp_path / "gpu", replace(MACHINE, device="cuda")
    )
    tolerance = 1e-3 if precision == "fp32" else 5e-2
    for ours, theirs in zip(numbers(fast), numbers(slow), strict=True):
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
    pretrain(settings, [], tmp_path / "gpu", resume=True, machine=replace(MACHINE, device="cuda"))


def test_it_starts_from_weights(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    run = run_of(settings_of(**{"init": str(undisturbed)}), data, tmp_path / "run")
    assert numbers(run)[0]["loss"] < numbers(undisturbed)[0]["loss"]
    notes = medgmae.create_model(f"local-dir:{run}").pretrained_cfg["notes"]
    assert f"Started from {undisturbed}" in notes
    # a run that goes on needs these weights no longer
    gone = run_of(settings_of(**{"init": str(undisturbed)}), data, tmp_path / "gone")
    settings = (gone / "settings.toml").read_text().replace(str(undisturbed), str(tmp_path / "moved"))
    (gone / "settings.toml").write_text(settings)
    pretrain(settings_of(), [], gone, resume=True, machine=MACHINE)


def test_a_loss_that_is_not_finite_names_the_crops(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medgmae.models.mae import MaskedAutoencoder

    real, calls = MaskedAutoencoder.forward, []

    def forward(self: MaskedAutoencoder, *args: Any, **options: Any) -> Any:
        output = real(self, *args, **options)
        calls.append(self.training)
        return output._replace(loss=output.loss * float("nan")) if sum(calls) == 5 else output

    monkeypatch.setattr(MaskedAutoencoder, "forward", forward)
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan.*scan\d.nii.gz at \[") as failed:
        run_of(settings_of(), data, tmp_path / "run")
    monkeypatch.undo()
    assert str(tmp_path / "run" / "checkpoints") in str(failed.value)
    states = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert "step_00000004.safetensors" in states
    assert all(torch.isfinite(v).all() for v in medgmae.create_model(f"local-dir:{tmp_path / 'run'}").parameters())


def test_a_full_disk_leaves_the_checkpoint_before(
    undisturbed: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medgmae.training import states

    real, calls = states.os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(states.os, "fsync", full)
    out = tmp_path / "run"
    with pytest.raises((TrainingError, OSError, medgmae.WeightsError), match=r"disk is full|No space left"):
        run_of(settings_of(), data, out)
    monkeypatch.undo()
    assert not list((out / "checkpoints").glob(".*writing"))
    pretrain(Run(out).settings(Settings), [], out, resume=True, machine=MACHINE)
    assert outcome(out) == outcome(undisturbed)


def test_two_runs_into_one_folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, entered, go = tmp_path / "run", threading.Event(), threading.Event()
    _at_step(monkeypatch, 2, lambda: (entered.set(), go.wait(60)))
    first = threading.Thread(target=run_of, args=(settings_of(), data, out))
    first.start()
    assert entered.wait(60)
    other = (
        f"from medgmae.training import *; out = {str(out)!r}; "
        "pretrain(Run(out).settings(Settings), [], out, resume=True)"
    )
    done = warm_python.run("-c", other)
    go.set()
    first.join()
    assert "another run is writing" in done.stderr
    with pytest.raises(TrainingError, match="holds a run"):
        run_of(settings_of(), data, out)


def test_broken_scans_stop_or_are_counted(data: Path, tmp_path: Path) -> None:
    folder = scans(tmp_path / "scans", 2)
    (folder / "broken.nii.gz").write_bytes(b"no scan")
    with pytest.raises(TrainingError, match=r"broken\.nii\.gz"):
        run_of(settings_of(), folder, tmp_path / "stopped")
    run = run_of(settings_of(**{"held_out": 0.0}), folder, tmp_path / "run", replace(MACHINE, skip_broken=True))
    ((path, reason),) = Run(run).starts()[0]["broken"]
    assert path.endswith("broken.nii.gz")
    assert reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crops.size": [20, 16, 16]}, "multiples of the patch"),
        ({"training.warmup_steps": 9}, "warm-up takes 9 steps"),
        ({"held_out": "fold=0"}, "no column 'fold'"),
        ({"model_options.in_chans": 2}, "give model_options.in_chans"),
        ({"training.micro_batch": 3}, "does not divide"),
        ({"training.precision": "fp16"}, "needs a GPU"),
        ({"model": "vit_nano_patch8_32"}, "not a masked autoencoder"),
    ],
)
def test_settings_that_do_not_go_together(data: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        run_of(settings_of(**changes), data, tmp_path / "run")


def test_no_data_and_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match="no scan"):
        run_of(settings_of(), tmp_path / "empty", tmp_path / "run")
    with pytest.raises(TrainingError, match="holds no run"):
        pretrain(settings_of(), [], tmp_path / "none", resume=True)
    with pytest.raises(TrainingError, match="expected at least 1"):
        Machine(keep=0)


def test_a_column_holds_scans_out(data: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    rows = "".join(f"{data / f'scan{i}.nii.gz'},{i}\n" for i in range(3))
    table.write_text(f"path,fold\n{rows}")
    run = run_of(settings_of(**{"held_out": "fold=2"}), table, tmp_path / "run")
    start = Run(run).starts()[0]
    assert (start["scans"], start["held_out"]) == (2, 1)


def test_the_log_of_a_cut_run_is_read(undisturbed: Path, tmp_path: Path) -> None:
    text = (undisturbed / "metrics.jsonl").read_text()
    log = tmp_path / "metrics.jsonl"
    log.write_text(text[:-20])
    assert read_metrics(log) == [json.loads(line) for line in text.splitlines()[:-1]]
    assert time.strptime(Run(undisturbed).starts()[0]["time"], "%Y-%m-%dT%H:%M:%S%z")
