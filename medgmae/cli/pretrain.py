"""``medgmae pretrain``: from scans to a pre-trained model; ``medgmae runs``: curves of such runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.common import echo_json, echo_table, reports_errors, shown
from medgmae.cli.files import check_name, refuse_existing, write_figure
from medgmae.cli.options import complete_name, file_option, gathered, json_option, overwrite_option

# Recipe of a model without one: by the beginning of its name, the first that fits.
_RECIPES = {
    "gmae_": "medgmae",
    "mae_vim_": "mamba_mae",
    "mae2d_": "selfmedmae_2d",
    "mae_vit_large_patch16_256": "tangerine",
    "": "quick",
}


@dataclass(frozen=True)
class Changes:
    """Settings of a recipe that have an option of their own."""

    steps: int | None
    epochs: float | None
    batch_size: int | None
    lr: float | None
    seed: int | None
    precision: str | None
    init: str | None
    held_out: str | None
    settings: tuple[str, ...]


_changes = gathered(
    "changes",
    Changes,
    click.option("--steps", type=click.IntRange(1), help="Updates; the warm-up keeps its share. [the recipe's]"),
    click.option("--epochs", type=click.FloatRange(0, min_open=True), help="Length in epochs instead of --steps."),
    click.option("--batch-size", type=click.IntRange(1), help="Crops per update, of all processes. [the recipe's]"),
    click.option("--lr", type=float, help="Peak of the learning rate. [the recipe's]"),
    click.option("--seed", type=click.IntRange(0), help="Of every random draw. [the recipe's]"),
    click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), help="[the recipe's]"),
    click.option("--init", metavar="SOURCE", help="Start from these weights: a tag, file, folder or hub repository."),
    click.option("--held-out", metavar="SHARE|COLUMN=VALUE", help="Scans to measure on. [the recipe's: 0.1]"),
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
    sharded: bool
    log_every: int
    checkpoint_every: int
    picture_every: int
    keep: int
    log: tuple[str, ...]
    skip_broken: bool
    prepared: Path | None
    threads: int | None


_place = gathered(
    "place",
    Place,
    click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[a GPU where there is one]"),
    click.option("--workers", type=click.IntRange(0), help="Processes that read crops, of each. [8 beside a GPU]"),
    click.option("--sharded", is_flag=True, help="Spread weights over the processes (FSDP2) instead of copying them."),
    click.option("--log-every", type=click.IntRange(1), default=10, help="Updates between lines of the log."),
    click.option(
        "--checkpoint-every", type=click.IntRange(1), default=500, help="Updates between checkpoints and measurements."
    ),
    click.option("--picture-every", type=click.IntRange(0), default=500, help="Updates between pictures; 0: none."),
    click.option("--keep", type=click.IntRange(1), default=3, help="Checkpoints kept, beside the best."),
    click.option("--log", multiple=True, type=click.Choice(["tensorboard", "wandb"]), help="Beside metrics.jsonl."),
    click.option("--skip-broken", is_flag=True, help="Leave out scans that cannot be read, and count them."),
    click.option("--prepared", type=click.Path(path_type=Path), help="Folder of prepared scans. [OUT/prepared]"),
    click.option("--threads", type=click.IntRange(1), help="CPU threads. [torch's default]"),
)


@click.command("pretrain")
@click.option("--model", "name", shell_complete=complete_name, help="A masked autoencoder. [the recipe's]")
@click.option(
    "--data",
    "data",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A scan, a folder, a .csv or .txt list, or prepared scans; may be repeated.",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="The run's folder.")
@click.option("--recipe", metavar="NAME|FILE", help="Settings to begin with. [by the model]")
@click.option("--resume", is_flag=True, help="Go on with the run in OUT, with its settings and data.")
@click.option("--print-config", is_flag=True, help="Print the settings, and do nothing else.")
@_changes
@_place
@reports_errors
def pretrain_command(
    name: str | None,
    data: tuple[Path, ...],
    out: Path | None,
    recipe: str | None,
    resume: bool,
    print_config: bool,
    changes: Changes,
    place: Place,
) -> None:
    """Pre-train a masked autoencoder on scans.

    The settings are a recipe's, changed by options. Scans are prepared once, in OUT/prepared. OUT is a model that
    create_model("local-dir:OUT") opens, from the first checkpoint on; metrics.jsonl has its numbers, pictures/ what it
    makes of a crop.

    Ctrl-C, SIGTERM and SIGUSR1 save and end the run, with exit code 130, 143 or 138; --resume goes on as if nothing had
    been. Several processes: torchrun --nproc-per-node 4 -m medgmae pretrain ...
    """
    if print_config and not resume:
        click.echo(_settings(name, recipe, changes).toml())
        return
    if out is None:
        raise click.UsageError("missing option '--out'")
    check_name(out)
    if resume:
        given = [option for option, value in vars(changes).items() if value not in (None, ())]
        given += [option for option, value in (("model", name), ("recipe", recipe)) if value]
        if given:
            raise click.UsageError(
                f"--resume goes on with the settings of the run: leave out --{given[0].replace('_', '-')}; to train on "
                "with others, start a run with --init OUT"
            )
    settings = (
        medgmae.training.Run(out).settings(medgmae.training.Settings) if resume else _settings(name, recipe, changes)
    )
    if print_config:
        click.echo(settings.toml())
        return
    if not data and not resume:
        raise click.UsageError("missing option '--data'")
    _train(settings, data, out, resume, place)


def _train(settings: Any, data: tuple[Path, ...], out: Path, resume: bool, place: Place) -> None:
    import torch

    if place.threads:
        torch.set_num_threads(place.threads)
    machine = medgmae.training.Machine(**{key: value for key, value in vars(place).items() if key != "threads"})
    try:
        folder = medgmae.training.pretrain(settings, data, out, resume=resume, machine=machine)
    except medgmae.training.Stopped as stopped:
        click.echo(shown(str(stopped)), err=True)
        raise click.exceptions.Exit(128 + stopped.signal) from None
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"pre-trained: {shown(folder)}")


def _settings(name: str | None, recipe: str | None, changes: Changes) -> Any:
    """The recipe's settings with the changes that options ask for."""

    if recipe is None:
        if name is None:
            raise click.UsageError("missing option '--model' or '--recipe'")
        recipe = next(value for prefix, value in _RECIPES.items() if name.startswith(prefix))
    settings = medgmae.training.read_recipe(recipe)
    if changes.steps and changes.epochs:
        raise click.UsageError("--steps and --epochs both say how long; leave one out")
    if changes.steps or changes.epochs:
        settings = settings.lasting(steps=changes.steps, epochs=changes.epochs)
    named = {
        "model": name,
        "init": changes.init,
        "held_out": None if changes.held_out is None else _share(changes.held_out),
        **{f"training.{key}": getattr(changes, key) for key in ("batch_size", "lr", "seed", "precision")},
    }
    given = {key: value for key, value in named.items() if value is not None}
    return settings.changed({**given, **dict(map(medgmae.training.parse_change, changes.settings))})


def _share(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


@click.command("runs")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@file_option("--png", (".png",), "Write the curves as a picture.")
@overwrite_option
@json_option
@reports_errors
def runs_command(runs: tuple[Path, ...], png: Path | None, overwrite: bool, as_json: bool) -> None:
    """Compare RUNS of pre-training: what each was, how far it is, its last and best numbers; curves with --png."""

    rows = [medgmae.training.summary_of(run) for run in runs]
    if png is not None:
        refuse_existing(png, overwrite)
        write_figure(
            medgmae.visualize.runs_figure(
                {shown(run): medgmae.training.read_metrics(run / "metrics.jsonl") for run in runs}
            ),
            png,
            overwrite,
        )
    if as_json:
        echo_json(rows)
        return

    columns = list(rows[0])
    echo_table([columns, *([str(row[name]) for name in columns] for row in rows)])
