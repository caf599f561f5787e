"""Settings as tables: dataclasses read from TOML, changed by dotted names, written as TOML."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T", bound="Table")


class TrainingError(ValueError):
    """Settings that are not valid, data that cannot be used, or a run that cannot go on."""


@dataclass(frozen=True)
class Table:
    """Settings that a TOML table holds; subclasses are frozen dataclasses of numbers, text, lists and such tables."""

    alternatives: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Pairs of dotted names of which one is given: to name one takes the other away."""

    def changed(self: T, changes: Mapping[str, Any]) -> T:
        """The settings with others by dotted name, such as ``{"training.lr": 1e-4, "model": "vit_..."}``.

        Raises:
            TrainingError: an unknown name, or a value of another kind.
        """
        other_of = {one: other for pair in self.alternatives for one, other in (pair, pair[::-1])}
        table = asdict(self)
        for name, value in changes.items():
            *path, last = name.split(".")
            inner = table
            for key in path:
                inner = inner.get(key)  # type: ignore[assignment]
                expect(isinstance(inner, dict), f"{name}: there are no settings below {key!r}")
            inner[last] = value
            other = other_of.get(name)
            if other is not None and value is not None and other not in changes:
                inner[other.rsplit(".", 1)[-1]] = None  # of steps and epochs, the one that is named now is meant
        return read_table(type(self), table)

    def toml(self) -> str:
        """The settings as a recipe."""
        return _toml(asdict(self))


def read_table(kind: type[T], table: Mapping[str, Any]) -> T:
    """Settings of nested tables.

    Raises:
        TrainingError: an unknown name, a value of another kind, or values that do not go together.
    """
    return _read(kind, table, "")  # type: ignore[no-any-return]


def load_table(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        TrainingError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"the recipe {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # not TOML, not UTF-8
        raise TrainingError(f"the recipe {path} is not valid TOML: {error}") from None


def parse_change(text: str) -> tuple[str, Any]:
    """``"training.lr=1e-4"`` as a name and a value of TOML; what is not TOML is text.

    Raises:
        TrainingError: no "=" in it.
    """
    name, equals, value = text.partition("=")
    expect(bool(equals and name.strip()), f"{text!r} is not a setting; expected NAME=VALUE, as in training.lr=1e-4")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"] if value.strip() != "none" else None
    except ValueError:
        return name.strip(), value.strip()


def expect(holds: bool, message: str) -> None:
    """Raise a TrainingError where something does not hold."""
    if not holds:
        raise TrainingError(message)


def _read(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``: a dataclass of a table, lists of them, numbers and text as they are."""
    options = get_args(kind) or (kind,)
    table = next((one for one in options if is_dataclass(one)), None)
    if table is not None and isinstance(value, Mapping):
        kind = table  # of a table or nothing
    if is_dataclass(kind):
        expect(isinstance(value, Mapping), f"{where} is {value!r}; expected a table")
        hints = get_type_hints(kind)
        prefix = f"{where}." if where else ""
        unknown = sorted(set(value) - set(hints))
        expect(not unknown, f"{prefix}{unknown[0] if unknown else ''} is not a setting; expected {', '.join(hints)}")
        needed = [one.name for one in fields(kind) if one.name == "model"]
        expect(all(value.get(name) for name in needed), "no model is named; give one, such as mae_vit_base_patch16_96")
        return kind(**{name: _read(hints[name], inner, prefix + name) for name, inner in value.items()})  # type: ignore[operator]
    if getattr(kind, "__origin__", None) is list:
        expect(isinstance(value, (list, tuple)), f"{where} is {value!r}; expected a list")
        return [_read(options[0], inner, where) for inner in value]
    if getattr(kind, "__origin__", None) is dict:
        expect(isinstance(value, Mapping), f"{where} is {value!r}; expected a table")
        return dict(value)
    if len(options) > 1:
        if value is None and type(None) in options:
            return None
        for option in options:
            try:
                return _read(option, value, where)
            except TrainingError:
                continue
        raise TrainingError(f"{where} is {value!r}; expected {' or '.join(map(_named, options))}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    expect(fits, f"{where} is {value!r}; expected {_named(kind)}")
    return value


def _named(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(kind) or ("a list" if getattr(kind, "__origin__", None) is list else "a table")


def _toml(table: Mapping[str, Any], name: str = "") -> str:
    """Tables below values; None is left out, as TOML has none."""
    values = {key: value for key, value in table.items() if value is not None}
    inner = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in values.items() if key not in inner]
    lines = [*([f"[{name}]"] if name and lines else []), *lines]
    blocks = ["\n".join(lines)] if lines else []
    blocks += [_toml(value, f"{name}.{_key(key)}" if name else _key(key)) for key, value in inner.items()]
    return "\n\n".join(block for block in blocks if block)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_value(one)}" for key, one in value.items() if one is not None) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False)
