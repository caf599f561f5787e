"""The dialect of MAE3D, the masked autoencoder of SelfMedMAE and MedGMAE.

Its tables lie beside the encoder, ``encoder_to_decoder`` is the bridge between the parts.
"""

from __future__ import annotations

import torch

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import STEM, Converted, File, stem_dims, table_grid, take_decoder_table
from medgmae.checkpoints.dialects.recognise import register_dialect
from medgmae.checkpoints.dialects.vit import unfold_stem
from medgmae.layers.patches import Shape

SOURCE = "MAE3D of SelfMedMAE or MedGMAE"

_MOVED = {
    "encoder_to_decoder.weight": "decoder.embed.weight",
    "encoder_to_decoder.bias": "decoder.embed.bias",
    "mask_token": "decoder.mask_token",
}


@register_dialect(SOURCE, order=35, matches=lambda file: file.has("encoder_pos_embed"))
def convert_mae3d(file: File) -> Converted:
    """A decoder of voxels."""
    grid, class_row = take_encoder_table(file)
    take_decoder_table(file, int(class_row))
    flat = file.tensor(f"encoder.{STEM}").dim() == 4
    if flat and file.has("encoder_to_decoder.weight") and not file.has("encoder_to_decoder.bias"):
        file.add("decoder.embed.bias", torch.zeros(file.tensor("encoder_to_decoder.weight").shape[0]))
    file.take_all(_place)
    return file.finish(SOURCE, grid, expects={"decoder.sigmoid": False})


def take_encoder_table(file: File) -> tuple[Shape, bool]:
    """Move the encoder's table; returns its grid and whether the tables have a class row, as those of 2D models do."""
    stem = f"encoder.{STEM}"
    unfold_stem(file, stem)
    weight, table = file.tensor(stem), file.table("encoder_pos_embed")
    if weight.dim() == 4 and weight.shape[1] > 1:
        raise WeightsError(
            f"{file.origin}: a 2D masked autoencoder of SelfMedMAE with {weight.shape[1]} channels stores its patches "
            "in a scrambled channel order, which is not supported; files with one channel are"
        )
    grid, class_row = table_grid(file, table, stem_dims(file, stem), class_row=weight.dim() == 4)
    file.take("encoder_pos_embed", "encoder.pos_embed", table[:, int(class_row) :])
    return grid, class_row


def _place(name: str) -> str | None:
    return _MOVED.get(name, name if name.startswith(("encoder.", "decoder.")) else None)
