"""What the commands share: errors as one message and an exit code, JSON on stdout, small tables."""

from __future__ import annotations

import functools
import json
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import click

import medgmae

P = ParamSpec("P")
R = TypeVar("R")


def shown(path: str | os.PathLike[str], keep: str = "") -> str:
    """``medgmae.data.shown``, which is imported when a text is shown: ``medgmae --help`` does without it."""
    return medgmae.data.shown(path, keep)


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Print the errors that the library raises on purpose as ``Error: ...``, exit code 1; others keep a traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):  # click ends these itself
            raise
        except Exception as error:
            if not is_reported(error):
                raise
            raise click.ClickException(shown(str(error), keep="\n\t")) from error

    return wrapped


def is_reported(error: Exception) -> bool:
    """Whether an error is shown as a message without a traceback: it is about the user's files, names or values rather
    than a defect of the program, or names a package to install, and --debug is not given."""
    import torch

    # VolumeError is a ValueError.
    kinds = (medgmae.WeightsError, ValueError, OSError, MemoryError, torch.cuda.OutOfMemoryError)
    # what torch raises where a machine has no more memory has no class of its own
    reported = isinstance(error, kinds) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    reported |= isinstance(error, ImportError) and "pip install" in str(error)
    return reported and not click.get_current_context().find_root().params.get("debug")


class NotRecognisedError(click.ClickException):
    """A name or file that is not known."""

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


def echo_result(facts: Mapping[str, Any], as_json: bool, **in_words: str | None) -> None:
    """Print facts as JSON or as text; the text leaves out None, and has ``in_words`` in place of facts of that name."""
    if as_json:
        echo_json(facts)
    else:
        echo_fields({name: value for name, value in {**facts, **in_words}.items() if value is not None})


def by_reason(unused: Mapping[str, str]) -> dict[str, str]:
    """Unused entries by the reason why, a few names each."""
    names_of: dict[str, list[str]] = {}
    for name, reason in unused.items():
        names_of.setdefault(reason, []).append(name)
    return {
        reason: ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
        for reason, names in names_of.items()
    }


def megabytes(count: int | None) -> str:
    """A file size in words; "-" when it is not known."""
    if count is None:
        return "-"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def by_times(sizes: Iterable[int]) -> str:
    """``(96, 96, 16)`` as "96x96x16"."""
    return "x".join(map(str, sizes))
