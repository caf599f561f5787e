"""Pre-training: from scans to a model that ``create_model`` opens, interruptible at any time."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medgmae.checkpoints.saving import save_pretrained
from medgmae.data import Augmentation, Crops, PreparedScan, is_prepared
from medgmae.data.input_block import padding
from medgmae.factory import create_model
from medgmae.training.batches import MaskedBatch, MaskedCrops
from medgmae.training.corpus import Corpus, corpus_of, split
from medgmae.training.engine import Engine, Plan
from medgmae.training.machine import Machine, accelerator_for
from medgmae.training.optim import param_groups
from medgmae.training.provenance import card_of
from medgmae.training.runs import Run
from medgmae.training.session import Job, Session
from medgmae.training.settings import Settings, TrainingSettings
from medgmae.training.states import Checkpoints, State
from medgmae.training.stopping import StopRequest
from medgmae.training.tables import expect
from medgmae.training.validation import Validation


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
        settings = run.settings(Settings)
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
        corpus = corpus_of(settings.input_block, data, size, prepared, machine.skip_broken, accelerator)
        job = Pretraining(settings, run, model, corpus)
        with StopRequest() as request:  # before, nothing is lost by an end at once
            Session(job, machine, run, accelerator, request).go(state)
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


class Pretraining(Job):
    """A masked autoencoder learns crops of scans by heart.

    Args:
        settings: of the run.
        run: its folder.
        model: a masked autoencoder.
        corpus: the scans.
    """

    title = "pre-training"
    model: Any
    settings: Settings
    samples: MaskedCrops

    def __init__(self, settings: Settings, run: Run, model: nn.Module, corpus: Corpus) -> None:
        self.settings = settings
        self.run, self.model, self.corpus = run, model, corpus
        self.objective = Reconstruct(model, settings.training)
        training, held_out = split(corpus.scans, settings)
        self.samples = self._crops(training, augment=True)
        self.validation = Validation(self._crops(held_out or training, augment=False), 8, bool(held_out))
        self.numbers = [len(training), len(held_out)]
        self.about = {
            "data": [str(one) for one in corpus.sources],
            "prepared": str(corpus.folder),
            "scans": len(training),
            "held_out": len(held_out),
            "broken": corpus.broken,
        }

    def rebuilt(self, state: State) -> nn.Module:
        """See :class:`Job`."""
        with torch.random.fork_rng(devices=[]):
            model = create_model(self.settings.model, **self.settings.model_options)
        model.load_state_dict(state.model)
        return model

    def measure(self, engine: Engine, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        """Loss, PSNR and SSIM of fixed crops with fixed masks; the score is the PSNR, else the loss."""
        values = self.validation.measure(engine, step)
        psnr = values.get("validation_psnr")
        score = {"loss": -values["validation_loss"]} if psnr is None else {"psnr": psnr}
        return {**values, "held_out": self.validation.held_out}, score

    def export(self, model: Any, plan: Plan, step: int) -> None:
        """See :class:`Job`."""
        size = self.samples.crops.size
        model.pretrained_cfg = card_of(self.settings, size, self.corpus, self.numbers, plan, step)
        save_pretrained(model, self.run.folder)

    def picture(self, model: nn.Module, path: Path, title: str) -> None:
        """What the model makes of the first measured crop."""
        self.validation.picture(model, path, title)

    def _crops(self, scans: Sequence[PreparedScan], *, augment: bool) -> MaskedCrops:
        settings, encoder = self.settings, self.model.encoder
        size = crop_size(settings, self.model)
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
            pad=padding(self.corpus.input),
            normalize=settings.crops.normalize,
            augmentation=Augmentation.of(settings.augmentation) if augment else None,
            seed=settings.training.seed,
        )
        patches = math.prod(n // p for n, p in zip(size, encoder.patch_size, strict=True))
        return MaskedCrops(crops, patches, settings.training.seed)


class Reconstruct:
    """The loss of a masked autoencoder, for crops and the masks that are made of their noise."""

    def __init__(self, model: Any, training: TrainingSettings) -> None:
        self.ratio, self.training = model.mask_ratio, training
        self.takes_step = "step" in inspect.signature(model.forward).parameters

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Without layer-wise rates, which the decoder has no place in."""
        return param_groups(model, weight_decay=self.training.weight_decay)

    def __call__(self, model: nn.Module, batch: MaskedBatch, step: int) -> dict[str, Tensor]:
        """The loss and the terms of the model's own."""
        output = model(batch.x, batch.masking(self.ratio), **({"step": step} if self.takes_step else {}))
        return {"loss": output.loss, **getattr(output, "terms", {})}


def crop_size(settings: Settings, model: Any) -> tuple[int, ...]:
    """The size of the crops, (d, h, w) or (h, w).

    Raises:
        TrainingError: it is not made of whole patches.
    """
    size, patch = tuple(settings.crops.size or model.encoder.img_size), model.encoder.patch_size
    fits = len(size) == len(patch) and all(n > 0 and n % p == 0 for n, p in zip(size, patch, strict=True))
    expect(fits, f"crops.size is {list(size)}; expected multiples of the patch {list(patch)}")
    return size
