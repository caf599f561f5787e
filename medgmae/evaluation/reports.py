"""All metrics of a set of predictions with their bootstrap intervals, from the same resamples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from medgmae.evaluation import resampled
from medgmae.evaluation.arguments import (
    Values,
    array_of,
    check_classes,
    check_rows,
    class_labels,
    numbers_of,
    table_of,
)
from medgmae.evaluation.intervals import Counts, Interval, intervals
from medgmae.evaluation.resampled import Flags, Numbers

_NAMES = (
    "auc", "average_precision", "accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity", "brier", "ece"
)  # fmt: skip
_MACRO = -1  # in place of the index of a label


class MultilabelReport(NamedTuple):
    """Metrics of several labels that do not exclude each other.

    labels: of each label by its index, as :func:`classification_report` names them. macro: their mean over the labels
    that are defined. undefined: why a label has no metrics (NaN), by its index.
    """

    labels: tuple[dict[str, Interval], ...]
    macro: dict[str, Interval]
    undefined: dict[int, str]


class FoldReport(NamedTuple):
    """Metrics of out-of-fold predictions.

    folds: of each fold's test cases, by its name. mean: their plain average over the folds in which they are defined.
    pooled: of all cases at once, with intervals. undefined: why a fold has no metrics (NaN), such as a class without a
    case.
    """

    folds: dict[Any, dict[str, float]]
    mean: dict[str, float]
    pooled: dict[str, Interval]
    undefined: dict[Any, str]


def fold_report(
    report: Callable[..., dict[str, Interval]],
    *arrays: Values,
    folds: Values,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    groups: Values | None = None,
) -> FoldReport:
    """A report per fold, their mean, and one of all folds pooled.

    Args:
        report: such as :func:`classification_report`, :func:`regression_report` or :func:`survival_report`.
        arrays: what it takes, (n, ...) each; predictions are those of the model that was not trained on the case.
        folds: (n,) the fold in which each case was a test case, numbers or texts.
        resamples, confidence, seed, groups: of the pooled report; see :func:`bootstrap_interval`.

    Raises:
        ValueError: not one fold per case; and what ``report`` raises of all cases.
    """
    columns, fold_of_case = [array_of(one) for one in arrays], array_of(folds)
    pooled = report(*columns, resamples=resamples, confidence=confidence, seed=seed, groups=groups)
    check_rows(fold_of_case, "folds", columns[0], "predictions")
    found: dict[Any, dict[str, float]] = {}
    undefined: dict[Any, str] = {}
    for fold in np.unique(fold_of_case):
        part = fold_of_case == fold
        try:
            values = {name: one.value for name, one in report(*(c[part] for c in columns), resamples=0).items()}
        except ValueError as error:
            undefined[fold.item()] = str(error)
            values = dict.fromkeys(pooled, np.nan)
        found[fold.item()] = values
    table = {name: [row[name] for row in found.values() if not np.isnan(row[name])] for name in pooled}
    mean = {name: float(np.mean(values)) if values else np.nan for name, values in table.items()}
    return FoldReport(found, mean, pooled, undefined)


def classification_report(
    probabilities: Values,
    labels: Values,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    groups: Values | None = None,
) -> dict[str, Interval]:
    """Metrics of a classifier's probabilities, each with its bootstrap interval, by their names:

    - auc: area under the ROC curve.
    - average_precision: area under the precision-recall curve, without interpolation.
    - accuracy, balanced_accuracy (mean recall of the classes), f1, sensitivity, specificity: of the class with the
      largest probability, the smaller label in a tie.
    - brier: mean squared error of the probability (Brier 1950; with more than two classes, his score divided by their
      number).
    - ece: expected calibration error (Guo et al. 2017) in ten bins of equal width: of the probability of class 1 where
      there are two, of the largest probability where there are more.

    With two classes, class 1 is the positive one; with more, auc, average_precision, f1, sensitivity, specificity and
    brier are means over the classes, each against the rest. All are between 0 and 1. Resamples without a case of some
    class are left out where a metric needs one (see :func:`bootstrap_interval`).

    Args:
        probabilities: (n, K), K >= 2, rows sum to 1; of a model with one output p, ``[1 - p, p]``.
        labels: (n,) whole numbers from 0 to K - 1.
        resamples, confidence, seed, groups: see :func:`bootstrap_interval`.

    Raises:
        ValueError: shapes that do not fit, values that are no probabilities, labels that are not classes, or a class
            without a case; and what :func:`bootstrap_interval` raises.
    """
    shares, classes = table_of(probabilities, "probabilities"), class_labels(labels)
    check_rows(shares, "probabilities", classes)
    _check_range(shares)
    off = np.abs(shares.sum(1) - 1)
    if off.max() > 1e-3:
        raise ValueError(
            f"probabilities of case {int(off.argmax())} sum to {shares[off.argmax()].sum():.6g}; expected 1: take the "
            "softmax of logits, in float32"
        )
    if classes.max() >= shares.shape[1]:
        raise ValueError(
            f"labels must be 0 to {shares.shape[1] - 1}, the columns of the probabilities, got {classes.max()}"
        )
    check_classes(classes, shares.shape[1])

    def statistics(counts: Counts) -> dict[str, Numbers]:
        if shares.shape[1] == 2:
            return _two_classes(shares[:, 1], shares.argmax(1) == 1, classes == 1, counts)
        known = [(shares[:, k], classes == k) for k in range(shares.shape[1])]
        predicted = shares.argmax(1)
        return {
            "auc": np.mean([resampled.auc(*one, counts) for one in known], axis=0),
            "average_precision": np.mean([resampled.average_precision(*one, counts) for one in known], axis=0),
            **resampled.votes(predicted, classes, shares.shape[1], counts),
            "brier": np.mean([resampled.mean((share - true) ** 2, counts) for share, true in known], axis=0),
            "ece": resampled.calibration_error(shares.max(1), predicted == classes, counts),
        }

    return intervals(statistics, len(classes), resamples=resamples, confidence=confidence, seed=seed, groups=groups)


def multilabel_report(
    probabilities: Values,
    labels: Values,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    groups: Values | None = None,
) -> MultilabelReport:
    """Metrics of labels that do not exclude each other, of which some may be missing.

    Each label is measured as the two classes of :func:`classification_report`, on the cases that have it; a probability
    above 0.5 is a positive prediction. A label whose known cases are all of one class has NaN for every metric, and is
    left out of the mean over labels. A resample counts for that mean where it does for all of these labels.

    Args:
        probabilities: (n, L), each between 0 and 1.
        labels: (n, L), 0 or 1, and NaN where it is not known.
        resamples, confidence, seed, groups: see :func:`bootstrap_interval`; the same resamples for all labels.

    Raises:
        ValueError: shapes that do not fit, values that are no probabilities, labels other than 0, 1 and NaN; and what
            :func:`bootstrap_interval` raises.
    """
    shares, known = table_of(probabilities, "probabilities", 1), array_of(labels).astype(np.float64)
    _check_range(shares)
    if known.shape != shares.shape:
        raise ValueError(
            f"labels are {known.shape} and probabilities {shares.shape}; expected the same (cases, labels)"
        )
    wrong = ~(np.isin(known, (0, 1)) | np.isnan(known))
    if wrong.any():
        raise ValueError(f"labels must be 0, 1 or NaN for missing, got {known[wrong][0]:g}")
    reasons = {k: reason for k in range(shares.shape[1]) if (reason := _undefined(known[:, k]))}
    defined = [k for k in range(shares.shape[1]) if k not in reasons]

    def statistics(counts: Counts) -> dict[tuple[int, str], Numbers]:
        found: dict[tuple[int, str], Numbers] = {}
        for k in defined:
            rows = ~np.isnan(known[:, k])
            p, positive = shares[rows, k], known[rows, k] == 1
            for name, values in _two_classes(p, p > 0.5, positive, counts[:, rows]).items():
                found[k, name] = values
        for name in _NAMES if defined else ():
            found[_MACRO, name] = np.mean([found[k, name] for k in defined], axis=0)
        return found

    found = intervals(statistics, len(shares), resamples=resamples, confidence=confidence, seed=seed, groups=groups)
    nothing = Interval(np.nan, np.nan, np.nan)
    rows = [{name: found.get((k, name), nothing) for name in _NAMES} for k in (*range(shares.shape[1]), _MACRO)]
    return MultilabelReport(tuple(rows[:-1]), rows[-1], reasons)


def regression_report(
    predictions: Values,
    targets: Values,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    groups: Values | None = None,
) -> dict[str, Interval]:
    """Metrics of predicted numbers, each with its bootstrap interval, by their names:

    - mae, rmse: mean absolute error and root of the mean squared error, in the unit of the targets.
    - r2: coefficient of determination; NaN where all targets are the same.
    - pearson, spearman: correlation of the numbers and of their ranks; NaN where all targets or all predictions are
      the same.

    Args:
        predictions, targets: (n,).
        resamples, confidence, seed, groups: see :func:`bootstrap_interval`.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite numbers; and what :func:`bootstrap_interval` raises.
    """
    guessed, true = numbers_of(predictions, "predictions"), numbers_of(targets, "targets")
    check_rows(guessed, "predictions", true, "targets")

    def statistics(counts: Counts) -> dict[str, Numbers]:
        return {
            "mae": resampled.mean(np.abs(guessed - true), counts),
            "rmse": np.sqrt(resampled.mean((guessed - true) ** 2, counts)),
            "r2": resampled.explained(guessed, true, counts),
            "pearson": resampled.correlation(guessed, true, counts),
            "spearman": resampled.correlation(resampled.ranks(guessed, counts), resampled.ranks(true, counts), counts),
        }

    return intervals(statistics, len(true), resamples=resamples, confidence=confidence, seed=seed, groups=groups)


def _two_classes(shares: Numbers, predicted: Flags, positive: Flags, counts: Counts) -> dict[str, Numbers]:
    """Metrics of the probability of class 1."""
    return {
        "auc": resampled.auc(shares, positive, counts),
        "average_precision": resampled.average_precision(shares, positive, counts),
        **resampled.votes(predicted.astype(np.int64), positive.astype(np.int64), 2, counts),
        "brier": resampled.mean((shares - positive) ** 2, counts),
        "ece": resampled.calibration_error(shares, positive, counts),
    }


def _check_range(shares: Numbers) -> None:
    if shares.min() < 0 or shares.max() > 1:
        raise ValueError(
            f"probabilities are from {shares.min():.6g} to {shares.max():.6g}; expected 0 to 1: take the softmax, or "
            "the sigmoid, of logits"
        )


def _undefined(known: Numbers) -> str:
    """Why a label (n,) has no metrics; empty where it has."""
    found = known[~np.isnan(known)]
    if not len(found):
        return f"none of {len(known)} cases has the label"
    if found.min() == found.max():
        return f"all {len(found)} cases that have the label are {found[0]:g}; expected some of 0 and some of 1"
    return ""
