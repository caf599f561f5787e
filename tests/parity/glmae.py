"""Adapters for GL-MAE and its authors' sibling repository."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

import medgmae
from medgmae.models.mae import masked_vit
from parity import adapter
from parity.case import Case, Options, crop, grids, triple
from parity.manifests import Manifest, check_manifest
from parity.models import (
    check_timm_mae,
    decoder,
    decoder_table,
    geometry,
    load,
    raw_tokens,
    transformer,
    with_class_row,
)
from parity.official import WEIGHT_ENTRIES, random_state, timm_shapes, write_file


def _settings(constructor: dict[str, Any], **values: Any) -> Options:
    settings = Options({**constructor, **values})
    settings.ignore("class", "encoder_only", "drop_rate", "classification_head")  # its forward never calls the head
    return settings


def _vit(settings: Options, **more: Any) -> medgmae.ViT:
    if "decoder_embed_dim" in settings:
        decoder(settings)
    model = medgmae.ViT(**geometry(settings), **transformer(settings), **more)
    settings.done()
    return model


def _mae(settings: Options, **more: Any) -> medgmae.MaskedAutoencoder:
    model = masked_vit(**geometry(settings), **transformer(settings), **decoder(settings), **more)
    settings.done()
    return model


# Names of the official class; everything else in a file is a projector's or a wrapper's.
ENCODER = r"(cls_token|pos_embed|patch_embed|blocks|norm)(\.|$)"
DECODER = r"(mask_token$|decoder_(pos_embed|embed|blocks|norm|pred)(\.|$))"


@adapter("glmae/encoder")
def encoder(case: Case) -> None:
    model = _vit(_settings(case.spec["constructor"]))
    load(model, write_file(case, case.weights), unused=rf"(^|\.)({DECODER}|head\.)")
    x = crop(case.input("volume"), model.patch_size)
    patches = model.patch_embed(x)
    case.offer("patch_tokens", patches)
    prefix = model.get_parameter("cls_token").expand(len(x), -1, -1)
    case.offer("tokens_in", torch.cat([prefix, patches + model.pos_embed], dim=1))
    tokens = model.forward_features(x)
    case.offer("all_features", tokens)
    case.offer("patch_features", tokens[:, 1:])
    case.offer("cls", model(x))
    case.offer("cls_token", model(x))
    _offer_blocks(case, model, x, "")


def _offer_blocks(case: Case, model: medgmae.ViT, x: Tensor, prefix: str) -> None:
    for name in list(case.outputs):
        if found := re.fullmatch(re.escape(prefix) + r"block_(\d+)", name):
            case.offer(name, raw_tokens(model, x, int(found[1])), "features")


@adapter("glmae/decoder")
def decode(case: Case) -> None:
    """The decoder on given latents; the file's encoder is filled with random numbers."""
    constructor = case.spec["constructor"]
    model = _mae(_settings(constructor))
    state = random_state(_shapes(constructor, model))
    load(model, write_file(case, state | case.weights))
    visible, restore = case.input("latent_visible"), case.input("ids_restore")
    tokens = restore.shape[1]
    if "noise" in case.inputs:
        kept = visible.shape[1] - 1
        ratio = 1 - (kept + 0.5) / tokens
        masking = medgmae.random_masking(len(visible), tokens, ratio, noise=case.inputs["noise"])
        case.same("visible patches", masking.keep.shape[1], kept)
        case.equal("ids_restore", masking.restore, restore)
        if "ids_shuffle" in case.inputs:
            case.equal("ids_keep", masking.keep, case.inputs["ids_shuffle"][:, :kept])
    case.offer("pred_masked", model.decoder(visible, restore))
    if case.has("pred_full"):
        case.offer("pred_full", model.decoder(case.input("latent_full")))


def _shapes(constructor: dict[str, Any], model: medgmae.MaskedAutoencoder) -> dict[str, tuple[int, ...]]:
    return timm_shapes(
        constructor["embed_dim"],
        patch=model.encoder.patch_size,
        rows=1 + model.encoder.pos_embed.shape[1],
        in_chans=model.encoder.in_chans,
        depth=constructor["depth"],
        decoder_dim=constructor["decoder_embed_dim"],
        decoder_depth=constructor["decoder_depth"],
    )


@adapter("glmae/mae_voxel")
def mae_voxel(case: Case) -> None:
    settings = _settings(case.spec["constructor"])
    normed = settings("norm_pix_loss", False)
    ratio = settings("mask_ratio", case.spec.get("mask_ratio"))
    model = _mae(settings, mask_ratio=ratio, norm_target="unbiased" if normed else None)
    check_timm_mae(case, model, raw=not normed)


@adapter("glmae/classifier")
def classifier(case: Case) -> None:
    """The authors' classifier: no class token, mean of the raw tokens.

    It normalises the mean and then hands the head the mean that is not normalised; here the two are taken apart.
    """
    settings = _settings(case.spec["constructor"])
    settings.require(global_pool=True, classification=True)
    size = geometry(settings) | {"in_chans": settings("in_channels", 1)}
    options = transformer(settings)
    model = medgmae.ViT(
        **size, **options, class_token=False, global_pool="avg", fc_norm=False, num_classes=settings("num_classes")
    )
    settings.done()
    load(model, write_file(case, case.weights))
    pooled = raw_tokens(model, crop(case.input("volume"), model.patch_size)).mean(1)
    case.offer("pooled", pooled)
    case.offer("pooled_norm", model.norm(pooled))
    case.offer("logits", model.head(pooled))


@adapter("glmae/load")
def load_file(case: Case) -> None:
    """A file into models of several sizes.

    The reference guesses the grids of a table from its row count. Where it guesses wrong the case holds both results:
    what the true grids give, which is what ours must load, and the reference's, made here from the grids it guessed.
    """
    call = Options(case.spec["load_call"])
    call.require(interpolate_pos_embed=True)
    whole, strict = not call("encoder_only"), call("strict", False)
    call.done()
    file = write_file(case, case.weights)
    source = triple(case.spec["source_grid"])
    for listed in case.spec["targets"]:
        target = Options(listed)
        target.ignore("warning", "max_abs_reference_minus_true_grid")
        settings = _settings(case.spec["constructor_target"], img_size=target("img_size"))
        model = _mae(settings) if whole else _vit(settings)
        report = medgmae.load_pretrained(model.eval(), file, source_grid=source, strict=strict)
        encoder: Any = model.encoder if whole else model
        case.same("grid", list(encoder.grid_size), target("grid"))
        missing = [name for name in target("missing_keys") if not name.startswith("head.")]
        case.same("missing", report.missing, missing)
        unused = {name.removeprefix(_prefix(case)).removeprefix("module.") for name in report.unused}
        case.same("unexpected keys that were used", sorted(set(target("unexpected_keys")) - unused), [])
        parts = f"{ENCODER}|{DECODER}" if whole else ENCODER
        case.same("parts of the model that were not used", [name for name in unused if re.match(parts, name)], [])
        _check_target(case, model, target, source)
        target.done()


def _prefix(case: Case) -> str:
    return str((case.spec.get("container") or {}).get("key_prefix") or "")


def _stripped(case: Case) -> dict[str, Tensor]:
    """The official weights by their bare names."""
    prefix = _prefix(case)
    return {name.removeprefix(prefix): tensor for name, tensor in case.weights.items()}


def _check_target(case: Case, model: Any, target: Options, source: tuple[int, ...]) -> None:
    name = target("name")
    guess = _guess(target, source)
    whole = isinstance(model, medgmae.MaskedAutoencoder)
    encoder: Any = model.encoder if whole else model
    state = _stripped(case)
    tables = {"pos_embed": with_class_row(encoder, state["cls_token"])}
    if whole:
        tables["decoder_pos_embed"] = decoder_table(model)
    twins = False
    for table, ours in tables.items():
        twin = f"{name}/{table}_true_grid"
        twins |= case.has(twin)
        case.offer(twin, ours, "pos_embed")
        guessed = _resampled(state[table], *guess) if case.has(twin) else ours
        case.offer(f"{name}/{table}", guessed, "pos_embed")
    if f"{name}/volume" not in case.inputs:
        return
    x = crop(case.inputs[f"{name}/volume"], encoder.patch_size)
    if twins:
        case.offer(f"{name}/all_features_true_grid", encoder.forward_features(x), "features")
        if whole:
            true = model.decoder(encoder.forward_features(x))
            case.offer(f"{name}/decoder_pred_true_grid", true, "features")
        # The other outputs come from the reference's scrambled table: a file that holds it gives the same.
        for table in tables:
            if case.has(f"{name}/{table}"):
                state[table] = case.outputs[f"{name}/{table}"]
        parts = f"{ENCODER}|{DECODER}" if whole else ENCODER
        load(model, {key: tensor for key, tensor in state.items() if re.match(parts, key)})
    tokens = encoder.forward_features(x)
    case.offer(f"{name}/all_features", tokens, "features")
    case.offer(f"{name}/cls", tokens[:, 0], "features")
    _offer_blocks(case, encoder, x, f"{name}/")
    if whole:
        case.offer(f"{name}/decoder_pred", model.decoder(tokens), "features")


def _guess(target: Options, source: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The grids between which the reference resampled; twice the same one where it left the table alone."""
    interpolated, text = target("reference_interpolated", True), target("reference_grids", "")
    return grids(text) if interpolated and text else [source, source]


def _resampled(table: Tensor, source: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """A table with its class row between two grids."""
    rows = table.shape[1] - math.prod(source)
    return torch.cat([table[:, :rows], medgmae.resample_pos_embed(table[:, rows:], source, target)], dim=1)


@adapter("glmae/pos_embed_interpolate")
def pos_embed_interpolate(case: Case) -> None:
    for pair in case.spec["pairs"]:
        table = case.inputs[f"{pair['id']}/pos_embed"]
        source, target, extra = triple(pair["source_grid"]), triple(pair["target_grid"]), pair["num_extra_tokens"]
        assert extra in (0, 1), f"{extra} extra rows: the reference's models have one class token or none"
        rows = timm_shapes(table.shape[2], patch=(1, 1, 1), rows=table.shape[1], class_token=bool(extra))
        state = random_state(rows)
        state["pos_embed"] = table
        pool: dict[str, Any] = {"global_pool": "token"} if extra else {"global_pool": "avg", "fc_norm": False}
        model = medgmae.ViT(target, 1, 1, table.shape[2], 1, 1, class_token=bool(extra), **pool)
        load(model, write_file(case, state), source)
        ours = with_class_row(model, state["cls_token"]) if extra else model.pos_embed
        guess, true = f"{pair['id']}/pos_embed_reference", f"{pair['id']}/pos_embed_true_grid"
        case.offer(true, ours, "pos_embed")
        case.offer(guess, _resampled(table, *grids(pair["reference_guess"])), "pos_embed")
        if pair["reference_equals_true_grid"]:
            case.equal(f"{guess}, loaded", ours, case.outputs[guess], case.tolerance("pos_embed"))


@adapter("glmae/pos_embed_table")
def pos_embed_table(case: Case) -> None:
    for settings in case.spec["cases"]:
        options = Options(settings)
        table = medgmae.sincos_pos_embed(options("embed_dim"), triple(options("grid_size")))[0]
        if options("cls_token", False):
            table = torch.cat([torch.zeros(1, table.shape[1]), table])
        case.offer(f"{options('id')}/pos_embed", table)
        options.done()


@adapter("glmae/key_mapping")
def key_mapping(case: Case) -> None:
    """Which names of a file are loaded.

    The reference keeps names by their beginning and leaves it to ``load_state_dict`` to ignore those that the model
    has not. So: what it keeps and its model has is loaded here; the rest is reported as unused.
    """
    keys = case.spec["input_keys"]
    official = timm_shapes(
        12,
        patch=(2, 2, 2),
        rows=9,
        depth=_depth(keys, "blocks"),
        decoder_dim=6,
        decoder_depth=_depth(keys, "decoder_blocks"),
    )
    for result in case.spec["results"]:
        whole, head = not result["encoder_only"], result["model_has_head"]
        kept = {given for given, name in result["kept"].items() if name in official}
        size: dict[str, Any] = {
            "img_size": 4,
            "patch_size": 2,
            "embed_dim": 12,
            "depth": _depth(keys, "blocks"),
            "num_heads": 2,
        }
        size |= {"num_classes": 3 if head else 0}
        if whole:
            widths: dict[str, Any] = {
                "decoder_embed_dim": 6,
                "decoder_depth": _depth(keys, "decoder_blocks"),
                "decoder_num_heads": 1,
            }
            model: Any = masked_vit(**size, **widths)
        else:
            model = medgmae.ViT(**size)
        # The list is an excerpt; the other names of a complete model come with the same prefix.
        spelled = {name: given for given, name in result["kept"].items() if name in official}
        prefix = next((given.removesuffix(name) for name, given in spelled.items()), "")
        state = {spelled.get(name, prefix + name): torch.randn(*shape) for name, shape in official.items()}
        state |= {key: torch.randn(4, 4) for key in keys if key not in state}
        case.spec["container"] = {"layout": {result["entry"]: "weights/*", "epoch": 1600, "args": "Namespace"}}
        report = medgmae.load_pretrained(model, write_file(case, state), source_grid=(2, 2, 2))
        unused = set(report.unused)
        case.same("kept by the reference, not loaded", sorted(kept & unused), [])
        dropped = (set(result["dropped"]) | set(result["kept"])) - kept
        case.same("dropped by the reference, loaded", sorted(dropped - unused), [])
        missing = [name for name in report.missing if ".head." not in f".{name}"]
        case.same("missing", missing, [])
        # The class row of a decoder's table is a parameter of its own here.
        case.same("loaded", len(report.loaded) - whole, len([k for k in state if k not in unused]))
    _check_precedence(case, official)


def _depth(keys: list[str], part: str) -> int:
    found = [re.search(rf"(?:^|\.){part}\.(\d+)\.", key) for key in keys]
    return 1 + max((int(match[1]) for match in found if match), default=0)


def _check_precedence(case: Case, official: dict[str, tuple[int, ...]]) -> None:
    """Which entry is read where a file has several; a file with none of them is refused."""
    encoder = {name: shape for name, shape in official.items() if not re.match("decoder_|mask_token", name)}
    depth = _depth(list(encoder), "blocks")
    for listed in case.spec["container_precedence"]:
        content = {
            entry: OrderedDict((name, torch.full(shape, float(i))) for name, shape in encoder.items())
            for i, entry in enumerate(listed["present"], start=1)
        }
        path = case.tmp / "entries.pth"
        torch.save(content, path)
        model = medgmae.ViT(4, 2, embed_dim=12, depth=depth, num_heads=2)
        try:
            medgmae.load_pretrained(model, path)
            value = int(model.norm.weight[0].item())
            used = listed["present"][value - 1]
        except medgmae.WeightsError:
            used = None
        case.same(f"entry used of {', '.join(listed['present'])}", used, listed["used"])
    assert set(WEIGHT_ENTRIES) >= {listed["used"] for listed in case.spec["container_precedence"] if listed["used"]}


@adapter("glmae/manifest")
def manifest(case: Case) -> None:
    constructor = case.spec["constructor"]
    overrides = {"num_classes": constructor["num_classes"]} if constructor.get("num_classes") else {}
    check_manifest(case, Manifest(case.spec, 3, overrides))
