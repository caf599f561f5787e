"""Fine-tuning: what is learned, from which cases, and that an interrupted run ends as an undisturbed one."""

from __future__ import annotations

import csv
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
from training_runs import outcome
from tuning_runs import MACHINE, cases, tune, tune_settings

import medgmae
from medgmae.training import (
    Predictor,
    Run,
    Stopped,
    TrainingError,
    TuneSettings,
    finetune,
    read_recipe,
    recipes,
    results,
)
from medgmae.training.finetune import completed
from medgmae.training.targets import read_targets
from medgmae.training.tuned import tuned_model


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune(tune_settings(), data, tmp_path_factory.mktemp("runs") / "undisturbed")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of many runs: a picture takes longer than the training, and is looked at in other tests."""
    monkeypatch.setattr(results, "_draw", lambda *_: None)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def metrics(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return found


def test_classes_are_learned_and_the_run_is_a_model(undisturbed: Path) -> None:
    assert metrics(undisturbed)["metrics"]["auc"]["value"] == 1.0
    model: Any = medgmae.create_model(f"local-dir:{undisturbed}")
    assert model.label_names == ["bright", "dark"]
    assert model.pretrained_cfg["input"]["size"] == [16, 16, 16]
    assert "auc 1.000" in model.pretrained_cfg["notes"]
    assert (undisturbed / "metrics.png").exists()
    rows = table(undisturbed / "predictions.csv")
    assert len(rows) == 4
    assert all(float(row["probability_bright"]) + float(row["probability_dark"]) == pytest.approx(1) for row in rows)


def test_the_model_says_of_a_file_what_the_run_said(undisturbed: Path, data: Path) -> None:
    predict = Predictor(undisturbed)
    assert predict.columns == ["probability_bright", "probability_dark"]
    for row in table(undisturbed / "predictions.csv"):
        values = predict(data.parent / f"{row['name']}.nii.gz")
        assert values.tolist() == pytest.approx([float(row[column]) for column in predict.columns], abs=1e-6)
        assert predict.best(values) == max(("bright", "dark"), key=lambda name: float(row[f"probability_{name}"]))


def test_several_labels_some_of_them_unknown(data: Path, tmp_path: Path) -> None:
    run = tune(tune_settings(**{"task.multilabel": True, "task.labels": ["spot", "other"]}), data, tmp_path / "run")
    found = metrics(run)["metrics"]
    assert set(found) == {"macro", "spot", "other"}
    assert found["spot"]["auc"]["value"] == 1.0
    rows = table(run / "predictions.csv")
    assert {"probability_spot", "probability_other", "spot", "other"} <= set(rows[0])


def test_numbers_come_out_in_their_own_units(data: Path, tmp_path: Path) -> None:
    changes = {"task.kind": "regress", "task.labels": ["height"], "training.steps": 24}
    run = tune(tune_settings(**changes), data, tmp_path / "run")
    found = metrics(run)["metrics"]
    assert found["mae"]["value"] < 2.5  # of numbers from 10 to 16
    assert found["pearson"]["value"] > 0.8
    model: Any = medgmae.create_model(f"local-dir:{run}")
    assert model.label_names == ["height"]
    assert 9 < float(Predictor(run)(data.parent / "case0.nii.gz")) < 17


def test_survival_ranks_the_cases(data: Path, tmp_path: Path) -> None:
    changes = {"task.kind": "survive", "task.labels": ["months", "died"], "training.steps": 18}
    run = tune(tune_settings(**changes), data, tmp_path / "run")
    assert metrics(run)["metrics"]["concordance"]["value"] >= 0.7
    assert Predictor(run).columns == ["risk"]


def test_folds_hold_every_case_out_once_and_patients_stay_together(data: Path, tmp_path: Path) -> None:
    settings = tune_settings(folds=3, group="patient", **{"training.steps": 6})
    run = tune(settings, data, tmp_path / "run")
    found, rows = metrics(run), table(run / "predictions.csv")
    assert [row["name"] for row in rows] == [f"case{k}" for k in range(12)]
    fold_of = {row["name"]: row["fold"] for row in rows}
    assert all(fold_of[f"case{k}"] == fold_of[f"case{k + 1}"] for k in range(0, 12, 2))
    assert set(fold_of.values()) == {"0", "1", "2"}
    assert len(found["folds"]) == 3
    assert set(found["pooled"]) >= {"auc", "accuracy", "brier"}
    aucs = [fold["auc"]["value"] for fold in found["folds"]]
    assert found["mean"]["auc"]["mean"] == pytest.approx(sum(aucs) / 3)
    several = Predictor(run)
    each = torch.stack([Predictor(run / f"fold_{k}")(data.parent / "case0.nii.gz") for k in range(3)])
    assert torch.allclose(several(data.parent / "case0.nii.gz"), each.mean(0), atol=1e-6)


@pytest.mark.usefixtures("no_pictures")
def test_folds_of_the_table_are_taken(data: Path, tmp_path: Path) -> None:
    run = tune(tune_settings(folds=3, fold="fold", **{"training.steps": 3}), data, tmp_path / "run")
    expected = {row["id"]: row["fold"] for row in table(data)}
    assert {row["name"]: row["fold"] for row in table(run / "predictions.csv")} == expected
    with pytest.raises(TrainingError, match=r"has the folds 0, 1, 2; expected 0 to 3"):
        tune(tune_settings(folds=4, fold="fold"), data, tmp_path / "four")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_resumed_run_is_the_same(data: Path, undisturbed: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"

    def send() -> None:
        log = out / "metrics.jsonl"
        while not (log.exists() and log.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Stopped):
        tune(tune_settings(), data, out)
    assert not (out / "metrics.json").exists()
    finetune(tune_settings(), [], out, resume=True, machine=MACHINE)
    assert outcome(out) == outcome(undisturbed)
    assert (out / "predictions.csv").read_bytes() == (undisturbed / "predictions.csv").read_bytes()
    assert metrics(out) == metrics(undisturbed)


@pytest.mark.usefixtures("no_pictures")
def test_folds_go_on_where_they_ended(data: Path, tmp_path: Path) -> None:
    settings = tune_settings(folds=2, **{"training.steps": 6})
    whole, out = tune(settings, data, tmp_path / "whole"), tmp_path / "cut"

    def send() -> None:
        while not (out / "fold_1" / "checkpoints").exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Stopped, match="cut"):
        tune(settings, data, out)
    finished = (out / "fold_0" / "model.safetensors").stat().st_mtime_ns
    finetune(settings, [], out, resume=True, machine=MACHINE)
    assert (out / "fold_0" / "model.safetensors").stat().st_mtime_ns == finished
    assert (out / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    assert metrics(out) == metrics(whole)


def test_the_chosen_weights_are_the_result(data: Path, tmp_path: Path) -> None:
    changes = {"tuning.select": "loss", "training.steps": 12, "training.lr": 0.05, "training.clip": None}
    run = tune(tune_settings(**changes), data, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert metrics(run)["step"] == min(losses, key=lambda step: losses[step])


@pytest.mark.usefixtures("no_pictures")
def test_weights_with_the_best_of_two_scores_are_results_of_their_own(data: Path, tmp_path: Path) -> None:
    """TANGERINE keeps the weights with the best AUC and those with the best loss; here they are of different steps."""
    changes = {"tuning.select": ["auc", "loss"], "training.steps": 12, "training.lr": 3e-3}
    settings = tune_settings(**changes, folds=2)
    run = tune(settings, data, tmp_path / "run")
    assert "best_loss" in {path.name for path in run.iterdir()}
    for fold in ("fold_0", "fold_1"):
        lines = [json.loads(line) for line in (run / fold / "metrics.jsonl").read_text().splitlines()]
        for folder, of in ((run, lambda line: line["validation_auc"]), (run / "best_loss", _less_loss)):
            found = metrics(folder / fold)
            measured = [line for line in lines if "validation_loss" in line]
            assert found["step"] == max(measured, key=of)["step"]  # the first of equals
            medgmae.create_model(f"local-dir:{folder / fold}")
    assert metrics(run / "best_loss")["pooled"].keys() == metrics(run)["pooled"].keys()
    values = Predictor(run / "best_loss")(data.parent / "case0.nii.gz")
    single = [Predictor(run / "best_loss" / f"fold_{k}")(data.parent / "case0.nii.gz") for k in range(2)]
    assert torch.allclose(values, torch.stack(single).mean(0))
    one = tune(replace(settings, folds=0), data, tmp_path / "one")
    assert (metrics(one)["select"], metrics(one / "best_loss")["select"]) == ("auc", "loss")
    with pytest.raises(TrainingError, match="a result of a run"):
        finetune(settings, [], one / "best_loss", resume=True, machine=MACHINE)


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_ends_between_two_files_of_a_checkpoint_is_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best weights and the last are two names, and a process can be killed between them."""
    settings = tune_settings(**{"tuning.select": ["auc", "loss"]})
    whole = tune(settings, data, tmp_path / "whole")
    replace_file, calls = os.replace, 0
    for last in (2, 3, 5, 6):
        calls = 0

        def until(source: Any, to: Any, last: int = last) -> None:
            nonlocal calls
            calls += str(to).endswith(".safetensors") and "checkpoints" in str(to)
            if calls == last:
                raise SystemExit(9)
            replace_file(source, to)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", until)
            with pytest.raises(SystemExit):
                tune(settings, data, tmp_path / str(last))
        tune(settings, data, tmp_path / str(last), resume=True)
        for folder in ("", "best_loss"):
            ended, undisturbed = tmp_path / str(last) / folder, whole / folder
            assert (ended / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes(), last
            assert metrics(ended) == metrics(undisturbed)


def _less_loss(line: dict[str, Any]) -> float:
    return -float(line["validation_loss"])


def test_patience_ends_a_run(data: Path, tmp_path: Path) -> None:
    changes = {"tuning.patience": 1, "tuning.select": "loss", "training.steps": 60, "training.lr": 0.1}
    run = tune(tune_settings(**changes, **{"training.clip": None}), data, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(losses) < 20
    assert losses[-1] >= min(losses[:-1])
    medgmae.create_model(f"local-dir:{run}")


def test_a_frozen_encoder_stays_as_it_was(data: Path, tmp_path: Path) -> None:
    changes = {"tuning.encoder": "frozen", "model_options.global_pool": "attention", "training.steps": 6}
    settings = tune_settings(**changes)
    run = tune(settings, data, tmp_path / "run")
    before = tuned_model(settings, 2).encoder.state_dict()
    after = medgmae.create_model(f"local-dir:{run}").state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all(name.startswith(("head.", "attn_pool.", "fc_norm.")) for name in changed)
    assert any(name.startswith("attn_pool.") for name in changed)


@pytest.mark.parametrize("model", ["vit_nano_patch8_32", "vim_nano_patch8_32", "primus_nano_patch8_32"])
def test_low_rank_changes_are_added_to_the_weights(data: Path, tmp_path: Path, model: str) -> None:
    changes = {"model": model, "tuning.encoder": "lora", "tuning.lora_rank": 2, "training.steps": 4}
    settings = tune_settings(**changes, **{"training.layer_decay": None})
    run = tune(settings, data, tmp_path / "run")
    before = tuned_model(settings.changed({"tuning.encoder": "full"}), 2).encoder.state_dict()
    saved: Any = medgmae.create_model(f"local-dir:{run}")
    after = saved.state_dict()
    assert set(after) == set(before)
    moved = [name for name in after if name.startswith("blocks.") and not torch.equal(after[name], before[name])]
    assert moved
    for name in moved:
        rank = torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4)
        assert rank <= 2
    row = table(run / "predictions.csv")[0]
    values = Predictor(run)(data.parent / f"{row['name']}.nii.gz")
    assert float(values[0]) == pytest.approx(float(row["probability_bright"]), abs=1e-5)


def test_layer_decay_reaches_every_block() -> None:
    settings = tune_settings()
    model = tuned_model(settings, 2)
    study_loss: Any = medgmae.training.tuned.Predict(
        read_targets([{"label": "a"}, {"label": "b"}], ["0", "1"], settings.task), settings.training, None, None
    )
    depth = len(model.encoder.blocks)
    scales = {}
    names = {id(parameter): name for name, parameter in model.encoder.named_parameters()}
    for group in study_loss.groups(model):
        for parameter in group["params"]:
            scales[names[id(parameter)]] = group["lr_scale"]
    assert scales["patch_embed.proj.weight"] == pytest.approx(0.75 ** (depth + 1))
    for k in range(depth):
        assert scales[f"blocks.{k}.attn.qkv.weight"] == pytest.approx(0.75 ** (depth - k))
    assert scales["head.weight"] == 1


def test_settings_that_do_not_go_together() -> None:
    for changes, message in (
        ({"task.kind": "guess"}, "expected one of classify"),
        ({"task.kind": "survive"}, "the time and the event"),
        ({"task.labels": ["a", "b"]}, "task.multilabel = true"),
        ({"task.kind": "regress", "task.balanced": True}, "which has none of classes"),
        ({"folds": 1}, "at least 2"),
        ({"fold": "fold"}, "folds is 0"),
        ({"tuning.select": "auc", "task.kind": "regress"}, "which 'regress' does not measure"),
        ({"view.kind": "zoom"}, "expected one of center"),
    ):
        with pytest.raises(TrainingError, match=message):
            tune_settings(**changes)


def test_what_a_model_must_be(data: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"model": "mae_vit_nano_patch8_32"}, "mae_vit_nano_patch8_32"),
        ({"model": "vit_nano_patch8_32.nothing"}, "nothing"),
        ({"view.size": [15, 16, 16]}, "multiples of the patch"),
        ({"input": {}}, "nothing says how scans are prepared"),
        ({"model_options.in_chans": 2}, "input.channels is 1 and the model takes 2"),
        ({"model_options.global_pool": "none"}, "gives no vector"),
    ):
        with pytest.raises(TrainingError, match=message):
            tune(tune_settings(**changes), data, tmp_path / "run")


def test_a_tag_brings_its_weights_and_input() -> None:
    settings = completed(tune_settings(model="vit_tiny_patch8_64.demo", input={}, model_options={}))
    assert settings.model == "vit_tiny_patch8_64"
    assert settings.init == "vit_tiny_patch8_64.demo"
    assert settings.input_block["spacing"] == [2.0, 2.0, 2.0]
    encoder = tuned_model(settings, 3).encoder
    demo: Any = medgmae.create_model("vit_tiny_patch8_64.demo")
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, demo.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("name", recipes(TuneSettings))
def test_recipes_are_read_and_written(name: str, tmp_path: Path) -> None:
    settings = read_recipe(name, TuneSettings)
    again = tmp_path / "settings.toml"
    again.write_text(settings.toml())
    assert read_recipe(again, TuneSettings) == settings
    completed(settings)


def test_another_kind_of_run_is_refused(undisturbed: Path) -> None:
    with pytest.raises(TrainingError, match="a run of fine-tuning"):
        Run(undisturbed).settings(medgmae.training.Settings)
