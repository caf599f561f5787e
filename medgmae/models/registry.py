"""The table of named architectures: one decorated function per name, families imported on first use."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Builder = Callable[..., nn.Module]
B = TypeVar("B", bound=Builder)

# A family is one module under medgmae.models; a new one is added here and nowhere else.
FAMILIES = ("vit", "vim", "mae", "mae_vim", "gmae")

_builders: dict[str, Builder] = {}


def register_model(builder: B) -> B:
    """Enter a builder function under its own name.

    Raises:
        ValueError: the name is taken.
    """
    name = builder.__name__
    if name in _builders:
        raise ValueError(f"model name {name!r} is registered twice, the first time in {_builders[name].__module__}")
    _builders[name] = builder
    return builder


def _load_families() -> None:
    for family in FAMILIES:
        importlib.import_module(f"medgmae.models.{family}")


def model_names(pattern: str = "*") -> list[str]:
    """Sorted architecture names that match a shell-style pattern."""
    _load_families()
    return sorted(fnmatch.filter(_builders, pattern))


def model_builder(name: str) -> Builder:
    """The function that builds architecture ``name`` (without a weight tag).

    Raises:
        ValueError: unknown name; the message offers the nearest ones.
    """
    _load_families()
    if name not in _builders:
        raise ValueError(unknown("model", name, _builders))
    return _builders[name]


def unknown(kind: str, name: str, choices: Any) -> str:
    """Error text for a name that is not in ``choices``, with the nearest ones."""
    names = sorted(choices)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Known: {', '.join(names)}."
    return f"unknown {kind} {name!r}. {hint}"


def build(cls: Callable[..., nn.Module], defaults: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """Call ``cls`` with an architecture's numbers, a caller's overrides winning.

    Raises:
        TypeError: an option that ``cls`` does not have; the message offers the nearest ones.
    """
    try:
        return cls(**{**defaults, **overrides})
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None or found[1] not in overrides:
            raise
        options = [name for name in inspect.signature(cls).parameters if not name.endswith("options")]
        raise TypeError(unknown("option", found[1], {*options, *defaults})) from None
