"""A checkpoint's state dictionary, taken apart entry by entry: what the converters of all dialects share."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from medgmae.checkpoints.cards import WeightsError
from medgmae.layers.patches import Shape
from medgmae.layers.positions import sincos_grid

# Wrappers put these in front of every name; they are removed as often as they stand there.
PREFIXES = ("module.", "_orig_mod.", "model.")

# What wrappers of single parts put into the middle of names.
_INNER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

STEM = "patch_embed.proj.weight"

# What an encoder's names begin with; where such a tensor finds no place, the features would be others.
ENCODER = ("blocks.", "patch_embed.", "pos_embed", "norm_pre.", "cls_token")

Part = Literal["encoder", "decoder"]

# Which patch of a volume the n-th position and rotation of a file belong to: the n-th in raster order, or the one whose
# first two axes are exchanged.
TokenOrder = Literal["raster", "swapped"]
# What is assumed of a ViT whose table no file says how to resample: as every code base but DINOv2's does.
PLAIN_TABLE = {"encoder.interpolate_offset": 0.0}


class Target(NamedTuple):
    """What is known of the model to be filled.

    grid: patch grid.
    patch_size: voxels per axis of a patch.
    in_chans: input channels.
    settings: the encoder's settings by name, for what a file leaves open; likewise ``decoder``.
    """

    grid: Shape
    patch_size: Shape
    in_chans: int
    settings: Mapping[str, Any] = MappingProxyType({})
    decoder: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Converted:
    """Weights in our language, one dictionary for each part of a model.

    source: the dialect that was recognised.
    grid: patch grid of the tables of positions.
    encoder: the encoder's name to tensor; likewise ``decoder``.
    renamed: the file's name to ours, behind "encoder." or "decoder.".
    unused: the file's name to the reason why it is left out.
    unknown: the file's names that belong to neither part.
    expects: settings that the model must have for the weights to mean the same, such as "decoder.sigmoid".
    assumed: settings that the file leaves open and that were taken for granted on conversion.
    notes: what else a user should know, see :class:`~medgmae.LoadReport`.
    """

    source: str
    grid: Shape
    encoder: Mapping[str, Tensor]
    decoder: Mapping[str, Tensor]
    renamed: Mapping[str, str]
    unused: Mapping[str, str]
    unknown: tuple[str, ...] = ()
    expects: Mapping[str, Any] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def file_names(self, part: Part) -> dict[str, str]:
        """A part's name to the file's; what conversion added has none."""
        places = {full: split_place(ours) for full, ours in self.renamed.items()}
        return {name: full for full, (owner, name) in places.items() if owner == part}


class File:
    """A state dictionary without wrappers' prefixes. A dialect moves its entries to their places, then finishes.

    Args:
        state: name to tensor.
        origin: the file's name, for messages.
        config: the config that travels with one of our own files.
        target: the model to be filled.
        source_grid: patch grid of the file's table, where the caller passed it.
        token_order: "raster" or "swapped", where the caller or a weight card says it.
        facts: what a container says beside the weights, by name.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        origin: str,
        config: Mapping[str, Any] | None = None,
        target: Target | None = None,
        source_grid: Shape | None = None,
        *,
        token_order: TokenOrder | None = None,
        facts: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.token_order, self.facts = token_order, facts
        self.origin, self.config, self.target, self.source_grid = origin, config, target, source_grid
        self._rest: dict[str, tuple[str, Tensor]] = {}
        self._parts: dict[Part, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
        self._renamed: dict[str, str] = {}
        self._unused: dict[str, str] = {}
        self.notes: list[str] = []
        for full, tensor in state.items():
            name = strip_prefixes(full)
            if name in self._rest:
                raise WeightsError(f"{origin}: {full!r} and {self._rest[name][0]!r} are both {name!r} without prefixes")
            self._rest[name] = (full, tensor)

    @property
    def names(self) -> list[str]:
        """Names of the entries that have not found their place yet, without wrappers' prefixes."""
        return list(self._rest)

    def has(self, name: str) -> bool:
        """Whether an entry of that name has not found its place yet."""
        return name in self._rest

    def has_any(self, prefix: str) -> bool:
        """Whether an entry that begins so has not found its place yet."""
        return any(name.startswith(prefix) for name in self._rest)

    def tensor(self, name: str) -> Tensor:
        """The tensor of an entry; WeightsError where there is none."""
        if name not in self._rest:
            raise WeightsError(f"{self.origin}: has no {name!r}; the file is incomplete, fetch or export it again")
        return self._rest[name][1]

    def numbers(self, name: str) -> Tensor:
        """The tensor of an entry, to compute with; WeightsError where it has none with a fraction."""
        tensor = self.tensor(name)
        if not tensor.is_floating_point():
            raise WeightsError(f"{self.origin}: {name!r} is of {tensor.dtype}, expected floating-point numbers")
        return tensor

    def table(self, name: str) -> Tensor:
        """A table of positions or a token, (1, N, E); WeightsError where the entry is none or of another shape."""
        tensor = self.numbers(name)
        if tensor.dim() != 3 or len(tensor) != 1:
            raise WeightsError(f"{self.origin}: {name!r} has shape {tuple(tensor.shape)}, expected (1, rows, width)")
        return tensor

    def full_name(self, name: str) -> str:
        """An entry's name as the file spells it."""
        return self._rest[name][0]

    def replace(self, name: str, tensor: Tensor) -> None:
        """Give an entry another tensor."""
        self._rest[name] = (self._rest[name][0], tensor)

    def enter(self, prefix: str) -> None:
        """Go on with the entries that begin so, without that beginning; the others are left out.

        Raises:
            WeightsError: an encoder's entry is among the others: what it belongs to cannot be known.
        """
        for name in self.names:
            if not name.startswith(prefix):
                if name.startswith(ENCODER):
                    raise WeightsError(
                        f"{self.origin}: {self.full_name(name)!r} lies beside an encoder under {prefix!r}; save the "
                        "state dictionary of that part alone"
                    )
                self.drop(name, f"beside {prefix!r}")
        self._rest = {name.removeprefix(prefix): entry for name, entry in self._rest.items()}
        self.notes.append(f"the weights are those under {prefix!r}")

    def strip(self, prefix: str) -> None:
        """Go on without a prefix of names, where they have it.

        Raises:
            WeightsError: two entries have the same name without it.
        """
        short = {name.removeprefix(prefix): entry for name, entry in self._rest.items()}
        if len(short) < len(self._rest):
            raise WeightsError(f"{self.origin}: holds the same names with and without {prefix!r}; save one of them")
        self._rest = short

    def rename(self, name: str, new: str) -> None:
        """Give an entry another name, under which its place is found."""
        if new in self._rest:
            raise WeightsError(f"{self.origin}: {self.full_name(name)!r} and {self.full_name(new)!r} are both {new!r}")
        self._rest[new] = self._rest.pop(name)

    def take(self, name: str, place: str, tensor: Tensor | None = None) -> None:
        """Move an entry to its place ("encoder.norm.weight"), with another tensor if one is given.

        Raises:
            WeightsError: the place is taken by another entry.
        """
        full, original = self._rest.pop(name)
        part, ours = split_place(place)
        if ours in self._parts[part]:
            raise WeightsError(f"{self.origin}: {full!r} stands for {place!r}, which is in the file twice")
        self._parts[part][ours] = original if tensor is None else tensor
        self._renamed[full] = place

    def take_beside(self, name: str, place: str) -> None:
        """Note that an entry is part of the tensor at a place that another entry has taken."""
        self._renamed[self._rest.pop(name)[0]] = place

    def take_all(self, rename: Callable[[str], str | None]) -> None:
        """Move every entry for which ``rename`` gives a place."""
        for name in self.names:
            place = rename(name)
            if place is not None:
                self.take(name, place)

    def add(self, place: str, tensor: Tensor) -> None:
        """Put a tensor that the file does not have to a place."""
        part, ours = split_place(place)
        self._parts[part][ours] = tensor

    def drop(self, name: str, why: str) -> None:
        """Leave out an entry for a reason that the report gives."""
        self._unused[self._rest.pop(name)[0]] = why

    def drop_all(self, prefix: str, why: str) -> None:
        """Leave out every entry that begins so."""
        for name in self.names:
            if name.startswith(prefix):
                self.drop(name, why)

    def finish(
        self,
        source: str,
        grid: Shape,
        expects: Mapping[str, Any] | None = None,
        assumed: Mapping[str, Any] | None = None,
    ) -> Converted:
        """What came out of it; entries without a place are reported as unknown."""
        return Converted(
            source,
            grid,
            encoder=self._parts["encoder"],
            decoder=self._parts["decoder"],
            renamed=self._renamed,
            unused=self._unused,
            unknown=tuple(full for full, _ in self._rest.values()),
            expects=expects or {},
            assumed=assumed or {},
            notes=tuple(self.notes),
        )


def grid_argument(grid: Sequence[int] | None) -> Shape | None:
    """A patch grid as a caller passes it, in plain whole numbers.

    Raises:
        ValueError: it is none.
    """
    if grid is None:
        return None
    try:
        sizes = tuple(operator.index(size) for size in grid)
        valid = len(sizes) in (2, 3) and min(sizes) > 0 and not any(isinstance(size, bool) for size in grid)
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"source_grid must be patches per axis, such as (6, 6, 6), got {grid!r}")
    return sizes


def split_place(place: str) -> tuple[Part, str]:
    """ "encoder.norm.weight" as ("encoder", "norm.weight")."""
    part, _, name = place.partition(".")
    if part == "encoder":
        return "encoder", name
    if part == "decoder":
        return "decoder", name
    raise ValueError(f"{place!r} is not a place: it should begin with 'encoder.' or 'decoder.'")


def strip_prefixes(name: str) -> str:
    """Remove the wrappers' prefixes in front of a name, however often they stand there, and those of its parts."""
    name = _INNER.sub("", name)
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
    file.add("decoder.prefix_pos_embed", prefix.to(table.dtype))
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
    if asked is not None and len(asked) != dims:
        raise WeightsError(
            f"{file.origin}: source_grid={asked} has {len(asked)} axes, the file's patches have {dims}; pass the grid "
            "that the file was trained with"
        )
    if asked is not None:
        grids = {(tuple(asked), has_row) for n, has_row in choices if math.prod(asked) == n}
    else:
        grids = _shown_grids(table, dims, choices) or _likely_grids(file.target, dims, choices)
    if len(grids) != 1:
        could = " or ".join(f"{g}{' and a class row' if r else ''}" for g, r in sorted(grids)) or "unknown"
        raise WeightsError(
            f"{file.origin}: the table of positions has {rows} rows; its patch grid is {could}"
            + (f", not {asked}" if asked else "")
            + ". Pass source_grid=(d, h, w), the grid that the file was trained with"
            + ("" if class_row else " (no row is counted for a class token: the file has no cls_token)")
        )
    return grids.pop()


def _shown_grids(table: Tensor, dims: int, choices: list[tuple[int, bool]]) -> set[tuple[Shape, bool]]:
    """The grid that a sine-cosine table shows by itself."""
    shown = [(sincos_grid(table[:, int(has_row) :], dims), has_row) for _, has_row in choices]
    return {(grid, has_row) for grid, has_row in shown if grid is not None}


def _likely_grids(target: Target | None, dims: int, choices: list[tuple[int, bool]]) -> set[tuple[Shape, bool]]:
    """The model's own grid and the cube, where they have as many patches as the table."""
    grids: set[tuple[Shape, bool]] = set()
    own = [target.grid] if target and len(target.grid) == dims else []
    for n, has_row in choices:
        side = round(max(n, 1) ** (1 / dims))
        grids |= {(tuple(grid), has_row) for grid in (*own, (side,) * dims) if math.prod(grid) == n}
    return grids
