"""The dialect of this library: saved models with their config, and bare state dictionaries with our own names."""

from __future__ import annotations

import math

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import STEM, Converted, File, stem_dims, table_grid
from medgmae.checkpoints.dialects.recognise import register_dialect
from medgmae.layers.patches import Shape

SOURCE = "medgmae"

# Names by which a decoder of ours is known.
_MARKS = ("decoder.mask_token", "decoder.query_tokens", "decoder.stem.conv1.weight")


# What a report says of the two networks of one run, by the end of the tag of their card.
_NETWORKS = {
    ".teacher": "the weights are the teacher's; those of its student are in the folder 'student' beside them",
    ".student": "the weights are the student's; those of its teacher are in the folder above",
}


def is_own_pair(file: File) -> bool:
    """Whether a file has our names of an encoder and a decoder."""
    return file.has("encoder.pos_embed") and any(map(file.has, _MARKS))


def is_own_encoder(file: File) -> bool:
    """Whether a file may have our names of an encoder."""
    return file.has(STEM) and file.has("pos_embed")


@register_dialect("models saved by medgmae", order=10, matches=lambda file: file.config is not None)
def convert_saved(file: File) -> Converted:
    """Our own names beside a config, which says the grid; an encoder's file has them without ``encoder.``."""
    prefix = _encoders_prefix(file)
    grid = (file.config or {})["grid"]
    if not isinstance(grid, list) or not all(type(n) is int and n > 0 for n in grid):
        raise WeightsError(f"{file.origin}: the config's grid is {grid!r}, expected a list of whole numbers from 1")
    if file.has(f"{prefix}pos_embed"):
        rows = file.table(f"{prefix}pos_embed").shape[1]
        if math.prod(grid) != rows:
            raise WeightsError(f"{file.origin}: the config's grid is {grid!r}, the table of positions has {rows} rows")
    card = (file.config or {}).get("weight_card")
    tag = card.get("tag") if isinstance(card, dict) else None
    file.notes += [note for end, note in _NETWORKS.items() if isinstance(tag, str) and tag.endswith(end)]
    return _take(file, tuple(grid))


def _has_no_table(file: File) -> bool:
    """Whether a file may have our names of an encoder with rotary positions alone."""
    return file.has(STEM) and file.has("blocks.0.attn.qkv.weight") and not file.has("pos_embed")


@register_dialect("encoders without a table of positions with medgmae's names", order=59, matches=_has_no_table)
def convert_tableless(file: File) -> Converted:
    """Our own names without a config; nothing in the file depends on a grid."""
    grid = file.source_grid or (file.target.grid if file.target else None)
    if grid is None:
        raise WeightsError(
            f"{file.origin}: has no table of positions, so its patch grid is unknown; pass source_grid=(d, h, w)"
        )
    return _take(file, tuple(grid))


@register_dialect("encoders and decoders with medgmae's names", order=40, matches=is_own_pair)
@register_dialect("encoders with medgmae's names", order=90, matches=is_own_encoder)
def convert_own(file: File) -> Converted:
    """Our own names without a config."""
    prefix = _encoders_prefix(file)
    dims = stem_dims(file, f"{prefix}{STEM}")
    return _take(file, table_grid(file, file.table(f"{prefix}pos_embed"), dims, class_row=False)[0])


def _encoders_prefix(file: File) -> str:
    """What stands in front of the encoder's names in the file."""
    return "encoder." if file.has_any("encoder.") else ""


def _take(file: File, grid: Shape) -> Converted:
    if _encoders_prefix(file):
        file.take_all(lambda name: name if name.startswith(("encoder.", "decoder.")) else None)
    else:
        file.take_all(lambda name: f"encoder.{name}")
    return file.finish(SOURCE, grid)
