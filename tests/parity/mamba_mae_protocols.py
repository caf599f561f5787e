"""Adapters for the protocols around 3D Mamba MAE: evaluation and preparation of its input."""

from __future__ import annotations

import torch

from medgmae import Volume, create_transform
from medgmae.evaluation import Metrics, classification_metrics, fold_metrics, knn_shares, stratified_folds
from parity import adapter
from parity.case import EXACT, Case, Options, Tolerance

EPSILON = 1e-7  # the reference adds it to each denominator of F1, precision and recall

# Theirs and ours.
NAMES = {"roc_auc_score": "auc", "f1_score": "f1", "specificity": "specificity", "sensitivity": "sensitivity"}


def _tolerance(case: Case) -> Tolerance:
    stated = case.spec["suggested_tolerance"]
    return stated["atol"], stated["rtol"]


@adapter("mamba_mae/evaluation")
def evaluation(case: Case) -> None:
    """Accuracy is in percent there; its F1 is below ours by up to two epsilons, which the tolerance covers."""
    options, tolerance = Options(case.spec["config"]), _tolerance(case)
    assert tolerance[0] > 2 * EPSILON
    labels, logits = case.inputs["labels"], case.inputs["logits"]
    case.same("cases", len(labels), options("n"))
    folds = stratified_folds(labels, options("k_fold"), options("seed_split"))
    case.offer("fold_of_sample", folds)
    found = fold_metrics(logits, labels, folds)
    case.same("folds", len(found.folds), len(case.spec["per_fold_metrics"]))
    expected = [*case.spec["per_fold_metrics"], case.spec["average_metrics"], case.spec["global_metrics"]]
    for number, (ours, theirs) in enumerate(zip([*found.folds, found.mean, found.pooled], expected, strict=True)):
        case.same(f"metrics {number}", sorted(theirs), sorted([*NAMES, "acc1"]))
        for name, own in NAMES.items():
            case.close(f"metrics {number}: {name}", getattr(ours, own), theirs[name], tolerance)
        case.close(f"metrics {number}: acc1", 100 * ours.accuracy, theirs["acc1"], tolerance)
    _neighbours(case, options("knn_k"), tolerance)
    options.done()


def _neighbours(case: Case, k: int, tolerance: Tolerance) -> None:
    """Their AUC ranks by the voted label; ours would by the share of the vote."""
    labels = case.inputs["knn_val_labels"]
    shares = knn_shares(case.inputs["knn_train"], case.inputs["knn_train_labels"], case.inputs["knn_val"], k)
    vote = shares.argmax(1)
    case.offer("knn_pred", vote, tolerance=EXACT)
    ours: Metrics = classification_metrics(torch.nn.functional.one_hot(vote, shares.shape[1]), labels)
    theirs = case.spec["knn_metrics"]
    case.same("metrics of neighbours", sorted(theirs), ["knn_acc", "knn_auc", "knn_f1"])
    for name, own in {"knn_acc": ours.accuracy, "knn_auc": ours.auc, "knn_f1": ours.f1}.items():
        case.close(name, own, theirs[name], tolerance)


@adapter("mamba_mae/preprocess")
def preprocess(case: Case) -> None:
    """Integers 0 to 255 of four contrasts. Each of these reaches both ends, so that scaling it by its own range, as
    our cards do for scans of any unit, is the division by 255."""
    options, tolerance = Options(case.spec["config"]), _tolerance(case)
    size, order, top = options("size"), options("stack_order"), options("data_range")
    options.done()
    case.same("contrasts", sorted(case.inputs), sorted(order))
    scans = {name: Volume(case.inputs[name][None]) for name in sorted(order)}
    block = {"channels": len(order), "contrasts": order, "size": [size] * 3, "crop": ["center"]}
    by_255, by_channel = [0, top], {"percentiles": [0, 100], "per": "channel"}
    for window in (by_255, by_channel):
        zscore = create_transform({**block, "window": window, "normalize": "zscore_all"})(scans)
        case.offer("zscore", zscore.data, tolerance=tolerance)
    together = create_transform({**block, "window": {"percentiles": [0, 100]}})(scans)
    case.offer("minmax", together.data, tolerance=tolerance)
