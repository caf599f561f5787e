"""Counters of a run, and the lines of its log that they make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medgmae.training.engine import Plan


@dataclass
class Progress:
    """Counters of a run; they are part of its state, so that its log does not depend on interruptions.

    step: updates that are done.
    best: best scores so far, by name.
    since: measurements after that of the first name.
    last: last loss.
    sums: of values since the last line of the log, over ``count`` updates.
    """

    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    since: int = 0
    last: float = math.nan
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, values: Mapping[str, float], seconds: float) -> None:
        """Count an update."""
        for name, value in {**values, "seconds": seconds}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.step, self.count, self.last = self.step + 1, self.count + 1, values["loss"]

    def score(self, scores: Mapping[str, float]) -> list[str]:
        """Count a measurement of one or more scores; the names of those that are the best so far."""
        better = [name for name, score in scores.items() if name not in self.best or score > self.best[name]]
        self.best |= {name: scores[name] for name in better}
        self.since = 0 if next(iter(scores)) in better else self.since + 1
        return better

    def line(self, plan: Plan, megabytes: float) -> dict[str, Any]:
        """A line of the log, and a new beginning."""
        means = {name: value / self.count for name, value in self.sums.items()}
        seconds, waited = means.pop("seconds"), means.pop("waited")
        self.sums, self.count = {}, 0
        return {
            "step": self.step,
            "epoch": round(plan.epoch(self.step), 4),
            **means,
            "crops_per_second": round(plan.batch / seconds, 4),
            "data_wait": round(waited / seconds, 4),
            "memory_mb": round(megabytes, 1),
        }
