"""Probes of saved features: against scikit-learn's models, without a look at test cases; the command and its errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import saved_nano, small_scan
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_cli import run

from medgmae.cli.feature_tables import read_features
from medgmae.evaluation import (
    classification_report,
    concordance_index,
    even_folds,
    fold_report,
    knn_shares,
    probe_features,
    regression_report,
    stratified_folds,
    survival_report,
)
from medgmae.evaluation.probes import PENALTIES

RNG = np.random.default_rng(0)
LABELS = RNG.permutation(np.arange(150) % 3)
FEATURES = RNG.normal(3, 2, (150, 20)) + 2 * np.eye(3, 20)[LABELS]
NUMBERS = FEATURES @ RNG.normal(size=20) + RNG.normal(0, 3, 150) + 40


def test_the_linear_probe_is_logistic_regression_with_the_penalty_that_it_names() -> None:
    folds = stratified_folds(LABELS, 5).numpy()
    found = probe_features(torch.from_numpy(FEATURES), LABELS, folds)
    assert len(found.penalties) == 5
    assert set(found.penalties) <= set(PENALTIES)
    for fold, penalty in enumerate(found.penalties):
        test = folds == fold
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=2000))
        wanted = model.fit(FEATURES[~test], LABELS[~test]).predict_proba(FEATURES[test])
        np.testing.assert_allclose(found.predictions[test], wanted, atol=2e-3)  # float32, and where descent stops
    np.testing.assert_allclose(found.predictions.sum(1), 1, atol=1e-12)


@pytest.mark.parametrize("width", [20, 300])
def test_the_linear_probe_of_numbers_is_ridge_regression(width: int) -> None:
    features = np.concatenate([FEATURES, RNG.normal(size=(150, width - 20)), np.ones((150, 1))], axis=1)
    folds = even_folds(150).numpy()
    found = probe_features(features, NUMBERS, folds, task="regress")
    for fold, penalty in enumerate(found.penalties):
        test = folds == fold
        wanted = make_pipeline(StandardScaler(), Ridge(alpha=penalty)).fit(features[~test], NUMBERS[~test])
        np.testing.assert_allclose(found.predictions[test], wanted.predict(features[test]), rtol=1e-7)


def test_the_penalty_is_that_which_does_best_within_the_training_cases() -> None:
    folds = even_folds(150).numpy()
    for width in (20, 320):
        features = np.concatenate([FEATURES, RNG.normal(size=(150, width - 20))], axis=1)
        found = probe_features(features, NUMBERS, folds, task="regress")
        for fold, penalty in enumerate(found.penalties):
            known, numbers = features[folds != fold], NUMBERS[folds != fold]
            inner, losses = even_folds(len(known), 3, 42).numpy(), []
            for alpha in PENALTIES:
                model, loss = make_pipeline(StandardScaler(), Ridge(alpha=alpha)), 0.0
                for part in range(3):
                    fitted = model.fit(known[inner != part], numbers[inner != part])
                    loss += ((fitted.predict(known[inner == part]) - numbers[inner == part]) ** 2).sum()
                losses.append(loss)
            assert penalty == PENALTIES[int(np.argmin(losses))]


def test_numbers_that_are_in_the_features_are_found() -> None:
    for probe, least in (("linear", 0.5), ("knn", 0.2)):
        found = probe_features(FEATURES, NUMBERS, even_folds(150), task="regress", probe=probe)
        assert regression_report(found.predictions, NUMBERS, resamples=0)["r2"].value > least


def test_nothing_is_learned_from_test_cases() -> None:
    """Labels drawn by chance: whoever peeks, at the penalty or the weights, does better than chance."""
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(240, 300)), np.arange(240) % 2
    for probe, k in (("linear", 5), ("knn", 1)):
        found = probe_features(features, labels, stratified_folds(labels), probe=probe, k=k)
        auc = classification_report(found.predictions, labels, resamples=0)["auc"].value
        assert 0.35 < auc < 0.65, probe


def test_patients_stay_together_within_the_training_cases_too() -> None:
    """Ten copies of each of 24 cases: apart they would be recognised, and the weakest penalty would look best."""
    rng = np.random.default_rng(2)
    patients = np.repeat(np.arange(24), 10)
    labels = (patients % 2).astype(int)
    features = rng.normal(size=(24, 60))[patients] + 0.01 * rng.normal(size=(240, 60))
    folds = stratified_folds(labels, 3, groups=patients)
    together = probe_features(features, labels, folds, groups=patients).penalties
    apart = probe_features(features, labels, folds).penalties
    assert max(apart) < min(together)


def test_neighbours_are_those_of_the_training_cases() -> None:
    folds = stratified_folds(LABELS, 3).numpy()
    found = probe_features(FEATURES, LABELS, folds, probe="knn", k=7)
    assert found.penalties == ()
    for fold in range(3):
        test = folds == fold
        wanted = knn_shares(FEATURES[~test], LABELS[~test], FEATURES[test], 7)
        torch.testing.assert_close(found.predictions[torch.from_numpy(test)], wanted)
    numbers = probe_features(FEATURES, NUMBERS, folds, task="regress", probe="knn", k=3).predictions
    distances = np.linalg.norm(FEATURES[folds != 0] - FEATURES[folds == 0][0], axis=1)
    assert float(numbers[folds == 0][0]) == pytest.approx(NUMBERS[folds != 0][distances.argsort()[:3]].mean())


def test_too_few_training_cases_to_choose_get_the_usual_penalty() -> None:
    labels = np.array([0, 1] * 2)
    found = probe_features(FEATURES[:4], labels, [0, 0, 1, 1])
    assert found.penalties == (1.0, 1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"folds": np.zeros(150)}, "all cases are in fold 0.0; expected two folds or more"),
        ({"folds": (LABELS != 1).astype(int)}, "class 1 has 0; they are what is trained on to test fold 0"),
        ({"folds": np.zeros(4)}, "features has 150 cases and folds has 4"),
        ({"task": "rank"}, "task must be 'classify' or 'regress', got 'rank'"),
        ({"probe": "svm"}, "probe must be 'linear' or 'knn', got 'svm'"),
        ({"targets": NUMBERS}, "labels must be whole numbers"),
        ({"targets": NUMBERS, "task": "regress", "probe": "knn", "k": 200}, "k must be 1 to 120"),
        ({"groups": ["a"] * 3}, "groups has 3 cases; expected 150"),
    ],
)
def test_what_cannot_be_probed_is_said(change: dict[str, Any], words: str) -> None:
    arguments = {"features": FEATURES, "targets": LABELS, "folds": stratified_folds(LABELS, 5), **change}
    with pytest.raises(ValueError, match=words):
        probe_features(**arguments)


def test_reports_of_folds() -> None:
    folds = np.array(["a", "b", "c"])[stratified_folds(LABELS, 3).numpy()]
    shares = probe_features(FEATURES, LABELS, folds).predictions
    found = fold_report(classification_report, shares, LABELS, folds=folds, resamples=50)
    assert list(found.folds) == ["a", "b", "c"]
    for fold, row in found.folds.items():
        alone = classification_report(shares[folds == fold], LABELS[folds == fold], resamples=0)
        assert row == {name: one.value for name, one in alone.items()}
    assert found.mean["auc"] == pytest.approx(np.mean([row["auc"] for row in found.folds.values()]))
    assert found.pooled == classification_report(shares, LABELS, resamples=50)
    assert found.undefined == {}
    folds[LABELS == 2] = "a"
    part = fold_report(classification_report, shares, LABELS, folds=folds, resamples=0)
    assert list(part.undefined) == ["b", "c"]
    assert "class 2 has 0" in part.undefined["b"]
    assert part.mean == part.folds["a"]
    times, events = RNG.random(150), RNG.random(150) < 0.5
    survival = fold_report(survival_report, NUMBERS, times, events, folds=folds, resamples=0)
    assert survival.pooled["concordance"].value == concordance_index(NUMBERS, times, events)


# The command


def table_of(path: Path, labels: list[Any], features: NDArray[Any] | None = None, **columns: list[Any]) -> Path:
    """A CSV file of features, by default such that tell two classes apart."""
    n = len(labels)
    rng = np.random.default_rng(3)
    numbers = rng.normal(size=(n, 6)) if features is None else features
    if features is None:
        numbers[:, 1] += 1.5 * (np.arange(n) % 2)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "path", "series", "kind", *columns, *(f"f{k}" for k in range(numbers.shape[1]))])
        for i in range(n):
            cells = [column[i] for column in columns.values()]
            writer.writerow([f"s{i}", f"{i}.nii", "", labels[i], *cells, *numbers[i]])
    return path


KINDS = ["healthy", "tumour"] * 30


def test_features_of_scans_are_probed_in_every_format(tmp_path: Path) -> None:
    """From scans and a table to metrics: what the four kinds of file hold is the same."""
    for i in range(8):
        small_scan(tmp_path / f"scan{i}.nii", i, 32)
    rows = "".join(f"scan{i}.nii,case {i},{'ab'[i % 2]},p{i}\n" for i in range(8))
    (tmp_path / "cases.csv").write_text(f"path,id,label,patient\n{rows}")
    name, tables = saved_nano(tmp_path / "model"), {}
    for ending in ("csv", "npy", "safetensors", "parquet"):
        out = tmp_path / f"features.{ending}"
        done = run("features", tmp_path / "cases.csv", "--model", name, "--input", "size=[32,32,32]", "--out", out)
        assert done.exit_code == 0, done.stderr
        tables[ending] = read_features(out)
        result = run(
            "probe", out, "--label", "label", "--folds", "2", "--neighbours", "2", "--group", "patient", "--json"
        )
        assert result.exit_code == 0, result.stderr
        facts = json.loads(result.stdout)
        assert (facts["cases"], facts["groups"], facts["classes"]) == (8, 8, {"a": 4, "b": 4})
    for table in tables.values():
        assert table.names == [f"case {i}" for i in range(8)]
        assert [cells["label"] for cells in table.cells] == ["a", "b"] * 4
        np.testing.assert_array_equal(table.vectors, tables["npy"].vectors)


def test_the_command_reports_what_the_library_computes(tmp_path: Path) -> None:
    features = table_of(tmp_path / "f.csv", KINDS)
    result = run("probe", features, "--label", "kind", "--probe", "linear", "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    labels = np.arange(60) % 2
    folds = stratified_folds(labels, 5, 42)
    found = probe_features(read_features(features).vectors, labels, folds)
    wanted = fold_report(classification_report, found.predictions, labels, folds=folds, seed=42)
    linear = facts["probes"]["linear"]
    for name, one in wanted.pooled.items():
        assert linear["pooled"][name] == pytest.approx(one._asdict())
        assert linear["mean"][name] == pytest.approx(wanted.mean[name])
        assert [row[name] for row in linear["folds"].values()] == pytest.approx(
            [r[name] for r in wanted.folds.values()]
        )
    assert tuple(linear["penalties"].values()) == found.penalties
    assert facts["positive"] == "tumour"
    text = run("probe", features, "--label", "kind").stdout
    assert "60 cases, 6 features; kind: healthy (30), tumour (30); tumour is positive" in text
    assert "knn, 5 neighbours" in text
    auc = next(line.split() for line in text.splitlines() if line.startswith("auc"))
    assert auc[-4] == f"{wanted.pooled['auc'].value:.3f}"
    assert auc[-3:] == [f"{wanted.pooled['auc'].low:.3f}", "to", f"{wanted.pooled['auc'].high:.3f}"]


@pytest.mark.parametrize("task", ["classify", "regress"])
def test_the_folder_holds_all_of_it(tmp_path: Path, task: str) -> None:
    features = table_of(tmp_path / "f.csv", KINDS, age=[50 + i % 13 for i in range(60)])
    label, out = {"classify": "kind", "regress": "age"}[task], tmp_path / "results/probe"
    args = ("probe", features, "--label", label, "--task", task, "--out", out, "--json")
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    names = {"probe.json", "metrics.csv", "predictions.csv", "linear.png", "knn.png"}
    assert {path.name for path in out.iterdir()} == names
    facts = json.loads(result.stdout)
    assert json.loads((out / "probe.json").read_text()) == facts
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 2 * len(facts["probes"]["knn"]["pooled"])
    for row in rows:
        assert float(row["pooled"]) == facts["probes"][row["probe"]]["pooled"][row["metric"]]["value"]
    rows = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == [f"s{i}" for i in range(60)]
    if task == "classify":
        guessed = [[float(row["linear_healthy"]), float(row["linear_tumour"])] for row in rows]
        report = classification_report(guessed, [int(row["kind"] == "tumour") for row in rows], resamples=0)
        assert report["auc"].value == pytest.approx(facts["probes"]["linear"]["pooled"]["auc"]["value"])
    else:
        report = regression_report([float(row["linear"]) for row in rows], [float(row["age"]) for row in rows])
        assert report["mae"].value == pytest.approx(facts["probes"]["linear"]["pooled"]["mae"]["value"], rel=1e-6)
    before = (out / "metrics.csv").read_bytes()
    assert "probe.json exists" in run(*args).stderr
    assert run(*args, "--overwrite").exit_code == 0
    assert (out / "metrics.csv").read_bytes() == before  # the same seed


def test_labels_come_from_a_table_in_any_order(tmp_path: Path) -> None:
    features = table_of(tmp_path / "f.csv", KINDS)
    order = np.random.default_rng(4).permutation(40)
    rows = "".join(f"s{i};{KINDS[i]};patient {i // 2}\r\n" for i in order)
    (tmp_path / "labels.csv").write_bytes(f"\ufeffid;Diagnose;Patientin für Ä\r\n{rows}".encode())
    args = ("probe", features, "--labels", tmp_path / "labels.csv", "--label", "Diagnose", "--json")
    result = run(*args, "--group", "Patientin für Ä")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["cases"], facts["groups"]) == (40, 20)
    assert "20 of 60 scans have no row in" in result.stderr
    carried = table_of(tmp_path / "g.csv", KINDS[:40], read_features(features).vectors[:40])
    direct = json.loads(run("probe", carried, "--label", "kind", "--json").stdout)
    assert json.loads(run(*args).stdout)["probes"] == direct["probes"]


def test_folds_of_a_column(tmp_path: Path) -> None:
    folds = [i // 2 % 3 + 8 for i in range(60)]
    features = table_of(tmp_path / "f.csv", KINDS, fold=folds, patient=[f"p{i % 3}" for i in range(60)])
    args = ("probe", features, "--label", "kind", "--fold-column", "fold", "--probe", "knn", "--json")
    facts = json.loads(run(*args).stdout)
    assert list(facts["probes"]["knn"]["folds"]) == ["8", "9", "10"]
    result = run(*args, "--group", "patient")
    assert result.exit_code == 1
    assert "3 of 3 groups lie in more than one fold: p0 (8, 9), p1 (10, 8)" in result.stderr
    assert run(*args, "--folds", "5").exit_code == 2
    lonely = [0] * 20 + [1] * 39 + [2]  # a fold of one case
    result = run("probe", table_of(tmp_path / "g.csv", KINDS, fold=lonely), *args[2:])
    assert result.exit_code == 0, result.stderr
    assert "fold 2 has no metrics of its own: of 1 cases, class 0 has 0" in result.stderr
    assert json.loads(result.stdout)["probes"]["knn"]["folds"]["2"]["auc"] is None


@pytest.mark.parametrize(
    ("kinds", "args", "words"),
    [
        (KINDS, ("--label", "grade"), "no column 'grade' to learn; its columns are kind, path, series"),
        (["a", "", "b", "a"] * 5, (), "5 cases have no label in the column 'kind'"),
        (["a"] * 9, (), "the column 'kind' has 'a' (9); expected cases of two classes"),
        (["a"] * 9 + ["b"] * 3, (), "of 12 cases, class b has 3; each of the 5 folds needs one to test on"),
        (KINDS, ("--task", "regress"), "60 cases have labels that are not finite numbers: s0 (kind = 'healthy')"),
        (KINDS, ("--group", "patient"), "there is no column 'patient'; there are kind, path, series"),
        (KINDS, ("--group", "series"), "the column 'series' is empty for 60 scans (s0, s1, s2, s3, s4 and 55 more)"),
        (KINDS, ("--fold-column", "kind"), "they are what is trained on to test fold healthy"),
        (["a", "b"] * 3, ("--folds", "2", "--neighbours", "9"), "k must be 1 to 3, the number of training cases"),
    ],
)  # fmt: skip
def test_what_the_command_cannot_probe_is_one_message(
    tmp_path: Path, kinds: list[str], args: tuple[str, ...], words: str
) -> None:
    label = () if "--label" in args else ("--label", "kind")
    result = run("probe", table_of(tmp_path / "f.csv", kinds), *label, *args)
    assert result.exit_code in (1, 2)
    assert words in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("id,label\ns0,a\ns99,b\n", "has no features of 1 scan (s99) of"),
        ("case,label\ns0,a\n", "has the columns case, label; expected name or id with the names of the scans"),
        ("id,label\ns0,a\ns0,b\n", "has 1 scan (s0) twice"),
        ("id,label\n", "has no rows; expected a row for each case"),
        ("id,label\ns0\n", "row 2: 1 cells; expected 2"),
        ("id,id\ns0,1\n", "a column has no name, or that of another"),
    ],
)
def test_tables_of_labels_that_do_not_fit(tmp_path: Path, table: str, words: str) -> None:
    (tmp_path / "labels.csv").write_text(table)
    features = table_of(tmp_path / "f.csv", KINDS)
    result = run("probe", features, "--labels", tmp_path / "labels.csv", "--label", "label")
    assert result.exit_code == 1
    assert words in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"path,label\na.nii,1\n", "expected name, ..., f0, f1, ..."),
        ("a.csv", b"name,f0\na,1\na,2\n", "has 1 scan (a) twice"),
        ("a.csv", b"name,f0\na,nan\n", "NaN or infinite features of 1 scan (a)"),
        ("a.csv", b"name,f0\na,b\n", "no file of features that can be read"),
        ("a.csv", b"name,f0,f1\na,1\n", "row 2 has 2 cells; expected 3"),
        ("a.csv", b"name,f0\n", "no file of features that can be read"),
        ("a.npy", b"nothing", "no file of features that can be read"),
        ("a.safetensors", b"nothing", "no file of features that can be read"),
        ("a.txt", b"", "expected what medgmae features wrote (.safetensors, .parquet, .csv, .npy or a folder"),
    ],
)
def test_what_is_no_file_of_features_is_said(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    result = run("probe", tmp_path / name, "--label", "kind")
    assert result.exit_code in (1, 2)
    assert words in result.stderr
    assert "Traceback" not in result.stderr
