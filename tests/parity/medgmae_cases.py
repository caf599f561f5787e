"""Adapters for MedGMAE: its voxel baseline, patches and tables."""

from __future__ import annotations

import re

import medgmae
from parity import adapter
from parity.case import EXACT, Case, Options, triple
from parity.manifests import Manifest, check_manifest
from parity.models import build_mae3d, check_mae3d, load
from parity.official import random_state, timm_shapes, write_file


@adapter("medgmae/mae_voxel")
def mae_voxel(case: Case) -> None:
    settings = Options(case.spec["config"])
    decoder = Options(settings("decoder"))
    bridge = {f"decoder_{name}": decoder(name) for name in ("embed_dim", "depth", "num_heads")}
    decoder.done()
    model = build_mae3d(settings, settings("mask_ratio"), Options(settings("encoder")), bridge)
    words = {"encoded": "encoder_latent", "decoded": "prediction", "recon": "reconstruction", "loss": "loss"}
    check_mae3d(case, model, {**words, "patches": "patches", "masked": "masked"})


@adapter("medgmae/patchify")
def patchify(case: Case) -> None:
    x, patch = case.input("x", "image", "volume"), triple(case.spec["patch"])
    case.offer("patches", medgmae.patchify(x, patch), tolerance=EXACT)
    grid = tuple(s // p for s, p in zip(x.shape[2:], patch, strict=True))
    back = medgmae.unpatchify(case.outputs["patches"], patch, grid, x.shape[1])
    case.equal("the volume again", back, x)
    if case.weights:
        width = len(case.weights["proj.bias"])
        model = medgmae.ViT(tuple(x.shape[2:]), patch, x.shape[1], width, depth=1, num_heads=1)
        rows = 1 + len(case.outputs["patches"][0])
        state = random_state(timm_shapes(width, patch=patch, rows=rows, in_chans=x.shape[1]))
        state |= {f"patch_embed.{name}": tensor for name, tensor in case.weights.items()}
        case.offer("tokens", load(model, write_file(case, state)).patch_embed(x))


@adapter("medgmae/pos_embed_table")
def pos_embed_table(case: Case) -> None:
    sampled = case.spec.get("sampled_rows_of_full_tables", {})
    for name in list(case.outputs):
        found = re.fullmatch(r"(rows_)?(\d+)x(\d+)x(\d+)_d(\d+)(?:_t(\d))?", name)
        assert found, f"no table is understood under the name {name!r}"
        grid, width, class_rows = tuple(int(v) for v in found.groups()[1:4]), int(found[5]), int(found[6] or 0)
        table = medgmae.sincos_pos_embed(width, grid)
        if found[1]:
            case.offer(name, table[0, case.inputs[name].long()])
            continue
        ours = table.new_zeros(1, class_rows + table.shape[1], width)
        ours[:, class_rows:] = table  # a class token's row is zero: our models do not add one
        case.offer(name, ours)
    for name, full in sampled.items():
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)_d(\d+)", name)
        assert found, f"no table is understood under the name {name!r}"
        table = medgmae.sincos_pos_embed(int(found[4]), tuple(int(v) for v in found.groups()[:3]))[0].double()
        case.same(f"{name}: shape", list(table.shape), full["shape"])
        within = (case.tolerance()[0] * table.numel(), 0.0)  # every entry may be off by the tolerance
        case.close(f"{name}: sum", table.sum().item(), full["sum"], within)
        case.close(f"{name}: sum of absolute values", table.abs().sum().item(), full["abs_sum"], within)


@adapter("medgmae/manifest")
def manifest(case: Case) -> None:
    spec = case.spec
    unused = ("mask_token", "decoder_pos_embed") if "gaussian_query_tokens" in spec["state_dict"] else ()
    check_manifest(case, Manifest(spec, len(spec["img_size"]), {}), unused)
