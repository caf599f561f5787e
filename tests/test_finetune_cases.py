"""Cases of fine-tuning: what is seen of them, how they are divided, and what is refused before anything is trained."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import dicom_series
from tuning_runs import MACHINE, cases, tune, tune_settings, write_table

import medgmae
from medgmae.training import TrainingError, rehearse
from medgmae.training.cases import LabelledScans, View
from medgmae.training.finetune import listed, study_of, view_of
from medgmae.training.machine import accelerator_for
from medgmae.training.settings import ViewSettings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases(tmp_path_factory.mktemp("data"))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", ["center", "resize", "windows"])
@pytest.mark.parametrize("normalize", ["none", "zscore", "zscore_nonzero", "zscore_all"])
def test_training_sees_what_prediction_sees(data: Path, tmp_path: Path, kind: str, normalize: str) -> None:
    block = {"orientation": "RAS", "window": [0, 160], "range": [0, 1], "normalize": normalize, "pad": 0.25}
    settings = tune_settings(**{"input": block, "view.kind": kind, "view.size": [16, 24, 16]})
    view = view_of(settings)
    accelerator = accelerator_for(MACHINE, "fp32", tmp_path)
    study = study_of(settings, [data], tmp_path / "prepared", False, accelerator)
    prepare = medgmae.data.preparation.Preparation(view.input, whole=kind == "windows")
    for scan in study.corpus.scans[:2]:
        ours, theirs = view.whole(scan), prepare(scan.source)
        assert ours.size == theirs.size
        assert ours.size == (16, 24, 16) or kind == "windows"
        assert torch.allclose(ours.data, theirs.data, atol=1e-5)


def test_windows_are_drawn_and_padded(data: Path, tmp_path: Path) -> None:
    settings = tune_settings(**{"view.kind": "windows", "view.windows": 3, "view.size": [8, 24, 16]})
    study = study_of(settings, [data], tmp_path, False, accelerator_for(MACHINE, "fp32", tmp_path))
    samples = LabelledScans(study.corpus.scans, study.targets.values, study.view, medgmae.data.Augmentation(), seed=1)
    x, _, _ = samples[0]
    assert x.shape == (3, 1, 8, 24, 16)
    assert not torch.equal(x[0], x[1])
    assert torch.equal(samples[0][0], x)  # by its place alone
    assert not torch.equal(samples[12][0], x)


def test_balanced_draws_see_all_classes_alike(data: Path, tmp_path: Path) -> None:
    study = study_of(tune_settings(), [data], tmp_path, False, accelerator_for(MACHINE, "fp32", tmp_path))
    classes = torch.tensor([0] * 11 + [1])
    samples = LabelledScans(
        study.corpus.scans, classes[:, None].float(), study.view, medgmae.data.Augmentation(), 0, classes
    )
    drawn = torch.tensor([float(samples[i][1]) for i in range(240)])
    assert 0.4 < drawn.mean() < 0.6


def test_the_same_scan_on_both_sides_is_refused(data: Path, tmp_path: Path) -> None:
    rows = table(data)
    copy = tmp_path / "copy.nii.gz"
    copy.write_bytes((data.parent / "case0.nii.gz").read_bytes())
    for row in rows:
        row["path"] = str(data.parent / row["path"])
    rows.append({**rows[0], "path": str(copy), "id": "copy", "fold": "2"})
    leaking = write_table(tmp_path / "leaking.csv", rows)
    with pytest.raises(TrainingError, match=r"the same scan is learned from and held out: case0 and copy"):
        tune(tune_settings(folds=3, fold="fold"), leaking, tmp_path / "run")
    rows[-1]["fold"] = "0"
    tune(tune_settings(folds=3, fold="fold", **{"training.steps": 2}), write_table(leaking, rows), tmp_path / "run")


BAD: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "no such column": ({"task.labels": ["diagnosis"]}, [], "no column 'diagnosis' to learn; its columns are died"),
    "empty labels": ({}, [{"label": ""}, {"label": "nan"}], "2 cases have no label in .*: case0, case1"),
    "one class": ({}, [{"label": "dark"}] * 12, r"the column 'label' has 'dark' \(12\); expected cases of two classes"),
    "unknown class": ({"task.classes": ["dark", "grey"]}, [], r"not of the classes dark, grey: case1 \('bright'\)"),
    "a class without a case": ({"task.classes": ["bright", "dark", "grey"]}, [], "no case of grey"),
    "numbers as classes": ({"task.labels": ["id"]}, [], "--task regress"),
    "no number": ({"task.kind": "regress", "task.labels": ["height"]}, [{"height": "tall"}], r"\(height = 'tall'\)"),
    "infinite": ({"task.kind": "regress", "task.labels": ["height"]}, [{"height": "inf"}], "not finite numbers"),
    "constant": ({"task.kind": "regress", "task.labels": ["height"]}, [{"height": "3"}] * 12, "is 3 everywhere"),
    "no flag": ({"task.multilabel": True, "task.labels": ["spot"]}, [{"spot": "2"}], "not 0, 1 or nothing"),
    "no event": ({"task.kind": "survive", "task.labels": ["months", "died"]}, [{"died": 0}] * 12, "no case has an"),
    "negative time": ({"task.kind": "survive", "task.labels": ["months", "died"]}, [{"months": -1}], "a negative time"),
    "patient in two folds": (
        {"folds": 3, "fold": "fold", "group": "patient"},
        [{"patient": "p5"}],
        r"1 of 6 groups lie in more than one fold: p5",
    ),
    "too few": ({"folds": 9}, [], "9 folds"),
    "no such group": ({"group": "hospital"}, [], "group names the column 'hospital'"),
    "no such value": ({"held_out": "fold=7"}, [], "no case has that value"),
    "all held out": ({"held_out": "other=0"}, [{"other": 0}] * 12, "holds out every case of any class"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_a_table_lacks_is_said_before_scans_are_read(data: Path, tmp_path: Path, name: str) -> None:
    changes, cells, message = BAD[name]
    rows: list[dict[str, Any]] = table(data)
    for row, change in zip(rows, cells, strict=False):
        row |= change
    for row in rows:
        row["path"] = str(data.parent / row["path"])
    wrong = write_table(tmp_path / "wrong.csv", rows)
    with pytest.raises(TrainingError, match=message):
        tune(tune_settings(**changes), wrong, tmp_path / "run")
    assert not (tmp_path / "run" / "prepared").exists()
    with pytest.raises(TrainingError, match=message):
        rehearse(tune_settings(**changes), [wrong])


def test_rows_that_are_no_scan_of_their_own(data: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = table(data)
    for row in rows:
        row["path"] = str(data.parent / row["path"])
    for wrong, message in (
        ([*rows, rows[3]], "has the id 'case3' twice"),
        ([*rows, {**rows[3], "id": "other"}], "has the scan .*case3.nii.gz twice"),
    ):
        with pytest.raises(TrainingError, match=message):
            tune(tune_settings(), write_table(tmp_path / "wrong.csv", wrong), tmp_path / "run")
    for uid in ("1.2.3.1", "1.2.3.2"):
        dicom_series(tmp_path / "both", uid)
    two = write_table(tmp_path / "two.csv", [{**rows[0], "path": "both"}, *rows[1:]])
    with pytest.raises(TrainingError, match=r"both: 2 DICOM series; expected one(?s:.*)1\.2\.3\.1(?s:.*)1\.2\.3\.2"):
        tune(tune_settings(), two, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))


def test_tables_of_spreadsheets_are_read(data: Path, tmp_path: Path) -> None:
    """Semicolons, a byte order mark, Windows' line ends, letters beyond ASCII in paths and classes."""
    rows: list[dict[str, Any]] = table(data)
    for row in rows:
        copy = tmp_path / "Größe" / row["path"].replace("case", "Fall ä ")
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((data.parent / row["path"]).read_bytes())
        row |= {"path": f"Größe/{copy.name}", "label": row["label"].replace("dark", "dünkel")}
    text = write_table(tmp_path / "table.csv", rows).read_bytes()
    (tmp_path / "table.csv").write_bytes(b"\xef\xbb\xbf" + text.replace(b",", b";").replace(b"\n", b"\r\n"))
    targets, parts = listed(tune_settings(), [tmp_path / "table.csv"], False)
    assert (targets.names, len(targets.values), len(parts)) == (["bright", "dünkel"], 12, 1)
    (tmp_path / "table.csv").write_bytes(text.decode().encode("latin-1"))
    with pytest.raises(TrainingError, match="is not UTF-8"):
        listed(tune_settings(), [tmp_path / "table.csv"], False)


def test_a_rehearsal_says_what_a_run_would_be(data: Path) -> None:
    facts = rehearse(tune_settings(folds=3, group="patient"), [data])
    assert facts["cases"] == 12
    assert facts["counts"] == {"bright": 6, "dark": 6}
    assert [part[:2] for part in facts["parts"]] == [[8, 4]] * 3
    assert facts["view"] == "center, 16 x 16 x 16 voxels"
    assert facts["steps"] == 9
    assert facts["seconds"] > 0


def test_a_view_has_one_size_of_scans_that_are_resampled_to_one() -> None:
    block = {"resample": {"to": "size"}, "size": [32, 32, 32]}
    with pytest.raises(TrainingError, match="expected 'resize'"):
        View.of(ViewSettings(size=[16, 16, 16]), block, (32, 32, 32), (8, 8, 8))
