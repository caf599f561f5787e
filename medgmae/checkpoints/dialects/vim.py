"""The border for state-space encoders: files of the 3D Mamba MAE, of both its stages, become ours.

A pre-training file holds encoder and decoder; a fine-tuning file an encoder and a head. The authors' models work on
cubes only, so the rows of their tables tell the grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import STEM, File, stem_dims, table_grid, take_decoder_table
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


def holds_vim(names: Iterable[str]) -> bool:
    """Whether an encoder with these names is one of state-space blocks."""
    return "blocks.0.mixer.A_log" in names


def convert_vim(file: File) -> None:
    """Translate a file of the 3D Mamba MAE, or a bare encoder with our own names.

    Raises:
        WeightsError: the grid cannot be known, or the file was made with other rotary angles than the published ones.
    """
    if not file.has("norm_f.weight"):
        _own_encoder(file)
        return
    whole = file.has("decoder_pred.weight")
    file.out.source = f"3D Mamba MAE, {'pre-training' if whole else 'fine-tuning'}"
    tokens = _class_tokens(file)
    table = file.table("pos_embed")
    file.out.grid = _grid(file, table.shape[1] - tokens)
    _take_tables(file, tokens, whole)
    file.out.expects["encoder.rope"] = _drop_rotary(file, table.shape[2])
    if whole:
        take_decoder_table(file, file.table("decoder_pos_embed").shape[1] - math.prod(file.out.grid))
        file.out.expects |= {
            "encoder.scan_order": "given",
            "decoder.rope": "sequence" if _drop_sequence_rope(file, "decoder_rope.freqs") else None,
            "decoder.off_by_one": not tokens,
        }
    file.take_all(_rename)


def _own_encoder(file: File) -> None:
    file.out.source = "medgmae"
    file.out.grid = table_grid(file, file.table("pos_embed"), stem_dims(file, STEM), class_row=False)[0]
    file.take_all(lambda name: f"encoder.{name}")


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
    found = next((grid for grid in choices if len(grid) == dims and math.prod(grid) == rows), None)
    if found is None:
        raise WeightsError(
            f"{file.origin}: the table of positions has {rows} rows for patches, which are not those of "
            f"{' or '.join(map(str, choices))}. Pass source_grid=(d, h, w), the grid that the file was trained with"
        )
    return found


def _take_tables(file: File, tokens: int, whole: bool) -> None:
    """The encoder's table; rows of class tokens go into the tokens, where they would be added anyway."""
    table = file.table("pos_embed")
    patches = table.shape[1] - tokens
    if tokens == 2:
        parts = [file.table(name) + table[:, row : row + 1] for name, row in zip(DOUBLE, (0, patches + 1), strict=True)]
        file.take(DOUBLE[0], "encoder.cls_token", torch.cat(parts, dim=1))
        file.take(DOUBLE[1], "encoder.cls_token", file.out.state["encoder.cls_token"])
        table = table[:, 1:-1]
    elif tokens:
        place = _class_row(file, patches, whole)
        file.take("cls_token", "encoder.cls_token", file.table("cls_token") + table[:, place : place + 1])
        table = torch.cat([table[:, :place], table[:, place + 1 :]], dim=1)
    file.take("pos_embed", "encoder.pos_embed", table)


def _class_row(file: File, patches: int, whole: bool) -> int:
    """Row of the class token in the official table, which follows the sequence: no file tells it, the model does.

    Without a model it is taken to be first in a masked autoencoder, in the middle of a classifier.
    """
    place = file.target.class_token if file.target is not None else None
    return 0 if place == "front" or (whole and place is None) else patches // 2


def _drop_rotary(file: File, width: int) -> str | None:
    """Leave out what the model computes by itself, and say which rotation it is."""
    if file.has("rope.freqs_cos"):
        _check_axial(file, width)
        file.drop("rope.freqs_", UNUSED["rope.freqs_cos"])
        return "axial_published"
    return "sequence" if _drop_sequence_rope(file, "rope.freqs") else None


def _drop_sequence_rope(file: File, name: str) -> bool:
    """Leave out rotary frequencies, if there are any, after a look whether they are the published ones."""
    if not file.has(name):
        return False
    found = file.tensor(name)
    expected = _frequencies(len(found) if found.dim() else 1)
    if found.shape != expected.shape or not _near(found, expected):
        raise WeightsError(
            f"{file.origin}: {name!r} holds other rotary frequencies than 10000^(-i/n), i = 0 .. n - 1, which is what "
            "the models of this library rotate by; the file cannot be used with them"
        )
    file.drop(name, UNUSED[name])
    return True


def _check_axial(file: File, width: int) -> None:
    """Compare the last row of a fine-tuning file's rotary table, where every coordinate is g - 1, with the formula."""
    side = file.out.grid[-1]
    angles = (side - 1) / side * 14 * _frequencies(width // 4).repeat_interleave(2).repeat(2)
    for name, expected in (("rope.freqs_cos", angles.cos()), ("rope.freqs_sin", angles.sin())):
        table = file.tensor(name)
        shape = (math.prod(file.out.grid), len(angles))
        if tuple(table.shape) != shape or not _near(table[-1], expected):
            raise WeightsError(
                f"{file.origin}: {name!r} of shape {tuple(table.shape)} is not the rotary table of a {file.out.grid} "
                f"grid, {shape} with the angles i / {side} * 14 / 10000^(4 j / {len(angles)}); the models of this "
                "library have no other"
            )


def _frequencies(count: int) -> Tensor:
    return 10000 ** -(torch.arange(count, dtype=torch.float32) / max(count, 1))


def _near(found: Tensor, expected: Tensor) -> bool:
    """Whether a tensor of any precision holds these values; without values, it does."""
    return found.is_meta or torch.allclose(found.float().cpu(), expected, rtol=1e-2, atol=2e-3)
