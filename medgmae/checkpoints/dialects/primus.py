"""The dialects of Primus: OpenMind's pre-trainings (nnssl), the architecture's own package, and COLIPRI.

All of them have the blocks' tensors under ``eva.``, with the names that ours have. Published pre-trainings of one
architecture differ in the order of the tokens, which no tensor shows. nnssl's masked autoencoder, and all that is built
on its class, lay the patch (i0, i1, i2) of the volume at the place of (i1, i0, i2): it has that patch's position and
rotation. This is undone here, in the tables and in the rows of the layers for queries and keys.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from medgmae.checkpoints.adapt import wide
from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import STEM, Converted, File, table_grid
from medgmae.checkpoints.dialects.recognise import register_dialect
from medgmae.checkpoints.heads import from_axes, permute_heads
from medgmae.layers.patches import Shape

NNSSL = "Primus of nnssl or dynamic-network-architectures"
COLIPRI = "COLIPRI"

_QUERY = "blocks.0.attn.q_proj.weight"
_EVA = f"eva.{_QUERY}"
_TOWER = "image_encoder.backbone."

# Heads by the width of the published sizes: no tensor shows them.
_HEADS = {396: 6, 792: 12, 864: 12, 1056: 16}

# The grid that COLIPRI was trained on, for files whose model is not known yet: nothing in them depends on it.
_COLIPRI_GRID = (24, 24, 24)

_PROJECTION = {
    "image_encoder.projector.weight": "proj.weight",
    "image_encoder.projector.bias": "proj.bias",
    "image_encoder.pooler.attn.in_proj_weight": "qkv.weight",
    "image_encoder.pooler.attn.in_proj_bias": "qkv.bias",
    "image_encoder.pooler.attn.out_proj.weight": "out.weight",
    "image_encoder.pooler.attn.out_proj.bias": "out.bias",
}


def _is_own(file: File) -> bool:
    own = [prefix for prefix in ("", "encoder.") if file.has(prefix + STEM) and file.has(prefix + _QUERY)]
    return bool(own) and file.tensor(own[0] + STEM).dim() == 5


@register_dialect("Primus with medgmae's names", order=37, matches=_is_own)
def convert_own_primus(file: File) -> Converted:
    """Our own names without a config; a model without a table of positions has no grid of its own."""
    prefix = "encoder." if file.has(f"encoder.{STEM}") else ""
    grid = _grid(file, f"{prefix}pos_embed", 0)
    if prefix:
        file.take_all(lambda name: name if name.startswith(("encoder.", "decoder.")) else None)
    else:
        file.take_all(lambda name: f"encoder.{name}")
    return file.finish("medgmae", grid)


@register_dialect(COLIPRI, order=28, matches=lambda file: file.has(_TOWER + _EVA))
def convert_colipri(file: File) -> Converted:
    """The whole model with its text encoder, or the vision tower alone."""
    _refuse_swapped(file)
    grid = file.source_grid or (file.target.grid if file.target else _COLIPRI_GRID)
    for theirs, ours in _PROJECTION.items():
        if file.has(theirs):
            tensor = file.numbers(theirs)
            flat = tensor.flatten(1) if tensor.dim() == 5 else tensor
            file.take(theirs, f"encoder.projection.{ours}", flat)
    if file.has("softmax_temperature"):  # a whole number where it was never trained
        place = "encoder.projection.temperature"
        file.take("softmax_temperature", place, file.tensor("softmax_temperature").float())
    file.drop_all("text_encoder.", "text encoder")
    width = len(file.tensor(_TOWER + _EVA))
    file.drop_all(f"{_TOWER}mask_token", "mask token, which this encoder never reads")
    _take_encoder(file, _TOWER)
    return file.finish(COLIPRI, tuple(grid), _expected(width, decoder=False))


@register_dialect(NNSSL, order=29, matches=lambda file: any(_ends(name) for name in file.names))
def convert_nnssl(file: File) -> Converted:
    """An encoder, and the decoder of MAE or of dense networks where there is one."""
    prefix = _prefix(file)
    table = f"{prefix}eva.pos_embed"
    registers = f"{prefix}register_tokens"
    rows = file.table(registers).shape[1] if file.has(registers) else 0
    grid = _grid(file, table, rows)
    width = len(file.numbers(prefix + _EVA))
    if rows and file.has(table):
        file.take(registers, "encoder.cls_token", wide(file.table(registers)) + wide(file.table(table)[:, :rows]))
        file.replace(table, file.table(table)[:, rows:])
    elif rows:
        file.take(registers, "encoder.cls_token")
    order, reason = _token_order(file)
    file.notes.append(f"token order {order!r}: {reason}")
    if order == "swapped":
        _to_raster(file, grid, f"{prefix}eva.", _heads(file, width, "encoder"))
        if file.has_any("decoder.blocks."):
            _to_raster(file, grid, "decoder.", _heads(file, width, "decoder"))
    decoder = any(name.startswith("up_projection.") for name in file.names)
    if decoder:
        _take_decoder(file, prefix)
    else:
        file.drop_all(f"{prefix}mask_token", "mask token, without the layers that predict what it hides")
    _take_encoder(file, prefix)
    for name in file.names:
        file.drop(name, "head of the pre-training")
    return file.finish(NNSSL, grid, _expected(width, decoder))


def _ends(name: str) -> bool:
    return name == _EVA or name.endswith(f".{_EVA}")


def _prefix(file: File) -> str:
    """What stands before ``eva.``, by the names, and by the plan that nnssl puts beside its weights."""
    prefixes = {name.removesuffix(_EVA) for name in file.names if _ends(name)}
    planned = file.facts.get("key_to_encoder")
    if planned is not None and planned.removesuffix("eva") in prefixes:
        return planned.removesuffix("eva")
    if planned is not None or len(prefixes) > 1:
        plan = f"; its adaptation plan says {planned!r}" if planned is not None else ""
        raise WeightsError(
            f"{file.origin}: has Primus encoders under {', '.join(map(repr, sorted(prefixes)))}{plan}; expected one: "
            "save the state dictionary of that part alone"
        )
    return prefixes.pop()


def _grid(file: File, table: str, rows: int) -> Shape:
    """Patch grid: of the table of positions behind ``rows`` for registers, or of the model where there is none."""
    if file.has(table):
        return table_grid(file, file.table(table)[:, rows:], 3, class_row=False)[0]
    grid = file.source_grid or (file.target.grid if file.target else None)
    if grid is None:
        raise WeightsError(
            f"{file.origin}: has no table of positions, so its patch grid is unknown; pass source_grid=(d, h, w)"
        )
    return tuple(grid)


def _token_order(file: File) -> tuple[str, str]:
    """ "raster" or "swapped", and why."""
    if file.token_order is not None:
        return file.token_order, "as asked for by token_order, or by the weight card"
    trainer = file.facts.get("trainer_name")
    if trainer is not None and "simmim" in trainer.lower():
        return "raster", f"the file was written by {trainer}"
    known = ("mae", "mgeva", "vfeva", "volumefusion", "modelgenesis", "voco", "simclr", "swinunetr")
    if trainer is not None and any(word in trainer.lower() for word in known):
        return "swapped", f"the file was written by {trainer}"
    if file.has_any("decoder.blocks."):
        return "swapped", "the file has the decoder of nnssl's masked autoencoder"
    raise WeightsError(
        f"{file.origin}: in which order its tokens are is in none of its tensors, and it was written by "
        f"{trainer or 'an unknown trainer'}. Pass token_order='swapped' for weights of nnssl's trainers other than "
        "SimMIM, and of dynamic-network-architectures before 24 June 2025; token_order='raster' for all others"
    )


def _refuse_swapped(file: File) -> None:
    if file.token_order == "swapped":
        raise WeightsError(
            f"{file.origin}: token_order='swapped' is for nnssl's files; COLIPRI's tokens are in raster order"
        )


def _heads(file: File, width: int, part: str) -> int:
    """Attention heads of a part: those of the published size, else those of the model to be filled."""
    target = file.target
    own = target.decoder.get("num_heads") if target is not None and part == "decoder" else None
    heads = _HEADS.get(width) or own or (target.settings.get("num_heads") if target is not None else None)
    if heads is None or width % (6 * heads):
        raise WeightsError(
            f"{file.origin}: {width} channels in {heads or 'an unknown number of'} heads; expected a multiple of 6 per "
            "head. Load the file into a model with its own embed_dim and num_heads"
        )
    return int(heads)


def _to_raster(file: File, grid: Shape, prefix: str, heads: int) -> None:
    """Exchange the first two axes of a part's table, and of the rotations that its queries and keys expect."""
    if grid[0] != grid[1]:
        raise WeightsError(
            f"{file.origin}: swapped tokens need a grid whose first two axes are equal, got {grid}; pass source_grid, "
            "or token_order='raster' if the tokens are in raster order"
        )
    for name in file.names:
        if name == f"{prefix}pos_embed":
            file.replace(name, _transposed(file.table(name), grid))
        elif name.startswith(prefix) and re.search(r"\.attn\.(q_proj|k_proj)\.(weight|bias)$", name):
            tensor = file.numbers(name)
            if tensor.dim() == 0 or len(tensor) % (6 * heads):
                raise WeightsError(f"{file.origin}: {name!r} of shape {tuple(tensor.shape)} is not for {heads} heads")
            file.replace(name, permute_heads(tensor, from_axes(len(tensor) // heads, (1, 0, 2))))


def _transposed(table: Tensor, grid: Shape) -> Tensor:
    if table.shape[1] != math.prod(grid):
        return table  # of another grid: refused later, by its shape
    return table.reshape(1, grid[1], grid[0], grid[2], -1).transpose(1, 2).reshape(table.shape)


def _take_encoder(file: File, prefix: str) -> None:
    stem, eva = f"{prefix}down_projection.", f"{prefix}eva."

    def place(name: str) -> str | None:
        if name.startswith(stem):
            return f"encoder.patch_embed.{name.removeprefix(stem)}"
        return f"encoder.{name.removeprefix(eva)}" if name.startswith(eva) else None

    file.take_all(place)


def _take_decoder(file: File, prefix: str) -> None:
    """The transposed convolutions, the mask token, and the blocks between where there are any."""
    blocks = file.has_any("decoder.blocks.")
    if blocks:
        width = file.table("decoder.pos_embed").shape[2] if file.has("decoder.pos_embed") else 0
        file.add("decoder.prefix_pos_embed", torch.zeros(1, 0, width))

    def place(name: str) -> str | None:
        stage = re.fullmatch(r"up_projection\.decode\.(\d+)\.(?:([01])\.)?(weight|bias)", name)
        if stage:
            return f"decoder.head.{'norms' if stage[2] == '1' else 'convs'}.{stage[1]}.{stage[3]}"
        if name == f"{prefix}mask_token":
            return "decoder.mask_token"
        return name if name.startswith("decoder.") else None

    file.take_all(place)


def _expected(width: int, decoder: bool) -> dict[str, Any]:
    """Every layer norm has torch's own epsilon, and a published size its heads."""
    settings: dict[str, Any] = {"norm_eps": 1e-5} | ({"num_heads": _HEADS[width]} if width in _HEADS else {})
    parts = ("encoder", "decoder") if decoder else ("encoder",)
    return {f"{part}.{name}": value for part in parts for name, value in settings.items()}
