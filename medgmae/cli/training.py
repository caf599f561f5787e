"""What ``medgmae pretrain`` and ``medgmae finetune`` share: options of settings and machine, and how a run ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.common import shown
from medgmae.cli.options import gathered


@dataclass(frozen=True)
class Changes:
    """Settings of a recipe that have an option of their own, whatever is trained."""

    steps: int | None
    epochs: float | None
    batch_size: int | None
    lr: float | None
    seed: int | None
    precision: str | None
    held_out: str | None
    settings: tuple[str, ...]


change_options = gathered(
    "changes",
    Changes,
    click.option("--steps", type=click.IntRange(1), help="Updates; the warm-up keeps its share. [the recipe's]"),
    click.option("--epochs", type=click.FloatRange(0, min_open=True), help="Length in epochs instead of --steps."),
    click.option("--batch-size", type=click.IntRange(1), help="Samples per update, of all processes. [the recipe's]"),
    click.option("--lr", type=float, help="Peak of the learning rate. [the recipe's]"),
    click.option("--seed", type=click.IntRange(0), help="Of every random draw. [the recipe's]"),
    click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), help="[the recipe's]"),
    click.option("--held-out", metavar="SHARE|COLUMN=VALUE", help="Scans to measure on. [the recipe's]"),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="NAME=VALUE",
        help="Any setting, as in training.clip=1.0; repeat it.",
    ),
)


@dataclass(frozen=True)
class Place:
    """Options of a run that do not change what comes out of it, and ``threads``."""

    device: str | None
    workers: int | None
    log_every: int
    checkpoint_every: int | None
    keep: int
    log: tuple[str, ...]
    skip_broken: bool
    prepared: Path | None
    threads: int | None


def place_options(checkpoint_every: int | None) -> Callable[[Any], Any]:
    """``place``, a :class:`Place`; ``checkpoint_every`` is the default, None an epoch."""
    every = "an epoch" if checkpoint_every is None else f"{checkpoint_every}"
    return gathered(
        "place",
        Place,
        click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[a GPU where there is one]"),
        click.option("--workers", type=click.IntRange(0), help="Processes that read scans, of each. [8 beside a GPU]"),
        click.option("--log-every", type=click.IntRange(1), default=10, help="Updates between lines of the log."),
        click.option(
            "--checkpoint-every",
            type=click.IntRange(1),
            default=checkpoint_every,
            show_default=False,
            help=f"Updates between checkpoints and measurements. [{every}]",
        ),
        click.option("--keep", type=click.IntRange(1), default=3, help="Checkpoints kept, beside the best."),
        click.option("--log", multiple=True, type=click.Choice(["tensorboard", "wandb"]), help="Beside metrics.jsonl."),
        click.option("--skip-broken", is_flag=True, help="Leave out scans that cannot be read, and count them."),
        click.option("--prepared", type=click.Path(path_type=Path), help="Folder of prepared scans. [OUT/prepared]"),
        click.option("--threads", type=click.IntRange(1), help="CPU threads. [torch's default]"),
    )


def changed(settings: Any, changes: Changes, named: Mapping[str, Any]) -> Any:
    """Settings with the changes that options ask for; ``named`` are those of one command, None where not given."""
    if changes.steps and changes.epochs:
        raise click.UsageError("--steps and --epochs both say how long; leave one out")
    if changes.steps or changes.epochs:
        settings = settings.lasting(steps=changes.steps, epochs=changes.epochs)
    common = {
        "held_out": None if changes.held_out is None else _share(changes.held_out),
        **{f"training.{key}": getattr(changes, key) for key in ("batch_size", "lr", "seed", "precision")},
    }
    given = {key: value for key, value in {**named, **common}.items() if value is not None}
    return settings.changed({**given, **dict(map(medgmae.training.parse_change, changes.settings))})


def refuse_changes(changes: Changes, others: Mapping[str, Any], advice: str) -> None:
    """Refuse options beside --resume."""
    given = [option for option, value in {**vars(changes), **others}.items() if value not in (None, (), False)]
    if given:
        raise click.UsageError(
            f"--resume goes on with the settings of the run: leave out --{given[0].replace('_', '-')}; {advice}"
        )


def run_with(place: Place, begin: Callable[[Any], Path], word: str, **more: Any) -> None:
    """Run a training; ``begin`` takes the :class:`~medgmae.training.Machine`."""
    import torch

    if place.threads:
        torch.set_num_threads(place.threads)
    options = {key: value for key, value in vars(place).items() if key != "threads"}
    try:
        folder = begin(medgmae.training.Machine(**options, **more))
    except medgmae.training.Stopped as stopped:
        click.echo(shown(str(stopped)), err=True)
        raise click.exceptions.Exit(128 + stopped.signal) from None
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"{word}: {shown(folder)}")


def _share(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
