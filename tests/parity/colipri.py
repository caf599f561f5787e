"""Adapters for COLIPRI: vision tower, heads, windows, the file."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import medgmae
from medgmae.checkpoints.safetensors_files import read_safetensors
from medgmae.inference.windows import batches, lay_out
from medgmae.models.primus import Primus
from parity import adapter
from parity.case import Case, Options


def tower(case: Case) -> Primus:
    """The vision tower of a case, with projector and pooler where the case has them."""
    options = Options(case.spec["config"])
    options.require(eps=1e-5, pos_embed="none", layer_scale=True, scale_attn_inner=True, class_token=False)
    assert options("rope") == {"kind": "primus", "base": 10000.0, "bands": options("head_dim") // 6}
    width = options("embed_dim")
    size = options("input_shape", None) or options("input_shape_a")
    settings = {"embed_dim": width, "depth": options("depth"), "num_heads": options("num_heads")}
    settings |= {"registers": options("register_tokens"), "mlp_ratio": options("mlp_hidden") / width}
    settings |= {"projection_dim": options("projection_dim", 0), "projection_heads": options("pooler_heads", 12)}
    model = Primus(size, options("patch"), options("in_chans"), pos_embed="none", **settings)
    options.ignore("grid", "overrides", "softmax_temperature", "text", "window", "volume_grid", "grid_a", "grid_b")
    options.ignore("input_shape_b", "overrides_a", "overrides_b")
    options.done()
    return model.eval()


def filled(case: Case) -> Primus:
    """The same with the case's weights, all of which find their place."""
    model = tower(case)
    report = medgmae.load_pretrained(model, case.weights)
    case.same("missing", report.missing, [])
    unused = {name for name in report.unused if not name.startswith("image_encoder.backbone.mask_token")}
    case.same("unused", {name for name in unused if model.projection is not None or "backbone" in name}, set())
    return model


def as_map(tokens: Tensor, grid: Any) -> Tensor:
    """(B, N, C) as (B, C, d, h, w)."""
    return tokens.mT.unflatten(2, tuple(grid))


def offer_encoder(case: Case, model: Primus, x: Tensor, suffix: str = "") -> None:
    grid = tuple(n // p for n, p in zip(x.shape[2:], model.patch_size, strict=True))
    tokens, states = model.forward_intermediates(x, output_fmt="NLC")
    case.offer(f"stem{suffix}", as_map(model.patch_embed(x), grid), tolerance=tolerance(case, f"stem{suffix}"))
    for block, hidden in enumerate(states):
        case.offer(f"hidden_{block}{suffix}", hidden, tolerance=tolerance(case, f"hidden_{block}{suffix}"))
    case.offer(f"tokens{suffix}", tokens, tolerance=tolerance(case, f"tokens{suffix}"))
    case.offer(f"map{suffix}", as_map(tokens, grid), tolerance=tolerance(case, f"map{suffix}"))


def tolerance(case: Case, name: str) -> tuple[float, float]:
    """The tight one of a tensor, where the case has such."""
    tight = case.spec.get("tolerance_per_tensor", {}).get(f"outputs/{name}")
    return case.tolerance() if tight is None else (tight, 0.0)


@adapter("colipri/encoder")
def encoder(case: Case) -> None:
    offer_encoder(case, filled(case), case.input("volume"))


@adapter("colipri/encoder_grids")
def encoder_grids(case: Case) -> None:
    """Two grids of one model; the reference needs an instance for each."""
    model = filled(case)
    for suffix in ("_a", "_b"):
        offer_encoder(case, model, case.inputs[f"volume{suffix}"], suffix)


@adapter("colipri/heads")
def heads(case: Case) -> None:
    model = filled(case)
    projection, x, texts = model.projection, case.input("volume"), case.input("text")
    assert projection is not None
    tokens = model.forward_features(x)
    projected = projection(tokens)
    pooled, dense = projection.pool(projected), projection.dense(projected)
    maps = {"map": tokens, "map_normalized": F.normalize(tokens, dim=-1), "projected": projected}
    maps |= {"dense": dense, "dense_normalized": F.normalize(dense, dim=-1)}
    maps["dense_similarity"] = F.normalize(dense, dim=-1) @ F.normalize(texts, dim=-1).mT
    for name, rows in maps.items():
        case.offer(name, as_map(rows, model.grid_size), tolerance=tolerance(case, name))
    vectors = {"pooled": pooled, "pooled_normalized": F.normalize(pooled, dim=-1)}
    vectors["similarity"] = vectors["pooled_normalized"] @ F.normalize(texts, dim=-1).mT
    vectors["probability"] = projection.scores(pooled, texts)
    # The reference's probabilities of a map run over its last axis instead of the prompts: its fault, repeated here.
    faulty = (as_map(maps["dense_similarity"], model.grid_size) / projection.temperature).softmax(-1)
    for name, rows in {**vectors, "dense_probability_reference": faulty}.items():
        case.offer(name, rows, tolerance=tolerance(case, name))
    case.equal(
        "probabilities of a map", projection.scores(dense, texts).sum(-1), torch.ones(dense.shape[:2]), (1e-5, 0)
    )


@adapter("colipri/sliding_window")
def sliding_window(case: Case) -> None:
    """Windows side by side, the last one flush with the end; where two overlap, the later one stands."""
    model, volume = filled(case), case.input("volume")
    layout = lay_out(tuple(volume.shape[2:]), model.patch_size, case.spec["config"]["window"], 0.0, "strided")
    found = torch.zeros(1, model.embed_dim, *layout.grid)
    for starts, batch in batches(volume[0], layout, 0.0):
        found[(..., *layout.patches(starts[0]))] = as_map(model.forward_features(batch), layout.window)
    case.offer("map", found, tolerance=tolerance(case, "map"))
    assert model.projection is not None
    dense = model.projection.dense(model.projection(found.flatten(2).mT))
    case.offer("dense", as_map(dense, layout.grid), tolerance=tolerance(case, "dense"))


@adapter("colipri/container")
def container(case: Case) -> None:
    """A whole file with a text encoder: what is read of it, and what is not."""
    spec, model = case.spec, tower(case)
    file = case.path.parent / spec["file"]
    state, _ = read_safetensors(file)
    case.same("names", {name: list(tensor.shape) for name, tensor in state.items()}, spec["file_keys"])
    for name, total in spec["value_sums"].items():
        case.close(f"sum of {name}", float(state[name].double().sum()), total, (1e-4, 1e-5))
    report = medgmae.load_pretrained(model, file)
    case.same("unused", sorted(report.unused), sorted(spec["unused_keys"]))
    case.same("missing", report.missing, [])
    assert model.projection is not None
    temperature = spec["config"]["softmax_temperature"]
    case.close("temperature", float(model.projection.temperature), temperature, (1e-7, 0))
    tokens = model.forward_features(case.input("volume"))
    case.offer("map", as_map(tokens, model.grid_size), tolerance=tolerance(case, "map"))
    case.offer("pooled", model.projection.pool(model.projection(tokens)), tolerance=tolerance(case, "pooled"))
