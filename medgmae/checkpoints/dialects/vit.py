"""The dialect with timm's ViT names: plain encoders and masked autoencoders, TANGERINE's and GL-MAE's among them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from medgmae.checkpoints.adapt import wide
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

# Parts of related architectures that our encoder does not compute; dropping them in silence would change the features.
FOREIGN = re.compile(r"(dist_token|q_norm|k_norm|rope|w12|q_bias|gamma_1|relative_position)")

_DECODER_NAMES = (
    (r"^decoder_embed\.", "decoder.embed."),
    (r"^decoder_blocks\.", "decoder.blocks."),
    (r"^decoder_norm\.", "decoder.norm."),
    (r"^decoder_pred\.(?:0\.)?", "decoder.head."),
    (r"^mask_token$", "decoder.mask_token"),
)


@register_dialect(
    "ViTs and masked autoencoders with timm's names (those of TANGERINE and GL-MAE among them)",
    order=60,
    matches=lambda file: file.has(STEM) and file.has("blocks.0.norm1.weight"),
)
def convert_timm(file: File) -> Converted:
    """timm's ViT names, with a MAE decoder beside them or without: ``decoder_blocks`` and so on."""
    return convert_vit(file, _name(file))


def _name(file: File) -> str:
    if file.full_name(STEM) == f"module.backbone.{STEM}" and file.tensor(STEM).dim() == 5:
        return "the layout of GL-MAE's student"
    if file.has("decoder_pred.0.weight"):
        return "TANGERINE pre-training"
    if file.has("decoder_pred.weight"):
        return "masked autoencoder with timm's names"
    fine_tuned = file.has("fc_norm.weight") or file.has("head.0.weight")
    return "ViT with timm's names, fine-tuned" if fine_tuned else "ViT with timm's names"


def convert_vit(
    file: File, source: str, expects: Mapping[str, Any] | None = None, class_row: bool | None = None
) -> Converted:
    """What has not found its place yet, as an encoder with timm's names.

    Args:
        expects: of the encoder, as in ``Converted``.
        class_row: whether the table's first row belongs to the class token; None: where its length says so.
    """
    unknown = [file.full_name(name) for name in file.names if FOREIGN.search(name)]
    if unknown:
        raise WeightsError(
            f"{file.origin}: this ViT has parts that are not supported: {', '.join(unknown[:4])}. Supported are plain "
            "pre-norm ViTs, with LayerScale or a norm before the blocks"
        )
    sigmoid = file.has("decoder_pred.0.weight")
    has_decoder = sigmoid or file.has("decoder_pred.weight")
    unfold_stem(file, STEM)
    fold_layer_scale(file)
    add_qkv_bias(file)
    split_gates(file)
    table = file.table("pos_embed")
    may_have_row = file.has("cls_token") if class_row is None else class_row
    grid, has_row = table_grid(file, table, stem_dims(file, STEM), class_row=may_have_row)
    if may_have_row and not has_row:
        file.notes.append(f"the table of positions has no row for the class token: {table.shape[1]} rows, all patches'")
    _take_table(file, has_row)
    join_registers(file, "reg_token")
    if not file.has("patch_embed.proj.bias") and file.has_any("norm_pre."):  # CLIP's encoders have none
        file.add("encoder.patch_embed.proj.bias", torch.zeros(file.tensor(STEM).shape[0]))
    if has_decoder:
        rows = file.table("decoder_pos_embed").shape[1] if file.has("decoder_pos_embed") else 0
        take_decoder_table(file, rows - math.prod(grid))
    file.drop_all("attn_pool.", "attention pooling")
    file.take_all(_place)
    shown: dict[str, Any] = {"decoder.sigmoid": sigmoid} if has_decoder else {}
    if file.target is not None and file.target.settings.get("rope"):  # such weights mean something else in it
        shown["encoder.rope"] = None
    return file.finish(source, grid, {**shown, **(expects or {})}, PLAIN_TABLE)


def _place(name: str) -> str:
    for pattern, ours in _DECODER_NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, ours, name)
    return f"encoder.{name}"


def unfold_stem(file: File, name: str) -> None:
    """Turn a linear patch weight (E, ph * pw * pd * C) into a convolution's (E, C, ph, pw, pd), exactly."""
    weight = file.tensor(name)
    if weight.dim() != 2:
        return
    if file.target is not None:
        patch, channels = file.target.patch_size, file.target.in_chans
    else:
        side = round(weight.shape[1] ** (1 / 3))
        patch, channels = (side, side, side), 1
    if math.prod(patch) * channels != weight.shape[1]:
        raise WeightsError(
            f"{file.origin}: the patch weight {file.full_name(name)!r} is linear with {weight.shape[1]} inputs, not "
            f"{channels} channel(s) of a {patch} patch; load it into a model with its own patch_size and in_chans"
        )
    file.replace(name, weight.reshape(weight.shape[0], *patch, channels).movedim(-1, 1).contiguous())


def fold_layer_scale(file: File) -> None:
    """Multiply DINOv2's per-channel scale of a branch into the branch's last linear layer: the same function."""
    for name in [n for n in file.names if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", n)]:
        block, branch = name.rsplit(".", 2)[:2]
        linear = f"{block}.{'attn.proj' if branch == 'ls1' else 'mlp.fc2'}"
        gamma = file.numbers(name)
        for part, factor in ((f"{linear}.weight", gamma[:, None]), (f"{linear}.bias", gamma)):
            tensor = file.numbers(part)
            if gamma.shape != tensor.shape[:1]:
                raise WeightsError(f"{file.origin}: {name!r} of shape {tuple(gamma.shape)} does not fit {part!r}")
            file.replace(part, wide(tensor) * wide(factor))
        file.drop(name, f"folded into {linear}")


def add_qkv_bias(file: File) -> None:
    """Zeros where none of the projections to queries, keys and values has a bias: the same function."""
    weights = [name for name in file.names if re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", name)]
    biases = {name: name.removesuffix("weight") + "bias" for name in weights}
    if not any(map(file.has, biases.values())):
        for name, bias in biases.items():
            file.add(f"encoder.{bias}", torch.zeros(len(file.tensor(name))))


def split_gates(file: File) -> None:
    """A gated MLP's first layer in two: the half under the SiLU, and the one that it gates.

    Its names are those of timm (``fc1`` with twice as many rows as ``fc2`` has columns) or of DINOv2 (``w12``, ``w3``).
    """
    for name in [n for n in file.names if ".mlp.w3." in n]:
        file.rename(name, name.replace(".w3.", ".fc2."))
    for name in [n for n in file.names if re.fullmatch(r"blocks\.\d+\.mlp\.(fc1|w12)\.(weight|bias)", n)]:
        block, _, part = name.rpartition(".mlp.")
        last = f"{block}.mlp.fc2.weight"
        if file.has(last) and len(file.tensor(name)) == 2 * file.tensor(last).shape[-1]:
            gate, gated = file.numbers(name).chunk(2)
            place = f"encoder.{block}.mlp."
            file.take(name, place + re.sub(r"^\w+", "fc1_g", part), gate)
            file.add(place + re.sub(r"^\w+", "fc1_x", part), gated)


def join_registers(file: File, registers: str) -> None:
    """The class token, as it stands in the file, and the registers behind it."""
    if not file.has(registers):
        return
    tokens = [file.table("cls_token"), file.table(registers)]
    if tokens[0].shape[2] != tokens[1].shape[2]:
        raise WeightsError(
            f"{file.origin}: 'cls_token' is {tokens[0].shape[2]} wide, {registers!r} {tokens[1].shape[2]}; the two are "
            "not of one model"
        )
    file.take("cls_token", "encoder.cls_token", torch.cat(tokens, dim=1))
    file.take_beside(registers, "encoder.cls_token")


def _take_table(file: File, class_row: bool) -> None:
    """The encoder's table; its class row goes into the class token, which is where it would be added anyway."""
    table = file.table("pos_embed")
    if class_row:
        token = file.table("cls_token")
        if token.shape != table[:, :1].shape:
            raise WeightsError(f"{file.origin}: 'cls_token' is {tuple(token.shape)}, not as wide as the table")
        if file.has("reg_token"):
            file.replace("cls_token", wide(token) + wide(table[:, :1]))
        else:
            file.take("cls_token", "encoder.cls_token", wide(token) + wide(table[:, :1]))
        table = table[:, 1:]
    file.take("pos_embed", "encoder.pos_embed", table)
