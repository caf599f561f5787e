"""Metrics and protocols against their definitions by hand and against scikit-learn; what is refused."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from torch import Tensor

from medgmae.evaluation import (
    Metrics,
    classification_metrics,
    cross_validate_features,
    fold_metrics,
    knn_metrics,
    knn_shares,
    stratified_folds,
)

LABELS = torch.tensor([0, 1] * 12 + [0] * 10)


def features(labels: Tensor, distance: float, seed: int = 0) -> Tensor:
    """Noise (n, 6), shifted by ``distance`` times the label along one axis."""
    noise = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(seed))
    noise[:, 2] += distance * labels
    return noise


def logits(labels: Tensor, classes: int = 2, seed: int = 0) -> Tensor:
    noise = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(seed))
    return noise + torch.nn.functional.one_hot(labels, classes)


def by_hand(scores: Tensor, labels: Tensor) -> Metrics:
    """Two classes, from the definitions."""
    voted, positive = scores.argmax(1), labels == 1
    hits, false = int((voted[positive] == 1).sum()), int((voted[~positive] == 1).sum())
    margin = scores[:, 1] - scores[:, 0]
    pairs = margin[positive][:, None] - margin[~positive]
    auc = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean()
    return Metrics(
        float((voted == labels).double().mean()),
        2 * hits / (hits + false + int(positive.sum())),
        float(auc),
        hits / int(positive.sum()),
        1 - false / int((~positive).sum()),
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_two_classes_by_hand(seed: int, negatives: int, positives: int, ties: bool) -> None:
    labels = torch.tensor([0] * negatives + [1] * positives)
    scores = logits(labels, seed=seed)
    scores = scores.round() if ties else scores
    assert classification_metrics(scores, labels) == pytest.approx(by_hand(scores.double(), labels))
    assert classification_metrics(scores.numpy(), labels.tolist()) == classification_metrics(scores, labels)


def test_large_logits_keep_their_ranks() -> None:
    scores = torch.tensor([[0.0, 800.0], [0.0, 900.0], [0.0, 1000.0]])  # softmax gives 1, 1, 1
    assert classification_metrics(scores, [0, 1, 1]).auc == 1
    assert classification_metrics(scores, [0, 1, 1]).specificity == 0


def test_more_classes_are_the_mean_of_each_against_the_rest() -> None:
    labels = torch.arange(60) % 3
    scores = logits(labels, 3)
    metrics, shares = classification_metrics(scores, labels), scores.double().softmax(1)
    voted = torch.nn.functional.one_hot(scores.argmax(1), 3)
    each = []
    for label in range(3):
        votes = torch.stack([1 - voted[:, label], voted[:, label]], 1).double()
        one = by_hand(votes, (labels == label).long())
        ranked = by_hand(torch.stack([1 - shares[:, label], shares[:, label]], 1), (labels == label).long())
        each.append(one._replace(auc=ranked.auc))
    expected = Metrics(*np.mean(each, axis=0))._replace(accuracy=float((scores.argmax(1) == labels).double().mean()))
    assert metrics == pytest.approx(expected)


@pytest.mark.parametrize("seed", [0, 42])
def test_folds_are_scikit_learns(seed: int) -> None:
    fold_of_case = stratified_folds(LABELS, 4, seed)
    splits = StratifiedKFold(4, shuffle=True, random_state=seed).split(np.zeros(len(LABELS)), LABELS)
    for fold, (_, test) in enumerate(splits):
        assert (fold_of_case == fold).nonzero().flatten().tolist() == test.tolist()
        assert LABELS[fold_of_case == fold].bincount().tolist() in ([6, 3], [5, 3])


def test_folds_are_measured_one_by_one_and_together() -> None:
    scores, folds = logits(LABELS), stratified_folds(LABELS)
    result = fold_metrics(scores, LABELS, folds)
    for fold, metrics in enumerate(result.folds):
        assert metrics == classification_metrics(scores[folds == fold], LABELS[folds == fold])
    assert len(result.folds) == 5
    assert result.pooled == classification_metrics(scores, LABELS)
    assert result.mean.f1 == pytest.approx(np.mean([metrics.f1 for metrics in result.folds]))
    assert result.mean != result.pooled


@pytest.mark.parametrize("probe", ["linear", "knn"])
def test_probes_tell_classes_apart_where_features_do(probe: Any) -> None:
    apart, same = (cross_validate_features(features(LABELS, d), LABELS, probe=probe) for d in (12.0, 0.0))
    assert apart.pooled == Metrics(1, 1, 1, 1, 1)
    assert same.pooled.auc < 0.75
    three = torch.arange(45) % 3
    assert cross_validate_features(features(three, 12.0), three, probe=probe, folds=3).mean.accuracy > 0.8


def test_probes_never_see_the_cases_that_they_are_tested_on() -> None:
    """Labels drawn by chance: whoever peeks finds each case at distance 0 from itself."""
    labels = torch.randint(2, (200,), generator=torch.Generator().manual_seed(1))
    assert cross_validate_features(features(labels, 0), labels, probe="knn", k=1).pooled.accuracy < 0.65
    wide = torch.randn(200, 400, generator=torch.Generator().manual_seed(2))
    assert cross_validate_features(wide, labels).pooled.accuracy < 0.65


def test_the_linear_probe_is_scikit_learns_pipeline() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = features(LABELS, 1.0) * 100 + 7
    folds = StratifiedKFold(5, shuffle=True, random_state=42)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    shares = cross_val_predict(pipeline, x.double().numpy(), LABELS.numpy(), cv=folds, method="predict_proba")
    expected = fold_metrics(np.log(shares), LABELS, stratified_folds(LABELS))
    result = cross_validate_features(x, LABELS)
    assert result.pooled == pytest.approx(expected.pooled)


def test_neighbours_vote_and_a_tie_goes_to_the_smaller_label() -> None:
    train = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    labels = torch.tensor([2, 1, 1, 0])
    shares = knn_shares(train, labels, torch.tensor([[0.4], [9.0]]), k=2)
    assert shares.tolist() == [[0, 0.5, 0.5], [0.5, 0.5, 0]]
    assert shares.argmax(1).tolist() == [1, 0]
    x = features(LABELS, 1.0).double()
    distances = torch.cdist(x, x[:9]).T.square()
    nearest = LABELS[distances.argsort(1)[:, :5]]
    expected = torch.stack([(nearest == label).double().mean(1) for label in range(2)], 1)
    torch.testing.assert_close(knn_shares(x, LABELS, x[:9]), expected)


def test_one_random_split() -> None:
    x = features(LABELS, 1.0)
    runs = [knn_metrics(x, LABELS, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    data = torch.utils.data.TensorDataset(x, LABELS)
    train, test = torch.utils.data.random_split(data, [27, 7], torch.Generator().manual_seed(3))  # int(0.8 * 34)
    shares = knn_shares(x[train.indices], LABELS[train.indices], x[test.indices])
    assert runs[0] == pytest.approx(classification_metrics(shares, LABELS[test.indices]))
    torch.manual_seed(3)
    assert knn_metrics(x, LABELS) == runs[0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: classification_metrics(torch.zeros(3), [0, 1, 1]), r"logits must be \(cases, 2 or more columns\)"),
        (lambda: classification_metrics(torch.zeros(3, 1), [0, 1, 1]), r"got \(3, 1\)"),
        (lambda: classification_metrics(torch.zeros(3, 2), [0, 1]), "logits has 3 cases and labels has 2"),
        (lambda: classification_metrics(torch.zeros(3, 2), [0, 1, 2]), "0 to 1, the columns of the logits, got 2"),
        (lambda: classification_metrics(torch.zeros(3, 2), [0, 1, -1]), "int64 from -1 on; leave out cases without"),
        (lambda: classification_metrics(torch.zeros(3, 2), [0, 1, 0.5]), "whole numbers from 0 on, got float64"),
        (lambda: classification_metrics(torch.zeros(3, 2), [1, 1, 1]), "of 3 cases, class 0 has 0; metrics of a class"),
        (lambda: classification_metrics(torch.zeros(3, 2), [[0, 1, 1]]), r"labels must be \(cases,\), got \(1, 3\)"),
        (lambda: classification_metrics(torch.tensor([[0, torch.nan]] * 2), [0, 1]), "2 NaN or infinite values in 2"),
        (lambda: stratified_folds([0] * 9 + [1] * 4), "of 13 cases, class 1 has 4; each of the 5 folds needs one"),
        (lambda: stratified_folds([0] * 9), "all 9 cases have the label 0; expected two classes"),
        (lambda: stratified_folds([0, 1], 1), "folds must be at least 2, got 1"),
        (lambda: fold_metrics(torch.zeros(4, 2), [0, 1, 0, 0], [0, 0, 1, 1]), "fold 1: of 2 cases, class 1 has 0"),
        (lambda: fold_metrics(torch.zeros(4, 2), [0, 1, 0, 1], [0, 0, 2, 2]), "fold 1 has no cases"),
        (lambda: fold_metrics(torch.zeros(4, 2), [0, 1, 0, 1], [0, 0]), "logits has 4 cases and labels has 2"),
        (lambda: cross_validate_features(torch.zeros(3, 5), LABELS), "features has 3 cases and labels has 34"),
        (lambda: cross_validate_features(features(LABELS, torch.inf), LABELS), "features must be finite"),
        (lambda: cross_validate_features(features(LABELS, 1), LABELS, probe="svm"), "'linear' or 'knn', got 'svm'"),
        (lambda: cross_validate_features(features(LABELS, 1), LABELS, probe="knn", k=40), "k must be 1 to 27"),
        (lambda: knn_shares(torch.zeros(3, 2), [0, 1, 1], torch.zeros(3, 4), 1), "2 features per case and features 4"),
        (lambda: knn_shares(torch.zeros(3, 2), [0, 2, 2], torch.zeros(3, 2), 1), "of 3 cases, class 1 has 0"),
        (lambda: knn_metrics(features(LABELS, 1), LABELS, test_share=0.0), "test_share=0.0 of 34 cases leaves 34"),
        (lambda: knn_metrics(torch.zeros(5, 2), [0, 0, 0, 0, 1]), "both sides of the split need one"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_a_missing_scikit_learn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"scikit-learn, which is not installed: pip install medgmae\[evaluation\]"):
        classification_metrics(torch.zeros(2, 2), [0, 1])
