"""How well features or a classifier tell cases apart: metrics, nearest neighbours, linear probe.

scikit-learn does the work (``pip install medgmae[evaluation]``); this module holds the protocols around it. All metrics
are between 0 and 1. With two classes, class 1 is the positive one; with more, each metric is the macro average over the
classes, each against the rest.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgmae.evaluation.arguments import Values, check_classes, check_rows, class_labels, library, table_of
from medgmae.evaluation.folds import stratified_folds

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
    scores, classes = table_of(logits, "logits"), class_labels(labels)
    return _metrics(scores, torch.from_numpy(scores).softmax(1).numpy(), classes)


def fold_metrics(logits: Values, labels: Values, fold_of_case: Values) -> FoldMetrics:
    """Metrics of out-of-fold outputs: per fold, their mean, and all folds pooled.

    Args:
        logits: (n, K), each row from the model that was not trained on this case.
        labels: (n,) whole numbers from 0 to K - 1.
        fold_of_case: (n,) of :func:`~medgmae.evaluation.stratified_folds`.

    Raises:
        ValueError: what :func:`classification_metrics` raises, for the cases of a fold too; it names the fold.
        ImportError: scikit-learn is not installed.
    """
    scores = table_of(logits, "logits")
    return _by_fold(scores, torch.from_numpy(scores).softmax(1).numpy(), class_labels(labels), fold_of_case)


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
        folds, seed: see :func:`~medgmae.evaluation.stratified_folds`.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite features, fewer training cases than ``k``, an unknown
            probe; and what :func:`~medgmae.evaluation.stratified_folds` raises.
        ImportError: scikit-learn is not installed.
    """
    table, classes = table_of(features, "features", 1), class_labels(labels)
    check_rows(table, "features", classes)
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
    known, classes, new = table_of(train, "train", 1), class_labels(train_labels), table_of(features, "features", 1)
    check_rows(known, "train", classes)
    check_classes(classes, int(classes.max()) + 1)
    if known.shape[1] != new.shape[1]:
        raise ValueError(f"train has {known.shape[1]} features per case and features {new.shape[1]}; expected the same")
    if not 1 <= k <= len(known):
        raise ValueError(f"k must be 1 to {len(known)}, the number of training cases, got {k}")
    neighbours = library("sklearn.neighbors").KNeighborsClassifier(k, algorithm="brute")
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
    table, classes = table_of(features, "features", 1), class_labels(labels)
    check_rows(table, "features", classes)
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
        check_classes(classes[part], int(classes.max()) + 1, why=why)
    shares = knn_shares(table[train], classes[train], table[test], k).numpy()
    return _metrics(shares, shares, classes[test])


def _linear_probe() -> Any:
    scaler = library("sklearn.preprocessing").StandardScaler()
    return library("sklearn.pipeline").make_pipeline(
        scaler, library("sklearn.linear_model").LogisticRegression(max_iter=2000)
    )


def _metrics(scores: NDArray[Any], shares: NDArray[Any], labels: NDArray[np.int64]) -> Metrics:
    """``scores`` (n, K) decide and rank; ``shares`` (n, K) are the same as probabilities, whose rows sum to 1."""
    classes, predicted = scores.shape[1], scores.argmax(1)
    check_rows(scores, "logits", labels)
    if labels.max() >= classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, the columns of the logits, got {labels.max()}")
    check_classes(labels, classes)
    two = classes == 2
    metrics, average = library("sklearn.metrics"), "binary" if two else "macro"
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
    folds, metrics = class_labels(fold_of_case), []
    check_rows(scores, "logits", labels)
    check_rows(scores, "logits", folds)
    for fold in range(int(folds.max()) + 1):
        part = folds == fold
        if not part.any():
            raise ValueError(f"fold {fold} has no cases; expected folds numbered from 0 without a gap")
        try:
            metrics.append(_metrics(scores[part], shares[part], labels[part]))
        except ValueError as error:
            raise ValueError(f"fold {fold}: {error}") from None
    return FoldMetrics(tuple(metrics), Metrics(*np.mean(metrics, axis=0).tolist()), _metrics(scores, shares, labels))
