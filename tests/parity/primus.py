"""Adapters for Primus and OpenMind's pre-trainings: encoders in both orders of tokens, MAE, SimMIM, files."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import torch
from torch import Tensor

import medgmae
from medgmae.layers.dense import PatchDecode
from medgmae.layers.rope import PRIMUS
from medgmae.models.mae_primus import masked_primus, simmim_primus
from medgmae.models.primus import Primus
from medgmae.training import poly_schedule
from parity import adapter
from parity.case import EXACT, Case, Options

# The tiny models of the cases have other multiples of a GELU MLP's width than the registered ones in no case.
_CONSTANT = {"layer_scale": True, "scale_attn_inner": True, "class_token": False}


def sizes(options: Options) -> dict[str, Any]:
    """What an encoder is built with."""
    options.require(**_CONSTANT)
    options.ignore("head_dim", "mlp_hidden", "num_classes", "grid")
    return {
        "img_size": tuple(options("input_shape")),
        "patch_size": options("patch"),
        "in_chans": options("in_chans", 1),
        "embed_dim": options("embed_dim"),
        "depth": options("depth"),
        "num_heads": options("num_heads"),
        "registers": options("register_tokens", 0),
    }


def order_of(case: Case) -> Any:
    """The order of a case's tokens, as ``load_pretrained`` takes it."""
    return "raster" if str(case.spec["token_order"]).startswith("raster") else "swapped"


def official_order(case: Case, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Tokens in raster order (B, N, ...) in the order of the case."""
    if order_of(case) == "raster":
        return tokens
    return tokens.unflatten(1, grid).transpose(1, 2).flatten(1, 3)


def rope_row(angles: Tensor) -> Tensor:
    """Angles (N, d / 2) as the reference's tables have them: sines and cosines, each twice."""
    return torch.cat([angles.sin().repeat_interleave(2, 1), angles.cos().repeat_interleave(2, 1)], 1)


def dense_volume(case: Case, model: Primus, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """What the case's dense head makes of tokens without registers, as a volume."""
    parts = {n.removeprefix("up_projection.decode."): t for n, t in case.weights.items() if n.startswith("up_proj")}
    chans = len(parts[max(name for name in parts if name.endswith("bias"))])
    head = PatchDecode(model.embed_dim, chans, model.patch_size)
    named = {}
    for name, tensor in parts.items():
        stage, *inner = name.split(".")
        named[f"{'norms' if inner[0] == '1' else 'convs'}.{stage}.{inner[-1]}"] = tensor
    head.load_state_dict(named)
    return medgmae.unpatchify(head(tokens), model.patch_size, grid, chans)


@adapter("primus/encoder")
def encoder(case: Case) -> None:
    """All hidden states; the same file read in the other order must give something else."""
    options = Options(case.spec["config"])
    model = Primus(**sizes(options))
    options.done()
    report = medgmae.load_pretrained(model, case.weights, token_order=order_of(case), source_grid=model.grid_size)
    assert not report.missing, report.missing
    model.eval()
    x, grid, prefix = case.input("image"), model.grid_size, model.num_prefix_tokens
    stem = model.patch_embed(x)
    case.offer("stem", stem.mT.unflatten(2, grid))
    angles = PRIMUS.angles(grid, model.embed_dim // model._built["num_heads"])
    case.offer("rope", rope_row(angles))
    tokens, maps = model.forward_intermediates(x, return_prefix_tokens=True, output_fmt="NLC")
    for block, (patches, registers) in enumerate(maps):
        ours = torch.cat([registers, official_order(case, patches, grid)], 1)
        case.offer(f"hidden_{block}", ours, "hidden")
    patches = tokens[:, prefix:]
    case.offer("tokens", torch.cat([tokens[:, :prefix], official_order(case, patches, grid)], 1))
    case.offer("tokens_raster", patches)
    volume = functools.partial(dense_volume, case, model, patches, grid)
    for name in ("up_projection", "logits"):
        if case.has(name):
            case.offer(name, volume())
    if grid[0] == grid[1]:
        other: Any = {"raster": "swapped", "swapped": "raster"}[order_of(case)]
        medgmae.load_pretrained(model, case.weights, token_order=other, source_grid=grid)
        assert not torch.allclose(model.forward_features(x), tokens, atol=0.01), (
            "the order of the tokens changes nothing"
        )


@adapter("primus/container")
def container(case: Case) -> None:
    """The published container: the order of the tokens is known by the trainer's name."""
    options = Options(case.spec["config"])
    model = Primus(**sizes(options))
    options.done()
    file = case.path.parent / case.spec["file"]
    report = medgmae.load_pretrained(model, file)
    case.same("missing", report.missing, [])
    notes = " ".join(report.notes)
    assert f"token order {order_of(case)!r}: the file was written by" in notes, notes
    names = {name for name in case.spec["network_weights"] if ".eva." in f".{name}" or "down_projection" in name}
    case.same("unused", set(report.unused), set(case.spec["network_weights"]) - names)
    case.offer("tokens_raster", model.eval().forward_features(case.input("image")))


@adapter("primus/mae_voxel")
def mae_voxel(case: Case) -> None:
    """The masked autoencoder from explicit noise, and its loss with the right mask and with the trainer's."""
    options = Options(case.spec["config"])
    options.ignore("decoder_embed_dim")
    settings = {**sizes(options), "decoder_depth": options("decoder_depth"), "mask_ratio": options("mask_ratio")}
    settings["decoder_num_heads"] = options("decoder_num_heads")
    kept = options("kept")
    options.done()
    model = masked_primus(**settings)
    report = medgmae.load_pretrained(model, case.weights, token_order=order_of(case))
    case.same("what found no place", (report.missing, report.unused), ([], {}))
    model.eval()
    x, grid = case.input("image"), model.grid_size
    # The noise is in the order of the file's tokens: exchanging the axes is its own inverse.
    numbers = official_order(case, torch.arange(math.prod(grid))[None], grid)[0]
    keep = torch.argsort(case.input("noise"), dim=1)[:, :kept]
    case.offer("keep", keep, tolerance=EXACT)
    masking = medgmae.random_masking(
        *case.input("noise").shape, model.mask_ratio, noise=case.input("noise")[:, numbers]
    )
    case.offer("keep_raster", masking.keep, tolerance=EXACT)
    case.offer("keep_raster", numbers[keep], tolerance=EXACT)
    case.offer("visible_grid", 1 - masking.mask.unflatten(1, grid), tolerance=EXACT)
    case.offer("trainer_mask_grid", 1 - masking.mask.unflatten(1, grid).transpose(1, 2), tolerance=EXACT)
    states: dict[str, list[Tensor]] = {"encoder": [], "decoder": []}
    for part, held in states.items():
        for block in getattr(model, part).blocks:
            block.register_forward_hook(lambda _, given, out, held=held: held.append(out))
    states |= {"norm": [], "input": []}
    model.decoder.norm.register_forward_hook(lambda _, given, out: states["norm"].append(out))
    model.decoder.blocks[0].register_forward_pre_hook(lambda _, given: states["input"].append(given[0]))
    output = model(x, masking)
    for block, hidden in enumerate(states["encoder"]):
        case.offer(f"encoder_hidden_{block}", hidden, "encoder_hidden")
    for block, hidden in enumerate(states["decoder"]):
        case.offer(f"decoder_hidden_{block}", official_order(case, hidden, grid), "decoder_hidden")
    case.offer("decoded", official_order(case, states["norm"][0], grid))
    case.offer("decoder_input", official_order(case, states["input"][0] - model.decoder.pos_embed, grid))
    case.offer("encoded", model.forward_features(x, keep=masking.keep))
    case.offer("reconstruction", model.reconstruct(x, masking, paste_visible=False))
    case.offer("loss_aligned", output.loss)
    model.loss_patches = "transposed"
    case.offer("loss_trainer", model(x, masking).loss)


@adapter("primus/simmim")
def simmim(case: Case) -> None:
    options = Options(case.spec["config"])
    model = simmim_primus(**sizes(options))
    options.done()
    report = medgmae.load_pretrained(model, case.weights, token_order=order_of(case), source_grid=model.grid_size)
    case.same("what found no place", (report.missing, report.unused), ([], {}))
    model.eval()
    x, mask = case.input("image"), 1 - case.input("visible").flatten(1)
    held: list[Tensor] = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda _, given, out: held.append(out))
    tokens = model.encoder.forward_masked(x, mask, model.decoder.mask_token)
    for block, hidden in enumerate(held):
        case.offer(f"hidden_{block}", hidden, "hidden")
    case.offer("tokens", tokens)
    order = torch.argsort(mask, dim=1, stable=True)
    masking = medgmae.Masking(order[:, : int((mask[0] == 0).sum())], torch.argsort(order, dim=1), mask)
    case.offer("loss", model(x, masking).loss)
    case.offer("reconstruction", model.reconstruct(x, masking, paste_visible=False))


@adapter("primus/pos_embed_interpolate")
def pos_embed_interpolate(case: Case) -> None:
    options = Options(case.spec["config"])
    options.ignore("patch")
    source, target = options("old_grid"), options("new_grid")
    options.done()
    case.offer("pos_embed", medgmae.resample_pos_embed(case.input("pos_embed"), source, target))


@adapter("primus/rope_table")
@adapter("colipri/rope_table")
def rope_table(case: Case) -> None:
    """Tables by their names, ``rope_hd<channels of a head>_<grid>``; of large ones some rows, which are listed."""
    for name in list(case.outputs):
        if name.endswith("_rows"):
            continue
        _, head, shape = name.split("_")
        grid = tuple(int(n) for n in shape.split("x"))
        table = rope_row(PRIMUS.angles(grid, int(head.removeprefix("hd"))))
        rows = {**case.inputs, **case.outputs}.get(f"{name}_rows")
        if rows is not None:
            assert int(rows.max()) < len(table), f"{name}_rows: a row beyond the {len(table)} of the table"
            case.offer(f"{name}_rows", rows)  # says which rows were kept
            table = table[rows.long()]
        case.offer(name, table)


@adapter("primus/schedule")
def schedule(case: Case) -> None:
    """The learning rate of every epoch."""
    options = Options(case.spec["config"])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=options("lr"))
    ours = poly_schedule(optimizer, options("epochs"), options("warmup_epochs"))
    options.done()
    for epoch, rate in enumerate(case.spec["outputs"]["lr"]):
        ours.step(epoch)
        case.close(f"learning rate of epoch {epoch}", optimizer.param_groups[0]["lr"], rate, case.tolerance())


# What a manifest's model is here, by a word of its name; the encoder alone where nothing else of it is read.
_MODELS = {
    "-MAE": "mae_primus_m_patch8_160",
    "-SimMIM": "simmim_primus_m_patch8_160",
    "-MG": "simmim_primus_m_patch8_160",
}


def model_of_manifest(spec: dict[str, Any], name: str) -> Any:
    """A registered model without storage, for the manifest's input."""
    with torch.device("meta"):
        return medgmae.create_model(name, img_size=tuple(spec["input"]), in_chans=spec["in_chans"])


@adapter("primus/manifest")
@adapter("colipri/manifest")
def manifest(case: Case) -> None:
    """Every official name and shape finds its place in the registered model, without values."""
    spec = case.spec
    state = {name: torch.empty(shape, device="meta") for name, shape in spec["state_dict"].items()}
    colipri = spec["system"] == "colipri"
    size = re.match(r"primus_([sbml])_encoder", spec["model"])
    name = next((ours for word, ours in _MODELS.items() if spec["model"].endswith(word)), "primus_m_patch8_160")
    name = f"primus_{size[1]}_patch8_160" if size else "primus_m_patch8_192" if colipri else name
    model = model_of_manifest(spec, name)
    if colipri:
        with torch.device("meta"):
            model = medgmae.create_model(name, projection_dim=768)
    report = medgmae.load_pretrained(model, state, token_order=order_of(case))
    case.same("names that are missing", report.missing, [])
    case.same("tensors that had to be changed", {**report.resized, **report.adapted}, {})
    own = (spec["encoder_prefix"], spec["stem_prefix"])
    case.same("of the encoder, unused", [n for n in report.unused if n.startswith(own)], [])
    case.same("tensors", len(state), spec["tensors"])
    buffers = spec.get("buffers", [])
    case.same("parameters", sum(t.numel() for n, t in state.items() if n not in buffers), spec["parameters"])
    case.same("bytes", 4 * sum(t.numel() for t in state.values()), spec["float32_bytes"])
    unused = sum(state[n].numel() for n in report.unused)
    loaded = sum(t.numel() for n, t in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items())
    case.same("values in the model", loaded, sum(t.numel() for t in state.values()) - unused)
    case.same("our names", set(report.loaded), set(model.state_dict()))
    if name in _MODELS.values():
        case.same("unused", report.unused, {})
