"""Options that several commands share, as decorators, and what they stand for: a model, its preprocessing, a machine.

``gathered`` turns a group of options into one typed argument of the command.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import medgmae
from medgmae.cli.common import shown
from medgmae.cli.files import check_name, refuse_existing

if TYPE_CHECKING:
    from torch import nn

F = TypeVar("F", bound=Callable[..., Any])

VOLUMES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
# What a model without a card gets: the scan as stored, its intensities between two percentiles mapped to 0..1.
DEFAULT_INPUT = {"window": {"percentiles": [0.5, 99.5]}, "range": [0.0, 1.0]}


@dataclass(frozen=True)
class ModelChoice:
    """A model by name, and where its weights come from: its own tag when ``weights`` is None."""

    name: str
    weights: str | None
    random_weights: bool


@dataclass(frozen=True)
class InputChoice:
    """Preprocessing: by the card with this tag, or as the command says when there is none; then ``changes`` to it."""

    tag: str | None
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Machine:
    """Where a model runs: a device as torch names it, and how many CPU threads, None for torch's default."""

    device: str
    threads: int | None


def complete_tag(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Tags that begin so, for the shell's tab key."""
    return [tag for tag in medgmae.list_weights() if tag.startswith(incomplete)]


def complete_name(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Architectures and tags that begin so, for the shell's tab key."""
    names = [name for name in medgmae.list_models() if name.startswith(incomplete)]
    return sorted([*names, *complete_tag(ctx, param, incomplete)])


def gathered(argument: str, kind: type[Any], *options: Callable[[Any], Any]) -> Callable[[F], F]:
    """Add options to a command that takes their values together, as ``argument=kind(...)``, a dataclass."""
    names = [field.name for field in fields(kind)]

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def wrapped(**values: Any) -> Any:
            return command(**{argument: kind(**{name: values.pop(name) for name in names})}, **values)

        decorated: Any = wrapped
        for option in reversed(options):  # the first decorator that is applied comes last in the help
            decorated = option(decorated)
        return decorated  # type: ignore[no-any-return]

    return decorate


# Values


def sizes(*words: str) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """A reader of one size or one per axis, ``96`` or ``96,96,16``; texts in ``words`` are kept as they are."""

    def parse(ctx: click.Context, param: click.Parameter, text: str | None) -> Any:
        if text is None or text in words:
            return text
        numbers = [int(part) for part in text.split(",") if part.strip().isdigit()]
        if len(numbers) != len(text.split(",")) or len(numbers) > 3 or min(numbers) < 1:
            choices = "".join(f", or {word!r}" for word in words)
            raise click.BadParameter(f"{text!r} is not a size such as 96 or 96,96,16 (depth, height, width){choices}")
        return numbers[0] if len(numbers) == 1 else tuple(numbers)

    return parse


def per_axis(size: int | tuple[int, ...] | None) -> tuple[int, ...] | None:
    """One number as that of a cube."""
    return (size,) * 3 if isinstance(size, int) else size


def assignments(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> dict[str, Any]:
    """``key=value`` texts as a dictionary; values are read as JSON or Python literals where they are such."""
    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise click.BadParameter(f"{text!r} is not of the form key=value")
        values[key] = _literal(value)
    return values


def _literal(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return text


# Options


# Eager: the options that name files to write ask for it.
overwrite_option = click.option("--overwrite", is_flag=True, is_eager=True, help="Replace files that are there.")


def file_option(name: str, endings: Sequence[str], help: str, required: bool = False) -> Callable[[F], F]:
    """A file to write, of a command with --overwrite. Whether it could be written is checked before the work."""

    def check(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
        if path is None:
            return None
        if not path.name.lower().endswith(tuple(endings)):
            raise click.BadParameter(f"{shown(path)} must end in one of {', '.join(endings)}")
        check_name(path)
        if not path.parent.is_dir():
            raise click.BadParameter(f"the folder {shown(path.parent)} does not exist")
        refuse_existing(path, ctx.params["overwrite"])
        if ".png" in endings and importlib.util.find_spec("matplotlib") is None:
            raise click.UsageError(f"{name} needs matplotlib, which is not installed: pip install medgmae[viz]")
        return path

    kind = click.Path(path_type=Path, dir_okay=False)
    return click.option(name, required=required, type=kind, callback=check, help=help)


def seed_option(of: str) -> Callable[[F], F]:
    """The seed of what a command draws at random."""
    return click.option("--seed", type=int, default=0, help=f"Seed of {of}: the same seed gives the same files.")


def input_options(instead_of: str) -> Callable[[F], F]:
    """``inputs``, an :class:`InputChoice`; ``instead_of`` says what a card replaces."""
    return gathered(
        "inputs",
        InputChoice,
        click.option(
            "--input-of",
            "tag",
            metavar="TAG",
            shell_complete=complete_tag,
            help=f"Preprocess as this weight card says instead of {instead_of}.",
        ),
        click.option(
            "--input",
            "changes",
            multiple=True,
            callback=assignments,
            metavar="KEY=VALUE",
            help="Change the preprocessing: window=[-1000,400], orientation=RAS, spacing=[2,2,2] ... as in a card's "
            "input.",
        ),
    )


_weights_options = (
    click.option(
        "--weights",
        help="Weights: a tag, file, folder or hf-hub:org/repo; with architecture.tag, the file that its card "
        "describes.",
    ),
    click.option("--random-weights", is_flag=True, help="Leave the model untrained."),
)
# ``choice``, a ModelChoice whose name is an argument.
model_argument = gathered(
    "choice", ModelChoice, click.argument("name", metavar="MODEL", shell_complete=complete_name), *_weights_options
)


def model_options(required: bool = True) -> Callable[[F], F]:
    """``choice``, a :class:`ModelChoice`."""
    name = click.option(
        "--model",
        "name",
        required=required,
        shell_complete=complete_name,
        help="Architecture, architecture.tag, the folder of a model or run, or hf-hub:org/repo.",
    )
    return gathered("choice", ModelChoice, name, *_weights_options)


threads_option = click.option(
    "--threads", type=click.IntRange(1), help="CPU threads; by default as many as torch uses."
)
machine_options = gathered(
    "machine",
    Machine,
    click.option("--device", default="cpu", help="cpu, cuda, cuda:1 ..."),
    threads_option,
)
mask_ratio_option = click.option(
    "--mask-ratio",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of hidden patches; by default the autoencoder's own.",
)
overlap_option = click.option(
    "--overlap",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.5,
    help="Least share of a window that it has in common with the next.",
)
source_grid_option = click.option(
    "--source-grid",
    callback=sizes(),
    metavar="D,H,W",
    help="Patches per axis that the file's position table was made for, where the file does not say.",
)
token_order_option = click.option(
    "--token-order",
    type=click.Choice(["raster", "swapped"]),
    help="Of a Primus' file, the order of its tokens, where it does not say; swapped: the first two axes exchanged.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on stdout.")


# What they stand for


def use_threads(threads: int | None) -> None:
    """Let torch use this many CPU threads; None leaves its default."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def open_model(choice: ModelChoice, machine: Machine) -> tuple[Any, str]:
    """The model on its device, in evaluation mode, and where its weights come from, in words."""
    use_threads(machine.threads)
    model, weights = _created(choice)
    try:
        model.to(machine.device).eval()
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        reason = str(error).splitlines()[0]
        raise click.BadParameter(f"{machine.device!r} cannot be used: {reason}", param_hint="--device") from error
    return model, weights


def _created(choice: ModelChoice) -> tuple[nn.Module, str]:
    name, weights = _source(choice.name), choice.weights
    if choice.random_weights:
        if weights:
            raise click.UsageError("--weights and --random-weights contradict each other")
        return medgmae.create_model(name, pretrained=False), "random"
    if weights is not None:
        return model_with_weights(name, weights), weights
    if "." not in name and not name.startswith(("hf-hub:", "local-dir:")):
        tags = medgmae.list_models(f"{name}.*", pretrained=True)
        published = f" Published: {', '.join(tags)}." if tags else ""
        raise click.UsageError(
            f"{name} alone is an untrained model, whose output means nothing.{published} Name weights with --weights, "
            "or say --random-weights"
        )
    return medgmae.create_model(name), name


def _source(name: str) -> str:
    """A name as ``create_model`` takes it: of a folder that is there, its address."""
    if name.partition(".")[0] in medgmae.list_models() or not os.path.isdir(name):
        return name
    if not os.path.exists(os.path.join(name, "config.json")):
        folds = sorted(path.parent.name for path in Path(name).glob("fold_*/config.json"))
        held = f"; the models of its folds are in {', '.join(folds)}: name one of them" if folds else ""
        raise click.UsageError(
            f"{shown(name)} holds no model: expected config.json and model.safetensors, as medgmae finetune, pretrain "
            f"and convert write them{held}"
        )
    return f"local-dir:{name}"


def model_with_weights(name: str, weights: str, **options: Any) -> Any:
    """A model with weights from a source of the user's; a tag in ``name`` says by its card what they are."""
    if "." not in name or name.startswith(("hf-hub:", "local-dir:")):
        return medgmae.create_model(name, pretrained=weights, **options)
    return medgmae.create_model(name, checkpoint_path=weights, **options)


def preprocessing_of(model: Any, inputs: InputChoice, whole: bool = True) -> Any:
    """Preprocessing by the chosen card, the model's own or the default, with changes: of whole scans, or of the part
    that the card crops."""
    card = medgmae.weight_card(inputs.tag).to_json() if inputs.tag else model.pretrained_cfg
    if card and card["input"]:
        return preprocessing(card["input"], inputs.changes, whole)
    if not inputs.changes:
        click.echo(
            "Note: nothing is known about the input of these weights. Scans are taken as stored, their intensities "
            "between the 0.5th and 99.5th percentile mapped to 0..1. Change that with --input or --input-of.",
            err=True,
        )
    return preprocessing({"channels": model.in_chans, **DEFAULT_INPUT}, inputs.changes, whole)


def preprocessing(block: Mapping[str, Any], changes: Mapping[str, Any], whole: bool = True) -> Any:
    """Preprocessing by an input block with changes; a new spacing means resampling to it."""
    resample = block.get("resample") or ({"to": "spacing"} if "spacing" in changes else None)
    return medgmae.create_transform({**block, "resample": resample, **changes}, whole=whole)


def contrasts_of(choice: ModelChoice, inputs: InputChoice, machine: Machine) -> Any:
    """The contrasts of the model's input, where possible without its weights."""
    tag = inputs.tag or (choice.name if choice.name in medgmae.list_weights() else None)
    if "contrasts" in inputs.changes or (choice.name is None and tag is None):
        return inputs.changes.get("contrasts")
    if tag:
        return (medgmae.weight_card(tag).input or {}).get("contrasts")
    return preprocessing_of(open_model(choice, machine)[0], inputs).input["contrasts"]
