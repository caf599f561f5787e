"""Adapters for VoxelFM: encoders, tables of rotations, features of a NIfTI file, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import torch
from torch import Tensor

import medgmae
from medgmae import create_transform
from medgmae.layers.rope import HeadRope
from parity import adapter
from parity.beyond import save
from parity.case import EXACT, Case, Options, Tolerance
from parity.manifests import on_meta
from parity.models import load, raw_tokens

# What its files hold beside the parts that compute features: LayerScale is folded into the layers before it.
NOT_READ = r"mask_token|ls[12]\.gamma|_head\.|rope_embed\.periods"


def model_of(case: Case, options: Options) -> medgmae.ViT:
    """VoxelFM's encoder in the sizes of a case."""
    options.require(pos_embed="none", class_token=True, proj_bias=True, ffn_bias=True)
    options.ignore("qkv_bias", "layer_scale", "student", "grid_b")  # zeros; folded; the same again; of the inputs
    rope, heads, patch = options("rope"), options("num_heads"), options("patch")
    case.same("kind of the rotations", rope["kind"], "voxelfm")
    width = options("embed_dim")
    case.same("channels of a head", options("head_dim"), width // heads)
    case.same("bands", rope["bands"], width // heads // 6)
    return medgmae.ViT(
        tuple(n * patch for n in options("grid")),
        patch,
        options("in_chans"),
        width,
        options("depth"),
        heads,
        mlp_ratio=options("mlp_hidden") / width,
        mlp={"mlp": "gelu", "swiglu": "swiglu"}[options("ffn")],
        registers=options("register_tokens"),
        norm_eps=options("eps"),
        pos_embed="none",
        rope="unit",
        rope_base=rope["base"],
    )


def tight(case: Case, name: str) -> Tolerance:
    return float(case.spec["tolerance_per_tensor"][f"outputs/{name}"]), 0.0


def offer(case: Case, name: str, actual: Tensor) -> None:
    if case.has(name):
        case.offer(name, actual, tolerance=tight(case, name))


def offer_tokens(case: Case, model: medgmae.ViT, x: Tensor, start: str = "", end: str = "") -> None:
    """The normed tokens, and what is pooled of them."""
    tokens, prefix = model.forward_features(x), model.num_prefix_tokens
    offer(case, f"{start}cls{end}", tokens[:, 0])
    case.equal("the pooled vector", model(x), tokens[:, 0])
    offer(case, f"{start}registers{end}", tokens[:, 1:prefix])
    offer(case, f"{start}patch{end}", tokens[:, prefix:])
    offer(case, f"{start}mean_patch{end}", tokens[:, prefix:].mean(1))


@adapter("voxelfm/encoder")
@adapter("voxelfm/encoder_options")
def encoder(case: Case) -> None:
    """All hidden states on the grids of the case, and with masked patches."""
    options = Options(case.spec["config"])
    model = model_of(case, options)
    options.done()
    model = load(model, save(case, case.weights), unused=NOT_READ)
    for end in ("", "_b"):
        if f"volume{end}" in case.inputs:
            x = case.input(f"volume{end}")[:, None]
            for block in range(len(model.blocks)):
                offer(case, f"hidden_{block}{end}", raw_tokens(model, x, block))
            offer_tokens(case, model, x, end=end)
    if "mask" in case.inputs:  # patches are hidden behind a token, of which a ViT of ours has none
        mask = case.input("mask").bool().unsqueeze(-1)
        hook = model.patch_embed.register_forward_hook(
            lambda _, __, out: torch.where(mask, case.weights["mask_token"], out)
        )
        offer_tokens(case, model, case.input("volume")[:, None], "masked_")
        hook.remove()
    bands, base = case.spec["config"]["rope"]["bands"], case.spec["config"]["rope"]["base"]
    offer(case, "periods", base ** (torch.arange(bands) / bands))


@adapter("voxelfm/rope_table")
def rope_table(case: Case) -> None:
    for one in case.spec["config"]["tables"]:
        options = Options(one)
        options.ignore("embed_dim", "num_heads")
        grid, head, base = tuple(options("grid")), options("head_dim"), options("base")
        options.done()
        end = f"hd{head}_base{base:g}_{'x'.join(map(str, grid))}"
        angles = HeadRope("unit", base).angles(grid, head).unflatten(1, (3, -1))
        offer(case, f"sin_{end}", angles.sin())
        offer(case, f"cos_{end}", angles.cos())
        offer(case, f"periods_{end}", base ** (torch.arange(head // 6) / (head // 6)))


@adapter("voxelfm/features")
def features(case: Case) -> None:
    """From a NIfTI file to class token and map, with the block of the card."""
    options = Options(case.spec["config"])
    model = model_of(case, options)
    options.require(crop_background=False, max_patches=None)
    options.ignore("crop_k", "spacing_xyz")
    model = load(model, save(case, case.weights), unused=NOT_READ)
    block: dict[str, Any] = {
        "window": options("clip"),
        "range": "same",
        "resample": {"to": "isotropic", "least": options("min_spacing"), "equal": "keep", "origin": "edges"},
        "normalize": {"mean": options("mean"), "std": options("std")},
        "multiple": list(model.patch_size),
        "crop": ["multiple"],
        "centering": "floor",
        "order": ["window", "foreground", "resample", "center", "normalize"],
    }
    options.done()
    file = case.tmp / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(case.input("array").numpy(), case.input("affine").numpy()), file)
    scan = create_transform(block)(file)
    offer(case, "volume", scan.data[0])
    tokens = model.forward_features(scan.tensor)
    grid = tuple(n // p for n, p in zip(scan.data.shape[1:], model.patch_size, strict=True))
    patches = tokens[:, model.num_prefix_tokens :]
    offer(case, "cls", tokens[:, 0])
    offer(case, "mean_patch", patches.mean(1))
    offer(case, "patch", patches[0].unflatten(0, grid))


@adapter("voxelfm/container")
def container(case: Case) -> None:
    """A file as it is published, and the same with ``module.`` before its names and with a head of iBOT beside."""
    options = Options(case.spec["config"])
    model = model_of(case, options)
    options.done()
    file = case.path.parent / case.spec["file"]
    content = torch.load(file, weights_only=True)
    held = {f"teacher.{name}": list(tensor.shape) for name, tensor in content["teacher"].items()}
    case.same("names", held, case.spec["file_keys"])
    for name, total in case.spec["value_sums"].items():
        values = content["teacher"][f"backbone.{name}"].double()
        case.close(f"sum of {name}", float(values.sum()), total, (1e-5, 1e-5))
        squares = case.spec["value_sum_of_squares"][name]
        case.close(f"sum of squares of {name}", float(values.square().sum()), squares, (1e-5, 1e-5))
    heads = {name.removeprefix("teacher.") for name in case.spec["unused_keys"]}
    wrapped = {f"module.{name}": tensor for name, tensor in content["teacher"].items()}
    wrapped["module.ibot_head.mlp.0.weight"] = torch.zeros(16, 24)
    for path in (file, save(case, {"teacher": wrapped})):
        report = medgmae.load_pretrained(model, Path(f"{path}::teacher"))
        case.same("missing", report.missing, [])
        if path == file:
            case.same("heads unused", {name for name in report.unused if "_head." in name}, heads)
        offer_tokens(case, model.eval(), case.input("volume")[:, None])


@adapter("voxelfm/manifest")
def manifest(case: Case) -> None:
    """Every name of the full-size list finds its place in the model of the card."""
    spec, shapes = case.spec, case.spec["state_dict"]
    case.same("tensors", len(shapes), spec["tensors"])
    numbers = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    periods = {name: torch.tensor(values) for name, values in spec["buffers"].items()}
    case.same("parameters", sum(numbers.values()) - sum(map(len, periods.values())), spec["parameters"])
    case.same("bytes", 4 * sum(numbers.values()), spec["float32_bytes"])
    heads = spec["heads_beside_it"]
    case.same("of the heads", sum(torch.Size(shape).numel() for shape in heads.values()), spec["parameters_head"])
    state = {name: torch.empty(shape, device="meta") for name, shape in {**shapes, **heads}.items()}
    model = on_meta("vit_base_patch14_112.voxelfm")
    report = medgmae.load_pretrained(model, {**state, **periods})
    case.same("missing", report.missing, [])
    case.same("tensors that had to be changed", {**report.resized, **report.adapted}, {})
    folded = [name for name in shapes if name in report.unused and name not in periods]
    case.same("unused", [name for name in folded if "gamma" not in name], ["backbone.mask_token"])
    ours = sum(parameter.numel() for parameter in model.parameters())
    case.same("parameters of ours", ours + sum(numbers[name] for name in folded), spec["parameters"])
    student, built = spec["config"], model.options()
    named = {"embed_dim": "embed_dim", "depth": "depth", "num_heads": "num_heads", "mlp_ratio": "mlp_ratio"}
    named |= {"rope_base": "rope_base", "num_register_tokens": "registers"}
    case.same("options", {n: built[ours] for n, ours in named.items()}, {n: student[n] for n in named})
    block = model.pretrained_cfg["input"]
    case.same("mean and deviation", block["normalize"], spec["norm"])
    case.same("window", block["window"], spec["clip"])
    case.equal("periods", HeadRope("unit", 100.0).angles((1, 1, 1), 72)[0], torch.zeros(36), EXACT)
