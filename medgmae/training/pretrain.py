"""Pre-training: from scans to a model that ``create_model`` opens, interruptible at any time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medgmae.data import is_prepared
from medgmae.factory import create_model
from medgmae.training.corpus import corpus_of
from medgmae.training.global_local import GlobalLocalPretraining, with_teacher
from medgmae.training.machine import Machine, accelerator_for
from medgmae.training.pretraining import Pretraining, crop_size
from medgmae.training.runs import Run
from medgmae.training.session import Session
from medgmae.training.settings import Settings
from medgmae.training.states import Checkpoints
from medgmae.training.stopping import StopRequest
from medgmae.training.tables import expect


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
        model: Any = start_model(settings if state is None else settings.changed({"init": None}))
        prepared = machine.prepared or run.folder / "prepared"
        if resume and not data:
            start = run.starts()[0]
            data, prepared = start["data"], machine.prepared or Path(start["prepared"])
            data = [prepared] if is_prepared(prepared) else data
        size = crop_size(settings, model)
        corpus = corpus_of(settings.input_block, data, size, prepared, machine.skip_broken, accelerator)
        job = (
            Pretraining(settings, run, model, corpus)
            if settings.global_local is None
            else GlobalLocalPretraining(settings, run, with_teacher(model, settings), corpus)
        )
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
