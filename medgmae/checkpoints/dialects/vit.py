"""The dialects of ViTs: timm's names with or without a MAE decoder, and MAE3D of SelfMedMAE and MedGMAE."""

from __future__ import annotations

import math
import re

import torch

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects import gaussian
from medgmae.checkpoints.dialects.entries import (
    STEM,
    File,
    stem_dims,
    table_grid,
    take_decoder_table,
)

# Parts of related architectures that our encoder does not compute; dropping them in silence would change the features.
FOREIGN = re.compile(r"(reg_token|dist_token|q_norm|k_norm|rope|w12|q_bias|gamma_1|relative_position)")


def _plain(file: File, source: str) -> None:
    """timm's ViT names, with a MAE decoder beside them or without: ``decoder_blocks`` and so on."""
    unknown = [full for name, (full, _) in file.rest.items() if FOREIGN.search(name)]
    if unknown:
        raise WeightsError(
            f"{file.origin}: this ViT has parts that are not supported: {', '.join(unknown[:4])}. Supported are plain "
            "pre-norm ViTs, with LayerScale or a norm before the blocks"
        )
    sigmoid = file.has("decoder_pred.0.weight")
    has_decoder = sigmoid or file.has("decoder_pred.weight")
    _linear_stem(file, STEM)
    dims = stem_dims(file, STEM)
    _fold_layer_scale(file)
    table = file.table("pos_embed")
    grid, class_row = table_grid(file, table, dims, class_row=file.has("cls_token"))
    _take_table(file, class_row)
    if not file.has("patch_embed.proj.bias") and file.has_any("norm_pre."):  # CLIP's encoders have none
        file.out.state["encoder.patch_embed.proj.bias"] = torch.zeros(file.tensor(STEM).shape[0])
    if has_decoder:
        rows = file.table("decoder_pos_embed").shape[1] if file.has("decoder_pos_embed") else 0
        take_decoder_table(file, rows - math.prod(grid))
        file.out.expects["decoder.sigmoid"] = sigmoid
    file.out.grid = grid
    file.out.source = source or _name_plain(file, sigmoid, has_decoder)
    file.drop("attn_pool.", "attention pooling")
    file.take_all(_plain_name)


def _name_plain(file: File, sigmoid: bool, has_decoder: bool) -> str:
    if sigmoid:
        return "TANGERINE pre-training"
    if any(".backbone." in f".{full}" for full in [*file.out.renamed, *(v[0] for v in file.rest.values())]):
        return "GL-MAE"
    if has_decoder:
        return "masked autoencoder with timm's names"
    fine_tuned = file.has("fc_norm.weight") or file.has("head.0.weight")
    return "ViT with timm's names, fine-tuned" if fine_tuned else "ViT with timm's names"


_DECODER_NAMES = (
    (r"^decoder_embed\.", "decoder.embed."),
    (r"^decoder_blocks\.", "decoder.blocks."),
    (r"^decoder_norm\.", "decoder.norm."),
    (r"^decoder_pred\.(?:0\.)?", "decoder.head."),
    (r"^mask_token$", "decoder.mask_token"),
)


def _plain_name(name: str) -> str:
    for pattern, ours in _DECODER_NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, ours, name)
    return f"encoder.{name}"


def _mae3d(file: File) -> None:
    """``MAE3D`` of SelfMedMAE and MedGMAE: tables beside the encoder, ``encoder_to_decoder`` as the bridge."""
    stem = f"encoder.{STEM}"
    _linear_stem(file, stem)
    weight, table = file.tensor(stem), file.table("encoder_pos_embed")
    if weight.dim() == 4 and weight.shape[1] > 1:
        raise WeightsError(
            f"{file.origin}: a 2D masked autoencoder of SelfMedMAE with {weight.shape[1]} channels stores its patches "
            "in a scrambled channel order, which is not supported; files with one channel are"
        )
    grid, class_row = table_grid(file, table, stem_dims(file, stem), class_row=weight.dim() == 4)
    file.take("encoder_pos_embed", "encoder.pos_embed", table[:, int(class_row) :])
    file.out.grid = grid
    if gaussian.holds_gaussians(file.rest):
        _gaussian_decoder(file)
        return
    take_decoder_table(file, int(class_row))
    file.out.expects["decoder.sigmoid"] = False
    file.out.source = "MAE3D of SelfMedMAE or MedGMAE"
    if weight.dim() == 4 and file.has("encoder_to_decoder.weight") and not file.has("encoder_to_decoder.bias"):
        file.out.state["decoder.embed.bias"] = torch.zeros(file.tensor("encoder_to_decoder.weight").shape[0])
    moved = {"encoder_to_decoder.weight": "decoder.embed.weight", "encoder_to_decoder.bias": "decoder.embed.bias"}
    file.take_all(lambda name: "decoder.mask_token" if name == "mask_token" else moved.get(name, name))


def _gaussian_decoder(file: File) -> None:
    """The rest of a MedGMAE file: its Gaussian decoder, whatever its kind and whether it is wrapped or not."""
    kind = gaussian.decoder_kind(file.rest)
    file.out.source = "MedGMAE" if kind == "standard" else f"MedGMAE, {kind} decoder"
    file.out.expects |= {
        "decoder.kind": kind,
        "decoder.density_scale": gaussian.DENSITY_SCALE,
        "renderer.support": gaussian.SUPPORT,
    }
    for name, why in gaussian.UNUSED.items():
        file.drop(name, why)
    for name, (full, tensor) in list(file.rest.items()):
        ours = gaussian.gaussian_name(name)
        if ours in file.out.state:
            raise WeightsError(f"{file.origin}: {full!r} stands for {ours!r}, which is in the file twice")
        file.take(name, ours, gaussian.turn_rotation(ours, tensor))
    queries = file.out.state.get("decoder.query_tokens")
    if queries is not None and queries.dim() == 3:  # the authors' positions have no offset per query
        file.out.state["decoder.position_bias"] = torch.zeros(1, queries.shape[1], 3)


def _linear_stem(file: File, name: str) -> None:
    """Turn a linear patch weight (E, ph * pw * pd * C) into a convolution's (E, C, ph, pw, pd), exactly."""
    weight = file.tensor(name)
    if weight.dim() != 2:
        return
    full = file.rest[name][0]
    if file.target is not None:
        patch, channels = file.target.patch_size, file.target.in_chans
    else:
        side = round(weight.shape[1] ** (1 / 3))
        patch, channels = (side, side, side), 1
    if math.prod(patch) * channels != weight.shape[1]:
        raise WeightsError(
            f"{file.origin}: the patch weight {full!r} is linear with {weight.shape[1]} inputs, not {channels} "
            f"channel(s) of a {patch} patch; load it into a model with its own patch_size and in_chans"
        )
    conv = weight.reshape(weight.shape[0], *patch, channels).movedim(-1, 1).contiguous()
    file.rest[name] = (full, conv)


def _fold_layer_scale(file: File) -> None:
    """Multiply DINOv2's per-channel scale of a branch into the branch's last linear layer: the same function."""
    for name in [n for n in file.rest if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", n)]:
        block, branch = name.rsplit(".", 2)[:2]
        linear = f"{block}.{'attn.proj' if branch == 'ls1' else 'mlp.fc2'}"
        gamma = file.tensor(name)
        for part, factor in ((f"{linear}.weight", gamma[:, None]), (f"{linear}.bias", gamma)):
            tensor = file.tensor(part)
            if gamma.shape != tensor.shape[:1]:
                raise WeightsError(f"{file.origin}: {name!r} of shape {tuple(gamma.shape)} does not fit {part!r}")
            file.rest[part] = (file.rest[part][0], tensor * factor)
        file.out.unused[file.rest.pop(name)[0]] = f"folded into {linear}"


def _take_table(file: File, class_row: bool) -> None:
    """The encoder's table; its class row goes into the class token, which is where it would be added anyway."""
    table = file.table("pos_embed")
    if class_row:
        token = file.table("cls_token")
        if token.shape != table[:, :1].shape:
            raise WeightsError(f"{file.origin}: 'cls_token' is {tuple(token.shape)}, not as wide as the table")
        file.take("cls_token", "encoder.cls_token", token + table[:, :1])
        table = table[:, 1:]
    file.take("pos_embed", "encoder.pos_embed", table)
