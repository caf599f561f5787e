"""The table of named architectures: one decorated function per name, families imported on first use."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

Builder = Callable[..., nn.Module]
B = TypeVar("B", bound=Builder)
C = TypeVar("C", bound=type[nn.Module])

# Arguments of create_model that are not an architecture's, for the hint about a misspelt option.
LOADING = (
    *("checkpoint_path", "strict", "source_grid", "token_order", "inflate"),
    *("cache_dir", "token", "force_download", "hub_org", "progress", "allow_nonfinite"),
)

# Names that an error lists at most.
SHOWN = 24

_builders: dict[str, Builder] = {}
_classes: dict[str, type[nn.Module]] = {}


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


def register_class(cls: C) -> C:
    """Enter a class under its own name: a saved model that no registered function builds is built from its classes.

    Raises:
        ValueError: the name is taken.
    """
    if cls.__name__ in _classes:
        raise ValueError(f"class {cls.__name__!r} is registered twice, first in {_classes[cls.__name__].__module__}")
    _classes[cls.__name__] = cls
    return cls


@functools.cache
def _load_families() -> None:
    """Import every module beside this one: a family is known by lying there."""
    package = importlib.import_module(__name__.rpartition(".")[0])
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def model_names(pattern: str | Sequence[str] = "*") -> list[str]:
    """Sorted architecture names that match a pattern, or one of several; see :func:`matching`."""
    _load_families()
    return matching(_builders, pattern)


def matching(names: Iterable[str], pattern: str | Sequence[str]) -> list[str]:
    """Sorted names that match a shell-style pattern; one without a wildcard may stand anywhere in the name."""
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    wild = [one if set(one) & set("*?[") else f"*{one}*" for one in patterns]
    return sorted(name for name in names if any(fnmatch.fnmatchcase(name, one) for one in wild))


def is_registered(name: str) -> bool:
    """Whether ``name`` is a registered architecture."""
    _load_families()
    return name in _builders


def model_builder(name: str) -> Builder:
    """The function that builds architecture ``name`` (no weight tag), or the class of that name from its options.

    Raises:
        ValueError: unknown name; the message offers the nearest ones.
    """
    _load_families()
    if name in _builders:
        return _builders[name]
    if name in _classes:
        return functools.partial(_build_class, _classes[name])
    raise ValueError(unknown("model", name, _builders))


def _build_class(cls: type[nn.Module], **options: Any) -> nn.Module:
    """``cls`` with its options; one that is {"class": name, ...} is a part, which is built first."""
    parts = {name: value for name, value in options.items() if isinstance(value, Mapping) and "class" in value}
    for name, part in parts.items():
        options[name] = model_builder(part["class"])(**{key: part[key] for key in part if key != "class"})
    return build(cls, {}, options)  # type: ignore[no-any-return]


def unknown(kind: str, name: str, choices: Any) -> str:
    """Error text for a name that is not in ``choices``, with the nearest ones."""
    names = sorted(choices)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    listed = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if names[SHOWN:] else "")
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Known: {listed}."
    return f"unknown {kind} {name!r}. {hint}"


def build(cls: Callable[..., nn.Module], defaults: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """Call ``cls`` with an architecture's numbers, a caller's overrides winning.

    Raises:
        TypeError: an option that ``cls`` does not have; the message offers the nearest ones.
    """
    try:
        return cls(**{**defaults, **overrides})
    except TypeError as error:
        named = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if named is None or named[1] not in overrides:
            raise
        options = [name for name in inspect.signature(cls).parameters if not name.endswith("options")]
        raise TypeError(unknown("option", named[1], {*options, *defaults, *LOADING})) from None
