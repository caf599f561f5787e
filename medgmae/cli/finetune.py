"""``medgmae finetune``: from scans with labels in a table to a model that predicts them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.common import echo_table, reports_errors, shown
from medgmae.cli.files import check_name
from medgmae.cli.options import complete_name, gathered
from medgmae.cli.training import Changes, Place, change_options, changed, place_options, refuse_changes, run_with

# Recipe of a model without one: by the beginning of its name, the first that fits.
_RECIPES = {"unetr_": "segment", "vit_large_patch16_256": "tangerine", "vim_small_patch": "mamba_mae", "": "quick"}


@dataclass(frozen=True)
class Question:
    """Options that say what is learned from which weights, and how it is measured."""

    weights: str | None
    input_of: str | None
    task: str | None
    label: tuple[str, ...]
    multilabel: bool | None
    folds: int | None
    fold_column: str | None
    group: str | None
    view: str | None
    encoder: str | None
    select: str | None
    patience: int | None


_question = gathered(
    "question",
    Question,
    click.option("--weights", metavar="SOURCE", help="Weights to start from: a tag, file, folder or hub repository."),
    click.option("--input-of", metavar="TAG", help="Prepare scans as these weights need it. [those of --weights]"),
    click.option(
        "--task", type=click.Choice(["classify", "regress", "survive", "segment"]), help="[the recipe's, or classify]"
    ),
    click.option("--label", multiple=True, metavar="COLUMN", help="What is learned; may be repeated. [label]"),
    click.option(
        "--multilabel/--single-label", default=None, help="Each column is a question of its own: 0, 1, or empty."
    ),
    click.option("--folds", type=click.IntRange(0), help="Cross-validation: that many runs. [the recipe's]"),
    click.option("--fold-column", metavar="COLUMN", help="The fold of each case, 0, 1, ... [drawn, stratified]"),
    click.option("--group", metavar="COLUMN", help="Cases that stay together, such as those of a patient."),
    click.option(
        "--view",
        type=click.Choice(["center", "resize", "windows"]),
        help="What the model sees of a scan: its middle, all of it resampled, or windows. [the recipe's]",
    ),
    click.option(
        "--encoder", type=click.Choice(["full", "frozen", "lora"]), help="What of the encoder learns. [the recipe's]"
    ),
    click.option(
        "--select", type=click.Choice(["last", "loss", "auc", "dice"]), help="Whose weights are kept. [the recipe's]"
    ),
    click.option("--patience", type=click.IntRange(1), help="Measurements without a better one before the end."),
)


@click.command("finetune")
@click.option("--model", "name", shell_complete=complete_name, help="An encoder, or a tag: vit_tiny_patch8_64.demo.")
@click.option(
    "--data",
    "data",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A .csv table: path, labels, perhaps id; or a folder of nnU-Net's.",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="The run's folder.")
@click.option("--recipe", metavar="NAME|FILE", help="Settings to begin with. [by the model]")
@click.option("--resume", is_flag=True, help="Go on with the run in OUT, with its settings and data.")
@click.option("--print-config", is_flag=True, help="Print the settings, and do nothing else.")
@click.option("--dry-run", is_flag=True, help="Check table, scans, folds, memory and time, and train nothing.")
@_question
@change_options
@place_options(None)
@reports_errors
def finetune_command(
    name: str | None,
    data: tuple[Path, ...],
    out: Path | None,
    recipe: str | None,
    resume: bool,
    print_config: bool,
    dry_run: bool,
    question: Question,
    changes: Changes,
    place: Place,
) -> None:
    """Fine-tune an encoder on scans whose labels a table has.

    The settings are a recipe's, changed by options. OUT is a model that create_model("local-dir:OUT") opens, with its
    preprocessing and the names of its outputs; with --folds there is one in each of OUT/fold_0, OUT/fold_1, ...
    metrics.json has metrics with 95 % intervals on the cases held out, predictions.csv what the model said of each.

    Ctrl-C, SIGTERM and SIGUSR1 save and end the run, with exit code 130, 143 or 138; --resume goes on as if nothing had
    been.
    """
    if out is not None:
        check_name(out)
    if resume:
        if out is None:
            raise click.UsageError("missing option '--out'")
        refuse_changes(
            changes,
            {"model": name, "recipe": recipe, **vars(question)},
            "to train on with others, start a run with --weights OUT",
        )
        settings = medgmae.training.Run(out).settings(medgmae.training.TuneSettings)
    else:
        settings = _settings(name, recipe, question, changes)
    if print_config:
        click.echo(settings.toml())
        return
    if not data and not resume:
        raise click.UsageError("missing option '--data'")
    if dry_run:
        _report(medgmae.training.rehearse(settings, data, skip_broken=place.skip_broken))
        return
    if out is None:
        raise click.UsageError("missing option '--out'")

    def begin(machine: Any) -> Path:
        return medgmae.training.finetune(settings, data, out, resume=resume, machine=machine)

    run_with(place, begin, "fine-tuned", picture_every=0)


def _settings(name: str | None, recipe: str | None, question: Question, changes: Changes) -> Any:
    """The recipe's settings with the changes that options ask for."""
    if recipe is None:
        if name is None:
            raise click.UsageError("missing option '--model' or '--recipe'")
        recipe = next(value for prefix, value in _RECIPES.items() if name.startswith(prefix))
    settings = medgmae.training.read_recipe(recipe, medgmae.training.TuneSettings)
    if question.task not in (None, settings.task.kind):  # another task has none of the recipe's classes
        column = "mask" if question.task == "segment" else "label"
        settings = settings.changed({"task": {"kind": question.task, "labels": list(question.label) or [column]}})
    named = {
        "model": name,
        "init": question.weights,
        "input": question.input_of,
        "task.labels": list(question.label) or None,
        "task.multilabel": question.multilabel,
        "folds": question.folds,
        "fold": question.fold_column,
        "group": question.group,
        "view.kind": question.view,
        "tuning.encoder": question.encoder,
        "tuning.select": question.select,
        "tuning.patience": question.patience,
    }
    return changed(settings, changes, named)


def _report(facts: dict[str, Any]) -> None:
    """What a rehearsal found."""
    click.echo(f"cases: {facts['cases']}; outputs: {', '.join(map(shown, facts['outputs']))}")
    if facts["counts"]:
        click.echo("of them: " + ", ".join(f"{shown(name)} {count}" for name, count in facts["counts"].items()))
    rows = [[str(cell) for cell in (k, *part)] for k, part in enumerate(facts["parts"])]
    echo_table([["fold", "learned from", "held out", *(f"held out {name}" for name in facts["classes"])], *rows])
    click.echo(f"what the model sees: {facts['view']}")
    click.echo(f"updates: {facts['steps']} in each of {len(rows)} run(s), {facts['epochs']:.3g} epochs")
    click.echo(
        f"an update of {facts['batch']} took {facts['seconds']:.2f} s here on {facts['device']}: about "
        f"{facts['hours']:.2g} h without reading and measuring; memory: {facts['memory_mb']:.0f} MB"
    )
