"""``medgmae probe``: how much of a label simple models find in saved features."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.common import echo_json, echo_table, reports_errors, shown
from medgmae.cli.feature_tables import FeatureTable, few, read_features
from medgmae.cli.files import complete, keep_inputs, refuse_existing, write_figure
from medgmae.cli.options import gathered, json_option, overwrite_option

_KEYS = ("name", "id")  # columns of a table that say which scan a row is about
_FOLDS = 5


@dataclass(frozen=True)
class Question:
    """What is asked of the features, and how cases are divided."""

    labels: Path | None
    label: str
    task: str
    probe: str
    neighbours: int
    folds: int | None
    fold_column: str | None
    group: str | None
    seed: int

    @property
    def probes(self) -> list[str]:
        """The models that are asked."""
        return ["linear", "knn"] if self.probe == "both" else [self.probe]


question_options = gathered(
    "question",
    Question,
    click.option(
        "--labels",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help='A CSV file with the scans\' names in a column "name" or "id", whose rows are the cases. Without it: the '
        "columns of the table that the features were computed from.",
    ),
    click.option("--label", required=True, metavar="COLUMN", help="The column to predict."),
    click.option("--task", type=click.Choice(["classify", "regress"]), default="classify", help="Classes or numbers."),
    click.option("--probe", type=click.Choice(["linear", "knn", "both"]), default="both", help="The simple model."),
    click.option("--neighbours", type=click.IntRange(1), default=5, help="Of the nearest-neighbour probe."),
    click.option("--folds", type=click.IntRange(2), help=f"How many; classes in equal shares. [{_FOLDS}]"),
    click.option("--fold-column", metavar="COLUMN", help="The fold in which each case is tested, instead of --folds."),
    click.option("--group", metavar="COLUMN", help="Cases to keep together in folds and in intervals: the patient."),
    click.option(
        "--seed", type=click.IntRange(0), default=42, help="Of the folds and the intervals: the same gives the same."
    ),
)


@dataclass(frozen=True)
class Cases:
    """Vectors, targets, folds and groups (or None) of cases, in the order of the features."""

    table: FeatureTable
    targets: medgmae.training.Targets
    folds: list[Any]
    groups: list[str] | None

    @property
    def known(self) -> Any:
        """(n,) classes as numbers, or numbers."""
        values = self.targets.values[:, 0]
        return values.long() if self.targets.task.kind == "classify" else values.double()


@click.command("probe")
@click.argument("features", type=click.Path(path_type=Path, exists=True))
@question_options
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder to write: probe.json, metrics.csv, predictions.csv and a picture of each probe.",
)
@overwrite_option
@json_option
@reports_errors
def probe_command(features: Path, question: Question, out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Measure how well simple models predict a label from FEATURES, what "medgmae features" wrote: out-of-fold
    metrics per fold, their mean, and of all folds pooled with 95 % intervals of a bootstrap over cases or groups.

    linear: logistic or ridge regression, its penalty chosen within the training cases of each fold. knn: the nearest
    training cases. Of two classes, the second in order of number or alphabet is the positive one.
    """
    evaluation = medgmae.evaluation
    outputs = _outputs(out, question.probes)
    keep_inputs([one for one in (features, question.labels) if one], outputs)
    for path in outputs:
        refuse_existing(path, overwrite)
    cases = _cases(features, question)
    report = evaluation.classification_report if question.task == "classify" else evaluation.regression_report
    predictions, facts = {}, _about(features, question, cases)
    for probe in question.probes:
        probed = evaluation.probe_features(
            cases.table.vectors,
            cases.known,
            cases.folds,
            task=question.task,  # type: ignore[arg-type]
            probe=probe,  # type: ignore[arg-type]
            k=question.neighbours,
            groups=cases.groups,
            seed=question.seed,
        )
        found = evaluation.fold_report(
            report, probed.predictions, cases.known, folds=cases.folds, seed=question.seed, groups=cases.groups
        )
        for fold, reason in found.undefined.items():
            click.echo(f"Note: fold {fold} has no metrics of its own: {reason}", err=True)
        predictions[probe] = probed.predictions
        facts["probes"][probe] = {
            "penalties": dict(zip(map(str, found.folds), probed.penalties, strict=False)),
            "folds": {str(fold): _finite(row) for fold, row in found.folds.items()},
            "mean": _finite(found.mean),
            "pooled": {name: _finite(one._asdict()) for name, one in found.pooled.items()},
        }
    if out is not None:
        _write(out, question, cases, predictions, facts, overwrite)
    if as_json:
        echo_json(facts)
    else:
        _print(facts)


# Cases


def _cases(features: Path, question: Question) -> Cases:
    training = medgmae.training
    table = read_features(features)
    if question.labels is not None:
        table = _joined(table, features, question.labels)
    task = training.TaskSettings(kind=question.task, labels=[question.label])
    targets = training.read_targets(table.cells, table.names, task)
    groups = None if question.group is None else _column(table, question.group, "--group")
    return Cases(table, targets, _folds(table, targets, groups, question), groups)


def _joined(table: FeatureTable, features: Path, labels: Path) -> FeatureTable:
    """The scans that have a row in a table, with its cells."""
    columns, *lines = medgmae.data.read_table(labels)
    rows = [dict(zip(columns, cells, strict=True)) for cells in lines]
    key = next((name for name in _KEYS if name in columns), None)
    if key is None:
        raise click.ClickException(
            f"{shown(labels)} has the columns {', '.join(columns) or 'none'}; expected {' or '.join(_KEYS)} with the "
            f"names of the scans in {shown(features)}, such as {table.names[0]}"
        )
    by_name = {row[key]: row for row in rows}
    if len(by_name) < len(rows):
        counted = [row[key] for row in rows]
        twice = sorted({name for name in by_name if counted.count(name) > 1})
        raise click.ClickException(f"{shown(labels)} has {few(twice)} twice; expected each scan once")
    without = sorted(set(by_name) - set(table.names))
    if without:
        raise click.ClickException(
            f"{shown(features)} has no features of {few(without)} of {shown(labels)}; compute them, or leave these "
            f"rows out. Its names are such as {table.names[0]}"
        )
    chosen = [number for number, name in enumerate(table.names) if name in by_name]
    if not chosen:
        raise click.ClickException(f"{shown(labels)} has no rows; expected a row for each case")
    if len(chosen) < len(table.names):
        left = len(table.names) - len(chosen)
        click.echo(f"Note: {left} of {len(table.names)} scans have no row in {shown(labels)}: left out", err=True)
    names = [table.names[number] for number in chosen]
    cells = [{**table.cells[number], **by_name[table.names[number]]} for number in chosen]
    return FeatureTable(names, cells, table.vectors[chosen])


def _column(table: FeatureTable, column: str, option: str) -> list[str]:
    """The cells of a column, all of them filled in."""
    if not all(column in cells for cells in table.cells):
        known = sorted({name for cells in table.cells for name in cells})
        raise click.BadParameter(f"there is no column {column!r}; there are {', '.join(known)}", param_hint=option)
    empty = [name for name, cells in zip(table.names, table.cells, strict=True) if not cells[column].strip()]
    if empty:
        raise click.BadParameter(f"the column {column!r} is empty for {few(empty)}", param_hint=option)
    return [cells[column].strip() for cells in table.cells]


def _folds(
    table: FeatureTable, targets: medgmae.training.Targets, groups: list[str] | None, question: Question
) -> list[Any]:
    """The fold in which each case is tested, as the table says or by chance."""
    evaluation = medgmae.evaluation
    if question.fold_column is not None:
        if question.folds is not None:
            raise click.UsageError("--folds and --fold-column contradict each other; give one of them")
        folds = _column(table, question.fold_column, "--fold-column")
        if groups is not None:
            evaluation.check_folds(folds, groups)
        return list(map(int, folds)) if all(fold.isdecimal() for fold in folds) else folds
    count = question.folds or _FOLDS
    if question.task == "regress":
        return evaluation.even_folds(len(table.names), count, question.seed, groups).tolist()
    rare = [f"{name} has {cases}" for name, cases in targets.counts().items() if cases < count]
    if rare:
        raise click.ClickException(
            f"of {len(table.names)} cases, class {', class '.join(rare)}; each of the {count} folds needs one to test "
            "on: take fewer --folds, or leave the class out"
        )
    return evaluation.stratified_folds(targets.values[:, 0].long(), count, question.seed, groups).tolist()


# Results


def _about(features: Path, question: Question, cases: Cases) -> dict[str, Any]:
    names = cases.targets.names
    classes = {"classes": cases.targets.counts(), "positive": names[1] if len(names) == 2 else None}
    return {
        "medgmae": medgmae.__version__,
        "features": shown(features),
        "cases": len(cases.table.names),
        "width": cases.table.vectors.shape[1],
        "label": question.label,
        "task": question.task,
        **(classes if question.task == "classify" else {}),
        "group": question.group,
        "groups": None if cases.groups is None else len(set(cases.groups)),
        "fold_column": question.fold_column,
        "neighbours": question.neighbours,
        "seed": question.seed,
        "probes": {},
    }


def _print(facts: Mapping[str, Any]) -> None:
    kinds = ", ".join(f"{name} ({count})" for name, count in facts.get("classes", {}).items())
    positive = f"; {facts['positive']} is positive" if facts.get("positive") else ""
    groups = f" of {facts['groups']} groups" if facts["groups"] else ""
    what = f"{facts['label']}: {kinds}{positive}" if kinds else facts["label"]
    click.echo(f"{facts['cases']} cases{groups}, {facts['width']} features; {what}")
    for probe, found in facts["probes"].items():
        penalties = ", ".join(f"{value:g}" for value in found["penalties"].values())
        click.echo(f"\n{probe}" + (f", penalty {penalties}" if penalties else f", {facts['neighbours']} neighbours"))
        heading = [*(f"fold {fold}" for fold in found["folds"]), "mean", "pooled", "95 % interval"]
        rows = [["", *heading]]
        for name, pooled in found["pooled"].items():
            values = [*(row[name] for row in found["folds"].values()), found["mean"][name], pooled["value"]]
            rows.append([name, *map(_number, values), f"{_number(pooled['low'])} to {_number(pooled['high'])}"])
        echo_table(rows)


def _outputs(out: Path | None, probes: Sequence[str]) -> list[Path]:
    names = ("probe.json", "metrics.csv", "predictions.csv", *(f"{probe}.png" for probe in probes))
    return [] if out is None else [out / name for name in names]


def _write(
    out: Path,
    question: Question,
    cases: Cases,
    predictions: Mapping[str, Any],
    facts: Mapping[str, Any],
    overwrite: bool,
) -> None:
    """The folder with all results; the pictures first, the facts last."""
    out.mkdir(parents=True, exist_ok=True)
    visualize, names = medgmae.visualize, cases.targets.names
    for probe, found in predictions.items():
        title = f"{question.label}, {probe} probe"
        if question.task == "classify":
            figure = visualize.classification_figure(found, cases.known, names, folds=cases.folds, title=title)
        else:
            figure = visualize.regression_figure(
                found, cases.known, folds=cases.folds, label=question.label, title=title
            )
        write_figure(figure, out / f"{probe}.png", overwrite)
    _write_table(out / "predictions.csv", _guesses(question, cases, predictions), overwrite)
    _write_table(out / "metrics.csv", _metrics(facts["probes"]), overwrite)
    with complete(out / "probe.json", overwrite) as place:
        place.write_text(json.dumps(facts, indent=2, allow_nan=False), encoding="utf-8")


def _guesses(question: Question, cases: Cases, predictions: Mapping[str, Any]) -> list[list[Any]]:
    """A row per case: what is known of it, and of each probe the probability of each class, or the number."""
    columns = ["name", question.label, "fold"]
    for probe in predictions:
        columns += [f"{probe}_{name}" for name in cases.targets.names] if question.task == "classify" else [probe]
    rows = []
    for n, (name, cells) in enumerate(zip(cases.table.names, cases.table.cells, strict=True)):
        guesses = [guess for found in predictions.values() for guess in found[n].reshape(-1).tolist()]
        rows.append([name, cells[question.label], cases.folds[n], *(f"{guess:.9g}" for guess in guesses)])
    return [columns, *rows]


def _metrics(probes: Mapping[str, Any]) -> list[list[Any]]:
    """A row per probe and metric."""
    folds = [f"fold_{fold}" for fold in next(iter(probes.values()))["folds"]]
    rows: list[list[Any]] = [["probe", "metric", *folds, "mean", "pooled", "low", "high"]]
    for probe, one in probes.items():
        for name, pooled in one["pooled"].items():
            each = [row[name] for row in one["folds"].values()]
            rows.append([probe, name, *each, one["mean"][name], pooled["value"], pooled["low"], pooled["high"]])
    return rows


def _write_table(path: Path, rows: Sequence[Sequence[Any]], overwrite: bool) -> None:
    """Rows, the first of them the columns; what is not defined is empty."""
    with complete(path, overwrite) as place, place.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """None for what is not defined, which JSON has."""
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
