"""Which cases a run learns from, and which it is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medgmae.evaluation import check_folds, even_folds, stratified_folds
from medgmae.training.settings import TuneSettings
from medgmae.training.tables import TrainingError, expect
from medgmae.training.targets import Targets

Part = tuple[list[int], list[int]]
"""Cases to train on, and cases that are held out."""


def divide(settings: TuneSettings, targets: Targets, rows: Sequence[Mapping[str, str]]) -> tuple[list[Part], Any]:
    """The parts of every run, and the group of each case, None where there are no groups.

    Raises:
        TrainingError: a column that is missing, folds that are not numbered from 0, groups in two folds, too few cases.
        ImportError: scikit-learn is not installed.
    """
    groups = None if settings.group is None else np.array(_column(rows, settings.group, "group"))
    try:
        if settings.folds:
            fold_of_case = _folds(settings, targets, rows, groups)
            held = [[fold == number for fold in fold_of_case] for number in range(settings.folds)]
        else:
            held = [_held_out(settings, targets, rows, groups)]
        if groups is not None:
            for flags in held:
                check_folds(np.array(flags), groups)
    except ValueError as error:
        raise TrainingError(f"the cases cannot be divided: {error}") from error
    parts = []
    for flags in held:
        parts.append(([i for i, out in enumerate(flags) if not out], [i for i, out in enumerate(flags) if out]))
    for number, (training, _) in enumerate(parts):
        present = set(targets.classes[training].tolist()) if training else set()
        absent = set(targets.classes.tolist()) - present
        where = f"fold {number}" if settings.folds else "held_out"
        single = targets.task.kind == "classify" and not targets.task.multilabel
        if not training or (single and absent):
            lost = ", ".join(targets.names[k] for k in sorted(absent)) if training and single else "any class"
            raise TrainingError(f"{where} holds out every case of {lost}; hold out less, or other cases")
    return parts, groups


def _folds(settings: TuneSettings, targets: Targets, rows: Sequence[Mapping[str, str]], groups: Any) -> list[int]:
    count = settings.folds
    if settings.fold is None:
        single = targets.task.kind == "classify" and not targets.task.multilabel
        return _drawn(targets, count, settings.training.seed, groups, strict=single)
    cells = _column(rows, settings.fold, "fold")
    wrong = sorted({cell for cell in cells if cell not in map(str, range(count))})
    missing = sorted(set(map(str, range(count))) - set(cells))
    expect(
        not wrong and not missing,
        f"the column {settings.fold!r} has the folds {', '.join(sorted(set(cells)))}; expected 0 to {count - 1}, as "
        f"folds = {count}",
    )
    return list(map(int, cells))


def _held_out(settings: TuneSettings, targets: Targets, rows: Sequence[Mapping[str, str]], groups: Any) -> list[bool]:
    held_out = settings.held_out
    if isinstance(held_out, str):
        column, _, value = held_out.partition("=")
        found = [cell == value for cell in _column(rows, column, "held_out")]
        expect(any(found), f"held_out={held_out!r}: no case has that value")
        return found
    if held_out == 0:
        return [False] * len(rows)
    count = max(2, round(1 / held_out))  # a share of a third is a fold of three
    return [fold == 0 for fold in _drawn(targets, count, settings.training.seed, groups, strict=False)]


def _drawn(targets: Targets, count: int, seed: int, groups: Any, *, strict: bool) -> list[int]:
    """The fold of every case, stratified; where a class is too rare for that, evenly, unless ``strict``."""
    classes = targets.classes
    if targets.task.kind != "segment":
        try:
            return [int(fold) for fold in stratified_folds(classes, count, seed, groups)]
        except ValueError:
            if strict:
                raise
    return [int(fold) for fold in even_folds(len(classes), count, seed, groups)]


def _column(rows: Sequence[Mapping[str, str]], column: str, setting: str) -> list[str]:
    known = sorted({name for row in rows for name in row})
    expect(
        all(column in row for row in rows),
        f"{setting} names the column {column!r}, and the table has {', '.join(known) or 'none'}",
    )
    return [row[column].strip() for row in rows]
