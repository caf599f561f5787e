"""State dictionaries of every known dialect are converted to our names, once, here.

Our language: one dictionary for the encoder, one for the decoder; tables of positions (1, N, E) without class row; a
class row of the encoder's table added into the class token; patch weights (E, C, *patch). See :func:`convert`.

A dialect is a function with :func:`register_dialect` on it, in a module of this folder or anywhere else::

    @register_dialect("my pre-training code", order=25, matches=lambda file: file.has("my_token"))
    def convert_mine(file: File) -> Converted:
        file.take_all(lambda name: f"encoder.{name}")
        return file.finish("my pre-training code", grid=(6, 6, 6), expects={"encoder.num_heads": 12})
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from medgmae.checkpoints import dialects
from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import STEM, Converted, File, Target, TokenOrder
from medgmae.layers.patches import Shape

Converter = Callable[[File], Converted]

_LORA = re.compile(r"(^|[._])lora_(A|B|down|up|embedding_A|embedding_B|magnitude_vector)\b")
_FLAT = re.compile(r"(^|\.)_?flat_param")

# Encoders in one file, and levels that one may lie deep in it.
_MAX_STEMS = 8

# Attributes with copies of the weights that are not the ones to load.
_OTHER = re.compile(r"^(\w*_)?(ema|teacher|momentum|swa|averaged|target)(_\w*)?\.")


class Dialect(NamedTuple):
    """How one code base spells its weights.

    order: place in the line, from 0; the first dialect that matches converts. Those with marks of their own come early
        (10 our saved models, 30 MedGMAE ...), those that others build upon late (60 timm, 90 any names).
    name: what it is called in messages.
    matches: whether a file is written in it, by the names in it.
    convert: the translation.
    """

    order: int
    name: str
    matches: Callable[[File], bool]
    convert: Converter


_dialects: dict[str, Dialect] = {}


def register_dialect(name: str, *, order: int, matches: Callable[[File], bool]) -> Callable[[Converter], Converter]:
    """Enter a converter; see :class:`Dialect` for the arguments.

    Raises:
        ValueError: the name is taken.
    """

    def enter(convert: Converter) -> Converter:
        if name in _dialects:
            raise ValueError(f"dialect {name!r} is registered twice, first by {_dialects[name].convert.__module__}")
        _dialects[name] = Dialect(order, name, matches, convert)
        return convert

    return enter


@functools.cache
def _load_dialects() -> None:
    for module in pkgutil.iter_modules(dialects.__path__):
        importlib.import_module(f"{dialects.__name__}.{module.name}")


def known_dialects() -> list[Dialect]:
    """All dialects, in the order in which they are tried."""
    _load_dialects()
    return sorted(_dialects.values(), key=lambda dialect: dialect[:2])


def convert(
    state: Mapping[str, Tensor],
    *,
    origin: str = "state dictionary",
    config: Mapping[str, Any] | None = None,
    target: Target | None = None,
    source_grid: Shape | None = None,
    token_order: TokenOrder | None = None,
    facts: Mapping[str, str] = MappingProxyType({}),
) -> Converted:
    """Recognise a state dictionary and translate it.

    Args:
        state: name to tensor.
        origin: file name for messages.
        config: the config that travels with one of our own files.
        target: the model to be filled; needed where the file alone does not say its grid or patch.
        source_grid: patch grid (d, h, w) of the file's table, where it is not a cube and not the model's.
        token_order: order of the tokens, of files that may have either and do not say it.
        facts: what the file's container says beside the weights.

    Raises:
        WeightsError: nothing is recognised, or the grid or patch of the file cannot be known.
    """
    lora = next((name for name in state if _LORA.search(name)), None)
    if lora is not None:
        raise WeightsError(
            f"{origin}: holds LoRA adapters, {lora!r} for one, which are changes to other weights. Merge them with the "
            "model they belong to (peft: model.merge_and_unload()) and save that model's state_dict()"
        )
    flat = next((name for name in state if _FLAT.search(name)), None)
    if flat is not None:
        raise WeightsError(
            f"{origin}: holds flattened shards of FSDP, {flat!r} for one; save the full state dictionary "
            "(StateDictType.FULL_STATE_DICT) and load that"
        )
    file = File(state, origin, config, target, source_grid, token_order=token_order, facts=facts)
    _leave_other_sets(file)
    dialect = _matching(file)
    if dialect is None:
        prefix = _attribute(file, target, source_grid)
        if prefix:
            file.enter(prefix)
            dialect = _matching(file)
    if dialect is None:
        raise WeightsError(
            f"{origin}: not recognised. Known are {', '.join(one.name for one in known_dialects())}. First names in "
            f"the file: {', '.join(file.names[:6]) or 'none'}. Rename the entries to timm's ViT names and try again"
        )
    return dialect.convert(file)


def _matching(file: File) -> Dialect | None:
    return next((dialect for dialect in known_dialects() if dialect.matches(file)), None)


def _stems(file: File) -> list[str]:
    """What stands in front of the patch weights in a file, "" among them."""
    stems = [name.removesuffix(STEM) for name in file.names if name == STEM or name.endswith(f".{STEM}")]
    if len(stems) > _MAX_STEMS:
        raise WeightsError(f"{file.origin}: holds {len(stems)} encoders, expected one; save the one to load by itself")
    return stems


def _leave_other_sets(file: File) -> None:
    """Leave out averaged copies and teachers that lie beside the weights under prefixes of their own."""
    stems = _stems(file)
    others = [stem for stem in stems if _OTHER.search(stem)]
    if len(others) < len(stems):
        for stem in others:
            prefix = stem.partition(".")[0] + "."
            file.drop_all(prefix, f"another set of weights, {prefix!r}")
            file.notes.append(f"the weights under {prefix!r} are not read; 'FILE::{prefix[:-1]}' takes them")


def _attribute(file: File, target: Target | None, source_grid: Shape | None) -> str:
    """The attribute of a larger module under which an encoder or autoencoder lies, by names that are known: "net."."""
    found: dict[str, None] = {}
    for stem in _stems(file):
        parts = stem.split(".")[:-1]
        for count in range(1, min(len(parts), _MAX_STEMS) + 1):
            prefix = ".".join(parts[:count]) + "."
            inner = {name.removeprefix(prefix): file.tensor(name) for name in file.names if name.startswith(prefix)}
            if _matching(File(inner, file.origin, file.config, target, source_grid)) is not None:
                found[prefix] = None
                break
    prefixes = list(found)
    if len(prefixes) > 1 and "student." in prefixes:
        file.notes += [
            f"the weights under {p!r} are not read; 'FILE::{p[:-1]}' takes them" for p in prefixes if p != "student."
        ]
        prefixes = ["student."]
    if len(prefixes) > 1:
        raise WeightsError(
            f"{file.origin}: has several models, under {', '.join(map(repr, prefixes[:6]))}; take one of them with "
            f"'FILE::{prefixes[0][:-1]}'"
        )
    return prefixes[0] if prefixes else ""
