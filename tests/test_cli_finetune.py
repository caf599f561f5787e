"""``medgmae finetune`` and ``medgmae predict``: options become settings, a table comes back with predictions."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tuning_runs import case_file, cases, tune, tune_settings, write_table

from medgmae.cli import main
from medgmae.training import read_recipe
from medgmae.training.settings import TuneSettings


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
def folds(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tune(tune_settings(folds=2, **{"training.steps": 4}), data, tmp_path_factory.mktemp("runs") / "folds")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


SMALL = [
    "--model", "vit_nano_patch8_32", "--input-of", "vit_tiny_patch8_64.demo", "--steps", 3, "--batch-size", 4,
    "--set", "view.size=[16,16,16]", "--set", "training.warmup_epochs=none", "--device", "cpu",
]  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_options_become_settings(tmp_path: Path) -> None:
    done = run(
        "finetune", "--model", "vit_tiny_patch8_64.demo", "--label", "a", "--label", "b", "--multilabel", "--folds", 3,
        "--group", "patient", "--view", "windows", "--encoder", "frozen", "--select", "auc", "--patience", 4,
        "--epochs", 15, "--held-out", "fold=2", "--print-config",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    written = tmp_path / "settings.toml"
    written.write_text(done.stdout)
    settings = read_recipe(written, TuneSettings)
    assert settings.task.labels == ["a", "b"]
    assert settings.task.multilabel
    assert (settings.folds, settings.group, settings.view.kind) == (3, "patient", "windows")
    assert (settings.tuning.encoder, settings.tuning.select, settings.tuning.patience) == ("frozen", ["auc"], 4)
    assert (settings.training.epochs, settings.training.warmup_epochs) == (15, 1.5)  # the warm-up keeps its share
    assert settings.held_out == "fold=2"


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("vit_large_patch16_256.tangerine", "tangerine"),
        ("vim_small_patch32_160.mamba_mae", "mamba_mae"),
        ("vit_base_patch16_96", "quick"),
    ],
)
def test_a_model_has_its_recipe(model: str, recipe: str) -> None:
    done = run("finetune", "--model", model, "--print-config")
    assert done.stdout == read_recipe(recipe, TuneSettings).changed({"model": model}).toml() + "\n"


def test_a_rehearsal_trains_nothing(data: Path, tmp_path: Path) -> None:
    done = run("finetune", *SMALL, "--data", data, "--folds", 3, "--group", "patient", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "of them: bright 6, dark 6" in done.stdout
    assert "center, 16 x 16 x 16 voxels" in done.stdout
    assert "memory: " in done.stdout


def test_from_a_table_to_predictions_beside_it(data: Path, tmp_path: Path) -> None:
    done = run("finetune", *SMALL, "--data", data, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    again = run("finetune", *SMALL, "--data", data, "--out", tmp_path / "run")
    assert again.exit_code == 1
    assert "--resume" in again.stderr
    rows = read(data)
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"not a scan")
    for row in rows:
        row["path"] = str(data.parent / row["path"])
    rows[2]["path"], rows[5]["path"] = str(broken), str(tmp_path / "missing.nii.gz")
    rows[7]["label"] = 'größer, "sehr"'
    table = write_table(tmp_path / "table.csv", rows)
    table.write_bytes(table.read_bytes().replace(b"\n", b"\r\n"))
    out = tmp_path / "predictions.csv"
    done = run("predict", "--run", tmp_path / "run", "--data", table, "--out", out)
    assert done.exit_code == 1
    assert "10 of 12 scans" in done.stdout
    found = read(out)
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    for number, row in enumerate(found):
        if number in (2, 5):
            assert row["error"].startswith(rows[number]["path"])
            assert row["probability_bright"] == row["prediction"] == ""
        else:
            assert row["error"] == ""
            assert float(row["probability_bright"]) + float(row["probability_dark"]) == pytest.approx(1)
            assert row["prediction"] in ("bright", "dark")


def test_runs_are_compared_by_what_was_measured(folds: Path, tmp_path: Path) -> None:
    done = run("runs", folds / "fold_0", folds / "fold_1", "--png", tmp_path / "runs.png", "--json")
    assert done.exit_code == 0, done.output
    for number, row in enumerate(json.loads(done.stdout)):
        lines = [json.loads(line) for line in (folds / f"fold_{number}" / "metrics.jsonl").read_text().splitlines()]
        aucs = [line["validation_auc"] for line in lines if "validation_auc" in line]
        assert (row["measure"], row["value"], row["best"]) == ("auc", aucs[-1], max(aucs))
    assert (tmp_path / "runs.png").exists()


def test_predictions_go_on_where_they_ended(folds: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from medgmae.training import Predictor

    said: list[str] = []
    plain = Predictor.__call__

    def counted(self: Any, scan: Any, **options: Any) -> Any:
        if len(said) == 5:
            raise KeyboardInterrupt
        said.append(str(scan))
        return plain(self, scan, **options)

    monkeypatch.setattr(Predictor, "__call__", counted)
    command = ("predict", "--run", folds, "--data", data, "--out", tmp_path / "out.csv")
    assert run(*command).exit_code == 1
    assert not (tmp_path / "out.csv").exists()
    first, said[:] = list(said), []
    monkeypatch.setattr(Predictor, "__call__", lambda self, scan, **o: said.append(str(scan)) or plain(self, scan, **o))
    assert run(*command).exit_code == 0
    assert len(said) == 7
    assert not set(said) & set(first)
    rows = read(tmp_path / "out.csv")
    assert [row["id"] for row in rows] == [f"case{k}" for k in range(12)]
    assert run(*command).exit_code == 2  # it is there
    monkeypatch.undo()
    assert run(*command, "--overwrite").exit_code == 0
    assert read(tmp_path / "out.csv") == rows


def test_scans_without_a_table(folds: Path, tmp_path: Path) -> None:
    case_file(tmp_path / "scans" / "a.nii.gz", 60, 1)
    case_file(tmp_path / "scans" / "b.nii.gz", 0, 2)
    (tmp_path / "scans" / "c.nii.gz").write_bytes(b"")
    done = run("predict", "--run", folds, "--data", tmp_path / "scans", "--out", tmp_path / "out.csv")
    assert done.exit_code == 1
    rows = read(tmp_path / "out.csv")
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    assert [bool(row["error"]) for row in rows] == [False, False, True]
    assert rows[0]["probability_bright"] != rows[1]["probability_bright"]


def test_several_runs_are_averaged(folds: Path, data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.csv", []
    run("predict", "--run", folds, "--data", data, "--out", whole)
    for k in range(2):
        part = tmp_path / f"{k}.csv"
        done = run("predict", "--run", folds / f"fold_{k}", "--data", data, "--out", part)
        assert done.exit_code == 0, done.output
        parts.append(read(part))
    for row, *each in zip(read(whole), *parts, strict=True):
        mean = sum(float(one["probability_dark"]) for one in each) / 2
        assert float(row["probability_dark"]) == pytest.approx(mean, abs=1e-6)


def test_wrong_uses(folds: Path, data: Path, tmp_path: Path) -> None:
    taken = [{**row, "path": str(data.parent / row["path"]), "prediction": "mine"} for row in read(data)]
    for arguments, code, message in (
        (("predict", "--run", tmp_path, "--data", data, "--out", tmp_path / "a.csv"), 1, "holds no run"),
        (("predict", "--run", folds, "--data", data, "--out", tmp_path / "a.xlsx"), 2, "ends in .csv"),
        (
            ("predict", "--run", folds, "--data", write_table(tmp_path / "t.csv", taken), "--out", tmp_path / "a.csv"),
            2,
            "the table has a column 'prediction'",
        ),
        (("finetune", "--data", data, "--out", tmp_path / "run"), 2, "missing option '--model'"),
        (("finetune", *SMALL, "--out", tmp_path / "run"), 2, "missing option '--data'"),
        (("finetune", *SMALL, "--data", data), 2, "missing option '--out'"),
        (("finetune", "--resume", "--out", tmp_path / "run"), 1, "holds no run"),
        (("finetune", "--resume", "--label", "a", "--out", folds), 2, "leave out --label"),
        (("finetune", *SMALL, "--task", "survive", "--data", data, "--out", tmp_path / "run"), 1, "the time and the"),
        (("pretrain", "--resume", "--out", folds), 1, "a run of fine-tuning"),
        (("finetune", *SMALL, "--data", data.parent, "--out", tmp_path / "run"), 1, "no column 'label'"),
    ):
        done = run(*arguments)
        assert done.exit_code == code, done.output
        assert message in done.stderr, done.output
    assert not (tmp_path / "run" / "prepared").exists()


def test_ten_thousand_rows_are_checked_quickly(tmp_path: Path) -> None:
    scan = case_file(tmp_path / "scan.nii.gz", 0, 0)
    rows = []
    for k in range(10_000):
        path = tmp_path / "scans" / f"{k // 100}" / f"{k}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(scan, path)
        rows.append({"path": path, "label": k % 3, "patient": k // 2})
    rows[9_999]["label"] = ""
    table = write_table(tmp_path / "many.csv", rows)
    done = run("finetune", *SMALL, "--data", table, "--folds", 5, "--group", "patient", "--dry-run")
    assert done.exit_code == 1
    assert "1 cases have no label in the column 'label'" in done.stderr
