"""The dialects of MAE3D, the masked autoencoder of SelfMedMAE and MedGMAE, and of SelfMedMAE's 2D model.

A convolution reads the patches upstream, a linear layer in the UVA adaptation, the channel fastest. The tables lie
beside the encoder, ``encoder_to_decoder`` is the bridge between the parts. The 2D model has class rows in its tables,
no bias in the bridge, predicts Fourier codes, and reads the channels of a patch in a wrong order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import (
    PLAIN_TABLE,
    STEM,
    Converted,
    File,
    stem_dims,
    table_grid,
    take_decoder_table,
)
from medgmae.checkpoints.dialects.recognise import register_dialect
from medgmae.checkpoints.dialects.vit import unfold_stem
from medgmae.layers.patches import Shape

SOURCE = "MAE3D of SelfMedMAE or MedGMAE"
UVA = "MAE3D of the UVA adaptation of SelfMedMAE"

_MOVED = {
    "encoder_to_decoder.weight": "decoder.embed.weight",
    "encoder_to_decoder.bias": "decoder.embed.bias",
    "mask_token": "decoder.mask_token",
}


def _is_uva(file: File) -> bool:
    stem = f"encoder.{STEM}"
    return file.has("encoder_pos_embed") and file.has(stem) and file.tensor(stem).dim() == 2


@register_dialect(UVA, order=34, matches=_is_uva)
def convert_uva(file: File) -> Converted:
    """As upstream but for the linear patch weight."""
    return _convert(file, UVA)


@register_dialect(SOURCE, order=35, matches=lambda file: file.has("encoder_pos_embed") and not _is_uva(file))
def convert_mae3d(file: File) -> Converted:
    """A decoder of voxels, or of the Fourier codes of pixels."""
    return _convert(file, SOURCE)


def _convert(file: File, source: str) -> Converted:
    grid, class_row = take_encoder_table(file)
    take_decoder_table(file, int(class_row))
    flat = file.tensor(f"encoder.{STEM}").dim() == 4
    expects = {"decoder.sigmoid": False, **(_code_length(file) if flat else {})}
    if flat and file.has("encoder_to_decoder.weight") and not file.has("encoder_to_decoder.bias"):
        file.add("decoder.embed.bias", torch.zeros(file.tensor("encoder_to_decoder.weight").shape[0]))
    file.take_all(_place)
    return file.finish(source, grid, expects, PLAIN_TABLE)


def take_encoder_table(file: File) -> tuple[Shape, bool]:
    """Move the encoder's table; returns its grid and whether the tables have a class row, as those of 2D models do.

    That row is zero as published; it goes into the class token, which is where it would be added.
    """
    stem = f"encoder.{STEM}"
    unfold_stem(file, stem)
    weight, table = file.tensor(stem), file.table("encoder_pos_embed")
    if weight.dim() == 4 and weight.shape[1] > 1:
        file.replace(stem, _ordered(weight))
        file.notes.append("the patch weight reads channels in SelfMedMAE's order of 2D patches; it was put in order")
    grid, class_row = table_grid(file, table, stem_dims(file, stem), class_row=weight.dim() == 4)
    file.take("encoder_pos_embed", "encoder.pos_embed", table[:, int(class_row) :])
    if class_row and file.has("encoder.cls_token"):
        token = file.table("encoder.cls_token")
        if token.shape != table[:, :1].shape:
            raise WeightsError(f"{file.origin}: 'encoder.cls_token' is {tuple(token.shape)}, not as wide as the table")
        file.replace("encoder.cls_token", token + table[:, :1])
    return grid, class_row


def _ordered(weight: Tensor) -> Tensor:
    """The convolution (E, C, h, w) that computes from an image what SelfMedMAE's 2D model computes from its patches.

    A patch is laid out there as (C, h, w) and read as (h, w, C). So the weight of the pixel at place f of (h, w, C) is
    that of the pixel at place f of (C, h, w): an exact permutation (lib/networks/patch_embed_layers.py).
    """
    return weight.movedim(1, -1).reshape(weight.shape).contiguous()


def _code_length(file: File) -> dict[str, int]:
    """How many frequencies the Fourier codes have that the 2D decoder predicts, from the length of its output."""
    if not file.has("decoder.head.weight"):
        return {}
    rows, pixels = len(file.tensor("decoder.head.weight")), math.prod(file.tensor(f"encoder.{STEM}").shape[1:])
    if rows % (2 * pixels):
        return {}  # plain intensities, or nothing known: the shapes decide
    return {"fourier_frequencies": rows // (2 * pixels)}


def _place(name: str) -> str | None:
    return _MOVED.get(name, name if name.startswith(("encoder.", "decoder.")) else None)
