"""How sure a metric is: the percentile bootstrap over cases, or over groups of cases, such as patients."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from medgmae.evaluation.arguments import Values, array_of, group_numbers

Counts = NDArray[np.float64]
"""(b, n): how often each of n cases was drawn in each of b resamples."""
K = TypeVar("K", bound=Hashable)

_AT_ONCE = 1 << 20  # counts that are in memory at a time


class Interval(NamedTuple):
    """A metric of all cases, and the interval of its bootstrap; NaN where it is not defined."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    metric: Callable[..., float],
    *arrays: Values,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    groups: Values | None = None,
) -> Interval:
    """A metric with its interval by the percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, chapter 13).

    A resample draws as many cases as there are, with replacement; where there are groups, as many groups, each with all
    of its cases. Resamples in which the metric is not defined, such as an AUC of one class, are left out.

    Args:
        metric: of rows of the arrays, as numpy arrays in the order given, such as
            ``sklearn.metrics.roc_auc_score``; of a resample it may return NaN, or raise ValueError, where it is not
            defined.
        arrays: (n, ...) each, one row per case.
        resamples: how many; 0 gives the value alone.
        confidence: between 0 and 1: 0.95 is from the 2.5th to the 97.5th percentile.
        seed: of the draws: the same gives the same interval.
        groups: (n,) texts or numbers.

    Returns:
        Bounds are NaN where no resample is defined, or there is one group only.

    Raises:
        ValueError: no arrays or no cases, arrays of different lengths, cases without a group, a number out of range;
            and what ``metric`` raises of all cases.
    """
    columns = [array_of(array) for array in arrays]
    lengths = [len(column) if column.ndim else 0 for column in columns]
    if not lengths or min(lengths) < 1 or min(lengths) != max(lengths):
        raise ValueError(
            f"arrays have {', '.join(map(str, lengths)) or 'no'} cases; expected the same number, 1 or more"
        )
    metric(*columns)  # an error here is one of the arguments

    def statistics(counts: Counts) -> dict[str, NDArray[np.float64]]:
        rows = (np.repeat(np.arange(lengths[0]), drawn.astype(np.int64)) for drawn in counts)
        return {"metric": np.array([_defined(metric, [column[row] for column in columns]) for row in rows])}

    return intervals(statistics, lengths[0], resamples=resamples, confidence=confidence, seed=seed, groups=groups)[
        "metric"
    ]


def intervals(
    statistics: Callable[[Counts], Mapping[K, NDArray[np.float64]]],
    cases: int,
    *,
    resamples: int,
    confidence: float = 0.95,
    seed: int,
    groups: Values | None,
) -> dict[K, Interval]:
    """Several metrics with their intervals from the same resamples.

    Args:
        statistics: metrics (b,) of b resamples at once, by name, from how often each case was drawn; NaN where not
            defined.
        cases: how many there are.
        resamples, confidence, seed, groups: see :func:`bootstrap_interval`.
    """
    if resamples < 0:
        raise ValueError(f"resamples must be 0 or more, got {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, such as 0.95, got {confidence}")
    unit_of_case = np.arange(cases) if groups is None else group_numbers(groups, cases)
    whole = statistics(np.ones((1, cases)))
    parts = [statistics(counts) for counts in _draws(unit_of_case, resamples, seed)]
    found = {}
    for name, value in whole.items():
        drawn = np.concatenate([np.empty(0), *(part[name] for part in parts)])
        found[name] = Interval(float(value[0]), *_bounds(drawn, confidence, float(value[0])))
    return found


def _draws(unit_of_case: NDArray[np.int64], resamples: int, seed: int) -> Iterator[Counts]:
    """How often each case was drawn, for some resamples at a time; none where there is one unit only."""
    units, cases = int(unit_of_case.max()) + 1, len(unit_of_case)
    generator, most = np.random.default_rng(seed), max(1, _AT_ONCE // cases)
    for first in range(0, resamples if units > 1 else 0, most):
        number = min(most, resamples - first)
        drawn = generator.integers(units, size=(number, units)) + units * np.arange(number)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=number * units).reshape(number, units)
        yield counts[:, unit_of_case].astype(np.float64)


def _bounds(drawn: NDArray[np.float64], confidence: float, value: float) -> tuple[float, float]:
    defined = drawn[~np.isnan(drawn)]
    if not len(defined) or np.isnan(value):
        return np.nan, np.nan
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _defined(metric: Callable[..., float], rows: list[NDArray[Any]]) -> float:
    try:
        return float(metric(*rows))
    except ValueError:
        return np.nan
