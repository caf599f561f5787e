"""What the functions of this wing are given, checked: scores, labels, groups of cases. And the optional libraries."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Values: TypeAlias = Tensor | NDArray[Any] | Sequence[Any]


def library(module: str) -> Any:
    """A module of scikit-learn.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            "evaluation needs scikit-learn, which is not installed: pip install medgmae[evaluation]"
        ) from error


def array_of(values: Values) -> NDArray[Any]:
    """As an array of numpy; floating-point tensors as float64."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def table_of(values: Values, name: str, least: int = 2) -> NDArray[np.float64]:
    """(n, at least ``least``) finite float64."""
    table = array_of(values)
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] < least:
        raise ValueError(f"{name} must be (cases, {least} or more columns), got {tuple(table.shape)}")
    return _finite(table, name)


def numbers_of(values: Values, name: str) -> NDArray[np.float64]:
    """(n,) finite float64."""
    numbers = array_of(values)
    if numbers.ndim != 1 or len(numbers) < 1:
        raise ValueError(f"{name} must be (cases,), got {tuple(numbers.shape)}")
    return _finite(numbers, name)


def _finite(values: NDArray[Any], name: str) -> NDArray[np.float64]:
    values = values.astype(np.float64)
    bad = ~np.isfinite(values)
    if bad.any():
        cases = int(bad.reshape(len(bad), -1).any(1).sum())
        raise ValueError(f"{name} must be finite, got {int(bad.sum())} NaN or infinite values in {cases} cases")
    return values


def class_labels(values: Values) -> NDArray[np.int64]:
    """(n,) whole numbers from 0 on."""
    labels = array_of(values)
    if labels.ndim != 1 or len(labels) < 1:
        raise ValueError(f"labels must be (cases,), got {tuple(labels.shape)}")
    if labels.dtype.kind not in "iub" or labels.min() < 0:
        kind = f"{labels.dtype}" + (f" from {labels.min()} on" if labels.dtype.kind in "iuf" else "")
        raise ValueError(f"labels must be whole numbers from 0 on, got {kind}; leave out cases without a label")
    return labels.astype(np.int64)


def check_rows(values: NDArray[Any], name: str, labels: NDArray[Any], other: str = "labels") -> None:
    """Both are of the same number of cases."""
    if len(values) != len(labels):
        raise ValueError(f"{name} has {len(values)} cases and {other} has {len(labels)}; expected the same number")


def check_classes(labels: NDArray[np.int64], classes: int, least: int = 1, why: str = "") -> None:
    """Every class has at least ``least`` cases, and there are at least two."""
    why = why or "metrics of a class without cases are not defined"
    counts = np.bincount(labels, minlength=classes)
    if len(counts) < 2:
        raise ValueError(f"all {len(labels)} cases have the label 0; expected two classes or more")
    rare = [f"{label} has {count}" for label, count in enumerate(counts) if count < least]
    if rare:
        raise ValueError(f"of {len(labels)} cases, class {', class '.join(rare)}; {why}")


def group_numbers(groups: Values, cases: int) -> NDArray[np.int64]:
    """The group of each case, numbered from 0 in the order in which they first come.

    Raises:
        ValueError: not one group per case, or cases whose group is None, NaN or an empty text.
    """
    names = array_of(groups)
    if names.ndim != 1:
        raise ValueError(f"groups must be (cases,), got {tuple(names.shape)}")
    if len(names) != cases:
        raise ValueError(f"groups has {len(names)} cases; expected {cases}, one group for each")
    missing = sum(name is None or name != name or name == "" for name in names.tolist())
    if missing:
        raise ValueError(f"{missing} of {cases} cases have no group; expected one, such as a patient, for each")
    _, first, sorted_numbers = np.unique(names, return_index=True, return_inverse=True)
    numbers: NDArray[np.int64] = first.argsort().argsort()[sorted_numbers].astype(np.int64)
    return numbers
