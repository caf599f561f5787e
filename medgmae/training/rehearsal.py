"""What a run of fine-tuning would be, before an hour is spent on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medgmae.training.batches import CaseBatch
from medgmae.training.engine import Engine, Objective, Plan, memory
from medgmae.training.finetune import completed, listed, view_of
from medgmae.training.machine import Machine, accelerator_for
from medgmae.training.masks import Masks
from medgmae.training.segmenting import Segment
from medgmae.training.settings import TuneSettings
from medgmae.training.targets import Targets
from medgmae.training.tuned import Predict, segmenter, tuned_model


def rehearse(settings: TuneSettings, data: Sequence[str | Path], *, skip_broken: bool = False) -> dict[str, Any]:
    """Check a table, its files and how they are divided, and make two updates on random numbers.

    Returns:
        Plain facts: ``cases``, ``outputs``, ``counts`` by class, ``classes``, ``parts`` (of each fold: cases learned
        from, held out, and of the latter those of every class), ``view``, ``steps``, ``epochs``, ``batch``,
        ``seconds`` of an update, ``hours`` of all of them, ``memory_mb``, ``device``.

    Raises:
        TrainingError: what :func:`~medgmae.training.finetune` would raise before its first epoch, but for scans that
            are there and cannot be read or are copies, which only reading shows.
    """
    settings = completed(settings, data)
    targets, parts = listed(settings, data, skip_broken)
    single = settings.task.kind == "classify" and not settings.task.multilabel
    classes = targets.names if single else []
    table = []
    for training, held_out in parts:
        found = [int((targets.values[held_out, 0] == k).sum()) for k in range(len(classes))]
        table.append([len(training), len(held_out), *found])
    each = settings.view.windows if settings.task.kind == "segment" else 1
    view, plan = view_of(settings), Plan.of(settings.training, len(parts[0][0]) * each)
    seconds, megabytes, device = _timed(settings, targets, view.size, plan)
    return {
        "cases": len(targets.values),
        "outputs": targets.names if targets.outputs > 1 else targets.names[:1],
        "counts": targets.counts(),
        "classes": classes,
        "parts": table,
        "view": f"{settings.view.kind}, {' x '.join(map(str, view.size))} voxels",
        "steps": plan.steps,
        "epochs": plan.epoch(plan.steps),
        "batch": plan.batch,
        "seconds": seconds,
        "hours": seconds * plan.steps * len(parts) / 3600,
        "memory_mb": megabytes,
        "device": device,
    }


def _timed(settings: TuneSettings, targets: Targets, size: Sequence[int], plan: Plan) -> tuple[float, float, str]:
    """Seconds of the second update, and the most memory."""
    accelerator = accelerator_for(Machine(), settings.training.precision, Path())
    first, training = targets.values[:1], settings.training
    model: Any
    objective: Objective
    if settings.task.kind == "segment":
        masks = Masks([], settings.task.regions or {"label": [1]}, settings.task.multilabel)
        model, objective = segmenter(settings, len(masks.names), pretrained=False), Segment(masks, training)
        x, first = torch.rand(1, model.in_chans, *size), masks.target(torch.zeros(1, *size))[None]
    else:
        scale = (torch.zeros(first.shape[1]), torch.ones(first.shape[1])) if settings.task.kind == "regress" else None
        model, objective = (
            tuned_model(settings, targets.outputs, pretrained=False),
            Predict(targets, training, None, scale),
        )
        windows = settings.view.windows if settings.view.kind == "windows" else 1
        x = torch.rand(1, windows, model.encoder.in_chans, *size)
    engine = Engine(model, objective, training, plan, accelerator)
    count = engine.share.micro
    several = [one.expand(count, *one.shape[1:]) for one in (x, first)]
    batch = CaseBatch(several[0], several[1], ["random numbers"] * count)
    seconds = 0.0
    for step in range(2):
        begin = time.perf_counter()
        engine.update(step, iter([batch] * engine.share.passes))
        seconds = time.perf_counter() - begin
    return seconds, memory(accelerator.device), str(accelerator.device)
