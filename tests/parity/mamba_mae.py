"""Adapters for the 3D Mamba MAE: tables and rotations of positions, optimisation, lists of names and shapes."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

import medgmae
from medgmae.layers import rope
from medgmae.models.vim import Vim
from medgmae.training import cosine_schedule, param_groups
from parity import adapter
from parity.case import Case, Options, triple
from parity.mamba_mae_models import WITHOUT_TOKEN
from parity.manifests import on_meta


@adapter("mamba_mae/position_tables")
def position_tables(case: Case) -> None:
    settings = Options(case.spec["config"])
    for dim, side, class_row in settings("sincos", []):
        table = _swapped_sincos(dim, side)
        table = torch.cat([torch.zeros(1, dim), table]) if class_row else table
        case.offer(f"sincos_d{dim}_g{side}_cls{int(class_row)}", table, "sincos")
    for dim, side in settings("rope3d", []):
        angles = rope.published_axial_angles((side,) * 3, dim).repeat_interleave(2, dim=1)  # one for each of a pair
        case.offer(f"rope3d_cos_d{dim}_g{side}", angles.cos(), "rope3d")
        case.offer(f"rope3d_sin_d{dim}_g{side}", angles.sin(), "rope3d")
    for _seed, dim, length in settings("rope1d", []):
        x = case.input(f"rope1d_in_d{dim}_L{length}")
        table = rope.Rotary("sequence", dim).table((length,), length, x)
        case.offer(f"rope1d_out_d{dim}_L{length}", rope.rotate(x, table), "rope1d")
        case.offer(f"rope1d_freqs_d{dim}", rope.sequence_angles(2, dim)[1], "rope1d")
    settings.done()


def _swapped_sincos(dim: int, side: int) -> Tensor:
    """The reference's table on a cube, (side³, dim), put together from ours of one axis.

    Its first block follows axis 1, its second axis 0, and the widths of the blocks are its own. Files carry their
    table, so ours need not be the same.
    """
    width = dim // 3 + dim // 3 % 2
    columns = []
    for axis, block in ((1, width), (0, width), (2, dim - 2 * width)):
        rows = medgmae.sincos_pos_embed(block, (side,))[0]  # (side, block)
        shape = [1, 1, 1, block]
        shape[axis] = side
        columns.append(rows.reshape(shape).expand(side, side, side, block).reshape(-1, block))
    return torch.cat(columns, dim=1)


@adapter("mamba_mae/optimisation")
def optimisation(case: Case) -> None:
    """Layer-wise learning rates, weight decay and the schedule of fine-tuning.

    The reference marks A_log and D as not to be decayed and then does not look at the marks: it decays A_log. Ours
    leaves it alone; with the marks left out the groups are the same.
    """
    settings = Options(case.spec["config"])
    listed, tolerance = case.spec["param_groups"], case.tolerance()
    token = "front" if "cls_token" in listed else None
    model = Vim(8, 4, 1, 12, settings("depth"), num_classes=2, pos_embed="learned", class_token=token)  # type: ignore[arg-type]
    decay, layer_decay = settings("weight_decay"), settings("layer_decay")
    ours = _groups(model, decay, layer_decay)
    model.no_weight_decay = lambda: {"pos_embed", "cls_token"}  # type: ignore[method-assign]
    groups = param_groups(model, decay, layer_decay=layer_decay)
    theirs = _groups(model, decay, layer_decay)
    case.same("parameters in param_groups", sorted(theirs), sorted(listed))
    for name, expected in listed.items():
        for key, value in expected.items():
            case.close(f"param_groups: {key} of {name}", theirs[name][key], value, tolerance)
        spared = re.search(r"\.A_(b_)?log$", name) is not None
        case.same(
            f"{name} with our marks", ours[name], {**theirs[name], "weight_decay": 0.0} if spared else theirs[name]
        )
    optimizer = torch.optim.AdamW(groups, lr=settings("lr"))
    schedule = cosine_schedule(optimizer, settings("epochs"), settings("warmup_epochs"), settings("min_lr"))
    settings.done()
    for epoch, rate in case.spec["lr_at_epoch"].items():
        schedule.step(float(epoch))
        for group in optimizer.param_groups:
            case.close(f"lr_at_epoch {epoch}", group["lr"], rate * group["lr_scale"], (1e-12, tolerance[1]))


def _groups(model: Vim, decay: float, layer_decay: float) -> dict[str, dict[str, float]]:
    """Official name of every optimised parameter: its share of the learning rate and its weight decay."""
    names = {id(parameter): re.sub(r"^norm\.", "norm_f.", name) for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: {key: group[key] for key in ("lr_scale", "weight_decay")}
        for group in param_groups(model, decay, layer_decay=layer_decay)
        for parameter in group["params"]
    }


@adapter("mamba_mae/manifest")
def manifest(case: Case) -> None:
    """The official names and shapes fill the registered model, all of them, and the counts agree."""
    spec = case.spec
    shapes = {name: tuple(shape) for name, shape in spec["state_dict"].items()}
    whole = {"pretraining": True, "classifier": False}[spec["kind"]]
    model = _registered(spec, whole)
    encoder: Any = model.encoder if whole else model
    report = medgmae.load_pretrained(model, {name: torch.empty(s, device="meta") for name, s in shapes.items()})
    case.same("names that are missing", report.missing, [])
    case.same("tensors that had to be changed", {**report.resized, **report.adapted}, {})
    case.same("our names", sorted(report.loaded), sorted(model.state_dict()))
    unused = [name for name in shapes if re.search(WITHOUT_TOKEN, name)]
    case.same("names that find no place", sorted(report.unused), sorted(unused))
    case.same("patches", math.prod(encoder.grid_size), spec["num_patches"])
    case.same("elements of the file", sum(map(math.prod, shapes.values())), spec["n_state_dict_elements"])
    _check_counts(case, model, {name: math.prod(shapes[name]) for name in unused})
    _check_sizes(case, model, encoder)


def _registered(spec: dict[str, Any], whole: bool) -> Any:
    """The registered model that has most of a manifest's sizes, with those that differ as options."""
    stem = "mae_vim_" if whole else "vim_"
    wanted = _sizes(spec, whole)
    found = {name: _own_sizes(on_meta(name)) for name in medgmae.list_models(f"{stem}*")}
    name = min(found, key=lambda name: sum(found[name][key] != wanted[key] for key in wanted))
    options = {key: value for key, value in wanted.items() if found[name][key] != value}
    published = wanted["embed_dim"] == 384 and wanted["depth"] == 12 and wanted["img_size"] == (160, 160, 160)
    assert not (published and options), f"{name} is not registered with {options}"
    if whole:
        return on_meta(name, rope="sequence", scan_order="given", off_by_one=True, **options)
    return on_meta(name, rope="axial_published", pos_embed="learned", num_classes=spec["num_classes"], **options)


def _sizes(spec: dict[str, Any], whole: bool) -> dict[str, Any]:
    """A manifest's sizes as options of our models."""
    names = ("embed_dim", "depth", "in_chans", *(("decoder_embed_dim", "decoder_depth") if whole else ()))
    found = {name: spec[name] for name in names}
    return {**found, "img_size": triple(spec["input_size"]), "patch_size": triple(spec["patch_size"])}


def _own_sizes(model: Any) -> dict[str, Any]:
    """The same of a model."""
    encoder, decoder = getattr(model, "encoder", model), getattr(model, "decoder", None)
    found = {name: getattr(encoder, name) for name in ("embed_dim", "in_chans", "img_size", "patch_size")}
    found["depth"] = len(encoder.blocks)
    if decoder is not None:
        found |= {"decoder_embed_dim": decoder.embed.out_features, "decoder_depth": len(decoder.blocks)}
    return found


def _check_counts(case: Case, model: Any, unused: dict[str, int]) -> None:
    """Parameters of the reference are ours and what ours has not; its buffers are all rotary tables."""
    spec = case.spec
    buffers, frozen = set(spec["buffers"]), set(spec["frozen_parameters"])
    extra = {name: count for name, count in unused.items() if name not in buffers}
    total = sum(p.numel() for p in model.parameters()) + sum(extra.values())
    case.same("parameters", total, spec["n_parameters"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trained += sum(count for name, count in extra.items() if name not in frozen)
    case.same("trainable parameters", trained, spec["n_parameters_trainable"])
    case.same("buffers that find no place", sorted(buffers), sorted(set(unused) & buffers))
    ours = {"pos_embed": "encoder.pos_embed", "decoder_pos_embed": "decoder.pos_embed"}
    still = {
        name for name, p in model.named_parameters() if not p.requires_grad and not name.endswith("prefix_pos_embed")
    }
    case.same("frozen", still, {ours[name] for name in frozen if name not in extra})


def _check_sizes(case: Case, model: Any, encoder: Any) -> None:
    """What the manifest says about the sizes beside the shapes."""
    case.same("sizes", _own_sizes(model), _sizes(case.spec, hasattr(model, "decoder")))
    mixer = encoder.blocks[0].mixer
    found = {
        "d_state": mixer.d_state,
        "d_conv": mixer.conv1d.kernel_size[0],
        "expand": mixer.out_proj.in_features // encoder.embed_dim,
        "dt_rank": mixer.dt_rank,
        "n_visible_at_0_75": medgmae.random_masking(1, math.prod(encoder.grid_size), 0.75).keep.shape[1],
    }
    if hasattr(model, "decoder"):
        found["decoder_dt_rank"] = model.decoder.blocks[0].mixer.dt_rank
    for name, value in found.items():
        case.same(name, value, case.spec.get(name, value))
