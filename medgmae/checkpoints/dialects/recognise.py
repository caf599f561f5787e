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
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from medgmae.checkpoints import dialects
from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import Converted, File, Target
from medgmae.layers.patches import Shape

Converter = Callable[[File], Converted]


class Dialect(NamedTuple):
    """How one code base spells its weights.

    order: place in the line, from 0; the first dialect that matches converts. Those with marks of their own come early
        (10 our saved models, 20 GL-MAE, 30 MedGMAE ...), those that others build upon late (60 timm, 90 any names).
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
) -> Converted:
    """Recognise a state dictionary and translate it.

    Args:
        state: name to tensor.
        origin: file name for messages.
        config: the config that travels with one of our own files.
        target: the model to be filled; needed where the file alone does not say its grid or patch.
        source_grid: patch grid (d, h, w) of the file's table, where it is not a cube and not the model's.

    Raises:
        WeightsError: nothing is recognised, or the grid or patch of the file cannot be known.
    """
    file = File(state, origin, config, target, source_grid)
    line = known_dialects()
    for dialect in line:
        if dialect.matches(file):
            return dialect.convert(file)
    raise WeightsError(
        f"{origin}: not recognised. Known are {', '.join(dialect.name for dialect in line)}. First names in the file: "
        f"{', '.join(file.names[:6]) or 'none'}. Rename the entries to timm's ViT names and try again"
    )
