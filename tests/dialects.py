"""The nano models' weights as the reference code bases spell them. One function per dialect, ours to theirs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]


def masked_autoencoder(state: Mapping[str, Tensor], sigmoid: bool = False) -> dict[str, str]:
    """Names of a plain MAE (He et al. 2022), of TANGERINE where ``sigmoid``; theirs to ours."""
    head = "decoder_pred.0." if sigmoid else "decoder_pred."
    names = {}
    for ours in state:
        theirs = ours.removeprefix("encoder.")
        if ours.startswith("decoder."):
            theirs = ours.replace("decoder.", "decoder_", 1).replace("decoder_head.", head)
        names[theirs.replace("decoder_mask_token", "mask_token")] = ours
    names.pop("decoder_prefix_pos_embed", None)
    return names


def to_masked_autoencoder(state: Mapping[str, Tensor], sigmoid: bool = False) -> State:
    """A plain MAE's file: tables with a row for the class token."""
    found = {theirs: state[ours] for theirs, ours in masked_autoencoder(state, sigmoid).items()}
    return _with_class_row(found)


def _with_class_row(state: State) -> State:
    for table in ("pos_embed", "decoder_pos_embed"):
        if table in state:
            state[table] = torch.cat([torch.zeros_like(state[table][:, :1]), state[table]], 1)
    return state


def to_tangerine(state: Mapping[str, Tensor]) -> State:
    """TANGERINE's pre-training: a plain MAE with a sigmoid behind the head."""
    return to_masked_autoencoder(state, sigmoid=True)


def to_timm_encoder(state: Mapping[str, Tensor]) -> State:
    """The encoder alone, with timm's names, as fine-tuning saves it."""
    return _with_class_row({n.removeprefix("encoder."): t for n, t in state.items() if n.startswith("encoder.")})


def to_glmae(state: Mapping[str, Tensor]) -> State:
    """GL-MAE's student: the encoder under ``module.backbone.``, a projector beside it."""
    backbone = {f"module.backbone.{name}": tensor for name, tensor in to_timm_encoder(state).items()}
    return {**backbone, "module.head.mlp.0.weight": torch.ones(4, 4), "module.head.last.weight_g": torch.ones(4, 1)}


def to_mae3d(state: Mapping[str, Tensor]) -> State:
    """``MAE3D`` of SelfMedMAE and MedGMAE: tables beside the encoder, ``encoder_to_decoder`` as the bridge."""
    moved = {
        "encoder.pos_embed": "encoder_pos_embed",
        "decoder.pos_embed": "decoder_pos_embed",
        "decoder.mask_token": "mask_token",
        "decoder.embed.weight": "encoder_to_decoder.weight",
        "decoder.embed.bias": "encoder_to_decoder.bias",
    }
    return {moved.get(n, n): t for n, t in state.items() if n != "decoder.prefix_pos_embed"}


def to_uva(state: Mapping[str, Tensor]) -> State:
    """The UVA adaptation of SelfMedMAE: a linear patch weight with the channel fastest."""
    found = to_mae3d(state)
    stem = found["encoder.patch_embed.proj.weight"]
    found["encoder.patch_embed.proj.weight"] = stem.movedim(1, -1).flatten(1).contiguous()
    return found


def to_gaussian(state: Mapping[str, Tensor]) -> State:
    """MedGMAE: the same encoder, a decoder of Gaussians."""
    found = {n: t for n, t in to_mae3d(state).items() if not n.startswith("decoder.") or ".norm" in n}
    return {**found, "gaussian_query_tokens": torch.ones(1, 8, 24), "decoder.scale_head.weight": torch.ones(3, 24)}


def to_medgmae(state: Mapping[str, Tensor], wrapped: bool = False) -> State:
    """A whole file of MedGMAE from the state of one of our Gaussian models.

    wrapped: the standard decoder under ``decoder.base_decoder.``, as it is beside residual and level heads.
    """
    found = {"mask_token": torch.ones(1, 1, 4), "decoder_pos_embed": torch.ones(1, 8, 4)}
    for ours, tensor in state.items():
        head = re.search(r"rotation_heads?\.([\d.]*)(weight|bias)$", ours)
        name = ours.replace("encoder.pos_embed", "encoder_pos_embed").replace("decoder.embed", "encoder_to_decoder")
        name = name.replace("decoder.query_tokens", "gaussian_query_tokens")
        if wrapped and name.startswith("decoder.") and "_heads." not in name:
            name = name.replace("decoder.", "decoder.base_decoder.")
        found[name] = torch.cat([tensor[:1], -tensor[1:]]) if head else tensor
    return found


def to_unetr(state: Mapping[str, Tensor]) -> State:
    """SelfMedMAE's UNETR: ``encoder.`` with a class row in the table, convolutions beside it."""
    encoder = {f"encoder.{name}": tensor for name, tensor in to_timm_encoder(state).items()}
    return {**encoder, "decoder.decoder5.conv.weight": torch.ones(2, 2)}


def to_mamba_mae(state: Mapping[str, Tensor], place: str | None = None) -> State:
    """The 3D Mamba MAE's pre-training file: rotary frequencies, and a class token even where the model has none.

    place: where the class token of the model stands, if there is one.
    """
    found: State = {}
    for ours, tensor in state.items():
        name = ours.removeprefix("encoder.").replace("decoder.", "decoder_", 1)
        name = name.replace("decoder_head.", "decoder_pred.").replace("decoder_mask_token", "mask_token")
        found[re.sub(r"^(decoder_)?norm\.", r"\1norm_f.", name)] = tensor
    prefix = found.pop("decoder_prefix_pos_embed", None)
    if prefix is not None:
        found["decoder_pos_embed"] = torch.cat([prefix, found["decoder_pos_embed"]], 1)
        found["decoder_rope.freqs"] = _frequencies(prefix.shape[2] // 4)
        found["rope.freqs"] = _frequencies(found["pos_embed"].shape[2] // 4)
        found.setdefault("cls_token", torch.ones(1, 1, found["pos_embed"].shape[2]))
    return found if place is None else _with_class_rows(found, place)


def to_mamba_classifier(state: Mapping[str, Tensor], grid: int, place: str | None = None) -> State:
    """The 3D Mamba MAE's fine-tuning file: rotary tables on a cube of ``grid`` patches per axis as buffers."""
    found = to_mamba_mae({n: t for n, t in state.items() if not n.startswith("decoder.")}, place)
    if place is None:
        side = torch.arange(grid) / grid * 14
        turns = torch.outer(side, _frequencies(found["pos_embed"].shape[2] // 4)).repeat_interleave(2, 1)
        cube = (grid, grid, grid, turns.shape[1])
        angles = torch.cat([turns[None, :, None].expand(cube), turns[None, None].expand(cube)], -1).flatten(0, 2)
        found |= {"rope.freqs_cos": angles.cos(), "rope.freqs_sin": angles.sin()}
    return found


def _frequencies(count: int) -> Tensor:
    return 10000 ** (-torch.arange(count) / count)


def _with_class_rows(state: State, place: str) -> State:
    """Class tokens by their official names, and a table that follows the sequence: ours are sums of token and row."""
    token, table = state.pop("cls_token"), state["pos_embed"]
    row, patches = torch.full_like(token[:, :1], 0.25), table.shape[1]
    cut = {"front": 0, "middle": patches // 2, "double": 0}[place]
    tail = [row] if place == "double" else []
    names = ("cls_token_head", "cls_token_tail") if tail else ("cls_token",)
    state |= {name: token[:, i : i + 1] - 0.25 for i, name in enumerate(names)}
    return {**state, "pos_embed": torch.cat([table[:, :cut], row, table[:, cut:], *tail], 1)}


def to_ours(state: Mapping[str, Tensor]) -> State:
    """Our own names, without the config."""
    return dict(state)


# Dialect to the function that writes it, and whether the whole autoencoder is in the file.
DIALECTS: dict[str, tuple[Callable[[Mapping[str, Tensor]], State], bool]] = {
    "plain mae": (to_masked_autoencoder, True),
    "tangerine": (to_tangerine, True),
    "timm encoder": (to_timm_encoder, False),
    "glmae": (to_glmae, False),
    "mae3d": (to_mae3d, True),
    "uva": (to_uva, True),
    "medgmae": (to_gaussian, False),
    "unetr": (to_unetr, False),
    "ours": (to_ours, True),
}

CONTAINERS: dict[str, Callable[[State], Any]] = {
    "bare": lambda state: state,
    "mae": lambda state: {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "epoch": 399,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="mae_vit_large_patch16", lr=1.5e-4, resume=None, sizes=[1, (2, 3)]),
    },
    "dino": lambda state: {
        "student": state,
        "teacher": {name: tensor + 1 for name, tensor in state.items()},
        "optimizer": {},
        "epoch": 1599,
        "args": argparse.Namespace(),
        "dino_loss": {"center": torch.zeros(1, 4)},
    },
    "best model": lambda state: {
        "epoch": 1000,
        "arch": "vit_base",
        "state_dict": state,
        "metric": np.float32(0.83),
        "metrics": [np.float64(0.5), np.int64(3), np.bool_(True)],
    },
    "model_state": lambda state: {"model_state": state, "epoch": 3},
    "nested": lambda state: {"state_dict": {"model": {"model_state_dict": state}}},
}
