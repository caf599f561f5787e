"""What the commands share: errors as one message and an exit code, JSON on stdout, option values, small tables."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import click

P = ParamSpec("P")
R = TypeVar("R")

VOLUMES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on stdout.")


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Print the errors that the library raises on purpose as ``Error: ...``, exit code 1; others keep a traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):  # click ends these itself
            raise
        except Exception as error:
            if click.get_current_context().find_root().params.get("debug") or not is_expected(error):
                raise
            raise click.ClickException(str(error)) from error

    return wrapped


def is_expected(error: Exception) -> bool:
    """Whether an error is about the user's files, names or values rather than a defect of the program."""
    import torch

    import medgmae

    # VolumeError is a ValueError.
    kinds = (medgmae.WeightsError, ValueError, OSError, MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, kinds)


class NotRecognisedError(click.ClickException):
    """A name or file that nothing is known about."""

    exit_code = 2


def echo_json(value: Any) -> None:
    """Print JSON on stdout."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def echo_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows, the first of them a heading, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def echo_fields(fields: Mapping[str, Any], indent: int = 0) -> None:
    """Print names and values one below the other; nested mappings are indented, long text is wrapped."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        label = f"{' ' * indent}{name.ljust(width)}  "
        if isinstance(value, Mapping) and value:
            click.echo(label.rstrip())
            echo_fields(value, indent + 2)
        else:
            text = value if isinstance(value, str) else f"{value:,}" if type(value) is int else json.dumps(value)
            click.echo(textwrap.fill(text, 110, initial_indent=label, subsequent_indent=" " * len(label)))


def by_reason(unused: Mapping[str, str]) -> dict[str, str]:
    """Unused entries by the reason why, a few names each."""
    found: dict[str, list[str]] = {}
    for name, reason in unused.items():
        found.setdefault(reason, []).append(name)
    return {
        reason: ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
        for reason, names in found.items()
    }


def megabytes(count: int | None) -> str:
    """A file size in words; "-" when it is not known."""
    if count is None:
        return "-"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def by_times(sizes: Iterable[int]) -> str:
    """``(96, 96, 16)`` as "96x96x16"."""
    return "x".join(map(str, sizes))


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


def assignments(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, Any]:
    """``key=value`` texts as a dictionary; values are read as JSON or Python literals where they are such."""
    found = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise click.BadParameter(f"{text!r} is not of the form key=value")
        found[key] = _literal(value)
    return found


def _literal(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return text


# What a model without a card gets: the scan as stored, its intensities between two percentiles mapped to 0..1.
DEFAULT_INPUT = {"window": {"percentiles": [0.5, 99.5]}, "range": [0.0, 1.0]}

source_grid_option = click.option(
    "--source-grid",
    callback=sizes(),
    metavar="D,H,W",
    help="Patch grid that a file's table of positions was made for, where the file leaves it open.",
)


def model_with_weights(name: str, weights: str, **options: Any) -> Any:
    """A model with weights from a source of the user's; the tag in ``name`` says what they are, by its card."""
    import medgmae

    if "." not in name or name.startswith(("hf-hub:", "local-dir:")):
        return medgmae.create_model(name, pretrained=weights, **options)
    card = medgmae.weight_card(name)
    model: Any = medgmae.create_model(card.architecture, pretrained=weights, **{**card.model_args, **options})
    model.config["card"] = card.to_json()
    return model


def per_axis(size: int | tuple[int, ...] | None) -> tuple[int, ...] | None:
    """One number as that of a cube."""
    return (size,) * 3 if isinstance(size, int) else size


def open_model(name: str, weights: str | None, random_weights: bool) -> tuple[Any, str]:
    """The model and where its weights come from, in words."""
    import medgmae

    saved = name.startswith(("hf-hub:", "local-dir:"))
    if random_weights:
        if weights:
            raise click.UsageError("--weights and --random-weights contradict each other")
        return medgmae.create_model(name, pretrained=False), "random"
    if weights is None and "." not in name and not saved:
        tags = medgmae.list_models(f"{name}.*", pretrained=True)
        known = f" Published: {', '.join(tags)}." if tags else ""
        raise click.UsageError(
            f"{name} alone is an untrained model, whose output means nothing.{known} Name weights with --weights, or "
            "say --random-weights"
        )
    if weights is None:
        return medgmae.create_model(name), name
    return model_with_weights(name, weights), weights


def preprocessing_of(model: Any, tag: str | None, changes: dict[str, Any]) -> Any:
    """Preprocessing by the model's card, another card or the default, with changes."""
    import medgmae

    card = medgmae.weight_card(tag).to_json() if tag else model.config["card"]
    block = dict(card["input"]) if card and card["input"] else {}
    if not block:
        encoder = getattr(model, "encoder", model)
        block = {"channels": encoder.in_chans, **DEFAULT_INPUT}
        if not changes:
            click.echo(
                "Note: nothing is known about the input of these weights. Scans are taken as stored, their intensities "
                "between the 0.5th and 99.5th percentile mapped to 0..1. Change that with --input or --input-of.",
                err=True,
            )
    return changed_preprocessing(block, changes)


def changed_preprocessing(block: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    """Preprocessing of whole scans by an input block with changes; a new spacing means resampling to it."""
    import medgmae

    resample = block.get("resample") or ({"to": "spacing"} if "spacing" in changes else None)
    return medgmae.create_transform({**block, "resample": resample, **changes}, whole=True)


def check_files(options: Mapping[str, Any], endings: Mapping[str, Sequence[str]]) -> None:
    """Refuse files to write that could not be written, by option: before the work, not after it."""
    for option, allowed in endings.items():
        path = options[option]
        if path is None:
            continue
        if not path.name.lower().endswith(tuple(allowed)):
            raise click.BadParameter(f"{path} must end in one of {', '.join(allowed)}", param_hint=f"--{option}")
        if not path.parent.is_dir():
            raise click.BadParameter(f"the folder {path.parent} does not exist", param_hint=f"--{option}")
    if options["png"] and importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("--png needs matplotlib, which is not installed: pip install medgmae[viz]")


def put_on_device(model: Any, device: str) -> None:
    """Move a model to a device, in evaluation mode; a device that is not there is a wrong option."""
    try:
        model.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        reason = str(error).splitlines()[0]
        raise click.BadParameter(f"{device!r} cannot be used: {reason}", param_hint="--device") from error
