"""The dialect of the 3D Mamba MAE, of both its stages, and what our own names leave open about a Vim.

A pre-training file holds encoder and decoder; a fine-tuning file an encoder and a head. The authors' models work on
cubes only, so the number of rows of a table gives its grid.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import STEM, Converted, File, stem_dims, take_decoder_table
from medgmae.checkpoints.dialects.own import convert_own, is_own_encoder, is_own_pair
from medgmae.checkpoints.dialects.recognise import register_dialect
from medgmae.layers.patches import Shape

# Official names of a double class token: before and behind the patches.
DOUBLE = ("cls_token_head", "cls_token_tail")

UNUSED = {
    "cls_token": "class token that the authors' 3D models create and never read",
    "rope.freqs_cos": "rotary table: the model computes it for the grid at hand",
    "rope.freqs_sin": "rotary table: the model computes it for the grid at hand",
    "rope.freqs": "rotary frequencies: the model computes them",
    "decoder_rope.freqs": "rotary frequencies: the model computes them",
}

_NAMES = (
    (r"^norm_f\.", "encoder.norm."),
    (r"^decoder_norm_f\.", "decoder.norm."),
    (r"^decoder_embed\.", "decoder.embed."),
    (r"^decoder_blocks\.", "decoder.blocks."),
    (r"^decoder_pred\.", "decoder.head."),
    (r"^mask_token$", "decoder.mask_token"),
)

_STATES = "blocks.0.mixer.A_log"


@register_dialect(
    "the 3D Mamba MAE",
    order=70,
    matches=lambda file: file.has(STEM) and file.has(_STATES) and file.has("norm_f.weight"),
)
def convert_mamba_mae(file: File) -> Converted:
    """A file of either stage.

    Raises:
        WeightsError: the grid cannot be known, or the file was made with other rotary angles than the published ones.
    """
    whole = file.has("decoder_pred.weight")
    tokens = _class_tokens(file)
    table = file.table("pos_embed")
    grid = _grid(file, table.shape[1] - tokens)
    place = _place_of_class_token(file, whole)
    _take_tables(file, tokens, place)
    expects: dict[str, Any] = {"encoder.rope": _drop_rotary(file, grid, table.shape[2])}
    if whole:
        take_decoder_table(file, file.table("decoder_pos_embed").shape[1] - math.prod(grid))
        expects |= {
            "encoder.scan_order": "given",
            "decoder.rope": "sequence" if _drop_sequence_rope(file, "decoder_rope.freqs") else None,
            "decoder.off_by_one": not tokens,
        }
    file.take_all(_rename)
    source = f"3D Mamba MAE, {'pre-training' if whole else 'fine-tuning'}"
    return file.finish(source, grid, expects, {"encoder.class_token": place} if tokens == 1 else {})


def _is_own(file: File) -> bool:
    if is_own_pair(file):
        return file.has(f"encoder.{_STATES}")
    return is_own_encoder(file) and file.has(_STATES) and not file.has("norm_f.weight")


@register_dialect("Vims with medgmae's names", order=38, matches=_is_own)
def convert_own_vim(file: File) -> Converted:
    """Our own names without a config: what only both parts together show, and where a class token is taken to be."""
    converted = convert_own(file)
    token, prefix = converted.encoder.get("cls_token"), converted.decoder.get("prefix_pos_embed")
    tokens = 0 if token is None else token.shape[1]
    place = _place_of_class_token(file, whole=bool(converted.decoder))
    return replace(
        converted,
        expects={} if prefix is None else {"decoder.off_by_one": prefix.shape[1] > tokens},
        assumed={"encoder.class_token": place} if tokens == 1 else {},
    )


def _rename(name: str) -> str:
    for pattern, ours in _NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, ours, name)
    return f"encoder.{name}"


def _class_tokens(file: File) -> int:
    """Class tokens in the sequence: rows that the table has for them. The one that is never read is dropped.

    The patch embedding has a norm exactly where there is no class token.
    """
    if file.has("patch_embed.norm.weight"):
        if file.has("cls_token"):
            file.drop("cls_token", UNUSED["cls_token"])
        return 0
    return sum(file.has(name) for name in ("cls_token", *DOUBLE))


def _grid(file: File, rows: int) -> Shape:
    """Patch grid of the file: the one that was passed, else a cube, else the model's."""
    dims = stem_dims(file, STEM)
    side = round(max(rows, 1) ** (1 / dims))
    choices = [(side,) * dims, *([file.target.grid] if file.target is not None else [])]
    if file.source_grid is not None:
        choices = [tuple(file.source_grid)]
    grid = next((grid for grid in choices if len(grid) == dims and math.prod(grid) == rows), None)
    if grid is None:
        raise WeightsError(
            f"{file.origin}: the table of positions has {rows} rows for patches, which are not those of "
            f"{' or '.join(map(str, choices))}. Pass source_grid=(d, h, w), the grid that the file was trained with"
        )
    return grid


def _take_tables(file: File, tokens: int, place: str) -> None:
    """The encoder's table; rows of class tokens go into the tokens, where they would be added anyway."""
    table = file.table("pos_embed")
    patches = table.shape[1] - tokens
    if tokens == 2:
        parts = [file.table(name) + table[:, row : row + 1] for name, row in zip(DOUBLE, (0, patches + 1), strict=True)]
        file.take(DOUBLE[0], "encoder.cls_token", torch.cat(parts, dim=1))
        file.take_beside(DOUBLE[1], "encoder.cls_token")
        table = table[:, 1:-1]
    elif tokens:
        row = 0 if place == "front" else patches // 2
        file.take("cls_token", "encoder.cls_token", file.table("cls_token") + table[:, row : row + 1])
        table = torch.cat([table[:, :row], table[:, row + 1 :]], dim=1)
    file.take("pos_embed", "encoder.pos_embed", table)


def _place_of_class_token(file: File, whole: bool) -> str:
    """Where a single class token stands in the sequence, which no file says: where the model to be filled has it.

    Without such a model it is taken to be in front in a masked autoencoder, in the middle of a classifier.
    """
    place = file.target.settings.get("class_token") if file.target is not None else None
    return str(place) if place else "front" if whole else "middle"


def _drop_rotary(file: File, grid: Shape, width: int) -> str | None:
    """Leave out what the model computes by itself, and say which rotation it is."""
    if file.has("rope.freqs_cos"):
        _check_axial(file, grid, width)
        file.drop_all("rope.freqs_", UNUSED["rope.freqs_cos"])
        return "axial_published"
    return "sequence" if _drop_sequence_rope(file, "rope.freqs") else None


def _drop_sequence_rope(file: File, name: str) -> bool:
    """Leave out rotary frequencies, if there are any, after a look whether they are the published ones."""
    if not file.has(name):
        return False
    frequencies = file.tensor(name)
    expected = _frequencies(len(frequencies) if frequencies.dim() else 1)
    if frequencies.shape != expected.shape or not _near(frequencies, expected):
        raise WeightsError(
            f"{file.origin}: {name!r} holds other rotary frequencies than 10000^(-i/n), i = 0 .. n - 1, which is what "
            "the models of this library rotate by; the file cannot be used with them"
        )
    file.drop(name, UNUSED[name])
    return True


def _check_axial(file: File, grid: Shape, width: int) -> None:
    """Compare the last row of a fine-tuning file's rotary table, where every coordinate is g - 1, with the formula."""
    side = grid[-1]
    angles = (side - 1) / side * 14 * _frequencies(width // 4).repeat_interleave(2).repeat(2)
    for name, expected in (("rope.freqs_cos", angles.cos()), ("rope.freqs_sin", angles.sin())):
        table = file.tensor(name)
        shape = (math.prod(grid), len(angles))
        if tuple(table.shape) != shape or not _near(table[-1], expected):
            raise WeightsError(
                f"{file.origin}: {name!r} of shape {tuple(table.shape)} is not the rotary table of a {grid} "
                f"grid, {shape} with the angles i / {side} * 14 / 10000^(4 j / {len(angles)}); the models of this "
                "library have no other"
            )


def _frequencies(count: int) -> Tensor:
    return 10000 ** -(torch.arange(count, dtype=torch.float32) / max(count, 1))


def _near(tensor: Tensor, expected: Tensor) -> bool:
    """Whether a tensor of any precision holds these values; without values, it does."""
    return tensor.is_meta or torch.allclose(tensor.float().cpu(), expected, rtol=1e-2, atol=2e-3)
