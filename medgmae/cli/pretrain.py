"""``medgmae pretrain``: from scans to a pre-trained model; ``medgmae runs``: curves of such runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.common import echo_json, echo_table, reports_errors, shown
from medgmae.cli.files import check_name, refuse_existing, write_figure
from medgmae.cli.options import complete_name, file_option, json_option, overwrite_option
from medgmae.cli.training import Changes, Place, change_options, changed, place_options, refuse_changes, run_with

# Recipe of a model without one: by the beginning of its name, the first that fits.
_RECIPES = {
    "gmae_": "medgmae",
    "glmae_vit_base_": "glmae",
    "glmae_": "glmae_quick",
    "mae_vim_": "mamba_mae",
    "mae2d_": "selfmedmae_2d",
    "mae_vit_large_patch16_256": "tangerine",
    "": "quick",
}


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
@click.option("--init", metavar="SOURCE", help="Start from these weights: a tag, file, folder or hub repository.")
@click.option("--sharded", is_flag=True, help="Spread weights over the processes (FSDP2) instead of copying them.")
@click.option("--picture-every", type=click.IntRange(0), default=500, help="Updates between pictures; 0: none.")
@change_options
@place_options(500)
@reports_errors
def pretrain_command(
    name: str | None,
    data: tuple[Path, ...],
    out: Path | None,
    recipe: str | None,
    resume: bool,
    print_config: bool,
    init: str | None,
    sharded: bool,
    picture_every: int,
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
        click.echo(_settings(name, recipe, init, changes).toml())
        return
    if out is None:
        raise click.UsageError("missing option '--out'")
    check_name(out)
    if resume:
        others = {"model": name, "recipe": recipe, "init": init}
        refuse_changes(changes, others, "to train on with others, start a run with --init OUT")
        settings = medgmae.training.Run(out).settings(medgmae.training.Settings)
    else:
        settings = _settings(name, recipe, init, changes)
    if print_config:
        click.echo(settings.toml())
        return
    if not data and not resume:
        raise click.UsageError("missing option '--data'")

    def begin(machine: Any) -> Path:
        return medgmae.training.pretrain(settings, data, out, resume=resume, machine=machine)

    run_with(place, begin, "pre-trained", sharded=sharded, picture_every=picture_every)


def _settings(name: str | None, recipe: str | None, init: str | None, changes: Changes) -> Any:
    """The recipe's settings with the changes that options ask for."""

    if recipe is None:
        if name is None:
            raise click.UsageError("missing option '--model' or '--recipe'")
        recipe = next(value for prefix, value in _RECIPES.items() if name.startswith(prefix))
    return changed(medgmae.training.read_recipe(recipe), changes, {"model": name, "init": init})


@click.command("runs")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@file_option("--png", (".png",), "Write the curves as a picture.")
@overwrite_option
@json_option
@reports_errors
def runs_command(runs: tuple[Path, ...], png: Path | None, overwrite: bool, as_json: bool) -> None:
    """Compare RUNS of pre-training or fine-tuning: what each was, how far it is, its last and best numbers; curves with
    --png."""

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
