"""How well features or a classifier tell cases apart: metrics, stratified folds, nearest neighbours, linear probe.

scikit-learn does the work (``pip install medgmae[evaluation]``); this module holds the protocols around it. All metrics
are between 0 and 1. With two classes, class 1 is the positive one; with more, each metric is the macro average over the
classes, each against the rest.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values: TypeAlias = Tensor | NDArray[Any] | Sequence[Any]
Probe = Literal["linear", "knn"]


class Metrics(NamedTuple):
    """accuracy, F1, area under the ROC curve, sensitivity (recall) and specificity, 0 to 1."""

    accuracy: float
    f1: float
    auc: float
    sensitivity: float
    specificity: float


class FoldMetrics(NamedTuple):
    """folds: metrics of each fold's test cases. mean: their plain average. pooled: metrics of all cases at once, each
    with the score from the fold where it was a test case."""

    folds: tuple[Metrics, ...]
    mean: Metrics
    pooled: Metrics


def classification_metrics(logits: Values, labels: Values) -> Metrics:
    """Metrics of a classifier's outputs.

    The predicted class is the largest logit, the smaller label in a tie; the AUC ranks by the softmax. 3D Mamba MAE
    reports the same numbers but for accuracy, there in percent, and F1, there with 1e-7 in each denominator (below
    ours by up to 2e-7).

    Args:
        logits: (n, K), K >= 2; of a model with one output z, ``[0, z]``.
        labels: (n,) whole numbers from 0 to K - 1.

    Raises:
        ValueError: shapes that do not fit, NaN, infinite or no values, labels that are not classes, or a class without
            a case: its AUC and sensitivity are not defined.
        ImportError: scikit-learn is not installed.
    """
    scores, classes = _table(logits, "logits"), _labels(labels)
    return _metrics(scores, torch.from_numpy(scores).softmax(1).numpy(), classes)


def stratified_folds(labels: Values, folds: int = 5, seed: int = 42) -> Tensor:
    """The fold in which each case is a test case, as scikit-learn's ``StratifiedKFold`` shuffles them.

    With ``fold = stratified_folds(labels)``, train on the cases where ``fold != k`` and collect the logits of those
    where ``fold == k``, for each k, as :func:`fold_metrics` takes them.

    Args:
        labels: (n,) whole numbers from 0 on; every class goes into every fold.
        folds: how many, at least 2.
        seed: ``random_state``; 42 with 5 folds is the protocol of 3D Mamba MAE.

    Returns:
        (n,) int64, 0 to folds - 1.

    Raises:
        ValueError: a class with fewer cases than folds, fewer than two classes, or labels that are not classes.
        ImportError: scikit-learn is not installed.
    """
    classes = _labels(labels)
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    _check_classes(classes, int(classes.max()) + 1, least=folds, why=f"each of the {folds} folds needs one to test on")
    splitter = _sklearn("model_selection").StratifiedKFold(folds, shuffle=True, random_state=seed)
    fold_of_case = torch.empty(len(classes), dtype=torch.int64)
    for fold, (_, test) in enumerate(splitter.split(np.zeros(len(classes)), classes)):
        fold_of_case[torch.from_numpy(test)] = fold
    return fold_of_case


def fold_metrics(logits: Values, labels: Values, fold_of_case: Values) -> FoldMetrics:
    """Metrics of out-of-fold outputs: per fold, their mean, and all folds pooled.

    Args:
        logits: (n, K), each row from the model that was not trained on this case.
        labels: (n,) whole numbers from 0 to K - 1.
        fold_of_case: (n,) of :func:`stratified_folds`.

    Raises:
        ValueError: what :func:`classification_metrics` raises, for the cases of a fold too; it names the fold.
        ImportError: scikit-learn is not installed.
    """
    scores = _table(logits, "logits")
    return _by_fold(scores, torch.from_numpy(scores).softmax(1).numpy(), _labels(labels), fold_of_case)


def cross_validate_features(
    features: Values, labels: Values, *, probe: Probe = "linear", k: int = 5, folds: int = 5, seed: int = 42
) -> FoldMetrics:
    """Metrics of a simple classifier on frozen features, trained and tested on stratified folds.

    Args:
        features: (n, E), one pooled vector per case, as :func:`~medgmae.extract_features` gives.
        labels: (n,) whole numbers from 0 to K - 1.
        probe: "linear": logistic regression (L2, C = 1) on features standardised by the training cases; "knn": the
            share of each class among the ``k`` nearest training cases, by Euclidean distance.
        k: neighbours.
        folds, seed: see :func:`stratified_folds`.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite features, fewer training cases than ``k``, an unknown
            probe; and what :func:`stratified_folds` raises.
        ImportError: scikit-learn is not installed.
    """
    table, classes = _table(features, "features", 1), _labels(labels)
    _check_rows(table, "features", classes)
    if probe not in ("linear", "knn"):
        raise ValueError(f"probe must be 'linear' or 'knn', got {probe!r}")
    fold_of_case = stratified_folds(labels, folds, seed).numpy()
    shares = np.empty((len(table), int(classes.max()) + 1))
    for fold in range(folds):
        test = fold_of_case == fold
        if probe == "knn":
            shares[test] = knn_shares(table[~test], classes[~test], table[test], k).numpy()
        else:
            shares[test] = _linear_probe().fit(table[~test], classes[~test]).predict_proba(table[test])
    return _by_fold(shares, shares, classes, fold_of_case)


def knn_shares(train: Values, train_labels: Values, features: Values, k: int = 5) -> Tensor:
    """The share of each class among the nearest training cases, by Euclidean distance.

    ``argmax(1)`` of it is the majority vote, whose ties go to the smaller label.

    Args:
        train: (m, E).
        train_labels: (m,) whole numbers from 0 to K - 1, each of them at least once.
        features: (n, E).
        k: neighbours, at most m.

    Returns:
        (n, K) float64, rows sum to 1.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite features, ``k`` out of range, labels that are not classes.
        ImportError: scikit-learn is not installed.
    """
    known, classes, new = _table(train, "train", 1), _labels(train_labels), _table(features, "features", 1)
    _check_rows(known, "train", classes)
    _check_classes(classes, int(classes.max()) + 1)
    if known.shape[1] != new.shape[1]:
        raise ValueError(f"train has {known.shape[1]} features per case and features {new.shape[1]}; expected the same")
    if not 1 <= k <= len(known):
        raise ValueError(f"k must be 1 to {len(known)}, the number of training cases, got {k}")
    neighbours = _sklearn("neighbors").KNeighborsClassifier(k, algorithm="brute")
    return torch.from_numpy(neighbours.fit(known, classes).predict_proba(new))


def knn_metrics(
    features: Values, labels: Values, *, k: int = 5, test_share: float = 0.2, generator: torch.Generator | None = None
) -> Metrics:
    """Metrics of nearest neighbours after one random split: the quick check of features of 3D Mamba MAE.

    The split is ``torch.utils.data.random_split``'s with that generator. The AUC ranks by the share of the vote.
    Published AUCs are those of the voted labels, ``classification_metrics(one_hot(vote), labels).auc``, and the
    published run leaves out the training cases of the last, incomplete batch.

    Args:
        features: (n, E), one pooled vector per case.
        labels: (n,) whole numbers from 0 to K - 1.
        k: neighbours.
        test_share: of the cases; ``n - int((1 - test_share) * n)`` are tested.
        generator: of the split; torch's default one otherwise. ``torch.Generator().manual_seed(0)`` repeats a split.

    Raises:
        ValueError: a class that is missing on either side of the split, a share that leaves no cases; and what
            :func:`knn_shares` raises.
        ImportError: scikit-learn is not installed.
    """
    table, classes = _table(features, "features", 1), _labels(labels)
    _check_rows(table, "features", classes)
    count = int((1 - test_share) * len(classes))
    if not 0 < count < len(classes):
        raise ValueError(
            f"test_share={test_share} of {len(classes)} cases leaves {count} to train on and {len(classes) - count} to "
            "test on; expected at least one each"
        )
    order = torch.randperm(len(classes), generator=generator).numpy()
    train, test = order[:count], order[count:]
    for name, part in (("training", train), ("test", test)):
        why = f"both sides of the split need one, and the {name} cases are {len(part)}"
        _check_classes(classes[part], int(classes.max()) + 1, why=why)
    shares = knn_shares(table[train], classes[train], table[test], k).numpy()
    return _metrics(shares, shares, classes[test])


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError(
            "evaluation needs scikit-learn, which is not installed: pip install medgmae[evaluation]"
        ) from error


def _linear_probe() -> Any:
    scaler = _sklearn("preprocessing").StandardScaler()
    return _sklearn("pipeline").make_pipeline(scaler, _sklearn("linear_model").LogisticRegression(max_iter=2000))


def _array(values: Values) -> NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _table(values: Values, name: str, least: int = 2) -> NDArray[Any]:
    """(n, at least ``least``) finite float64."""
    table = _array(values)
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] < least:
        raise ValueError(f"{name} must be (cases, {least} or more columns), got {tuple(table.shape)}")
    table = table.astype(np.float64)
    bad = ~np.isfinite(table)
    if bad.any():
        raise ValueError(
            f"{name} must be finite, got {int(bad.sum())} NaN or infinite values in {int(bad.any(1).sum())} cases"
        )
    return table


def _labels(values: Values) -> NDArray[np.int64]:
    labels = _array(values)
    if labels.ndim != 1 or len(labels) < 1:
        raise ValueError(f"labels must be (cases,), got {tuple(labels.shape)}")
    if labels.dtype.kind not in "iub" or labels.min() < 0:
        kind = f"{labels.dtype}" + (f" from {labels.min()} on" if labels.dtype.kind in "iuf" else "")
        raise ValueError(f"labels must be whole numbers from 0 on, got {kind}; leave out cases without a label")
    return labels.astype(np.int64)


def _check_rows(table: NDArray[Any], name: str, labels: NDArray[np.int64]) -> None:
    if len(table) != len(labels):
        raise ValueError(f"{name} has {len(table)} cases and labels has {len(labels)}; expected the same number")


def _check_classes(labels: NDArray[np.int64], classes: int, least: int = 1, why: str = "") -> None:
    """Every class has at least ``least`` cases, and there are at least two."""
    why = why or "metrics of a class without cases are not defined"
    counts = np.bincount(labels, minlength=classes)
    if len(counts) < 2:
        raise ValueError(f"all {len(labels)} cases have the label 0; expected two classes or more")
    rare = [f"{label} has {count}" for label, count in enumerate(counts) if count < least]
    if rare:
        raise ValueError(f"of {len(labels)} cases, class {', class '.join(rare)}; {why}")


def _metrics(scores: NDArray[Any], shares: NDArray[Any], labels: NDArray[np.int64]) -> Metrics:
    """``scores`` (n, K) decide and rank; ``shares`` (n, K) are the same as probabilities, whose rows sum to 1."""
    classes, predicted = scores.shape[1], scores.argmax(1)
    _check_rows(scores, "logits", labels)
    if labels.max() >= classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, the columns of the logits, got {labels.max()}")
    _check_classes(labels, classes)
    two = classes == 2
    metrics, average = _sklearn("metrics"), "binary" if two else "macro"
    confusion = metrics.multilabel_confusion_matrix(labels, predicted, labels=range(classes))  # each against the rest
    specificity = confusion[:, 0, 0] / confusion[:, 0].sum(1)
    ranks = scores[:, 1] - scores[:, 0] if two else shares  # the same ranks as softmax's, which rounds to 1
    return Metrics(
        accuracy=float(metrics.accuracy_score(labels, predicted)),
        f1=float(metrics.f1_score(labels, predicted, average=average, zero_division=0)),
        auc=float(metrics.roc_auc_score(labels, ranks, multi_class="ovr")),
        sensitivity=float(metrics.recall_score(labels, predicted, average=average)),
        specificity=float(specificity[1] if two else specificity.mean()),
    )


def _by_fold(
    scores: NDArray[Any], shares: NDArray[Any], labels: NDArray[np.int64], fold_of_case: Values
) -> FoldMetrics:
    folds, metrics = _labels(fold_of_case), []
    _check_rows(scores, "logits", labels)
    _check_rows(scores, "logits", folds)
    for fold in range(int(folds.max()) + 1):
        part = folds == fold
        if not part.any():
            raise ValueError(f"fold {fold} has no cases; expected folds numbered from 0 without a gap")
        try:
            metrics.append(_metrics(scores[part], shares[part], labels[part]))
        except ValueError as error:
            raise ValueError(f"fold {fold}: {error}") from None
    return FoldMetrics(tuple(metrics), Metrics(*np.mean(metrics, axis=0).tolist()), _metrics(scores, shares, labels))
