"""How well predictions fit: of classes, curves, confusion matrix and calibration; of numbers, points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgmae.evaluation import Values, classification_curves, classification_report, regression_report
from medgmae.evaluation.arguments import array_of
from medgmae.visualize.planes import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def classification_figure(
    probabilities: Values,
    labels: Values,
    names: Sequence[str] | None = None,
    *,
    folds: Values | None = None,
    title: str = "",
) -> Figure:
    """Four panels: ROC curve, precision-recall curve, confusion matrix and calibration.

    Of two classes the curves are those of class 1; of more there is one for each class against the rest. With folds,
    their ROC and precision-recall curves are thin lines behind those of all cases together; a fold that has no case
    of a class, or none of the rest, has no line for it.

    Args:
        probabilities: (n, K), rows sum to 1.
        labels: (n,) whole numbers from 0 to K - 1, each of them at least once.
        names: of the K classes.
        folds: (n,) the fold in which each case was a test case.
        title: line above the pictures.

    Raises:
        ImportError: matplotlib or scikit-learn is not installed; the message says how to get it.
        ValueError: not one name per class or one fold per case; and what
            :func:`~medgmae.evaluation.classification_report` raises.
    """
    classification_report(probabilities, labels, resamples=0)  # checks them
    shares, classes = array_of(probabilities), array_of(labels).astype(np.int64)
    count = shares.shape[1]
    called = [f"class {k}" for k in range(count)] if names is None else list(names)
    if len(called) != count:
        raise ValueError(f"{len(called)} names for {count} classes; expected one for each: {', '.join(called)}")
    fold_of_case = None if folds is None else array_of(folds)
    if fold_of_case is not None and fold_of_case.shape != classes.shape:
        raise ValueError(f"folds are {fold_of_case.shape}; expected one per case, {classes.shape}")
    figure = new_figure((9.6, 8.6))
    roc, precision, confusion, calibration = figure.subplots(2, 2).ravel()
    for number, k in enumerate(range(count) if count > 2 else [1]):
        colour, positive = f"C{number % 10}", classes == k
        for fold in [] if fold_of_case is None else np.unique(fold_of_case):
            part = fold_of_case == fold
            if 0 < positive[part].sum() < part.sum():
                thin = classification_curves(shares[part, k], positive[part])
                roc.plot(thin.false_positives, thin.true_positives, color=colour, lw=0.6, alpha=0.5)
                precision.step(thin.recall, thin.precision, color=colour, lw=0.6, alpha=0.5, where="post")
        curves = classification_curves(shares[:, k], positive)
        roc.plot(curves.false_positives, curves.true_positives, color=colour, label=f"{called[k]}: {curves.auc:.3f}")
        label = f"{called[k]}: {curves.average_precision:.3f}"
        precision.step(curves.recall, curves.precision, color=colour, where="post", label=label)
        calibration.plot(curves.confidence, curves.share, color=colour, marker=".", label=called[k])
    for axes in (roc, calibration):
        axes.plot([0, 1], [0, 1], color="grey", lw=0.8, ls=":")
    _describe(roc, "ROC curve, area", "1 - specificity", "sensitivity")
    _describe(precision, "precision-recall curve, average precision", "recall (sensitivity)", "precision")
    _describe(calibration, "calibration in ten bins", "mean probability", "share of cases")
    _confusion(confusion, shares.argmax(1), classes, called)
    figure.suptitle(title)
    return figure


def regression_figure(
    predictions: Values, targets: Values, *, folds: Values | None = None, label: str = "target", title: str = ""
) -> Figure:
    """Predicted against true numbers, a point per case, with the line where they are the same.

    Args:
        predictions, targets: (n,).
        folds: (n,) the fold in which each case was a test case, a colour each.
        label: what the numbers are, with their unit.
        title: line above the picture.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
        ValueError: not one fold per case; and what :func:`~medgmae.evaluation.regression_report` raises.
    """
    report = regression_report(predictions, targets, resamples=0)
    guessed, true = array_of(predictions), array_of(targets)
    names, fold_of_case = np.unique(np.zeros(len(true)) if folds is None else array_of(folds), return_inverse=True)
    if fold_of_case.shape != true.shape:
        raise ValueError(f"folds are {fold_of_case.shape}; expected one per case, {true.shape}")
    figure = new_figure((5.2, 5))
    axes = figure.add_subplot()
    for number, name in enumerate(names):
        part = fold_of_case == number
        axes.plot(true[part], guessed[part], ".", ms=4, alpha=0.7, label=None if folds is None else f"fold {name}")
    ends = [float(true.min()), float(true.max())]
    axes.plot(ends, ends, color="grey", lw=0.8, ls=":")
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("prediction", fontsize=9)
    axes.set_title(f"mean absolute error {report['mae'].value:.4g}, R² {report['r2'].value:.3f}", fontsize=10)
    axes.grid(alpha=0.3)
    if folds is not None:
        axes.legend(fontsize=8)
    figure.suptitle(title)
    return figure


def _describe(axes: Axes, title: str, across: str, up: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _confusion(axes: Axes, predicted: NDArray[Any], labels: NDArray[Any], names: Sequence[str]) -> None:
    """Cases by class and prediction, in shades of the share of the class."""
    count = len(names)
    table = np.bincount(labels * count + predicted, minlength=count**2).reshape(count, count)
    shares = table / table.sum(1, keepdims=True)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if count <= 20:
        for row, column in np.ndindex(count, count):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(table[row, column]), ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(count), names, rotation=30 if count > 3 else 0, fontsize=8)
    axes.set_yticks(range(count), names, fontsize=8)
    axes.set_title("confusion matrix, cases", fontsize=10)
    axes.set_xlabel("prediction", fontsize=9)
    axes.set_ylabel("class", fontsize=9)
