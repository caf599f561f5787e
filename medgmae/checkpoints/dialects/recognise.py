"""State dictionaries of every known dialect become ours, once, here.

Our language: ``encoder.*`` and ``decoder.*``; tables of positions (1, N, E) without class row; a class row of the
encoder's table added into the class token; patch weights (E, C, *patch). See :func:`convert`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import (
    STEM,
    Converted,
    File,
    Target,
    stem_dims,
    table_grid,
)
from medgmae.checkpoints.dialects.vim import convert_vim, holds_vim
from medgmae.checkpoints.dialects.vit import _mae3d, _plain
from medgmae.layers.patches import Shape


def convert(
    state: Mapping[str, Tensor],
    *,
    origin: str = "state dictionary",
    config: Mapping[str, Any] | None = None,
    target: Target | None = None,
    source_grid: Shape | None = None,
) -> Converted:
    """Recognise a state dictionary and translate it.

    Known: TANGERINE (pre-training and fine-tuning), GL-MAE, MedGMAE, SelfMedMAE (3D, UVA, encoders of its UNETR), plain
    MAE and timm ViT dictionaries, the 3D Mamba MAE (pre-training and fine-tuning), our own files.

    Args:
        state: name to tensor.
        origin: file name for messages.
        config: the config that travels with one of our own files.
        target: the model to be filled; needed where the file alone does not say its grid or patch.
        source_grid: patch grid (d, h, w) of the file's table, where it is not a cube and not the model's.

    Raises:
        WeightsError: nothing is recognised, or the grid or patch of the file cannot be known.
    """
    file = File(state, origin, target, source_grid)
    if config is not None:
        _own(file, config["grid"])
    elif file.has("encoder_pos_embed"):
        _mae3d(file)
    elif file.has("encoder.pos_embed") and (file.has("decoder.mask_token") or file.has("decoder.query_tokens")):
        _own(file, None)
    elif file.has("encoder.pos_embed") and file.has(f"encoder.{STEM}"):
        file.drop("decoder.", "decoder of a UNETR")
        file.rest = {n.removeprefix("encoder."): v for n, v in file.rest.items()}
        _plain(file, "UNETR encoder of SelfMedMAE")
    elif file.has(STEM) and file.has("blocks.0.norm1.weight"):
        _plain(file, "")
    elif file.has(STEM) and holds_vim(file.rest):
        convert_vim(file)
    else:
        names = ", ".join(list(file.rest)[:6]) or "none"
        raise WeightsError(
            f"{origin}: not recognised as a checkpoint of TANGERINE, GL-MAE, MedGMAE, SelfMedMAE, the 3D Mamba MAE, a "
            f"plain MAE, a timm ViT or of this library. Its first names: {names}. Rename the entries to timm's ViT "
            "names and try again"
        )
    return file.out


def _own(file: File, grid: Any) -> None:
    """Our own names; an encoder's file has them without ``encoder.``. ``grid`` is the config's, if there is one."""
    file.out.source = "medgmae"
    prefix = "" if file.has_any("encoder.") else "encoder."
    table = file.table("encoder.pos_embed" if not prefix else "pos_embed")
    rows = table.shape[1]
    if grid is None:
        dims = stem_dims(file, f"{'' if prefix else 'encoder.'}{STEM}")
        file.out.grid = table_grid(file, table, dims, class_row=False)[0]
    elif isinstance(grid, list) and all(type(n) is int and n > 0 for n in grid) and math.prod(grid) == rows:
        file.out.grid = tuple(grid)
    else:
        raise WeightsError(f"{file.origin}: the config's grid is {grid!r}, the table of positions has {rows} rows")
    file.take_all(lambda name: prefix + name)
