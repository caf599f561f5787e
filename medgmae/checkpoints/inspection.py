"""What a checkpoint file holds, which architecture it fits, and what would go where; nothing in it is executed."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medgmae.checkpoints import loading, opening
from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import Converted, Target, TokenOrder, grid_argument
from medgmae.checkpoints.dialects.recognise import convert
from medgmae.checkpoints.paths import as_path, check_source
from medgmae.checkpoints.reading import SET_MARK
from medgmae.checkpoints.report import html_table
from medgmae.checkpoints.settings import encoder_of, model_settings
from medgmae.checkpoints.sharded import weight_bytes
from medgmae.checkpoints.sources import read_folder
from medgmae.layers.patches import Shape
from medgmae.models.encoder import Setting
from medgmae.models.registry import model_builder, model_names

# What stands for an option that the file does not show.
UNKNOWN = "unknown"


class Inspection(dict[str, Any]):
    """What :func:`inspect_checkpoint` finds: a dictionary, ready for JSON, that shows itself in a few lines.

    - path, bytes: the file. container: entry that held the weights, "" for none. source: the dialect.
    - other_sets: entries with further weights; "FILE::ENTRY" reads those.
    - tensors, parameters, dtypes: their number, the number of their values, their kinds.
    - sizes: embed_dim, depth, grid and so on, by the names of the options of the file's family; "unknown" for an option
      that changes what the weights mean and that the file does not show, such as the number of attention heads.
    - head: the classifier in the file, ``num_classes`` (0 for none) and ``head_hidden``, the widths of hidden layers.
    - config: of a file or folder of this library, else None.
    - architecture, model_args: what to give ``create_model``; None when no registered architecture fits.
    - encoder_architecture: the same for the encoder alone, when the file is a masked autoencoder.
    - renamed: the file's name to ours. unused: the file's name to the reason why it would be left out.
    - missing: parameters that would keep a random start. resized, adapted, notes: see :class:`~medgmae.LoadReport`.
    - problem: why the file would not load, or None.
    """

    def __repr__(self) -> str:
        told = ", ".join(f"{name}: {value}" for name, value in self.summary().items())
        return f"Inspection({told})"

    def _repr_html_(self) -> str:
        return html_table([(name, str(value)) for name, value in self.summary().items()])

    def summary(self) -> dict[str, Any]:
        """The facts without the names of single tensors, of which there are their numbers."""
        counted = ("renamed", "unused", "missing", "resized", "adapted")
        facts = {name: len(value) if name in counted else value for name, value in self.items()}
        return {name: value for name, value in facts.items() if name in counted or value not in (None, "", {}, [])}


class Choice(NamedTuple):
    """What to give ``create_model``."""

    architecture: str
    model_args: dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """What the tensors of one encoder, or of one masked autoencoder, show of it in the words of its classes.

    classes: of the encoder and, of a masked autoencoder, of the decoder.
    sizes: option of these classes to its value.
    grid: patch grid.
    """

    classes: tuple[type[Any], ...]
    sizes: dict[str, Any]
    grid: Shape

    @property
    def fixed(self) -> dict[str, Any]:
        """The sizes that make an architecture."""
        return {name: self.sizes.get(name) for owner in self.classes for name in owner.FIXED_SIZES}

    @property
    def options(self) -> dict[str, Any]:
        """The other ones: options of an architecture."""
        return {name: value for name, value in self.sizes.items() if name not in self.fixed}


class Known(NamedTuple):
    """A registered architecture: how its own tensors read, its settings, and what it is to be filled with."""

    name: str
    reading: Reading
    settings: dict[str, Setting]
    target: Target


def inspect_checkpoint(
    path: str | os.PathLike[str], *, source_grid: Shape | None = None, token_order: TokenOrder | None = None
) -> Inspection:
    """Report what a weight file is and what would be loaded from it.

    Args:
        path: a weight file, or a folder that :func:`~medgmae.save_pretrained` wrote; "FILE::teacher" for one of several
            sets of weights in a file.
        source_grid: patch grid (d, h, w) of the file's table of positions, where the file leaves it open.
        token_order: of a Primus' file, where it does not say it; see :func:`~medgmae.load_pretrained`.

    Returns:
        a dictionary for JSON, see :class:`Inspection`.

    Raises:
        WeightsError: the file is not readable or not recognised.
    """
    source_grid = grid_argument(source_grid)
    check_source(path)
    file, wanted = opening.split_set(path)
    path = as_path(file)
    opened = opening.open_source(Path(f"{path}{SET_MARK}{wanted}") if wanted else path)
    opened = replace(opened, token_order=token_order)
    config = opened.config if opened.config and "architecture" in opened.config else None
    converted, chosen = _recognise(opened, source_grid)
    reading = _read(converted)
    if reading is None:
        raise WeightsError(
            f"{path} ({converted.source}): its tensors are those of no registered family, the architecture is unknown"
        )
    settings = {**converted.assumed, **converted.expects, **opened.expects}
    if config is not None:
        chosen = Choice(str(config["architecture"]), dict(config.get("model_args", {})))
    chosen = chosen or _choose(reading, converted, settings)
    encoder = _encoders_choice(reading, converted, settings)
    tensors = opened.checkpoint.state.values()
    facts = {
        "path": str(path),
        "bytes": weight_bytes(read_folder(path).path if path.is_dir() else path),
        "container": opened.checkpoint.container,
        "other_sets": list(opened.checkpoint.others),
        "source": converted.source,
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "sizes": _sizes(reading, settings),
        "head": _head(converted.encoder),
        "config": config,
        "architecture": chosen.architecture if chosen else None,
        "model_args": chosen.model_args if chosen else {},
        "encoder_architecture": encoder.architecture if encoder else None,
        "renamed": dict(converted.renamed),
        **_rehearse(opened, converted, chosen, source_grid),
    }
    return Inspection(facts)


def _recognise(opened: opening.OpenSource, source_grid: Shape | None) -> tuple[Converted, Choice | None]:
    """The file in our language; where it does not say its own grid or patch, as the registered model that it fits."""
    config = opened.config if opened.config and "grid" in opened.config else None
    arguments: dict[str, Any] = {"origin": opened.origin, "config": config, "source_grid": source_grid}
    arguments |= {"token_order": opened.token_order, "facts": opened.checkpoint.facts}
    try:
        return convert(opened.checkpoint.state, **arguments), None
    except WeightsError:
        for known in _architectures():
            try:
                converted = convert(opened.checkpoint.state, target=known.target, **arguments)
            except WeightsError:
                continue
            reading = _read(converted)
            choice = reading and _choose(reading, converted, {**converted.assumed, **converted.expects})
            if choice:
                return converted, choice
        raise


def _architectures() -> Iterator[Known]:
    """The registered architectures, but for modules that are not models of this library."""
    return (known for name in model_names() if (known := _known(name)) is not None)


@functools.cache
def _known(name: str) -> Known | None:
    """A registered architecture, built without storage."""
    with torch.device("meta"):
        model: Any = model_builder(name)()
    encoder = encoder_of(model)
    parts = [encoder] if encoder is model else [encoder, getattr(model, "decoder", None)]
    if not all(hasattr(part, "read_sizes") for part in parts):
        return None
    sizes: dict[str, Any] = {}
    for part in parts:
        sizes |= type(part).read_sizes(part.state_dict()) or {}
    reading = Reading(tuple(type(part) for part in parts), sizes, tuple(encoder.grid_size))
    target = Target(encoder.grid_size, encoder.patch_size, encoder.in_chans)
    return Known(name, reading, model_settings(model), target)


def _read(converted: Converted) -> Reading | None:
    """What a file shows in the words of the family that knows it; None where none does."""
    families = [known.reading.classes for known in _architectures()]
    encoder = _read_part({classes[0] for classes in families}, converted.encoder)
    decoder = _read_part({classes[1] for classes in families if len(classes) > 1}, converted.decoder)
    if encoder is None:
        return None
    parts = [encoder] if decoder is None else [encoder, decoder]
    sizes = {name: value for _, sizes in parts for name, value in sizes.items()}
    return Reading(tuple(owner for owner, _ in parts), sizes, tuple(converted.grid))


def _read_part(owners: set[type[Any]], state: Mapping[str, Tensor]) -> tuple[type[Any], dict[str, Any]] | None:
    """The class that knows a part's tensors, and what it reads off them."""
    for owner in sorted(owners, key=lambda owner: owner.__qualname__):
        sizes = owner.read_sizes(state) if state else None
        if sizes is not None:
            return owner, sizes
    return None


def _choose(reading: Reading, converted: Converted, settings: Mapping[str, Any]) -> Choice | None:
    """The registered architecture that is nearest to what a file shows, and the options that make it equal.

    Of two that are one model under names of their own, the one with the shorter name: mae_vit_*, not glmae_vit_*.
    """
    choices: list[tuple[int, int, str, dict[str, Any]]] = []
    for known in _architectures():
        if known.reading.classes == reading.classes and known.reading.fixed == reading.fixed:
            options = _options(reading, known, settings) | _head_options(converted.encoder)
            distance = abs(math.prod(known.reading.grid) - math.prod(reading.grid))
            choices.append((len(options), distance, known.name, options))
    if not choices:
        return None
    _, _, name, options = min(choices, key=lambda choice: (*choice[:2], len(choice[2]), choice[2]))
    return Choice(name, options)


def _encoders_choice(reading: Reading, converted: Converted, settings: Mapping[str, Any]) -> Choice | None:
    """The same for the encoder of a masked autoencoder alone."""
    if len(reading.classes) == 1:
        return None
    owner = reading.classes[0]
    alone = Reading((owner,), owner.read_sizes(converted.encoder), reading.grid)
    return _choose(alone, converted, settings)


def _options(reading: Reading, known: Known, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``create_model`` that turn a registered architecture into the one of the file."""
    options: dict[str, Any] = {}
    if known.reading.grid != reading.grid:
        size = [g * p for g, p in zip(reading.grid, reading.sizes["patch_size"], strict=True)]
        options["img_size"] = size[0] if len(set(size)) == 1 else size
    theirs = known.reading.options
    options |= {name: _plain(value) for name, value in reading.options.items() if value != theirs.get(name)}
    for name, setting in known.settings.items():
        if setting.option and name in settings and settings[name] != setting.value:
            options.setdefault(setting.option, _plain(settings[name]))
    return options


def _sizes(reading: Reading, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the file shows of its options, and which of those that change the weights' meaning it leaves open."""
    sizes = {**reading.sizes, "grid": reading.grid}
    family = next((known for known in _architectures() if known.reading.classes == reading.classes), None)
    for name, setting in family.settings.items() if family else ():
        if setting.option:
            sizes.setdefault(setting.option, settings.get(name, UNKNOWN))
    return {name: _plain(value) for name, value in sizes.items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _head(encoder: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes and hidden widths of the classifier in an encoder: ``head``, or the linear layers of ``head.N``."""
    layers: dict[int, int] = {}
    for name, tensor in encoder.items():
        match = re.fullmatch(r"head\.(?:(\d+)\.)?weight", name)
        if match and tensor.dim() == 2:
            layers[int(match[1] or 0)] = len(tensor)
    widths = [layers[i] for i in sorted(layers)]
    return {"num_classes": widths[-1] if widths else 0, "head_hidden": widths[:-1]}


def _head_options(encoder: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value for name, value in _head(encoder).items() if value}


def _rehearse(
    opened: opening.OpenSource, converted: Converted, chosen: Choice | None, source_grid: Shape | None
) -> dict[str, Any]:
    """Load into a model without storage and report what happened."""
    if chosen is None:
        return _problem(converted, "no registered architecture has these sizes")
    try:
        with torch.device("meta"):
            model = model_builder(chosen.architecture)(**chosen.model_args)
        report = loading.rehearse(model, opened, source_grid=source_grid).report
    except (WeightsError, ValueError, TypeError) as error:
        return _problem(converted, str(error))
    return {
        "unused": report.unused,
        "missing": report.missing,
        "resized": report.resized,
        "adapted": report.adapted,
        "notes": report.notes,
        "problem": None,
    }


def _problem(converted: Converted, problem: str) -> dict[str, Any]:
    return {
        "unused": dict(converted.unused),
        "missing": [],
        "resized": {},
        "adapted": {},
        "notes": list(converted.notes),
        "problem": problem,
    }
