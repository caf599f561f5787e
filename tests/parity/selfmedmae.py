"""Adapters for SelfMedMAE and its UVA adaptation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import medgmae
from parity import adapter
from parity.case import Case, Options, triple
from parity.manifests import Manifest, check_manifest
from parity.models import build_mae3d, check_mae3d, load, renamed
from parity.official import write_file
from parity.selfmedmae_unetr import UNUSED, build_unetr, check_unetr_manifest


def _mae3d(config: dict[str, Any]) -> Any:
    settings = Options(config)
    names = ("embed_dim", "depth", "num_heads")
    encoder = Options({name: settings(f"encoder_{name}") for name in names} | {"norm_eps": settings.norm_eps()})
    bridge = {f"decoder_{name}": settings(f"decoder_{name}") for name in names}
    return build_mae3d(settings, settings("mask_ratio"), encoder, bridge)


@adapter("selfmedmae/mae_voxel")
def mae_voxel(case: Case) -> None:
    model = _mae3d(case.spec["config"])
    words = ("patches", "masked", "encoded", "decoded", "recon", "loss")
    check_mae3d(case, model, {word: word for word in words})
    tokens = math.prod(model.encoder.grid_size)
    case.same("grid", list(model.encoder.grid_size), list(case.spec.get("grid_size", model.encoder.grid_size)))
    case.same("patches", tokens, case.spec.get("num_patches", tokens))
    visible = medgmae.random_masking(1, tokens, model.mask_ratio).keep.shape[1]
    case.same("visible", visible, case.spec.get("visible", visible))


@adapter("selfmedmae/classifier")
def classifier(case: Case) -> None:
    settings = Options(case.spec["config"])
    model = medgmae.ViT(
        img_size=triple(settings("img_size"), 2),
        patch_size=triple(settings("patch_size"), 2),
        in_chans=settings("in_chans"),
        embed_dim=settings("embed_dim"),
        depth=settings("depth"),
        num_heads=settings("num_heads"),
        num_classes=settings("num_classes"),
        pos_embed="learned" if settings("use_learnable_pos_emb") else "sincos",
        norm_eps=settings.norm_eps(),
        dims=2,
    )
    settings.done()
    load(model, write_file(case, case.weights))
    x = case.input("image", "volume", "x")
    case.offer("features", model.forward_head(model.forward_features(x), pre_logits=True))
    case.offer("logits", model(x))


@adapter("selfmedmae/container")
def container(case: Case) -> None:
    for name, described in case.spec["files"].items():
        file = case.path.parent / name
        assert file.exists(), f"{file}: no such file"
        content = torch.load(file, weights_only=False)
        case.same(f"{name}: entries", list(content), described["top_level"])
        case.same(f"{name}: read by torch.load(weights_only=True)", _plain(file), described["loads_with_weights_only"])
        _check_sums(case, name, content["state_dict"], described["state_dict"])
        config = described["config"]
        model = build_unetr(config) if "spatial_dim" in config else _mae3d(config)
        _check_loaded(case, name, model, file, content["state_dict"])


def _plain(file: Path) -> bool:
    try:
        torch.load(file, weights_only=True)
    except Exception:  # of one kind in one version of torch, of another in the next
        return False
    return True


def _check_sums(case: Case, name: str, state: dict[str, Tensor], listed: dict[str, Any]) -> None:
    """The file beside the JSON is the one that the JSON describes."""
    case.same(f"{name}: names", sorted(state), sorted(listed))
    for key, (shape, total, absolute) in listed.items():
        tensor = state[key].double()
        case.same(f"{name}: shape of {key}", list(tensor.shape), shape)
        case.close(f"{name}: sum of {key}", tensor.sum().item(), total, (1e-6, 1e-6))
        case.close(f"{name}: absolute sum of {key}", tensor.abs().sum().item(), absolute, (1e-6, 1e-6))


def _check_loaded(case: Case, name: str, model: nn.Module, file: Path, state: dict[str, Tensor]) -> None:
    """Every tensor of the file is in the model, unchanged but for what conversion states."""
    encoder: Any = getattr(model, "encoder", model)
    report = medgmae.load_pretrained(model, file, source_grid=encoder.grid_size)
    case.same(f"{name}: missing", report.missing, [])
    prefix = "" if encoder is not model else "encoder."
    ours = {prefix + key: value for key, value in model.state_dict().items()}
    names = renamed(state, model)
    case.same(f"{name}: not loaded", sorted(set(state) - set(names)), sorted(report.unused))
    left = {key for key, why in report.unused.items() if not why.startswith(UNUSED)}
    case.same(f"{name}: nothing that the reference uses is left", left, set())
    for official, our in names.items():
        expected = state[official]
        if our.endswith("pos_embed") and expected.shape[1] == ours[our].shape[1] + 1:
            expected = expected[:, 1:]
        if our.endswith("cls_token") and "encoder.pos_embed" in state:
            expected = expected + state["encoder.pos_embed"][:, :1]  # the class row is part of the class token here
        if expected.dim() == 2 and ours[our].dim() == 5:  # a linear patch weight, channel fastest
            expected = expected.reshape(len(expected), *encoder.patch_size, -1).movedim(-1, 1)
        case.equal(f"{name}: {official}", ours[our], expected)


@adapter("selfmedmae/manifest")
def manifest(case: Case) -> None:
    spec = case.spec
    kind = spec["kind"]
    dims = len(spec["input_size"])
    if kind.startswith("VisionTransformer"):
        overrides = {"num_classes": spec["num_classes"]}
    elif kind == "MAE3D":
        overrides = {}
    elif kind.startswith("UNETR"):
        check_unetr_manifest(case)
        return
    else:
        raise AssertionError(f"{case.path}: a model of kind {kind!r} is not supported yet")
    manifest = Manifest(spec, dims, overrides)
    check_manifest(case, manifest)
