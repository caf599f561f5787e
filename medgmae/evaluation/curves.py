"""Curves of a classifier over its thresholds, as points to draw."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medgmae.evaluation import resampled
from medgmae.evaluation.arguments import Values, array_of, check_rows, library, numbers_of

Numbers = NDArray[np.float64]


class Curves(NamedTuple):
    """Curves of the scores of one class against the rest.

    false_positives, true_positives: rates, of the ROC curve. recall, precision: of the other. confidence, share: mean
    probability and share of positive cases in each of ten bins of equal width that has cases; cases: how many it has.
    auc, average_precision: the areas under the first two.
    """

    false_positives: Numbers
    true_positives: Numbers
    recall: Numbers
    precision: Numbers
    confidence: Numbers
    share: Numbers
    cases: Numbers
    auc: float
    average_precision: float


def classification_curves(probabilities: Values, positive: Values) -> Curves:
    """ROC curve, precision-recall curve and calibration of the probabilities of one class.

    Args:
        probabilities: (n,) 0 to 1.
        positive: (n,) bool, or 1 for cases of the class and 0 for others; some of each.

    Raises:
        ValueError: shapes that do not fit, values that are no probabilities, or cases of one kind only.
        ImportError: scikit-learn is not installed.
    """
    shares, true = numbers_of(probabilities, "probabilities"), array_of(positive)
    check_rows(shares, "probabilities", true, "positive")
    if shares.min() < 0 or shares.max() > 1:
        raise ValueError(f"probabilities are from {shares.min():.6g} to {shares.max():.6g}; expected 0 to 1")
    if not np.isin(true, (0, 1)).all() or len(np.unique(true)) < 2:
        raise ValueError(f"positive has the values {np.unique(true).tolist()[:5]}; expected some 0 and some 1")
    flags = true.astype(bool)
    metrics, everyone = library("sklearn.metrics"), np.ones((1, len(flags)))
    false_positives, true_positives, _ = metrics.roc_curve(flags, shares)
    precision, recall, _ = metrics.precision_recall_curve(flags, shares)
    bins = resampled.bins(shares)
    cases = np.bincount(bins, minlength=resampled.BINS)
    some = cases > 0
    confidence, share = (
        np.bincount(bins, weights, resampled.BINS)[some] / cases[some] for weights in (shares, flags.astype(np.float64))
    )
    return Curves(
        false_positives,
        true_positives,
        recall,
        precision,
        confidence,
        share,
        cases[some].astype(np.float64),
        float(resampled.auc(shares, flags, everyone)[0]),
        float(resampled.average_precision(shares, flags, everyone)[0]),
    )
