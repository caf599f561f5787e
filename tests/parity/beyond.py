"""Adapters for models beside the five systems.

3DINO, Hi-End-MAE, and MONAI's ViT as SegVol, M3D-CLIP and BrainIAC use it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import medgmae
from medgmae.models.mae_hiend import hiend_mae
from parity import adapter
from parity.case import EXACT, Case, Options, triple
from parity.manifests import on_meta
from parity.models import geometry, load, raw_tokens, transformer, with_class_row

# What 3DINO's files hold beside the parts that compute features.
NOT_READ = r"mask_token|ls[12]\.gamma|_head\."
MONAI_NOT_READ = r"cross_attn|language|logit_scale|mm_vision_proj"
OFFSET = {"interpolate_offset": 0.1, "pos_embed": "learned"}


def dino(case: Case, size: str = "img_size") -> medgmae.ViT:
    """3DINO's encoder; LayerScale and the chunks of blocks are the file's alone."""
    settings = Options(case.spec["config"])
    settings.ignore("block_chunks", "init_values", "sizes", *({"img_size_checkpoint", "img_size_model"} - {size}))
    model = medgmae.ViT(**geometry(settings, size), **transformer(settings), **OFFSET)
    settings.done()
    return model


def save(case: Case, content: Any) -> Path:
    """A file with this in it."""
    path = case.tmp / "checkpoint.pth"
    torch.save(content, path)
    return path


def hidden(model: medgmae.ViT, x: Tensor, blocks: range | list[int]) -> Tensor:
    """(len(blocks), B, P + N, E): the stream after each of these blocks."""
    return torch.stack([raw_tokens(model, x, block) for block in blocks])


@adapter("beyond/dino3d_encoder")
def dino3d_encoder(case: Case) -> None:
    """At its own size, or at each of the sizes that the case lists."""
    model = load(dino(case), save(case, case.weights), unused=NOT_READ)
    sizes = case.spec["config"].get("sizes")
    for suffix in [f"_{name}" for name in sizes] if sizes else [""]:
        x = case.input(f"volume{suffix}")
        grid = tuple(s // p for s, p in zip(x.shape[2:], model.patch_size, strict=True))
        tokens = model.forward_features(x)
        case.offer(f"cls{suffix}", model(x))
        case.offer(f"patch_tokens{suffix}", tokens[:, 1:])
        table = medgmae.resample_pos_embed(model.pos_embed, model.grid_size, grid, 0.1)
        row = model.cls_token - case.weights["cls_token"]  # it was added on loading
        case.offer(f"pos_embed{suffix}", torch.cat([row, table], dim=1))
    if not sizes:
        _check_layers(case, model)


def _check_layers(case: Case, model: medgmae.ViT) -> None:
    x, depth = case.input("volume"), range(len(model.blocks))
    case.offer("prenorm", raw_tokens(model, x))
    case.offer("hidden", hidden(model, x, depth))
    case.offer("hidden_normed", model.norm(hidden(model, x, depth)))
    layers = model.get_intermediate_layers(x, case.spec["maps_indices"], reshape=True)
    case.offer("maps", torch.stack(layers))
    # The pre-training hides patches behind a token before it adds the positions; the house's models have no such token.
    mask = case.input("mask").bool().unsqueeze(-1)
    hook = model.patch_embed.register_forward_hook(
        lambda _, __, out: torch.where(mask, case.weights["mask_token"], out)
    )
    tokens = model.forward_features(x)
    hook.remove()
    case.offer("masked_cls", tokens[:, 0])
    case.offer("masked_patch_tokens", tokens[:, 1:])


@adapter("beyond/dino3d_load")
def dino3d_load(case: Case) -> None:
    """The teacher of a file into a model of another size."""
    model = dino(case, "img_size_model")
    side = case.spec["config"]["img_size_checkpoint"] // case.spec["config"]["patch_size"]
    file = save(case, {"teacher": case.weights, "epoch": 3})
    load(model, Path(f"{file}::teacher"), (side,) * 3, NOT_READ)
    case.offer("pos_embed_resized", with_class_row(model, case.weights["backbone.cls_token"]))
    x = case.input("volume")
    case.offer("cls", model(x))
    case.offer("patch_tokens", model.forward_features(x)[:, 1:])


@adapter("beyond/pos_embed_interpolate")
def pos_embed_interpolate(case: Case) -> None:
    table, source = case.weights["pos_embed"], tuple(case.spec["config"]["table_grid"])
    for name in list(case.outputs):
        grid = tuple(map(int, name.removeprefix("table_").split("_")))
        ours = medgmae.resample_pos_embed(table[:, 1:], source, grid, 0.1)
        case.offer(name, torch.cat([table[:, :1], ours], dim=1))


def monai(case: Case, **options: Any) -> medgmae.ViT:
    """A ViT as MONAI's arguments describe it."""
    settings = Options(case.spec["config"])
    settings.require(qkv_bias=False)
    settings.ignore("pos_embed", "proj_type", "pos_embed_type", "grid_size")
    width, class_token = settings("hidden_size"), settings("classification")
    model = medgmae.ViT(
        triple(settings("img_size")),
        triple(settings("patch_size")),
        settings("in_channels"),
        width,
        settings("num_layers"),
        settings("num_heads"),
        mlp_ratio=settings("mlp_dim") / width,
        class_token=class_token,
        global_pool="token" if class_token else "avg",
        fc_norm=False,
        norm_eps=1e-5,
        pos_embed="learned",
        **options,
    )
    settings.done()
    return model


@adapter("beyond/monai_encoder")
def monai_encoder(case: Case) -> None:
    """Tokens after every block; of M3D-CLIP the shared space too, which is the model's head if one is asked for."""
    content = {"state_dict": case.weights} if "state_dict" in case.spec["container"]["kind"] else case.weights
    file, x = save(case, content), case.input("volume")
    model = load(monai(case), file, unused=MONAI_NOT_READ)
    tokens = model.forward_features(x)
    case.offer("patch_embed", model._embed(x, None))
    case.offer("hidden", hidden(model, x, range(len(model.blocks))))
    case.offer("tokens", tokens)
    case.offer("first_token", tokens[:, 0])
    if case.has("image_features"):
        width = len(case.weights["mm_vision_proj.bias"])
        model = load(monai(case, num_classes=width), file, unused=MONAI_NOT_READ)
        case.offer("image_features", functional.normalize(model.head(tokens), dim=-1))
        case.equal("embedding", functional.normalize(model(x)), case.outputs["image_features"][:, 0], case.tolerance())


def hiend(case: Case) -> medgmae.MaskedAutoencoder:
    """Hi-End-MAE as its file fills it."""
    settings = Options(case.spec["config"])
    settings.require(pos_embed_type="sincos")
    parts = {name: settings(f"decoder_{name}") for name in ("embed_dim", "cross_depth", "num_heads")}
    model = hiend_mae(
        **geometry(settings),
        **transformer(settings),
        decoder_depth=settings("decoder_self_depth"),
        **{f"decoder_{name}": value for name, value in parts.items()},
        mask_ratio=settings("mask_ratio"),
    )
    settings.done()
    content = {"state_dict": case.weights, "epoch": 3, "optimizer": {"state": {}}, "scaler": {"scale": 65536.0}}
    return load(model, save(case, content)) if case.spec["case"] == "hiendmae_mae" else model


@adapter("beyond/hiendmae_encoder")
def hiendmae_encoder(case: Case) -> None:
    """The encoder alone: its file has no decoder here."""
    model = load(hiend(case).encoder, save(case, {"state_dict": case.weights}))
    x, keep = case.input("volume"), case.input("keep")
    case.offer("patch_vectors", medgmae.patchify(x, model.patch_size)[:, :4], tolerance=EXACT)
    case.offer("tokens", model.forward_features(x))
    case.offer("hidden", hidden(model, x, [0, 3, 6, 9, 11]))
    case.offer("tokens_visible", model.forward_features(x, keep))


@adapter("beyond/hiendmae_mae")
def hiendmae_mae(case: Case) -> None:
    """The whole forward pass with a given permutation."""
    model, x, shuffle = hiend(case), case.input("volume"), case.input("shuffle")
    masking = medgmae.random_masking(len(x), shuffle.shape[1], model.mask_ratio, noise=shuffle.argsort(dim=1).double())
    case.offer("loss", model(x, masking).loss)
    recon = model.reconstruct(x, masking, paste_visible=False, denormalize="reference")
    case.offer("recon", medgmae.patchify(recon, model.patch_size))


# The registered architecture of each list, and the options that its card gives.
MANIFESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "hi_end_mae_10k": ("mae_hiend_vit_wide_patch12_96", {}),
    "3dino_vit_large": ("vit_large_patch16_112.3dino", {}),
    "m3d_clip_vision": ("vit_base_patch4x16x16_32x256x256.m3dclip", {"num_classes": 768}),
    "segvol_vit_pretrain": ("vit_base_patch4x16x16_32x256x256.segvol", {}),
}


@adapter("beyond/manifest")
def manifest(case: Case) -> None:
    """Every name of a full-size list finds its place in the model of its card; what is folded is counted."""
    tag, options = MANIFESTS[case.spec["name"]]
    shapes = case.spec["state_dict"]
    case.same("tensors", len(shapes), case.spec["n_tensors"])
    model = on_meta(tag, **options)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    heads = {name: torch.empty(shape, device="meta") for name, shape in case.spec.get("heads_beside_it", {}).items()}
    report = medgmae.load_pretrained(model, {**state, **heads})
    left = [name for name in report.unused if name not in heads and not re.search(NOT_READ, name)]
    case.same("names that find no place", left, [])
    case.same("names that are missing", report.missing, [])
    case.same("tensors that had to be changed", {**report.resized, **report.adapted}, {})
    case.same(
        "parameters", sum(p.numel() for p in model.parameters()), case.spec["params_total"] + _more(model, shapes)
    )


def _more(model: Any, shapes: dict[str, list[int]]) -> int:
    """What ours has more: biases of zero, less what was folded into other tensors or only pre-training reads."""
    qkv = sum(torch.Size(shape)[0] for name, shape in shapes.items() if name.endswith("qkv.weight"))
    biases = 0 if any(name.endswith("qkv.bias") for name in shapes) else qkv
    lost = {} if hasattr(model, "decoder") else {n: shape for n, shape in shapes.items() if re.search(NOT_READ, n)}
    folded = sum(torch.Size(shape).numel() for shape in lost.values())
    table = next(shape for name, shape in shapes.items() if re.search(r"pos_embed$|position_embeddings$", name))
    # A decoder of ours has a row for the class token's position, zero where the reference adds none.
    row = model.decoder.prefix_pos_embed.numel() if hasattr(model, "decoder") else 0
    return row + biases - folded - (table[1] * table[2] - model.encoder.pos_embed.numel())
