"""What simple models make of frozen features: fitted on some folds, asked about the other, with the strength of their
penalty chosen among the training cases alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgmae.evaluation.arguments import (
    Values,
    array_of,
    check_classes,
    check_rows,
    class_labels,
    group_numbers,
    library,
    numbers_of,
    table_of,
)
from medgmae.evaluation.classification import Probe, knn_shares
from medgmae.evaluation.folds import even_folds, stratified_folds

Numbers = NDArray[np.float64]
Known = NDArray[np.int64] | NDArray[np.float64]
"""Targets of cases: classes, or numbers."""
Task = Literal["classify", "regress"]

PENALTIES = tuple(10.0**k for k in range(5, -3, -1))
"""That are tried, from the strongest: of the squared weights, beside the sum of the losses of all training cases."""

_USUAL = 1.0  # scikit-learn's, where the training cases are too few to choose
_INNER = 3  # folds of the training cases
_ENOUGH = 1000  # cases on which penalties are compared: of many training cases, not all folds are needed


class Probed(NamedTuple):
    """predictions: of each case by the model that did not see it: (n, K) probabilities, or (n,) numbers, float64.
    penalties: chosen for each fold; none of neighbours."""

    predictions: Tensor
    penalties: tuple[float, ...]


def probe_features(
    features: Values,
    targets: Values,
    folds: Values,
    *,
    task: Task = "classify",
    probe: Probe = "linear",
    k: int = 5,
    groups: Values | None = None,
    seed: int = 42,
) -> Probed:
    """Out-of-fold predictions of a simple model on frozen features.

    "linear" is logistic regression, or ridge regression, on features standardised by the training cases. Its penalty,
    one of ``PENALTIES`` times the squared weights (halved for logistic regression: 1 / C of scikit-learn), is that with
    the least log loss, or squared error, of three folds within the training cases (of as many of them as hold 1000
    cases); 1 where these cannot be split so.
    "knn" is the share of each class among the ``k`` nearest training cases (:func:`knn_shares`), or the mean of their
    numbers.

    Args:
        features: (n, E), one vector per case.
        targets: (n,) whole numbers from 0 to K - 1, or for "regress" numbers.
        folds: (n,) the fold in which each case is a test case, numbers or texts; two or more different ones.
        task: "classify" or "regress".
        probe: "linear" or "knn".
        k: neighbours, at most as many as a fold has training cases.
        groups: (n,) texts or numbers, such as patients, which are kept together among the training cases too.
        seed: of the folds among the training cases.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite features, one fold only, training cases of a fold that lack
            a class, an unknown task or probe.
        ImportError: scikit-learn is not installed.
    """
    table, fold_of_case = table_of(features, "features", 1), array_of(folds)
    if task not in ("classify", "regress"):
        raise ValueError(f"task must be 'classify' or 'regress', got {task!r}")
    if probe not in ("linear", "knn"):
        raise ValueError(f"probe must be 'linear' or 'knn', got {probe!r}")
    known = class_labels(targets) if task == "classify" else numbers_of(targets, "targets")
    check_rows(table, "features", known, "targets")
    check_rows(table, "features", fold_of_case, "folds")
    names = np.unique(fold_of_case)
    if len(names) < 2:
        raise ValueError(f"all cases are in fold {names[0]}; expected two folds or more")
    classes = int(known.max()) + 1 if task == "classify" else 0
    units = None if groups is None else group_numbers(groups, len(table))
    predictions = np.empty((len(table), classes) if classes else len(table))
    penalties = []
    for name in names:
        test = fold_of_case == name
        if classes:
            check_classes(known[~test], classes, why=f"they are what is trained on to test fold {name}")
        if probe == "knn":
            predictions[test] = _neighbours(table[~test], known[~test], table[test], k)
        else:
            penalty = _chosen(table[~test], known[~test], None if units is None else units[~test], seed)
            penalties.append(penalty)
            predictions[test] = next(_linear(table[~test], known[~test], table[test], [penalty]))
    return Probed(torch.from_numpy(predictions), tuple(penalties))


def _neighbours(train: Numbers, known: Known, test: Numbers, k: int) -> Numbers:
    if known.dtype.kind == "i":
        return knn_shares(train, known, test, k).numpy()
    if not 1 <= k <= len(train):
        raise ValueError(f"k must be 1 to {len(train)}, the number of training cases, got {k}")
    neighbours = library("sklearn.neighbors").KNeighborsRegressor(k, algorithm="brute")
    found: Numbers = neighbours.fit(train, known).predict(test)
    return found


def _chosen(table: Numbers, known: Known, units: NDArray[np.int64] | None, seed: int) -> float:
    """The penalty that does best within training cases."""
    try:
        if known.dtype.kind == "i":
            folds = stratified_folds(known, _INNER, seed, units).numpy()
        else:
            folds = even_folds(len(known), _INNER, seed, units).numpy()
    except ValueError:  # a class, or all, in fewer cases or groups than folds
        return _USUAL
    losses, compared = np.zeros(len(PENALTIES)), 0
    for fold in range(_INNER):
        test = folds == fold
        if compared >= _ENOUGH:
            break
        compared += int(test.sum())
        for number, guess in enumerate(_linear(table[~test], known[~test], table[test], PENALTIES)):
            losses[number] += _loss(guess, known[test])
    return PENALTIES[losses.argmin()]


def _loss(guess: Numbers, known: Known) -> float:
    """Summed log loss of probabilities (n, K), or squared error of numbers (n,)."""
    if guess.ndim == 1:
        return float(((guess - known) ** 2).sum())
    least = float(np.finfo(np.float32).eps)
    return float(-np.log(np.clip(guess[np.arange(len(known)), known.astype(np.int64)], least, 1)).sum())


def _linear(train: Numbers, known: Known, test: Numbers, penalties: Sequence[float]) -> Iterator[Numbers]:
    """Predictions for the test cases with each penalty, from the strongest to the weakest."""
    centre, deviation = train.mean(0), train.std(0)
    deviation[deviation == 0] = 1
    fit = _logistic if known.dtype.kind == "i" else _ridge
    return fit((train - centre) / deviation, known, (test - centre) / deviation, penalties)


def _logistic(train: Numbers, known: Known, test: Numbers, penalties: Sequence[float]) -> Iterator[Numbers]:
    """Each starts from the weights of the one before. In float32, which takes half of the time."""
    model = library("sklearn.linear_model").LogisticRegression(max_iter=2000, warm_start=True)
    narrow = train.astype(np.float32)
    for penalty in penalties:
        model.set_params(C=1 / penalty).fit(narrow, known)
        shares = model.predict_proba(test.astype(np.float32)).astype(np.float64)
        yield shares / shares.sum(1, keepdims=True)


def _ridge(train: Numbers, known: Known, test: Numbers, penalties: Sequence[float]) -> Iterator[Numbers]:
    """All from one eigendecomposition, of the smaller of the two matrices of inner products."""
    mean = known.mean()
    if train.shape[0] < train.shape[1]:
        values, vectors = np.linalg.eigh(train @ train.T)
        left, right = test @ train.T @ vectors, vectors.T @ (known - mean)
    else:
        values, vectors = np.linalg.eigh(train.T @ train)
        left, right = test @ vectors, vectors.T @ (train.T @ (known - mean))
    for penalty in penalties:
        yield left @ (right / (values + penalty)) + mean
