"""A checkpoint's state dictionary, taken apart into our language: what the converters of all dialects share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medgmae.checkpoints.cards import WeightsError
from medgmae.layers.patches import Shape
from medgmae.layers.positions import sincos_grid

# Wrappers put these in front of every name; they are removed as often as they stand there.
PREFIXES = ("module.", "_orig_mod.", "model.")

STEM = "patch_embed.proj.weight"


class Target(NamedTuple):
    """What the model to be filled says about itself.

    grid: patch grid.
    patch_size: voxels per axis of a patch.
    in_chans: input channels.
    class_token: where a state-space encoder scans its class token: "front", "middle" or "double"; None for no such.
    """

    grid: Shape
    patch_size: Shape
    in_chans: int
    class_token: str | None = None


@dataclass
class Converted:
    """Weights in our language.

    source: the dialect that was recognised.
    state: our name to tensor.
    renamed: the file's name to ours.
    unused: the file's name to the reason why it has no place.
    grid: patch grid of the tables in ``state``.
    expects: settings that the model must have for the weights to mean the same, as dotted attribute to value.
    """

    source: str
    state: dict[str, Tensor] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    grid: Shape = ()
    expects: dict[str, Any] = field(default_factory=dict)


class File:
    """A stripped state dictionary, taken apart entry by entry into a :class:`Converted`."""

    def __init__(self, state: Mapping[str, Tensor], origin: str, target: Target | None, source_grid: Shape | None):
        self.origin, self.target, self.source_grid = origin, target, source_grid
        self.rest: dict[str, tuple[str, Tensor]] = {}
        self.out = Converted("")
        for full, tensor in state.items():
            name = strip_prefixes(full)
            if name in self.rest:
                raise WeightsError(f"{origin}: {full!r} and {self.rest[name][0]!r} are both {name!r} without prefixes")
            self.rest[name] = (full, tensor)
        if any(name.startswith("backbone.") for name in self.rest):
            self._enter_backbone()

    def _enter_backbone(self) -> None:
        inside: dict[str, tuple[str, Tensor]] = {}
        for name, (full, tensor) in self.rest.items():
            if name.startswith("backbone."):
                inside[name.removeprefix("backbone.")] = (full, tensor)
            else:
                self.out.unused[full] = "beside the backbone (projector or decoder of the pre-training)"
        self.rest = inside

    def has(self, name: str) -> bool:
        """Whether an entry of that name has not found its place yet."""
        return name in self.rest

    def has_any(self, prefix: str) -> bool:
        """Whether an entry that begins so has not found its place yet."""
        return any(name.startswith(prefix) for name in self.rest)

    def tensor(self, name: str) -> Tensor:
        """The tensor of an entry; WeightsError where there is none."""
        if name not in self.rest:
            raise WeightsError(f"{self.origin}: has no {name!r}; the file is incomplete, fetch or export it again")
        return self.rest[name][1]

    def table(self, name: str) -> Tensor:
        """A table of positions or a token, (1, N, E); WeightsError where the entry is none or of another shape."""
        tensor = self.tensor(name)
        if tensor.dim() != 3 or len(tensor) != 1:
            raise WeightsError(f"{self.origin}: {name!r} has shape {tuple(tensor.shape)}, expected (1, rows, width)")
        return tensor

    def take(self, name: str, ours: str, tensor: Tensor | None = None) -> None:
        """Move an entry to its place, with another tensor if one is given."""
        full, original = self.rest.pop(name)
        self.out.state[ours] = original if tensor is None else tensor
        self.out.renamed[full] = ours

    def drop(self, prefix: str, why: str) -> None:
        """Leave out every entry that begins so, for a reason that the report gives."""
        for name in [n for n in self.rest if n.startswith(prefix)]:
            self.out.unused[self.rest.pop(name)[0]] = why

    def take_all(self, rename: Callable[[str], str | None]) -> None:
        """Move every entry that ``rename`` gives a place."""
        for name in list(self.rest):
            ours = rename(name)
            if ours is not None:
                self.take(name, ours)


def strip_prefixes(name: str) -> str:
    """Remove the wrappers' prefixes in front of a name, however often they stand there."""
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def take_decoder_table(file: File, prefix_rows: int) -> None:
    """The decoder's table and the rows for prefix tokens in front of it (zero where the file has none)."""
    if not file.has("decoder_pos_embed"):
        return
    if prefix_rows not in (0, 1):
        raise WeightsError(
            f"{file.origin}: the decoder's table has {file.tensor('decoder_pos_embed').shape[1]} rows, which does not "
            "fit the encoder's"
        )
    table = file.table("decoder_pos_embed")
    prefix = table[:, :1] if prefix_rows else torch.zeros(1, 1, table.shape[2])
    file.out.state["decoder.prefix_pos_embed"] = prefix.to(table.dtype)
    file.take("decoder_pos_embed", "decoder.pos_embed", table[:, prefix_rows:])


def stem_dims(file: File, stem: str) -> int:
    """Axes of the patch weight ``stem``: 2 or 3; WeightsError for another shape."""
    dims = file.tensor(stem).dim() - 2
    if dims not in (2, 3):
        raise WeightsError(f"{file.origin}: the patch weight has shape {tuple(file.tensor(stem).shape)}, not a ViT's")
    return dims


def table_grid(file: File, table: Tensor, dims: int, class_row: bool) -> tuple[Shape, bool]:
    """Patch grid of a table of positions, and whether its first row belongs to the class token.

    Only what leaves no choice is accepted: the grid that was passed, the one that a sine-cosine table shows by itself,
    else the model's own or a cube.
    """
    rows, asked = table.shape[1], file.source_grid
    choices = [(rows - has_row, has_row) for has_row in sorted({class_row, False}, reverse=True)]
    found: set[tuple[Shape, bool]] = set()
    if asked is not None:
        found = {(tuple(asked), has_row) for n, has_row in choices if math.prod(asked) == n}
    else:
        shown = [(sincos_grid(table[:, int(has_row) :], dims), has_row) for _, has_row in choices]
        found = {(grid, has_row) for grid, has_row in shown if grid is not None}
    if asked is None and not found:
        own = [file.target.grid] if file.target and len(file.target.grid) == dims else []
        for n, has_row in choices:
            side = round(max(n, 1) ** (1 / dims))
            found |= {(tuple(grid), has_row) for grid in (*own, (side,) * dims) if math.prod(grid) == n}
    if len(found) != 1:
        could = " or ".join(f"{g}{' and a class row' if r else ''}" for g, r in sorted(found)) or "unknown"
        raise WeightsError(
            f"{file.origin}: the table of positions has {rows} rows; its patch grid is {could}"
            + (f", not {asked}" if asked else "")
            + ". Pass source_grid=(d, h, w), the grid that the file was trained with"
            + ("" if class_row else " (no row is counted for a class token: the file has no cls_token)")
        )
    return found.pop()
