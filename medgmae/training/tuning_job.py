"""What all fine-tuning shares: cases held out, an early end, and results of the weights that were best by a score."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medgmae.training.corpus import Corpus
from medgmae.training.engine import Plan
from medgmae.training.progress import Progress
from medgmae.training.session import Job
from medgmae.training.settings import TuneSettings
from medgmae.training.states import Checkpoints, State


class TuningJob(Job):
    """A model learns some cases and is measured on others.

    Attributes:
        training, held_out: numbers of the cases.
        fold: number of this run.
        places: of ``tuning.select``, the folder of each result; that of the first is the run's.
    """

    settings: TuneSettings
    training: list[int]
    held_out: list[int]
    fold: int
    places: Mapping[str, Path]

    @abstractmethod
    def conclude(self, state: State, plan: Plan, select: str, folder: Path) -> None:
        """Write the model of a state, and how it does on the cases held out."""

    def facts(self, corpus: Corpus) -> dict[str, Any]:
        """About the run, for its ``run.json``."""
        return {
            "data": [str(one) for one in corpus.sources],
            "prepared": str(corpus.folder),
            "scans": len(self.training),
            "held_out": len(self.held_out),
            "fold": self.fold,
            "broken": corpus.broken,
        }

    def enough(self, progress: Progress) -> bool:
        """Whether ``tuning.patience`` measurements went by without a better one."""
        patience = self.settings.tuning.patience
        return patience is not None and progress.since >= patience

    def finish(self, state: State, plan: Plan, checkpoints: Checkpoints) -> None:
        """Write the result of each of ``tuning.select``; the run's own last, because its metrics show that all is
        done."""
        for select, folder in reversed(list(self.places.items())):
            found = None if select == "last" else checkpoints.best(select)
            self.conclude(found or state, plan, select, folder)
