"""The config of a saved model, as data of a stranger: read, bounded and compared with the tensors before use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medgmae.checkpoints.cards import WeightsError
from medgmae.models.registry import model_builder

MAX_LIST = 64

# Of blocks and other modules that options ask for by number, together; the deepest published encoder has 48.
MAX_MODULES = 512


def described_model(config: Mapping[str, Any], state: Mapping[str, Tensor], origin: str) -> nn.Module:
    """The model that a config describes, without storage, for weights of these shapes.

    Raises:
        WeightsError: the config describes no model of this version, or one that the tensors cannot be of. Nothing is
            built from numbers that no tensor bears out.
    """
    architecture, model_args = config.get("architecture"), config.get("model_args", {})
    if not isinstance(architecture, str) or not isinstance(model_args, dict):
        raise WeightsError(
            f"{origin}: the config's architecture and model_args should be text and an object, got "
            f"{type(architecture).__name__} and {type(model_args).__name__}; save the model again"
        )
    _check_numbers(model_args, state, origin)
    try:
        with torch.device("meta"):
            model = model_builder(architecture)(**model_args)
            built = model.state_dict()
            shapes = {name: tuple(value.shape) for name, value in built.items() if isinstance(value, Tensor)}
    except Exception as error:  # what a constructor raises for numbers that do not fit each other is its own affair
        raise WeightsError(
            f"{origin}: its config describes no model of this version of the library ({str(error)[:300]})"
        ) from error
    for name, shape in shapes.items():
        if name in state and tuple(state[name].shape) != shape:
            raise WeightsError(
                f"{origin}: {name} has shape {tuple(state[name].shape)} in the file, {shape} in the model that its "
                "config describes; the two are not of one model, save it again"
            )
    described: Any = getattr(model, "encoder", model)
    grid = config.get("grid")
    if grid is not None and hasattr(described, "grid_size") and grid != list(described.grid_size):
        raise WeightsError(
            f"{origin}: the config's grid is {str(grid)[:100]}, its model_args make {list(described.grid_size)}; "
            "correct the one that is wrong"
        )
    return model


def label_names(config: Mapping[str, Any], origin: str) -> list[str] | None:
    """The names of the classes that a config holds.

    Raises:
        WeightsError: it holds something else.
    """
    named = config.get("id2label")
    if named is None:
        return None
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise WeightsError(f"{origin}: the config's id2label is {str(named)[:100]}: expected a name for every class")
    if set(named) != {str(number) for number in range(len(named))}:
        raise WeightsError(f"{origin}: the config's id2label has the keys {list(named)[:8]}: expected 0, 1, 2, ...")
    return [named[str(number)] for number in range(len(named))]


def _check_numbers(model_args: Mapping[str, Any], state: Mapping[str, Tensor], origin: str) -> None:
    """Raise for numbers that the tensors cannot bear out: what would take long or much memory to build."""
    widest = max((size for tensor in state.values() for size in tensor.shape), default=0)
    modules = 0.0
    for name, value in _entries(model_args):
        if isinstance(value, str | None):
            continue
        size, limit, what = float("inf"), float(max(widest, 1024)), f"tensors of {widest} along their longest axis"
        if isinstance(value, list | dict):
            size, limit, what = len(value), MAX_LIST, "entries"
        elif isinstance(value, int) or math.isfinite(value):
            size = abs(value)
        if "depth" in name or "ratios" in name:
            modules += min(size, MAX_LIST * MAX_MODULES)  # a whole number may be too large to add to
            size, limit, what = modules, min(len(state), MAX_MODULES), f"a file of {len(state)} tensors"
        elif "img_size" in name:  # an axis of patches: at most the table's rows, each a patch long
            limit *= limit
        if size > limit:
            shown = f"{len(value)} long" if isinstance(value, list | dict) else str(value)[:40]
            raise WeightsError(
                f"{origin}: the config's {name} is {shown}, expected {limit:.0f} at most for {what}; it is not the "
                "config of these weights, save the model again"
            )


def _entries(value: Any, name: str = "model_args") -> Iterator[tuple[str, Any]]:
    """Every value in an object by its dotted name, the object itself first; its nesting is bounded."""
    yield name, value
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            inner = str(key) if name == "model_args" else f"{name}.{key}"
            yield from _entries(item, inner[:100])
