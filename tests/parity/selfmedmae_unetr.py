"""Adapters for the UNETRs of SelfMedMAE, of its UVA adaptation and of GL-MAE's first author."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

import medgmae
from parity import adapter
from parity.case import Case, Options, triple
from parity.manifests import Manifest, on_meta
from parity.models import with_class_row
from parity.official import write_file

# What the published decoders read, and whether they begin from pooled tokens.
DECODERS = {
    "UNETR_decoder": ((3, 6, 9), False),
    "UNETRx8_decoder": ((4, 8), False),
    "UNETRx8_decoderv2": ((3, 6, 9), True),
    "UNETRx4_decoderv2": ((3, 6, 9), True),
}
UNUSED = "not used by the reference"


def build_unetr(config: dict[str, Any]) -> medgmae.UNETR:
    """The model of a case's ``config``."""
    settings = Options(config)
    size = tuple(settings(f"roi_{axis}") for axis in "xyz" if f"roi_{axis}" in settings)
    spatial = settings("spatial_dim", len(size))
    taps, pooled = DECODERS[settings("decoder", "UNETR_decoder")]
    model = medgmae.create_model(
        "unetr_vit_nano_patch8_32",
        img_size=size,
        patch_size=triple(settings("patch_size"), len(size)),
        in_chans=settings("in_chans", 1),
        num_classes=settings("num_classes"),
        feature_size=settings("feature_size"),
        embed_dim=settings("encoder_embed_dim"),
        depth=settings("encoder_depth"),
        num_heads=settings("encoder_num_heads"),
        drop_path_rate=settings("drop_path", 0.0),
        mlp_ratio=float(settings("mlp_ratio", 4)),
        norm_eps=settings.norm_eps(),
        dims=len(size),
        taps=taps,
        pooled=pooled,
        slice_axis=-1 if spatial < len(size) else None,
    )
    settings.ignore("encoder")
    settings.done()
    return model


def load_unetr(model: medgmae.UNETR, case: Case) -> None:
    """Fill a UNETR from a case's file; only what the reference does not use may be left."""
    report = medgmae.load_pretrained(model, write_file(case, case.weights), source_grid=model.grid_size)
    case.same("missing", report.missing, [])
    left = {name for name, why in report.unused.items() if not why.startswith(UNUSED)}
    case.same("left out", left, set())
    idle = case.spec.get("parameters_without_gradient")
    if idle is not None:
        case.same("what the reference does not use", sorted(report.unused), sorted(idle))
    model.eval()


@adapter("selfmedmae/unetr")
@adapter("selfmedmae/unetr_pseudo3d")
@adapter("selfmedmae/unetr_2d")
def unetr(case: Case) -> None:
    model = build_unetr(case.spec["config"])
    load_unetr(model, case)
    x = case.input("image", "volume", "x")
    case.offer("logits", model(x))
    _offer_tokens(case, model, x)


def _offer_tokens(case: Case, model: medgmae.UNETR, x: Tensor) -> None:
    tokens, maps = model.encoder.forward_intermediates(x, output_fmt="NLC")
    case.offer("tokens", tokens[:, model.num_prefix_tokens :])
    for i, found in enumerate(maps):
        case.offer(f"hidden_{i}", found, "tokens")


@adapter("selfmedmae/map_mae_to_unetr")
def map_mae_to_unetr(case: Case) -> None:
    settings = Options(case.spec["config"]["mae"])
    taps, pooled = DECODERS[case.spec["config"]["unetr_decoder"]]
    size = triple(settings("input_size"))
    model = medgmae.create_model(
        "unetr_vit_nano_patch8_32",
        img_size=size,
        patch_size=triple(settings("patch_size")),
        in_chans=settings("in_chans", 1),
        **{name: settings(f"encoder_{name}") for name in ("embed_dim", "depth", "num_heads")},
        taps=taps,
        pooled=pooled,
    ).eval()
    report = medgmae.load_pretrained(model, write_file(case, case.weights), source_grid=model.grid_size)
    case.same("left out", sorted(report.unused), sorted(case.spec["ignored"]))
    case.same("new", {name.split(".")[0] for name in report.missing}, {"decoder"})
    case.same("the report says so", any("the decoder is new" in note for note in report.notes), True)
    case.same("the table is trained", model.encoder.pos_embed.requires_grad, True)
    x = case.input("image", "volume", "x")
    case.offer("pos_embed", with_class_row(model.encoder, case.weights["encoder.cls_token"]))
    _offer_tokens(case, model, x)


@adapter("glmae/unetr")
def glmae_unetr(case: Case) -> None:
    settings = Options(case.spec["constructor"])
    settings.require(norm_name="instance", conv_block=True, res_block=True)
    settings.ignore("class")
    model = medgmae.create_model(
        "unetr_vit_base_patch16_96_f48",
        img_size=triple(settings("img_size")),
        patch_size=triple(settings("patch_size")),
        in_chans=settings("in_channels"),
        num_classes=settings("out_channels"),
        feature_size=settings("feature_size"),
        embed_dim=settings("hidden_size"),
        mlp_ratio=settings("mlp_dim") / case.spec["constructor"]["hidden_size"],
        num_heads=settings("num_heads"),
        depth=settings("num_layer"),
        norm_eps=settings.norm_eps(),
        taps=(3, 6, 9),
    ).eval()
    settings.done()
    source = tuple(case.spec["checkpoint"]["grid"])
    report = medgmae.load_pretrained(model, write_file(case, case.weights), strict=False, source_grid=source)
    case.same("left out", list(report.unused), [f"{case.spec['container']['key_prefix']}cls_token"])
    case.same("new", {name.split(".")[0] for name in report.missing}, {"decoder"})
    # The authors' own layout: the encoder under vit., beside MONAI's names of the decoder.
    encoder = {f"vit.{name}": value for name, value in model.encoder.state_dict().items()}
    whole = {**encoder, **case.group("unetr_weights")}
    report = medgmae.load_pretrained(model, whole, source_grid=model.grid_size)
    case.same("missing from the whole file", report.missing, [])
    case.same("left out of the whole file", report.unused, {})
    x = case.input("volume", "image")
    case.offer("logits", model(x))
    case.offer("pos_embed", model.encoder.pos_embed)
    tokens, maps = model.encoder.forward_intermediates(x, output_fmt="NLC")
    case.offer("vit_tokens", tokens)
    for i, found in enumerate(maps):
        case.offer(f"vit_block_{i:02d}", found)


def check_unetr_manifest(case: Case) -> None:
    """The official names and shapes fill a registered UNETR, all of them, and the counts agree."""
    spec = case.spec
    manifest = Manifest(spec, len(spec["input_size"]), {})
    shapes = manifest.shapes
    width, feature_size = (
        shapes["encoder.patch_embed.proj.bias"][0],
        shapes["decoder.encoder1.layer.conv1.conv.weight"][0],
    )
    flat = len(shapes["decoder.out.conv.conv.weight"]) < len(shapes["encoder.patch_embed.proj.weight"])
    depth = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"encoder\.blocks\.(\d+)\.", name)))
    wanted = (width, depth, manifest.patch, feature_size, flat)
    fitting = [name for name in medgmae.list_models("unetr*_vit*") if _sizes(name) == wanted]
    assert fitting, f"no registered model has {wanted}"
    options = {"img_size": manifest.img_size, "in_chans": manifest.in_chans, "num_classes": spec["num_classes"]}
    named = sorted(fitting, key=lambda name: _distance(name, options))[0]
    model: Any = on_meta(named, **options)
    case.same("taps", list(model.taps), spec["skip_layers"])
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    report = medgmae.load_pretrained(model, state, source_grid=manifest.grid)
    case.same("missing", report.missing, [])
    case.same("tensors that had to be changed", {**report.resized, **report.adapted}, {})
    case.same("left out", {why.split(":")[0] for why in report.unused.values()} - {UNUSED}, set())
    class_row = (shapes["encoder.pos_embed"][1] - math.prod(manifest.grid)) * width
    idle = sum(math.prod(shapes[name]) for name in report.unused)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    case.same("parameters", total + class_row + idle, spec["parameters_total"])
    case.same("trained parameters", trained + class_row + idle, spec["parameters_trainable"])
    encoder = sum(p.numel() for p in model.encoder.parameters())
    case.same("parameters of the encoder", encoder + class_row, spec["parameters_encoder"])


def _sizes(name: str) -> tuple[Any, ...]:
    model: Any = on_meta(name)
    flat = model.slice_axis is not None
    return model.embed_dim, len(model.encoder.blocks), model.patch_size, model.feature_size, flat


def _distance(name: str, options: dict[str, Any]) -> int:
    """How many of the options are not the registered ones."""
    model: Any = on_meta(name)
    return sum(getattr(model, option) != value for option, value in options.items())
