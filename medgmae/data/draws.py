"""Random numbers that depend on counters alone: not on the order of the draws, the process or the worker."""

from __future__ import annotations

import numpy as np


def draws(seed: int, *counters: int) -> np.random.Generator:
    """The generator of one place in a run, such as ``draws(seed, epoch, index)``.

    The counters are the key of numpy's seed sequence, which keeps ``(seed,)``, ``(seed, 0)`` and ``(seed, 0, 0)``
    apart: as a list ``[seed, 0]`` is the same seed as ``[seed]``.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=counters))
