"""What a fine-tuned model says of cases that it has not learned from: tables, metrics, a picture."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medgmae.data.store import write_whole
from medgmae.evaluation import (
    Interval,
    classification_report,
    multilabel_report,
    regression_report,
    survival_report,
)
from medgmae.training.targets import Targets
from medgmae.training.tuned import columns_of, probabilities

METRICS, PREDICTIONS, PICTURE = "metrics.json", "predictions.csv", "metrics.png"

_log = logging.getLogger("medgmae")


@dataclass(frozen=True)
class Results:
    """Outputs for cases that were held out.

    cases: numbers of the cases, in the order of the table.
    logits: (n, outputs), numbers in their own units.
    fold: (n,) the run that held each case out.
    """

    cases: list[int]
    logits: Tensor
    fold: list[int]


def joined(results: Sequence[Results]) -> Results:
    """The results of several folds, in the order of the table."""
    cases = [case for one in results for case in one.cases]
    order = np.argsort(cases, kind="stable").tolist()
    logits, fold = torch.cat([one.logits for one in results]), [fold for one in results for fold in one.fold]
    return Results([cases[i] for i in order], logits[order], [fold[i] for i in order])


def report(targets: Targets, results: Results, groups: Any = None, resamples: int = 1000) -> dict[str, Any]:
    """Metrics with bootstrap intervals, by name; of several outputs by the output's name first. A metric that the cases
    do not define is left out."""
    task, values = targets.task, targets.values[results.cases]
    said = probabilities(results.logits, task)
    options: dict[str, Any] = {"resamples": resamples}
    if groups is not None:
        options["groups"] = groups[results.cases]
    if task.kind == "survive":
        return _defined(survival_report(said[:, 0], values[:, 0], values[:, 1], **options))
    if task.kind == "regress":
        found = {
            name: _defined(regression_report(said[:, k], values[:, k], **options))
            for k, name in enumerate(targets.names)
        }
        return found[targets.names[0]] if len(found) == 1 else found
    if task.multilabel:
        several = multilabel_report(said, values, **options)
        rows = {name: _defined(row) for name, row in zip(targets.names, several.labels, strict=True)}
        return rows[targets.names[0]] if len(rows) == 1 else {"macro": _defined(several.macro), **rows}
    return _defined(classification_report(said, values[:, 0].long(), **options))


def score(targets: Targets, results: Results, name: str) -> float:
    """One metric of :func:`report`, NaN where the cases do not define it."""
    try:
        found = report(targets, results, resamples=0)
    except ValueError:  # a class without a case
        return math.nan
    value = found.get("macro", found).get(name)
    return math.nan if value is None else float(value["value"])


def write_results(
    folder: Path, targets: Targets, results: Results, names: Sequence[str], about: Mapping[str, Any]
) -> None:
    """Write predictions.csv, metrics.png where it can be drawn, and last metrics.json.

    Args:
        folder: of the run.
        targets: of all cases.
        results: of those held out.
        names: of all cases.
        about: what metrics.json begins with.
    """
    write_whole(folder / PREDICTIONS, _table(targets, results, names).encode())
    _draw(folder / PICTURE, targets, results)
    write_whole(folder / METRICS, (json.dumps(plain(about), indent=2) + "\n").encode())


def read_results(folder: Path, names: Sequence[str], outputs: Sequence[str], fold: int) -> Results:
    """The results of a fold that :func:`write_results` has written."""
    rows = list(csv.DictReader(io.StringIO((folder / PREDICTIONS).read_text(encoding="utf-8"))))
    place = {name: case for case, name in enumerate(names)}
    logits = torch.tensor([[float(row[f"output_{name}"]) for name in outputs] for row in rows], dtype=torch.float32)
    return Results([place[row["name"]] for row in rows], logits, [fold] * len(rows))


def output_names(targets: Targets) -> list[str]:
    """Names of the outputs as the columns of logits have them."""
    return ["risk"] if targets.task.kind == "survive" else targets.names


def _table(targets: Targets, results: Results, names: Sequence[str]) -> str:
    task, text = targets.task, io.StringIO()
    outputs, said = output_names(targets), probabilities(results.logits, task)
    writer = csv.writer(text, lineterminator="\n")
    extra = [f"output_{name}" for name in outputs]
    writer.writerow(["name", "fold", *task.labels, *columns_of(targets.names, task), *extra])
    for case, fold, row, logits in zip(
        results.cases, results.fold, said.tolist(), results.logits.tolist(), strict=True
    ):
        truth = [_cell(targets, value) for value in targets.values[case].tolist()]
        writer.writerow([names[case], fold, *truth, *map(repr, row), *map(repr, logits)])
    return text.getvalue()


def _cell(targets: Targets, value: float) -> str:
    if targets.task.kind == "classify" and not targets.task.multilabel:
        return targets.names[int(value)]
    return "" if math.isnan(value) else f"{value:.9g}"


def _draw(path: Path, targets: Targets, results: Results) -> None:
    """ROC, precision-recall, confusion and calibration of classes."""
    task = targets.task
    if (
        task.kind != "classify"
        or len(targets.names) < 2 - task.multilabel
        or (len(targets.names) > 1 and task.multilabel)
    ):
        return
    from medgmae.visualize import classification_figure

    said, truth = probabilities(results.logits, task), targets.values[results.cases, 0]
    names = targets.names
    if task.multilabel:  # one question: its two answers are two classes
        known = ~truth.isnan()
        said, truth = torch.cat([1 - said, said], 1)[known], truth[known]
        names = [f"not {names[0]}", names[0]]
    try:
        figure = classification_figure(
            said, truth.long(), names, folds=results.fold if len(set(results.fold)) > 1 else None
        )
        figure.savefig(path)
    except (ImportError, ValueError) as error:
        _log.warning("%s: no picture: %s", path, error)


def _defined(found: Mapping[str, Interval]) -> dict[str, Any]:
    """Value and interval of every metric that has one."""
    return {name: one._asdict() for name, one in found.items() if not math.isnan(one.value)}


def plain(value: Any) -> Any:
    """With None for what is not finite: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
