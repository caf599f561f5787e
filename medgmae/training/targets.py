"""What is predicted of each case: the columns of a table as numbers, checked before anything is computed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from medgmae.training.settings import TaskSettings
from medgmae.training.tables import TrainingError, expect

_SHOWN = 5
_BINS = 10  # of a number, by which folds are stratified


@dataclass(frozen=True)
class Targets:
    """Targets of cases.

    task: what is predicted.
    names: of the outputs: the classes, or the columns.
    values: (n, T) float32. "classify": T = 1, the number of the class; with ``multilabel`` 0, 1 or NaN per column.
        "regress": the numbers. "survive": time and event. "segment": nothing, T = 0.
    """

    task: TaskSettings
    names: list[str]
    values: Tensor

    @property
    def outputs(self) -> int:
        """Width of the head."""
        return 1 if self.task.kind == "survive" else len(self.names)

    @property
    def classes(self) -> Tensor:
        """(n,) int64 by which folds and draws are stratified: the class; the combination of labels; the tenth in which
        the first number lies; the event."""
        if self.task.kind == "classify" and not self.task.multilabel:
            return self.values[:, 0].long()
        if self.task.kind == "survive":
            return self.values[:, 1].long()
        if self.task.kind == "segment":
            return torch.zeros(len(self.values), dtype=torch.int64)
        if self.task.kind == "regress":
            ranks = self.values[:, 0].argsort(stable=True).argsort(stable=True)
            bins = max(1, min(_BINS, len(ranks) // _BINS))
            return ranks * bins // len(ranks)
        rows = [tuple(row) for row in self.values.nan_to_num(2).long().tolist()]
        order = {row: number for number, (row, _) in enumerate(Counter(rows).most_common())}
        return torch.tensor([order[row] for row in rows])

    def counts(self) -> dict[str, int]:
        """Cases of every class; of a column with several questions, those with a 1; empty of numbers."""
        if self.task.kind in ("regress", "segment"):
            return {}
        if self.task.kind == "survive":
            events = int(self.values[:, 1].sum())
            return {"event": events, "no event": len(self.values) - events}
        if self.task.multilabel:
            return {name: int((self.values[:, k] == 1).sum()) for k, name in enumerate(self.names)}
        found = torch.bincount(self.values[:, 0].long(), minlength=len(self.names)).tolist()
        return dict(zip(self.names, found, strict=True))


def read_targets(rows: Sequence[Mapping[str, str]], cases: Sequence[str], task: TaskSettings) -> Targets:
    """The targets in the rows of a table.

    Args:
        rows: column to text, of each case.
        cases: its name, for messages.
        task: what is predicted.

    Raises:
        TrainingError: a column that is missing, cells that are not what the task needs, one class only.
    """
    for column in task.labels:
        if not all(column in row for row in rows):
            known = sorted({name for row in rows for name in row})
            raise TrainingError(
                f"the table has no column {column!r} to learn; its columns are {', '.join(known) or 'none'}: name one "
                "of them with --label"
            )
    cells = [[row[column].strip() for column in task.labels] for row in rows]
    if task.kind == "classify" and not task.multilabel:
        return _classes([one for (one,) in cells], cases, task)
    if task.kind == "segment":
        _refuse([case for case, (cell,) in zip(cases, cells, strict=True) if not cell], "no label map")
        return Targets(task, list(task.regions), torch.zeros(len(cells), 0))
    read = {"classify": _flag, "regress": _number, "survive": _number}[task.kind]
    values, wrong = [], []
    for case, line in zip(cases, cells, strict=True):
        numbers = [read(cell) for cell in line]
        bad = [f"{c} = {cell!r}" for c, cell, n in zip(task.labels, line, numbers, strict=True) if n is None]
        if bad:
            wrong.append(f"{case} ({', '.join(bad)})")
        values.append([math.nan if n is None else n for n in numbers])
    expected = "0, 1 or nothing" if task.kind == "classify" else "finite numbers"
    _refuse(wrong, f"labels that are not {expected}")
    targets = Targets(task, list(task.labels), torch.tensor(values, dtype=torch.float32))
    _check_numbers(targets, cases)
    return targets


def _classes(cells: Sequence[str], cases: Sequence[str], task: TaskSettings) -> Targets:
    column = task.labels[0]
    empty = [case for case, cell in zip(cases, cells, strict=True) if not cell or cell.lower() in ("nan", "na", "none")]
    _refuse(empty, f"no label in the column {column!r}; leave these cases out, or fill it in")
    names = list(task.classes) or sorted(set(cells), key=_by_number)
    unknown = [f"{case} ({cell!r})" for case, cell in zip(cases, cells, strict=True) if cell not in names]
    _refuse(unknown, f"labels that are not of the classes {', '.join(names)}")
    counts = Counter(cells)
    missing = [name for name in names if not counts[name]]
    if len(names) < 2 or missing:
        found = ", ".join(f"{name!r} ({count})" for name, count in counts.most_common(_SHOWN))
        raise TrainingError(
            f"the column {column!r} has {found}" + (f" and no case of {', '.join(missing)}" if missing else "")
            + "; expected cases of two classes or more"
        )  # fmt: skip
    if not task.classes and len(names) > max(2, len(cells) / 2):
        raise TrainingError(
            f"the column {column!r} has {len(names)} different labels in {len(cells)} cases, which are "
            "numbers or names rather than classes; for numbers use --task regress, or list task.classes"
        )
    numbers = [[float(names.index(cell))] for cell in cells]
    return Targets(task, names, torch.tensor(numbers, dtype=torch.float32))


def _check_numbers(targets: Targets, cases: Sequence[str]) -> None:
    """What single cells do not show."""
    values, task = targets.values, targets.task
    if task.kind == "survive":
        time, event = values.unbind(1)
        _refuse([c for c, t in zip(cases, time.tolist(), strict=True) if t < 0], f"a negative time in {task.labels[0]}")
        wrong = [c for c, e in zip(cases, event.tolist(), strict=True) if e not in (0, 1)]
        _refuse(wrong, f"an event in {task.labels[1]} that is neither 0 nor 1")
        expect(bool(event.any()), f"no case has an event: the column {task.labels[1]!r} is 0 everywhere")
        return
    for k, name in enumerate(targets.names):
        known = values[:, k][~values[:, k].isnan()]
        same = len(set(known.tolist())) < 2
        if same and task.kind == "regress":
            raise TrainingError(f"the column {name!r} is {known[0]:g} everywhere; expected numbers that differ")
        if same:
            all_one = f"is {known[0]:g} in all {len(known)} cases that have one" if len(known) else "has no known label"
            raise TrainingError(f"the column {name!r} {all_one}; expected cases of 0 and of 1: leave the column out")


def _refuse(wrong: Sequence[str], what: str) -> None:
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise TrainingError(f"{len(wrong)} cases have {what}: {', '.join(wrong[:_SHOWN])}{more}")


def _by_number(text: str) -> tuple[int, float, str]:
    """Numbers by their size, before names."""
    number = _number(text)
    return (0, number, text) if number is not None else (1, 0.0, text)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _flag(text: str) -> float | None:
    """0, 1, or NaN for an empty cell."""
    if not text or text.lower() in ("nan", "na"):
        return math.nan
    value = _number(text)
    return value if value in (0.0, 1.0) else None


def standardized(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every column, (T,) each; a deviation of 0 counts as 1."""
    array = values.double().numpy()
    deviation = np.where(array.std(0) > 0, array.std(0), 1.0)
    return torch.from_numpy(array.mean(0)).float(), torch.from_numpy(deviation).float()
