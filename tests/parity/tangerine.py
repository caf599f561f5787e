"""Adapters for TANGERINE: models, files and optimisation."""

from __future__ import annotations

import pickle
import re
from typing import Any

import torch
from torch import Tensor

import medgmae
from medgmae.models.mae import masked_vit
from medgmae.training import cosine_schedule, param_groups
from parity import adapter
from parity.case import EXACT, Case, Options, crop, triple
from parity.manifests import Manifest, check_manifest
from parity.models import (
    check_timm_mae,
    decoder,
    decoder_table,
    geometry,
    load,
    raw_tokens,
    renamed,
    transformer,
    with_class_row,
)
from parity.official import random_state, timm_shapes, write_file


def vit(config: dict[str, Any]) -> medgmae.ViT:
    """The fine-tuning encoder: class token and mean of the patches under ``global_pool``, else the class token."""
    settings = Options(config)
    pooled = settings("global_pool")
    model = medgmae.ViT(
        **geometry(settings),
        **transformer(settings),
        global_pool="token_avg" if pooled else "token",
        num_classes=settings("num_classes", 0),
        head_hidden=tuple(settings("hidden_layers", ())),
    )
    settings.done()
    return model


def embeddings(model: medgmae.ViT, x: Tensor) -> dict[str, Tensor]:
    """What the reference's extraction script calls its embeddings; all but ``pre_logits`` are not normalised."""
    tokens = raw_tokens(model, x)
    concat = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
    pooled = model.global_pool == "token_avg"
    return {
        "tokens": tokens,
        "class": tokens[:, 0],
        "pooled": tokens[:, 1:].mean(1),
        "concat": concat,
        "features": concat if pooled else model.forward_features(x)[:, 0],
        "head_input": model.forward_head(model.forward_features(x), pre_logits=True),
        # Without global_pool the script's fc_norm is an identity: its pre_logits are the raw concatenation.
        "pre_logits": model.fc_norm(concat) if pooled else concat,
    }


def offer_embeddings(case: Case, found: dict[str, Tensor]) -> None:
    """The outputs ``embedding_<type>``."""
    for kind in ("class", "pooled", "concat", "pre_logits"):
        case.offer(f"embedding_{kind}", found[kind])


@adapter("tangerine/encoder")
def encoder(case: Case) -> None:
    model = load(vit(case.spec["config"]), write_file(case, case.weights))
    x = crop(case.input("volume"), model.patch_size)
    found = embeddings(model, x)
    case.offer("patch_tokens", model.patch_embed(x))
    case.offer("tokens", found["tokens"])
    case.offer("features", found["features"])
    case.offer("pre_logits", found["head_input"])
    case.offer("logits", model(x))
    offer_embeddings(case, found)


@adapter("tangerine/mae_voxel")
def mae_voxel(case: Case) -> None:
    settings = Options(case.spec["config"])
    raw = not settings("norm_pix_loss", False)
    model = masked_vit(
        **geometry(settings),
        **transformer(settings),
        **decoder(settings),
        mask_ratio=settings("mask_ratio"),
        sigmoid="decoder_pred.0.weight" in case.weights,
    )
    settings.done()
    check_timm_mae(case, model, raw)


@adapter("tangerine/load")
def load_into_vit(case: Case) -> None:
    """A pre-training file into the fine-tuning model, usually at another input size."""
    source, target = Options(case.spec["config"]["mae"]), case.spec["config"]["vit"]
    decoder(source)
    source_grid = tuple(s // p for s, p in _sizes(case.spec["config"]["mae"]))
    inherited = {name: source(name) for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads")}
    inherited |= {"mlp_ratio": source("mlp_ratio", 4), "norm_eps": source.norm_eps()}
    source.ignore("img_size", "grid_size", "mask_ratio")
    source.done()
    model = vit({**inherited, **target})
    report = medgmae.load_pretrained(model, write_file(case, case.weights), source_grid=source_grid)
    model.eval()
    case.same("missing", sorted(report.missing), sorted(case.spec["missing_keys"]))
    prefix = case.spec["config"].get("key_prefix_in_file") or ""
    dropped = sorted(name.removeprefix(prefix) for name in report.unused)
    case.same("dropped", dropped, sorted(case.spec["dropped_keys"]))
    case.offer("pos_embed", with_class_row(model, case.weights["cls_token"]))
    found = embeddings(model, crop(case.input("volume"), model.patch_size))
    case.offer("features", found["features"])
    offer_embeddings(case, found)


def _sizes(config: dict[str, Any]) -> list[tuple[int, int]]:
    return list(zip(triple(config["img_size"]), triple(config["patch_size"]), strict=True))


@adapter("tangerine/container")
def container(case: Case) -> None:
    """A file with the entries and names that the reference's pre-training writes, filled with random numbers."""
    spec = case.spec
    settings = Options(spec["config"])
    config = {**geometry(settings), **transformer(settings), **decoder(settings)}
    settings.done()
    model = masked_vit(**config, sigmoid="decoder_pred.0.weight" in spec["model_keys"])
    state = random_state(spec["model_keys"])
    spec["container"] = {"layout": spec["top_level"]}
    file = write_file(case, state, spec["file_name"])
    error = None
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError as caught:
        error = type(caught).__name__
    case.same("plain torch.load(weights_only=True)", error, spec.get("weights_only_load"))
    load(model, file)
    names = renamed(state, model)
    case.same("names", sorted(names), sorted(state))
    ours = model.state_dict()
    for official, tensor in state.items():
        expected = tensor[:, 1:] if official.endswith("pos_embed") else tensor
        if official == "cls_token":
            expected = tensor + state["pos_embed"][:, :1]
        case.equal(official, ours[names[official]], expected)
    _check_groups(case, model, names)


def _check_groups(case: Case, model: medgmae.MaskedAutoencoder, names: dict[str, str]) -> None:
    """The reference's optimiser decays the same parameters as our groups, but for the tokens.

    The reference hands no marks to its optimiser in pre-training: it decays the class token and the mask token, which
    ours leaves alone. With the marks left out the groups are the same.
    """
    official = {our: name for name, our in names.items()}
    of = {id(parameter): official.get(name, name) for name, parameter in model.named_parameters()}
    listed = {0.0: case.spec["no_decay_params"]}
    decays = {group["weight_decay"] for group in case.spec["optimizer"]["param_groups"]} - {0.0}
    assert len(decays) == 1, f"expected one weight decay besides 0, the case has {decays}"
    decay = decays.pop()
    listed[decay] = case.spec["decay_params"]
    spared = {name for name, parameter in model.named_parameters() if parameter.requires_grad} & model.no_weight_decay()
    case.same("trained parameters with marks of ours", sorted(spared), ["decoder.mask_token", "encoder.cls_token"])
    model.no_weight_decay = lambda: set()  # type: ignore[method-assign]
    for group in param_groups(model, decay):
        found = sorted(of[id(parameter)] for parameter in group["params"])
        case.same(f"parameters with weight decay {group['weight_decay']}", found, sorted(listed[group["weight_decay"]]))
    for group in case.spec["optimizer"]["param_groups"]:
        case.same("size of the group", len(listed[group["weight_decay"]]), group["n_params"])


@adapter("tangerine/finetune_optim")
def finetune_optim(case: Case) -> None:
    """Layer-wise learning rates, weight decay and the schedule."""
    settings = Options(case.spec["config"])
    depth, pooled = settings("depth"), settings("global_pool")
    hidden = sorted(int(name.split(".")[1]) for name in case.spec["groups"] if re.fullmatch(r"head\.\d+\.weight", name))
    # A hidden layer is three modules, two of which have weights: head.0, head.2 | head.3, head.5 | ... | the last.
    head: dict[str, Any] = {"num_classes": 2, "head_hidden": (4,) * (len(hidden) // 2)} if _has_head(case) else {}
    model = medgmae.ViT(
        8, 4, embed_dim=12, depth=depth, num_heads=2, global_pool="token_avg" if pooled else "token", **head
    )
    groups = param_groups(model, settings("weight_decay"), layer_decay=settings("layer_decay"))
    optimizer = torch.optim.AdamW(groups, lr=settings("lr"))
    tolerance = case.tolerance()
    _check_layer_rates(case, model, optimizer, tolerance)
    schedule = cosine_schedule(optimizer, settings("epochs"), settings("warmup_epochs"), settings("min_lr"))
    settings.done()
    for epoch, rate in case.spec["schedule_epoch_lr"]:
        schedule.step(epoch)
        for group in optimizer.param_groups:
            case.close(f"learning rate at epoch {epoch}", group["lr"], rate * group["lr_scale"], tolerance)


def _has_head(case: Case) -> bool:
    return any(name.startswith("head.") for name in case.spec["groups"])


def _check_layer_rates(
    case: Case, model: medgmae.ViT, optimizer: torch.optim.Optimizer, tolerance: tuple[float, float]
) -> None:
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in group_of}
    case.same("parameters that are optimised", sorted(names), sorted(case.spec["groups"]))
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    case.same("frozen", sorted(frozen), sorted(case.spec["frozen"]))
    for name, parameter in model.named_parameters():
        if name in names:
            expected, found = case.spec["groups"][name], group_of[id(parameter)]
            for key in ("lr_scale", "weight_decay"):
                case.close(f"{key} of {name}", found[key], expected[key], tolerance)


@adapter("tangerine/pos_embed_table")
def pos_embed_table(case: Case) -> None:
    for name, settings in case.spec["config"]["cases"].items():
        options = Options(settings)
        grid, width = options("grid_size"), options("embed_dim")
        # On non-cubic grids the reference numbers its rows in the reversed grid; its files carry their table.
        table = medgmae.sincos_pos_embed(width, triple(grid), reversed_mesh=True)[0]
        if options("cls_token", False):
            table = torch.cat([torch.zeros(1, width), table])
        rows, count, total = options("rows", None), options("all_rows", None), options("sum_all", None)
        options.done()
        case.offer(name, table if rows is None else table[rows])
        if count is not None:
            case.same(f"rows of {name}", len(table), count)
        if total is not None:
            within = (case.tolerance()[0] * table.numel(), 0.0)  # every entry may be off by the tolerance
            case.close(f"sum of {name}", table.double().sum().item(), total, within)


@adapter("tangerine/pos_embed_interpolate")
def pos_embed_interpolate(case: Case) -> None:
    """Tables of encoder and decoder at load: by themselves, and inside a file for a model of another size.

    ``non_cubic_behaviour`` lists where the reference's loader fails; ours is told the grid and needs no such list.
    """
    settings = Options(case.spec["config"])
    source, extra = triple(settings("source_grid")), settings("num_extra_tokens")
    width, decoder_width = settings("embed_dim"), settings("decoder_embed_dim")
    assert extra == 1, f"{extra} extra rows: the reference's models have one class token"
    rows = len(case.weights["pos_embed"][0])
    state = random_state(timm_shapes(width, patch=(1, 1, 1), rows=rows, decoder_dim=decoder_width))
    state |= case.weights
    file = write_file(case, state)
    for target in map(triple, settings("target_grids")):
        size = {"embed_dim": width, "depth": 1, "num_heads": 1}
        model = masked_vit(target, 1, **size, decoder_embed_dim=decoder_width, decoder_depth=1, decoder_num_heads=1)
        load(model, file, source)
        loaded = {
            "pos_embed": with_class_row(model.encoder, state["cls_token"]),
            "decoder_pos_embed": decoder_table(model),
        }
        for name, table in loaded.items():
            output = _target_name(case, name, target)
            given = case.weights[name]
            ours = medgmae.resample_pos_embed(given[:, extra:], source, target)
            alone = torch.cat([given[:, :extra], ours], dim=1)
            case.equal(f"{output} by itself", alone, case.outputs[output], case.tolerance())
            case.offer(output, table)
            if target == source:
                case.equal(f"{output} is untouched", table[:, extra:], given[:, extra:], EXACT)
    settings.done()


def _target_name(case: Case, name: str, target: tuple[int, ...]) -> str:
    """The output for a grid: ``<name>_to_6`` for a cube, or with every axis in it."""
    choices = [f"{name}_to_{'x'.join(map(str, target))}", f"{name}_to_{'_'.join(map(str, target))}"]
    if len(set(target)) == 1:
        choices.insert(0, f"{name}_to_{target[0]}")
    found = [choice for choice in choices if case.has(choice)]
    assert found, f"no output for grid {target}: expected one of {choices}"
    return found[0]


@adapter("tangerine/manifest")
def manifest(case: Case) -> None:
    config = case.spec["config"]
    overrides: dict[str, Any] = {}
    if "global_pool" in config:
        overrides = {
            "global_pool": "token_avg" if config["global_pool"] else "token",
            "num_classes": config["num_classes"],
        }
        if config.get("hidden_layers"):
            overrides["head_hidden"] = tuple(config["hidden_layers"])
    check_manifest(case, Manifest(case.spec, 3, overrides))
