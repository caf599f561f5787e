"""One start of a run, whatever it trains for: updates, log, states, and an orderly end at any time."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from medgmae.ops.progress import progress_bar
from medgmae.training.batches import Batch, Samples, load
from medgmae.training.engine import Engine, NotFinite, Objective, Plan, memory
from medgmae.training.machine import Machine, workers_of
from medgmae.training.progress import Progress
from medgmae.training.runs import Run
from medgmae.training.settings import RunSettings
from medgmae.training.states import Checkpoints, State
from medgmae.training.stopping import Stopped, StopRequest
from medgmae.training.tables import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

_log = logging.getLogger("medgmae")


class Job(ABC):
    """What a run trains for: a model, its samples, what it learns, how it is measured and what it leaves.

    Attributes:
        title: of the bar.
        settings: of the run.
        model: what learns.
        objective: what it learns.
        samples: of training.
        about: facts for the run's ``run.json``.
    """

    title: ClassVar[str]
    settings: RunSettings
    model: nn.Module
    objective: Objective
    samples: Samples[Any]
    about: dict[str, Any]

    @abstractmethod
    def rebuilt(self, state: State) -> nn.Module:
        """A model of its own with the weights of a state, on the CPU."""

    @abstractmethod
    def measure(self, engine: Engine, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        """Numbers for the log, and scores by name: the larger, the better. The weights with the best of each are kept;
        patience looks at the first."""

    @abstractmethod
    def export(self, model: nn.Module, plan: Plan, step: int) -> None:
        """Write a rebuilt model into the run's folder, as ``create_model`` opens it."""

    def picture(self, model: nn.Module, path: Path, title: str) -> None:
        """What the model makes of a sample, as a PNG file; by default nothing."""
        return

    def updated(self, engine: Engine, step: int) -> None:
        """After update number ``step``, counted from 0: what follows the weights; by default nothing."""
        return

    def enough(self, progress: Progress) -> bool:
        """Whether the run may end before its time."""
        return False

    def finish(self, state: State, plan: Plan, checkpoints: Checkpoints) -> None:
        """At the end, on the first process: write the result, of this last state or of another."""
        self.export(self.rebuilt(state), plan, state.facts["step"])


class Session:
    """One start of a run, from its last state to its end or until it is stopped.

    Args:
        job: what it trains for.
        machine: where.
        run: its folder.
        accelerator: of accelerate.
        request: set when it is asked to end.
    """

    def __init__(self, job: Job, machine: Machine, run: Run, accelerator: Accelerator, request: StopRequest) -> None:
        self.job, self.machine, self.run, self.request = job, machine, run, request
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        training = job.settings.training
        self.plan = Plan.of(training, len(job.samples))
        self.engine = Engine(job.model, job.objective, training, self.plan, accelerator, machine.sharded)
        self.checkpoints = Checkpoints(run.checkpoints, machine.keep)
        self.every = machine.checkpoint_every or self.plan.per_epoch
        self.progress = Progress()

    def go(self, state: State | None) -> None:
        """Train to the end, from a state or from the start.

        Raises:
            Stopped: asked to end before.
        """
        if state is not None:
            self.engine.resume(state)
            self.progress = Progress(**state.facts["progress"])
        first = self.progress.step
        if self.main:
            self.run.begin(self.job.settings, {**self.job.about, **self._where()}, first)
        if self.machine.log:
            places = {"wandb": {"dir": str(self.run.folder), "name": self.run.folder.name}}
            self.accelerator.init_trackers("medgmae", init_kwargs=places)
        workers, gpu = workers_of(self.machine, self.accelerator), self.accelerator.device.type == "cuda"
        batches = load(self.job.samples, self.engine.share, first, self.plan.steps, workers, pin=gpu)
        show = self.machine.progress if self.main else False
        with progress_bar(self.plan.steps, self.job.title, show, unit="step") as bar:
            bar.update(first)
            for step in range(first, self.plan.steps):
                if self.job.enough(self.progress):
                    break
                self._update(step, batches)
                bar.update()
                bar.set_postfix_str(f"loss {self.progress.last:.4f}")
        last = self.engine.state(self._facts())
        if self.main:
            self.job.finish(last, self.plan, self.checkpoints)
        if self.machine.log:
            self.accelerator.end_training()

    def _update(self, step: int, batches: Iterator[Batch]) -> None:
        progress, begin = self.progress, time.perf_counter()
        try:
            values = self.engine.update(step, batches)
        except NotFinite as reason:
            self._save(measure=False)
            raise TrainingError(
                f"step {step}: {reason.what}. The weights before it are in {self.run.checkpoints}. The samples were: "
                f"{'; '.join(reason.of)}. Look at these scans; a lower training.lr, training.clip=1.0 or "
                "training.precision=fp32 may help"
            ) from None
        self.job.updated(self.engine, step)
        progress.add(values, time.perf_counter() - begin)
        done = progress.step
        if done % self.machine.log_every == 0 or done == self.plan.steps:
            self._log(progress.line(self.plan, memory(self.accelerator.device)))
        stop = self.engine.any(bool(self.request.signal))
        if stop or done % self.every == 0 or done == self.plan.steps:
            self._save(measure=done % self.every == 0 or done == self.plan.steps)
        if self.machine.picture_every and (done % self.machine.picture_every == 0 or done == self.plan.steps):
            self._picture()
        if stop and done < self.plan.steps:
            raise Stopped(self.request.signal or 15, done, self.run.folder)

    def _save(self, measure: bool) -> None:
        """Measure, save the state and the model."""
        progress, best = self.progress, []
        if measure:
            values, scores = self.job.measure(self.engine, progress.step)
            best = progress.score(scores)
            self._log({"step": progress.step, **values})
        state = self.engine.state(self._facts())
        if self.main:
            self.checkpoints.save(state, best)
            if progress.step < self.plan.steps:  # the end writes its own
                self.job.export(self.job.rebuilt(state), self.plan, progress.step)

    def _facts(self) -> dict[str, Any]:
        return {"step": self.progress.step, "progress": vars(self.progress)}

    def _picture(self) -> None:
        """What the model makes of a sample."""
        model = self.job.rebuilt(self.engine.state({})) if self.machine.sharded else self.engine.plain
        if not self.main:
            return
        step = self.progress.step
        try:
            self.job.picture(model, self.run.pictures / f"step_{step:08d}.png", f"step {step}")
        except ImportError as error:
            _log.warning("no pictures: %s", error)

    def _log(self, values: dict[str, Any]) -> None:
        if self.main:
            self.run.log(values)
        if self.machine.log:
            self.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=values["step"])

    def _where(self) -> dict[str, Any]:
        return {
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "precision": str(self.accelerator.mixed_precision),
            "threads": torch.get_num_threads(),
        }
