"""In which fold each case is a test case; cases of one patient stay together where that is asked for."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgmae.evaluation.arguments import Values, array_of, check_classes, class_labels, group_numbers, library

_MOST = 5  # names that a message has


def stratified_folds(labels: Values, folds: int = 5, seed: int = 42, groups: Values | None = None) -> Tensor:
    """The fold in which each case is a test case, as scikit-learn's ``StratifiedKFold`` shuffles them, or its
    ``StratifiedGroupKFold`` where there are groups.

    With ``fold = stratified_folds(labels)``, train on the cases where ``fold != k`` and collect the logits of those
    where ``fold == k``, for each k, as :func:`~medgmae.evaluation.fold_metrics` takes them.

    Args:
        labels: (n,) whole numbers from 0 on; every class goes into every fold.
        folds: how many, at least 2.
        seed: ``random_state``; 42 with 5 folds is the protocol of 3D Mamba MAE.
        groups: (n,) texts or numbers, such as patients: no group lies in two folds. The shares of the classes are
            then as even as the groups allow.

    Returns:
        (n,) int64, 0 to folds - 1.

    Raises:
        ValueError: a class with fewer cases (groups, where given) than folds, fewer than two classes, labels that are
            not classes; groups that leave a fold without a class, or cases without a group.
        ImportError: scikit-learn is not installed.
    """
    classes = class_labels(labels)
    check_count(folds)
    check_classes(classes, int(classes.max()) + 1, least=folds, why=f"each of the {folds} folds needs one to test on")
    selection = library("sklearn.model_selection")
    if groups is None:
        splits = selection.StratifiedKFold(folds, shuffle=True, random_state=seed).split(classes, classes)
    else:
        numbers = group_numbers(groups, len(classes))
        _check_groups(classes, numbers, folds)
        splits = selection.StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(classes, classes, numbers)
    fold_of_case = torch.empty(len(classes), dtype=torch.int64)
    for fold, (_, test) in enumerate(splits):
        fold_of_case[torch.from_numpy(test)] = fold
        absent = sorted(set(classes.tolist()) - set(classes[test].tolist()))
        if absent:
            raise ValueError(
                f"fold {fold} of {folds} has no case of class {', class '.join(map(str, absent))}, as groups stay "
                "together; take fewer folds or another seed"
            )
    return fold_of_case


def even_folds(cases: int, folds: int = 5, seed: int = 42, groups: Values | None = None) -> Tensor:
    """The fold in which each case is a test case, at random and of even sizes: for targets that are not classes.

    Args:
        cases: how many there are, at least as many as folds.
        folds: how many, at least 2.
        seed: of the order in which groups, or cases, are put into the smallest fold; larger groups come first.
        groups: (n,) texts or numbers, such as patients: no group lies in two folds.

    Returns:
        (n,) int64, 0 to folds - 1.

    Raises:
        ValueError: fewer cases or groups than folds, or cases without a group.
    """
    check_count(folds)
    numbers = np.arange(cases) if groups is None else group_numbers(groups, cases)
    sizes = np.bincount(numbers)
    if len(sizes) < folds:
        units = "cases" if groups is None else "groups"
        raise ValueError(f"{len(sizes)} {units} for {folds} folds; expected at least one {units[:-1]} for each")
    order = np.random.default_rng(seed).permutation(len(sizes))
    fold_of_group, filled = np.empty(len(sizes), np.int64), np.zeros(folds, np.int64)
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        fold_of_group[group] = filled.argmin()
        filled[fold_of_group[group]] += sizes[group]
    return torch.from_numpy(fold_of_group[numbers])


def check_folds(folds: Values, groups: Values) -> None:
    """No group, such as a patient, lies in two folds.

    Args:
        folds: (n,) the fold of each case, as numbers or texts.
        groups: (n,) the group of each case, as numbers or texts.

    Raises:
        ValueError: groups that lie in two folds, of which it names five; cases without a group.
    """
    fold_of_case, names = array_of(folds), array_of(groups)
    numbers = group_numbers(groups, len(fold_of_case))
    pairs = np.unique(np.stack([numbers, np.unique(fold_of_case, return_inverse=True)[1]]), axis=1)
    split = np.flatnonzero(np.bincount(pairs[0]) > 1)
    if len(split):
        told = []
        for number in split[:_MOST]:
            found = np.unique(fold_of_case[numbers == number]).tolist()
            told.append(f"{names[numbers == number][0]} ({', '.join(map(str, found))})")
        more = f" and {len(split) - _MOST} more" if len(split) > _MOST else ""
        raise ValueError(
            f"{len(split)} of {numbers.max() + 1} groups lie in more than one fold: {', '.join(told)}{more}; expected "
            "all cases of a group, such as a patient, in the same fold"
        )


def check_count(folds: int) -> None:
    """There are two folds or more."""
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")


def _check_groups(classes: NDArray[np.int64], numbers: NDArray[np.int64], folds: int) -> None:
    """Every class is found in as many groups as there are folds."""
    counts = [len(np.unique(numbers[classes == label])) for label in range(int(classes.max()) + 1)]
    rare = [f"{label} in {count}" for label, count in enumerate(counts) if count < folds]
    if rare:
        raise ValueError(
            f"of {numbers.max() + 1} groups, class {', class '.join(rare)}; each of the {folds} folds needs one to "
            "test on"
        )
