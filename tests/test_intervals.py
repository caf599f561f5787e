"""Bootstrap intervals and reports against scikit-learn, SciPy and loops; concordance against all pairs; folds."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as sk

from medgmae.evaluation import (
    Interval,
    bootstrap_interval,
    check_folds,
    classification_curves,
    classification_metrics,
    classification_report,
    concordance_index,
    even_folds,
    multilabel_report,
    regression_report,
    stratified_folds,
    survival_report,
)
from medgmae.evaluation import resampled as ours
from medgmae.evaluation.intervals import intervals

CLASSIFICATION = {
    "auc", "average_precision", "accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity", "brier", "ece"
}  # fmt: skip


def cases(n: int, classes: int, seed: int = 0, ties: bool = False) -> tuple[NDArray[Any], NDArray[Any]]:
    """Probabilities that know something of the labels, each of which comes at least twice."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.concatenate([np.repeat(np.arange(classes), 2), rng.integers(classes, size=n)]))
    logits = rng.normal(size=(len(labels), classes)) + np.eye(classes)[labels]
    logits = logits.round() if ties else logits
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return shares, labels


def by_scikit_learn(shares: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    classes, predicted = shares.shape[1], shares.argmax(1)
    two, average = classes == 2, "binary" if classes == 2 else "macro"
    one_hot = np.eye(classes)[labels]
    confidence, right = (shares[:, 1], labels) if two else (shares.max(1), predicted == labels)
    bins = np.minimum((confidence * 10).astype(int), 9)
    gaps = [abs((confidence - right)[bins == k].mean()) * (bins == k).mean() for k in range(10) if (bins == k).any()]
    hits = sk.multilabel_confusion_matrix(labels, predicted, labels=range(classes))
    specificity = hits[:, 0, 0] / hits[:, 0].sum(1)
    return {
        "auc": sk.roc_auc_score(labels, shares[:, 1] if two else shares, multi_class="ovr"),
        "average_precision": sk.average_precision_score(*((labels, shares[:, 1]) if two else (one_hot, shares))),
        "accuracy": sk.accuracy_score(labels, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "f1": sk.f1_score(labels, predicted, average=average, zero_division=0),
        "sensitivity": sk.recall_score(labels, predicted, average=average),
        "specificity": specificity[1] if two else specificity.mean(),
        "brier": np.mean([sk.brier_score_loss(one_hot[:, k], shares[:, k]) for k in range(classes)]),
        "ece": sum(gaps),
    }


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.sampled_from([2, 3, 5]), st.booleans())
def test_classification_is_scikit_learns(seed: int, n: int, classes: int, ties: bool) -> None:
    shares, labels = cases(n, classes, seed, ties)
    report = classification_report(torch.from_numpy(shares), labels.tolist(), resamples=0)
    assert {name: one.value for name, one in report.items()} == pytest.approx(by_scikit_learn(shares, labels))
    assert set(report) == CLASSIFICATION
    assert all(np.isnan(one.low) and np.isnan(one.high) for one in report.values())
    known = classification_metrics(np.log(shares), labels)
    for name, value in known._asdict().items() if not ties else ():  # the softmax of logs rounds ties apart
        assert report[name].value == pytest.approx(value)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60))
def test_every_resample_is_measured_as_its_rows(seed: int, n: int) -> None:
    """The sums over counts are scikit-learn's and SciPy's metrics of repeated rows, and NaN where those have none."""
    rng = np.random.default_rng(seed)
    scores, targets = rng.normal(size=n).round(1), rng.normal(size=n).round(1)
    positive = rng.random(n) < 0.4
    counts = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(6)]).astype(float)
    found = {
        "auc": ours.auc(scores, positive, counts),
        "ap": ours.average_precision(scores, positive, counts),
        "pearson": ours.correlation(scores, targets, counts),
        "spearman": ours.correlation(ours.ranks(scores, counts), ours.ranks(targets, counts), counts),
        "r2": ours.explained(scores, targets, counts),
    }
    for number, drawn in enumerate(counts):
        rows = np.repeat(np.arange(n), drawn.astype(int))
        x, y, p = scores[rows], targets[rows], positive[rows]
        both, vary = 0 < p.sum() < n, len(set(x)) > 1 and len(set(y)) > 1
        wanted = {
            "auc": sk.roc_auc_score(p, x) if both else np.nan,
            "ap": sk.average_precision_score(p, x) if p.any() else np.nan,
            "pearson": stats.pearsonr(x, y)[0] if vary else np.nan,
            "spearman": stats.spearmanr(x, y)[0] if vary else np.nan,
            "r2": sk.r2_score(y, x) if len(set(y)) > 1 else np.nan,
        }
        for name, value in wanted.items():
            assert found[name][number] == pytest.approx(value, nan_ok=True, abs=1e-9), name


def test_intervals_are_percentiles_of_the_metric_of_drawn_rows() -> None:
    """The reports' intervals are those of scikit-learn's metric on the same resamples."""
    shares, labels = cases(60, 2)
    report = classification_report(shares, labels, resamples=80, seed=5)
    wanted = bootstrap_interval(sk.roc_auc_score, labels, shares[:, 1], resamples=80, seed=5)
    assert report["auc"] == pytest.approx(wanted)
    assert wanted.low < wanted.value < wanted.high
    drawn = np.random.default_rng(5).integers(len(labels), size=(80, len(labels)))
    by_hand = np.quantile([sk.roc_auc_score(labels[rows], shares[rows, 1]) for rows in drawn], [0.025, 0.975])
    assert (wanted.low, wanted.high) == pytest.approx(tuple(by_hand))
    assert classification_report(shares, labels, resamples=80, seed=5) == report
    assert classification_report(shares, labels, resamples=80, seed=6) != report
    narrow = classification_report(shares, labels, resamples=80, seed=5, confidence=0.5)["auc"]
    assert report["auc"].low < narrow.low < narrow.high < report["auc"].high


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [bootstrap_interval(np.mean, rng.normal(size=60), resamples=200, confidence=0.8) for _ in range(200)]
    share = np.mean([one.low < 0 < one.high for one in found])
    assert 0.7 < share < 0.88  # 0.8 within three standard errors of 200 draws


def test_groups_are_drawn_whole_and_widen_the_interval() -> None:
    """Ten copies of each case tell no more than one of them."""
    shares, labels = cases(40, 2, 3)
    rows = np.repeat(np.arange(len(labels)), 10)
    alone = classification_report(shares, labels, resamples=300)["auc"]
    grouped = classification_report(shares[rows], labels[rows], resamples=300, groups=[f"p{k}" for k in rows])["auc"]
    naive = classification_report(shares[rows], labels[rows], resamples=300)["auc"]
    assert grouped.value == pytest.approx(alone.value)
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=0.15)
    assert naive.high - naive.low < 0.5 * (grouped.high - grouped.low)
    one = classification_report(shares, labels, resamples=20, groups=["only"] * len(labels))["auc"]
    assert not np.isnan(one.value)
    assert np.isnan(one.low)
    assert np.isnan(one.high)


def test_resamples_without_a_metric_are_left_out() -> None:
    """With two positives, every seventh resample has none: no warning, no NaN, and the rest are measured."""
    labels = np.array([0] * 30 + [1] * 2)
    scores = np.concatenate([np.arange(30), [12.5, 28.5]]) / 32
    shares = np.stack([1 - scores, scores], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = classification_report(shares, labels, resamples=200)
    assert 0 <= report["sensitivity"].low <= report["sensitivity"].high <= 1
    assert 0.3 < report["auc"].low < report["auc"].high <= 1

    def strict(y: NDArray[Any]) -> float:
        if y.min() == y.max():
            raise ValueError("one class")
        return float(y.mean())

    interval = bootstrap_interval(strict, labels, resamples=200)
    assert interval.low >= 1 / 32
    with pytest.raises(ValueError, match="one class"):
        bootstrap_interval(strict, np.ones(4))
    assert all(np.isnan(bootstrap_interval(lambda y: np.nan, np.ones(4))))


def test_many_cases_are_measured_some_resamples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shares, labels = cases(50, 2)
    whole = classification_report(shares, labels, resamples=40)
    monkeypatch.setattr("medgmae.evaluation.intervals._AT_ONCE", 3 * len(labels))
    again = classification_report(shares, labels, resamples=40)
    assert all(again[name] == pytest.approx(one) for name, one in whole.items())
    sizes = []

    def statistics(counts: NDArray[Any]) -> dict[str, NDArray[Any]]:
        sizes.append(len(counts))
        assert (counts.sum(1) == len(labels)).all()
        return {"n": counts.sum(1)}

    intervals(statistics, len(labels), resamples=8, seed=0, groups=None)
    assert sizes == [1, 3, 3, 2]


def test_a_thousand_resamples_take_a_second() -> None:
    shares, labels = cases(1000, 2)
    start = time.process_time()
    classification_report(shares, labels)
    assert time.process_time() - start < 3  # 0.15 s by itself on one core


def test_regression_is_scikit_learns_and_scipys() -> None:
    rng = np.random.default_rng(1)
    targets = rng.normal(50, 9, 80)
    guessed = targets + rng.normal(0, 5, 80)
    report = regression_report(torch.from_numpy(guessed), targets, resamples=200)
    wanted = {
        "mae": sk.mean_absolute_error(targets, guessed),
        "rmse": sk.root_mean_squared_error(targets, guessed),
        "r2": sk.r2_score(targets, guessed),
        "pearson": stats.pearsonr(guessed, targets)[0],
        "spearman": stats.spearmanr(guessed, targets)[0],
    }
    assert {name: one.value for name, one in report.items()} == pytest.approx(wanted)
    assert all(one.low < one.value < one.high for one in report.values())
    flat = regression_report(guessed, np.full(80, 0.1), resamples=20)
    assert [name for name, one in flat.items() if np.isnan(one.value)] == ["r2", "pearson", "spearman"]
    assert not np.isnan(flat["mae"].low)


def test_labels_that_do_not_exclude_each_other() -> None:
    rng = np.random.default_rng(2)
    labels = (rng.random((70, 4)) < 0.4).astype(float)
    shares = np.clip(labels * 0.2 + 0.8 * rng.random((70, 4)), 0, 1)
    labels[rng.random((70, 4)) < 0.2] = np.nan
    labels[:, 1] = np.where(np.isnan(labels[:, 1]), np.nan, 0)
    labels[:, 3] = np.nan
    report = multilabel_report(shares, labels, resamples=100)
    known = ~np.isnan(labels[:, 2])
    p = shares[known, 2]
    alone = classification_report(np.stack([1 - p, p], 1), labels[known, 2].astype(int), resamples=0)
    assert {n: one.value for n, one in report.labels[2].items()} == pytest.approx(
        {n: a.value for n, a in alone.items()}
    )
    assert report.undefined == {
        1: f"all {int((labels[:, 1] == 0).sum())} cases that have the label are 0; expected some of 0 and some of 1",
        3: "none of 70 cases has the label",
    }
    assert all(np.isnan(one).all() for k in (1, 3) for one in report.labels[k].values())
    assert set(report.macro) == set(report.labels[1]) == CLASSIFICATION
    for name, one in report.macro.items():
        assert one.value == pytest.approx((report.labels[0][name].value + report.labels[2][name].value) / 2)
        assert one.low < one.value < one.high
    none = multilabel_report(shares[:, 3:], labels[:, 3:], resamples=5)
    assert all(np.isnan(one).all() for one in none.macro.values())


def pairs_by_hand(risks: Any, times: Any, events: Any) -> float:
    """The rules of lifelines and scikit-survival, pair by pair."""
    right = known = 0.0
    for i in range(len(risks)):
        for j in range(len(risks)):
            if events[i] and (times[i] < times[j] or (times[i] == times[j] and not events[j])):
                known += 1
                right += 1 if risks[i] > risks[j] else 0.5 if risks[i] == risks[j] else 0
    return right / known if known else np.nan


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
def test_concordance_is_that_of_all_pairs(rows: list[tuple[int, int, bool]]) -> None:
    risks, times, events = (np.array(column) for column in zip(*rows, strict=True))
    wanted = pairs_by_hand(risks, times, events)
    if np.isnan(wanted):
        with pytest.raises(ValueError, match="expected at least one pair whose order is known"):
            concordance_index(risks, times, events)
    else:
        assert concordance_index(risks, times, events) == pytest.approx(wanted)


def test_concordance_of_a_resample_is_that_of_its_rows() -> None:
    rng = np.random.default_rng(3)
    times, events = rng.exponential(5, 50).round(), rng.random(50) < 0.5
    risks = (-times + rng.normal(0, 4, 50)).round()
    report = survival_report(risks, times, events, resamples=60)["concordance"]
    by_hand = bootstrap_interval(pairs_by_hand, risks, times, events, resamples=60)
    assert report == pytest.approx(by_hand)
    assert report.low < report.value < report.high
    assert concordance_index(-times, times, np.ones(50)) == 1
    binary = np.array([1.0, 0.0])[events.astype(int)]  # an AUC: all events at one time, all others seen longer
    assert concordance_index(risks, binary, events) == pytest.approx(sk.roc_auc_score(events, risks))


def test_concordance_of_many_cases_is_quick() -> None:
    rng = np.random.default_rng(4)
    start = time.process_time()
    value = concordance_index(rng.normal(size=10**5), rng.random(10**5), rng.random(10**5) < 0.5)
    assert value == pytest.approx(0.5, abs=0.01)
    assert time.process_time() - start < 10  # 0.7 s by itself; all pairs would take minutes


def test_curves_are_scikit_learns() -> None:
    shares, labels = cases(100, 2)
    curves = classification_curves(shares[:, 1], labels)
    assert sk.auc(curves.false_positives, curves.true_positives) == pytest.approx(curves.auc)
    assert curves.auc == pytest.approx(sk.roc_auc_score(labels, shares[:, 1]))
    assert curves.average_precision == pytest.approx(sk.average_precision_score(labels, shares[:, 1]))
    assert (curves.recall[0], curves.recall[-1], curves.precision[-1]) == (1, 0, 1)
    from sklearn.calibration import calibration_curve

    share, confidence = calibration_curve(labels, shares[:, 1], n_bins=10)
    np.testing.assert_allclose((curves.share, curves.confidence), (share, confidence))
    assert curves.cases.sum() == len(labels)


def test_no_group_lies_in_two_folds() -> None:
    rng = np.random.default_rng(5)
    patients = rng.integers(60, size=200)
    labels = (patients % 3 == 0).astype(int)
    names = [f"patient {k}" for k in patients]
    folds = stratified_folds(labels, 5, 7, groups=names)
    check_folds(folds, names)
    assert folds.tolist() == stratified_folds(labels, 5, 7, groups=patients).tolist()
    assert folds.tolist() != stratified_folds(labels, 5, 8, groups=names).tolist()
    for fold in range(5):
        part = labels[(folds == fold).numpy()]
        assert 25 <= len(part) <= 55
        assert 0.15 < part.mean() < 0.5  # of a third
    even = even_folds(200, 5, 7, groups=names)
    check_folds(even, names)
    assert even.bincount().tolist() == [40] * 5
    assert sorted(even_folds(23, 4).bincount().tolist()) == [5, 6, 6, 6]
    assert even_folds(23, 4, 1).tolist() != even_folds(23, 4, 2).tolist()
    alone = stratified_folds(labels, 5, 7)
    with pytest.raises(
        ValueError, match=r"50 of 59 groups lie in more than one fold: patient 40 \(0, 1, 2, 3\), .* and 45 more"
    ):
        check_folds(alone, names)


P, Y = cases(20, 2)
ONE_PATIENT = ["a"] * 11 + ["b"] * 11


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: classification_report(P * 2, Y), "from .* to 1.*; expected 0 to 1: take the softmax"),
        (lambda: classification_report(P / 2, Y), "probabilities of case 0 sum to 0.5; expected 1"),
        (lambda: classification_report(P, Y[1:]), "probabilities has 24 cases and labels has 23"),
        (lambda: classification_report(P, Y + 1), "labels must be 0 to 1, the columns of the probabilities, got 2"),
        (lambda: classification_report(P, Y * 0), "of 24 cases, class 1 has 0; metrics of a class"),
        (lambda: classification_report(P * np.nan, Y), "48 NaN or infinite values in 24 cases"),
        (lambda: classification_report(P, Y, resamples=-1), "resamples must be 0 or more, got -1"),
        (lambda: classification_report(P, Y, confidence=95), "between 0 and 1, such as 0.95, got 95"),
        (lambda: classification_report(P, Y, groups=ONE_PATIENT), "groups has 22 cases; expected 24"),
        (lambda: classification_report(P, Y, groups=[""] * 4 + ["a"] * 20), "4 of 24 cases have no group"),
        (lambda: multilabel_report(P, P[:, :1]), r"labels are \(24, 1\) and probabilities \(24, 2\)"),
        (lambda: multilabel_report(P, P), "labels must be 0, 1 or NaN for missing, got 0"),
        (lambda: regression_report(P, Y), r"predictions must be \(cases,\), got \(24, 2\)"),
        (lambda: regression_report(P[:, 0], Y[1:]), "predictions has 24 cases and targets has 23"),
        (lambda: regression_report(P[:, 0], Y * np.nan), "targets must be finite, got 24 NaN"),
        (lambda: bootstrap_interval(np.mean), "arrays have no cases"),
        (lambda: bootstrap_interval(np.mean, [1, 2], [1]), "arrays have 2, 1 cases; expected the same number"),
        (lambda: concordance_index([1, 2], [1, 2], [0, 2]), r"events must be \(cases,\) of 0 and 1"),
        (lambda: concordance_index([1, 2], [-1, 2], [0, 1]), "times must be 0 or more, got -1"),
        (lambda: concordance_index([1, 2], [1, 2], [0, 1]), "1 of 2 cases have an event, and none of them before"),
        (lambda: classification_curves([0.5, 0.1], [1, 1]), r"the values \[1\]; expected some 0 and some 1"),
        (lambda: classification_curves([0.5, 1.1], [0, 1]), "from 0.5 to 1.1; expected 0 to 1"),
        (lambda: stratified_folds([0] * 6 + [1] * 4, 3, groups=list("abcdefgghh")), "of 8 groups, class 1 in 2; each"),
        (lambda: even_folds(3, 5), "3 cases for 5 folds; expected at least one case for each"),
        (lambda: even_folds(4, 3, groups=list("aabb")), "2 groups for 3 folds; expected at least one group"),
        (lambda: check_folds([0, 1], ["a", None]), "1 of 2 cases have no group"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_said(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_an_interval_has_three_numbers() -> None:
    assert Interval(0.5, 0.4, 0.6) == (0.5, 0.4, 0.6)
