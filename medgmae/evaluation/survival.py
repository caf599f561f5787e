"""How well predicted risks order the times of events, of which some were not seen to the end (censored)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medgmae.evaluation.arguments import Values, array_of, check_rows, numbers_of
from medgmae.evaluation.intervals import Counts, Interval, intervals
from medgmae.evaluation.resampled import Flags, Numbers, ratio


def concordance_index(risks: Values, times: Values, events: Values) -> float:
    """Harrell's concordance index: of the pairs whose order is known, the share in which the case with the higher risk
    had its event first; equal risks are half a pair.

    Harrell et al., Evaluating the yield of medical tests, JAMA 1982. The order of two cases is known where one had its
    event, and the other had its event, or was last seen, at a later time; or was last seen without it at the same time.
    Two events at the same time are no pair. So do lifelines (of negative risks) and scikit-survival, which takes risks
    within 1e-8 for equal. In O(n log² n).

    Args:
        risks: (n,) higher where the event is expected earlier, such as the log of a hazard.
        times: (n,) of the event, or last seen, in any unit; 0 or more.
        events: (n,) bool, or 1 for an event and 0 for last seen without.

    Returns:
        0 to 1; 0.5 is chance.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite numbers, negative times, events other than 0 and 1, or no
            pair whose order is known.
    """
    return survival_report(risks, times, events, resamples=0)["concordance"].value


def survival_report(
    risks: Values,
    times: Values,
    events: Values,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    groups: Values | None = None,
) -> dict[str, Interval]:
    """``{"concordance": ...}``: :func:`concordance_index` with its bootstrap interval. Resamples without a pair whose
    order is known are left out.

    Args:
        risks, times, events: see :func:`concordance_index`.
        resamples, confidence, seed, groups: see :func:`bootstrap_interval`.

    Raises:
        ValueError: what :func:`concordance_index` and :func:`bootstrap_interval` raise.
    """
    score, time, event = numbers_of(risks, "risks"), numbers_of(times, "times"), _events(events)
    check_rows(score, "risks", time, "times")
    check_rows(score, "risks", event, "events")
    if time.min() < 0:
        raise ValueError(f"times must be 0 or more, got {time.min():g}")
    # Of two cases with different keys the order is known if the one with the smaller key had its event.
    moments = np.unique(time, return_inverse=True)[1]
    keys = np.unique(2 * moments + ~event, return_inverse=True)[1].astype(np.int64)
    if not _pairs(score, keys, event, np.ones((1, len(keys))))[1][0]:
        raise ValueError(
            f"{int(event.sum())} of {len(event)} cases have an event, and none of them before another case's time; "
            "expected at least one pair whose order is known"
        )

    def statistics(counts: Counts) -> dict[str, Numbers]:
        return {"concordance": ratio(*_pairs(score, keys, event, counts))}

    return intervals(statistics, len(keys), resamples=resamples, confidence=confidence, seed=seed, groups=groups)


def _events(values: Values) -> Flags:
    events = array_of(values)
    if events.ndim != 1 or not np.isin(events, (0, 1)).all():
        raise ValueError(f"events must be (cases,) of 0 and 1, got {events.dtype} {tuple(events.shape)}")
    flags: Flags = events.astype(bool)
    return flags


def _pairs(risks: Numbers, keys: NDArray[np.int64], events: Flags, counts: Counts) -> tuple[Numbers, Numbers]:
    """Of each resample (b,): pairs in the right order, equal risks being half of one, and all pairs of known order.

    Two different keys have one highest bit in which they differ. So the pairs are taken bit by bit: those keys that
    are the same above a bit form a block, and in it each case without the bit comes before each case with it. Sorted by
    risk within blocks, the cases with the bit and a lower risk are a difference of two cumulative sums.
    """
    right, known = np.zeros(len(counts)), np.zeros(len(counts))
    for bit in range(int(keys.max()).bit_length()):
        order = np.lexsort((risks, keys >> (bit + 1)))
        block, risk = keys[order] >> (bit + 1), risks[order]
        late = (keys[order] >> bit & 1).astype(bool)
        drawn = counts[:, order]
        sums = np.concatenate([np.zeros((len(counts), 1)), np.cumsum(drawn * late, axis=1)], axis=1)
        new_block = np.concatenate([[True], block[1:] != block[:-1]])
        first, last = _ends(new_block)
        tie_first, tie_last = _ends(new_block | np.concatenate([[True], risk[1:] != risk[:-1]]))
        early = np.flatnonzero(~late & events[order])
        lower = (sums[:, tie_first[early]] + sums[:, tie_last[early]]) / 2 - sums[:, first[early]]
        right += (drawn[:, early] * lower).sum(1)
        known += (drawn[:, early] * (sums[:, last[early]] - sums[:, first[early]])).sum(1)
    return right, known


def _ends(starts: Flags) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the run of each place begins and ends, from whether a run starts there."""
    places = np.flatnonzero(starts)
    run = np.cumsum(starts) - 1
    return places[run], np.append(places[1:], len(starts))[run]
