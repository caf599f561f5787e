"""Pre-training: from scans to a model that ``create_model`` opens, interruptible at any time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from medgmae.checkpoints.saving import save_pretrained
from medgmae.data import Augmentation, Crops, PreparedScan, is_prepared
from medgmae.factory import create_model
from medgmae.ops.progress import progress_bar
from medgmae.training.batches import Batch, MaskedCrops, load
from medgmae.training.corpus import Corpus, corpus_of, split
from medgmae.training.engine import Engine, NotFinite, Plan, memory
from medgmae.training.machine import Machine, accelerator_for, workers_of
from medgmae.training.progress import Progress
from medgmae.training.provenance import card_of
from medgmae.training.runs import Run
from medgmae.training.settings import Settings, TrainingError, expect
from medgmae.training.states import Checkpoints, State
from medgmae.training.stopping import Stopped, StopRequest
from medgmae.training.validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator

_log = logging.getLogger("medgmae")


def pretrain(
    settings: Settings,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    resume: bool = False,
    machine: Machine | None = None,
) -> Path:
    """Pre-train a masked autoencoder.

    The same settings and data give the same weights, bit by bit on a CPU with the same number of threads, whether the
    run was interrupted or not, and however many workers read the crops. Processes that ``torchrun`` or ``accelerate
    launch`` start share every batch.

    Args:
        settings: see :class:`Settings`; :func:`read_recipe` has those of published systems.
        data: scans, folders, lists, or a folder that :func:`~medgmae.data.prepare_scans` wrote.
        out: the run's folder.
        resume: go on with the run that is there, by its own settings, and without ``data`` with its own scans.
        machine: see :class:`Machine`.

    Returns:
        The folder, which ``create_model("local-dir:FOLDER")`` opens.

    Raises:
        TrainingError: settings, data or a folder that cannot be used; a loss that is not finite; a disk that is full.
        Stopped: the run was asked to end (Ctrl-C, SIGTERM, SIGUSR1), and has saved its state.
    """
    machine, run = machine or Machine(), Run(out)
    if resume:
        settings = run.settings()
    accelerator = accelerator_for(machine, settings.training.precision, run.folder)
    if accelerator.is_main_process:
        expect(resume or not run.exists, f"{out} holds a run; --resume goes on with it, or choose another folder")
        run.open()
    try:
        state = Checkpoints(run.checkpoints, machine.keep).last() if resume else None
        model = start_model(settings if state is None else settings.changed({"init": None}))
        prepared = machine.prepared or run.folder / "prepared"
        if resume and not data:
            start = run.starts()[0]
            data, prepared = start["data"], machine.prepared or Path(start["prepared"])
            data = [prepared] if is_prepared(prepared) else data
        size = crop_size(settings, model)
        corpus = corpus_of(settings, data, size, prepared, machine.skip_broken, accelerator)
        with StopRequest() as request:  # before, nothing is lost by an end at once
            Session(settings, machine, run, model, corpus, accelerator, request).go(state)
    finally:
        if accelerator.is_main_process:
            run.close()
    return run.folder


def start_model(settings: Settings) -> nn.Module:
    """The model that a run starts with; random weights are drawn by its seed.

    Raises:
        TrainingError: not a masked autoencoder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.training.seed)
        model = create_model(settings.model, pretrained=settings.init, **settings.model_options)
    expect(hasattr(model, "reconstruct"), f"{settings.model} is not a masked autoencoder; expected mae_* or gmae_*")
    return model


class Session:
    """One start of a run, from its last state to its end or until it is stopped."""

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        run: Run,
        model: nn.Module,
        corpus: Corpus,
        accelerator: Accelerator,
        request: StopRequest,
    ) -> None:
        self.settings, self.machine, self.run, self.request = settings, machine, run, request
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        training, held_out = split(corpus.scans, settings)
        self.corpus, self.crops = corpus, _crops(settings, model, training, corpus, augment=True)
        measured = _crops(settings, model, held_out or training, corpus, augment=False)
        self.plan = Plan.of(settings.training, len(self.crops))
        self.engine = Engine(model, settings, self.plan, self.accelerator, machine.sharded)
        self.validation = Validation(measured, 8, self.engine.share.micro, bool(held_out))
        self.checkpoints = Checkpoints(run.checkpoints, machine.keep)
        self.numbers = [len(training), len(held_out)]
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
            self.run.begin(self.settings, self._about(), first)
        if self.machine.log:
            places = {"wandb": {"dir": str(self.run.folder), "name": self.run.folder.name}}
            self.accelerator.init_trackers("medgmae", init_kwargs=places)
        workers, gpu = workers_of(self.machine, self.accelerator), self.accelerator.device.type == "cuda"
        batches = load(self.crops, self.engine.share, first, self.plan.steps, workers, pin=gpu)
        show = self.machine.progress if self.main else False
        with progress_bar(self.plan.steps, "pre-training", show, unit="step") as bar:
            bar.update(first)
            for step in range(first, self.plan.steps):
                self._update(step, batches)
                bar.update()
                bar.set_postfix_str(f"loss {self.progress.last:.4f}")
        if first == self.plan.steps:  # a run that had ended, perhaps before its model was written
            self._export(self.engine.state(self._facts()))
        if self.machine.log:
            self.accelerator.end_training()

    def _update(self, step: int, batches: Iterator[Batch]) -> None:
        progress, begin = self.progress, time.perf_counter()
        try:
            values = self.engine.update(step, batches)
        except NotFinite as reason:
            self._save(measure=False)
            raise TrainingError(
                f"step {step}: {reason.what}. The weights before it are in {self.run.checkpoints}. The crops were: "
                f"{'; '.join(reason.of)}. Look at these scans; a lower training.lr, training.clip=1.0 or "
                "training.precision=fp32 may help"
            ) from None
        progress.add(values, time.perf_counter() - begin)
        done = progress.step
        if done % self.machine.log_every == 0 or done == self.plan.steps:
            self._log(progress.line(self.plan, memory(self.accelerator.device)))
        stop = self.engine.any(bool(self.request.signal))
        if stop or done % self.machine.checkpoint_every == 0 or done == self.plan.steps:
            self._save(measure=not stop or done == self.plan.steps)
        if self.machine.picture_every and (done % self.machine.picture_every == 0 or done == self.plan.steps):
            self._picture()
        if stop and done < self.plan.steps:
            raise Stopped(self.request.signal or 15, done, self.run.folder)

    def _save(self, measure: bool) -> None:
        """Measure, save the state and the model."""
        progress = self.progress
        best = False
        if measure:
            scores = self.validation.measure(self.engine, progress.step)
            score = scores.get("validation_psnr", -scores["validation_loss"])
            best = progress.best is None or score > progress.best
            progress.best = score if best else progress.best
            self._log({"step": progress.step, **scores, "held_out": self.validation.held_out})
        state = self.engine.state(self._facts())
        if self.main:
            self.checkpoints.save(state, best)
            self._export(state)

    def _facts(self) -> dict[str, Any]:
        return {"step": self.progress.step, "progress": vars(self.progress)}

    def _rebuilt(self, state: State) -> nn.Module:
        """The model of a state, on the CPU and in no wrapper."""
        with torch.random.fork_rng(devices=[]):
            model = create_model(self.settings.model, **self.settings.model_options)
        model.load_state_dict(state.model)
        return model

    def _export(self, state: State) -> None:
        """Write the model itself; only the first process has all of it."""
        if self.main:
            model: Any = self._rebuilt(state)
            size, step = self.crops.crops.size, self.progress.step
            model.pretrained_cfg = card_of(self.settings, size, self.corpus, self.numbers, self.plan, step)
            save_pretrained(model, self.run.folder)

    def _picture(self) -> None:
        """What the model makes of the first measured crop."""
        model = self._rebuilt(self.engine.state({})) if self.machine.sharded else self.engine.plain
        if not self.main:
            return
        step = self.progress.step
        try:
            self.validation.picture(model, self.run.pictures / f"step_{step:08d}.png", f"step {step}")
        except ImportError as error:
            _log.warning("no pictures: %s", error)

    def _log(self, values: dict[str, Any]) -> None:
        if self.main:
            self.run.log(values)
        if self.machine.log:
            self.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=values["step"])

    def _about(self) -> dict[str, Any]:
        training, held_out = self.numbers
        return {
            "data": [str(one) for one in self.corpus.sources],
            "prepared": str(self.corpus.folder),
            "scans": training,
            "held_out": held_out,
            "broken": self.corpus.broken,
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "precision": str(self.accelerator.mixed_precision),
            "threads": torch.get_num_threads(),
        }


def crop_size(settings: Settings, model: Any) -> tuple[int, ...]:
    """The size of the crops, (d, h, w) or (h, w).

    Raises:
        TrainingError: it is not made of whole patches.
    """
    size, patch = tuple(settings.crops.size or model.encoder.img_size), model.encoder.patch_size
    fits = len(size) == len(patch) and all(n > 0 and n % p == 0 for n, p in zip(size, patch, strict=True))
    expect(fits, f"crops.size is {list(size)}; expected multiples of the patch {list(patch)}")
    return size


def _crops(
    settings: Settings, model: Any, scans: Sequence[PreparedScan], corpus: Corpus, *, augment: bool
) -> MaskedCrops:
    encoder, size = model.encoder, crop_size(settings, model)
    channels = {scan.channels for scan in scans}
    expect(
        channels == {encoder.in_chans},
        f"the scans have {sorted(channels)} channels and the model {encoder.in_chans}; give model_options.in_chans",
    )
    crops = Crops(
        scans,
        size,
        per_scan=settings.crops.per_scan,
        foreground=settings.crops.foreground,
        pad=float(corpus.input.get("pad") or 0.0),
        normalize=settings.crops.normalize,
        augmentation=Augmentation.of(settings.augmentation) if augment else None,
        seed=settings.training.seed,
    )
    patches = math.prod(n // p for n, p in zip(size, encoder.patch_size, strict=True))
    return MaskedCrops(crops, patches, settings.training.seed)
