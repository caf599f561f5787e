"""Metrics of many resamples at once, from how often each case was drawn.

Cases are sorted once and not in every resample. ``counts`` is (b, n) throughout; results are (b,), NaN where a metric
is not defined.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medgmae.evaluation.intervals import Counts

Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]

BINS = 10
"""Of the calibration error, of equal widths."""


def auc(scores: Numbers, positive: Flags, counts: Counts) -> Numbers:
    """Area under the ROC curve: the share of pairs of a positive and a negative case in which the positive has the
    higher score, a tie being half of one (Mann and Whitney 1947)."""
    order, starts = _sorted_runs(scores)
    up = np.add.reduceat((counts * positive)[:, order], starts, axis=1)
    down = np.add.reduceat((counts * ~positive)[:, order], starts, axis=1)
    below = down.cumsum(1) - down / 2
    return ratio((up * below).sum(1), up.sum(1) * down.sum(1))


def average_precision(scores: Numbers, positive: Flags, counts: Counts) -> Numbers:
    """The precision at each threshold times the recall that is gained there, summed, without interpolation, as
    scikit-learn has it."""
    order, starts = _sorted_runs(-scores)
    hits = np.add.reduceat((counts * positive)[:, order], starts, axis=1)
    claimed = np.add.reduceat(counts[:, order], starts, axis=1).cumsum(1)
    precision = np.divide(hits.cumsum(1), claimed, out=np.zeros_like(claimed), where=claimed > 0)
    return ratio((hits * precision).sum(1), hits.sum(1))


def votes(predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int, counts: Counts) -> dict[str, Numbers]:
    """accuracy, balanced_accuracy, f1, sensitivity and specificity of predicted classes; class 1 of two is the positive
    one, of more they are means over the classes, each against the rest."""
    eye = np.eye(classes)
    total = counts.sum(1)
    actual, claimed = counts @ eye[labels], counts @ eye[predicted]  # (b, classes)
    hits = counts @ (eye[labels] * (predicted == labels)[:, None])
    recall, f1 = ratio(hits, actual), ratio(2 * hits, actual + claimed)
    rest = total[:, None] - actual
    specificity = ratio(rest - claimed + hits, rest)
    shown = slice(1, 2) if classes == 2 else slice(None)
    return {
        "accuracy": ratio(hits.sum(1), total),
        "balanced_accuracy": recall.mean(1),
        "f1": f1[:, shown].mean(1),
        "sensitivity": recall[:, shown].mean(1),
        "specificity": specificity[:, shown].mean(1),
    }


def calibration_error(confidences: Numbers, right: Flags, counts: Counts) -> Numbers:
    """Expected calibration error (Naeini et al. 2015, Guo et al. 2017): the distance between the mean confidence and
    the share of cases that are right, averaged over bins of equal width by their cases."""
    gaps = counts @ (np.eye(BINS)[bins(confidences)] * (confidences - right)[:, None])
    return ratio(np.abs(gaps).sum(1), counts.sum(1))


def bins(confidences: Numbers) -> NDArray[np.int64]:
    """The bin of each confidence, [0, 0.1), [0.1, 0.2) ... [0.9, 1]."""
    return np.minimum((confidences * BINS).astype(np.int64), BINS - 1)


def mean(values: Numbers, counts: Counts) -> Numbers:
    """Of one number per case."""
    return ratio(counts @ values, counts.sum(1))


def correlation(x: Numbers, y: Numbers, counts: Counts) -> Numbers:
    """Pearson's, of numbers (n,), or of those of each resample (b, n)."""
    dx, dy = _centred(x, counts), _centred(y, counts)
    return ratio((counts * dx * dy).sum(1), np.sqrt((counts * dx**2).sum(1) * (counts * dy**2).sum(1)))


def explained(predictions: Numbers, targets: Numbers, counts: Counts) -> Numbers:
    """Coefficient of determination, R²: 1 minus the squared errors by the squared distances from the mean target."""
    return 1 - ratio(counts @ (predictions - targets) ** 2, (counts * _centred(targets, counts) ** 2).sum(1))


def ranks(values: Numbers, counts: Counts) -> Numbers:
    """(b, n): the rank of each case in each resample, of ties their mean rank."""
    order, starts = _sorted_runs(values)
    sizes = np.add.reduceat(counts[:, order], starts, axis=1)
    of_run = sizes.cumsum(1) - (sizes - 1) / 2
    run_of_case = np.empty(len(order), np.int64)
    run_of_case[order] = np.repeat(np.arange(len(starts)), np.diff([*starts, len(order)]))
    found: Numbers = of_run[:, run_of_case]
    return found


def ratio(above: Numbers, below: Numbers) -> Numbers:
    """NaN where nothing is below."""
    found: Numbers = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)
    return found


def _centred(values: Numbers, counts: Counts) -> Numbers:
    """(b, n): distances from the mean of each resample; exactly 0 where all drawn values are the same."""
    drawn = np.broadcast_to(values, counts.shape)
    low = np.where(counts > 0, drawn, np.inf).min(1, keepdims=True)
    high = np.where(counts > 0, drawn, -np.inf).max(1, keepdims=True)
    means = (counts * drawn).sum(1, keepdims=True) / counts.sum(1, keepdims=True)
    return np.where(low == high, 0.0, drawn - means)


def _sorted_runs(values: Numbers) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order that sorts values, and where in it each run of the same value starts."""
    order = values.argsort(kind="stable")
    arranged = values[order]
    return order, np.flatnonzero(np.concatenate([[True], arranged[1:] != arranged[:-1]]))
