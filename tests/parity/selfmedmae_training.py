"""Adapter for what SelfMedMAE's trainers do beside the models: rates, groups of parameters, and which weights they take
over. Where they drop weights, this library converts them; the case says what they drop, and ours is checked for taking
it."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

import medgmae
from medgmae.layers.masking import visible_count
from medgmae.training import cosine_schedule, param_groups, scale_lr
from parity import adapter
from parity.case import Case, Options

RATES: tuple[float, float] = (1e-19, 1e-9)
FACTS = ("bare_state_dict", "grid_mismatch", "channel_mismatch", "stripped_keys_with_channel_mismatch")


@adapter("selfmedmae/trainer_behaviour")
def trainer_behaviour(case: Case) -> None:
    spec = Options(case.spec)
    spec.ignore("parity_kind", "case", "system", "source", "versions", "tolerance", "notes")
    if "visible_counts" in spec:
        for text, count in spec("visible_counts").items():
            tokens, ratio = re.fullmatch(r"L=(\d+),mask_ratio=([\d.]+)", text).groups()  # type: ignore[union-attr]
            case.same(f"visible of {text}", visible_count(int(tokens), float(ratio)), count)
    if "unetr_optimizer" in spec:
        _unetr_optimizer(case, Options(spec("unetr_optimizer")))
    if "mae3d_optimizer" in spec:
        _mae_optimizer(case, Options(spec("mae3d_optimizer")))
    for name in [*FACTS, "classification_finetune", "head_spatial_dim_2"]:
        if name in spec:
            CHECKS.get(name, _dropped)(case, name, spec(name))
    for name in case.spec:
        if re.match(r"mae[23]d_.*to_unetr", name):
            _mapping(case, name, Options(spec(name)))
    spec.done()


def _rates(case: Case, what: str, settings: Options, listed: dict[str, float], peak: float) -> None:
    """The learning rate at each epoch, fractions included."""
    base = scale_lr(settings("lr"), settings("batch_size"))
    case.close(f"{what}: peak_lr", base, peak, RATES)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    schedule = cosine_schedule(optimizer, settings("epochs"), settings("warmup_epochs"))
    for epoch, rate in listed.items():
        schedule.step(float(epoch))
        case.close(f"{what}: lr at epoch {epoch}", optimizer.param_groups[0]["lr"], rate, (base * 1e-13, 1e-7))


Groups = dict[str, tuple[float, ...]]


def _ours(model: nn.Module, *options: float) -> Groups:
    """Weight decay and share of the learning rate of every optimised parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups(model, *options)
    return {names[id(p)]: (g["weight_decay"], g.get("lr_scale", 1.0)) for g in groups for p in g["params"]}


def _theirs(groups: list[dict[str, Any]]) -> Groups:
    return {name: (g["weight_decay"], g.get("lr_scale", 1.0)) for g in groups for name in g["names"]}


def _same_groups(case: Case, what: str, ours: Groups, theirs: Groups) -> None:
    case.same(f"{what}: parameters", sorted(ours), sorted(theirs))
    for name, expected in theirs.items():
        case.equal(f"{what}: {name}", torch.tensor(ours[name]), torch.tensor(expected), (1e-9, 1e-6))


def _unetr_optimizer(case: Case, options: Options) -> None:
    """The encoder's groups by name. The decoder has other names here: its kernels are one group and its bias another,
    in both."""
    settings = Options(options("config"))
    _rates(case, "unetr", settings, options("lr_at_epoch_before_layer_scale"), options("peak_lr"))
    depth = settings("encoder_depth")
    model = medgmae.create_model("unetr_vit_nano_patch8_32", depth=depth)
    ours, theirs = _ours(model, settings("weight_decay"), settings("layer_decay")), _theirs(options("groups"))
    settings.done()
    options.done()
    parts = [{name: g for name, g in groups.items() if name.startswith("encoder.")} for groups in (ours, theirs)]
    _same_groups(case, "unetr", *parts)
    kinds = [
        sorted({(name.rpartition(".")[2], *g) for name, g in groups.items() if name.startswith("decoder.")})
        for groups in (ours, theirs)
    ]
    case.same("unetr: groups of the decoder", *kinds)


def _mae_optimizer(case: Case, options: Options) -> None:
    """The reference decays tokens, which ours spares; with ours told not to, the groups are the same."""
    settings = Options(options("config"))
    _rates(case, "mae3d", settings, options("lr_at_epoch"), options("peak_lr"))
    theirs = _theirs(options("groups"))
    depths = [1 + max(int(n.split(".")[2]) for n in theirs if n.startswith(f"{part}.blocks")) for part in _PARTS]
    model = medgmae.create_model("mae_vit_nano_patch8_32", depth=depths[0], decoder_depth=depths[1])
    model.encoder.pos_embed.requires_grad_(False)  # type: ignore[union-attr]
    decay = settings("weight_decay")
    settings.done()
    options.done()
    spared = _ours(model, decay)
    model.no_weight_decay = lambda: set()  # type: ignore[method-assign]
    ours = _ours(model, decay)
    _same_groups(case, "mae3d", {_official(name): g for name, g in ours.items() if _official(name)}, theirs)
    changed = {_official(name) for name, g in ours.items() if g != spared[name]}
    case.same("mae3d: what ours does not decay", changed - {""}, {"mask_token", "encoder.cls_token"})


_PARTS = ("encoder", "decoder")


def _official(name: str) -> str:
    """SelfMedMAE's name of one of our autoencoder's tensors; empty of what it does not have."""
    if name in ("decoder.pos_embed", "encoder.pos_embed"):
        return name.replace(".", "_")
    if name == "decoder.prefix_pos_embed":
        return ""
    return name.replace("decoder.mask_token", "mask_token").replace("decoder.embed.", "encoder_to_decoder.")


def _mae_state(width: int, grid: tuple[int, ...], patch: int, linear: bool = False) -> dict[str, Tensor]:
    """An autoencoder's weights as the reference's trainer saves them, with random tables."""
    dims = len(grid)
    model: Any = medgmae.create_model(
        "mae_vit_nano_patch8_32", img_size=tuple(patch * g for g in grid), patch_size=patch, embed_dim=width, depth=1,
        num_heads=2, decoder_embed_dim=12, decoder_depth=1, decoder_num_heads=2, dims=dims,
    )  # fmt: skip
    state = {official: value.clone() for name, value in model.state_dict().items() if (official := _official(name))}
    for name in ("encoder_pos_embed", "decoder_pos_embed"):
        state[name] = torch.randn_like(state[name])
        if dims == 2:  # the class row, which is zero
            state[name] = torch.cat([torch.zeros_like(state[name][:, :1]), state[name]], dim=1)
    if dims == 2:
        del state["encoder_to_decoder.bias"]
    if linear:  # (E, d h w C), channel fastest
        key = "encoder.patch_embed.proj.weight"
        state[key] = state[key].movedim(1, -1).flatten(1)
    return state


def _unetr(width: int, grid: tuple[int, ...], patch: tuple[int, ...], in_chans: int = 1) -> Any:
    size = tuple(g * p for g, p in zip(grid, patch, strict=True))
    return medgmae.create_model(
        "unetr_vit_nano_patch8_32", img_size=size, patch_size=patch, in_chans=in_chans, embed_dim=width, depth=1,
        num_heads=2, taps=(0,) * _taps(max(patch)), dims=len(grid),
    )  # fmt: skip


def _taps(patch: int) -> int:
    return int(math.log2(patch)) - 1


def _grid(tokens: int, dims: int = 3) -> tuple[int, ...]:
    """A grid of so many patches: all that any factors give is that there are as many."""
    if dims == 1:
        return (tokens,)
    first = next((n for n in range(2, tokens + 1) if tokens % n == 0), 1)
    return (first, *_grid(tokens // first, dims - 1))


def _shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in found.split(",")) for found in re.findall(r"torch\.Size\(\[([\d, ]+)\]\)", text)]


def _taken(case: Case, name: str, model: Any, state: dict[str, Tensor], source: tuple[int, ...], **options: Any) -> Any:
    """Ours takes the whole encoder over: what is missing is the decoder alone."""
    report = medgmae.load_pretrained(model, state, source_grid=source, **options)
    missing = [key for key in report.missing if not key.startswith(("decoder.", "head."))]
    case.same(f"{name}: what ours leaves out of the encoder", missing, [])
    table, key = model.encoder.pos_embed, "encoder_pos_embed"
    expected = state[key if key in state else "pos_embed"]
    expected = expected[:, expected.shape[1] - math.prod(source) :]
    if table.shape == expected.shape and model.encoder.grid_size == source:
        case.equal(f"{name}: table of positions", table, expected)
    return report


def _grid_mismatch(case: Case, name: str, text: str) -> None:
    """Refused by the reference; ours resamples the table."""
    theirs, new = _shapes(text)
    case.same(f"{name}: the reference", text.startswith("RuntimeError: size mismatch for pos_embed"), True)
    source, target = _grid(theirs[1] - 1), _grid(new[1] - 1)
    report = _taken(case, name, _unetr(theirs[2], target, (8, 8, 8)), _mae_state(theirs[2], source, 8), source)
    case.same(f"{name}: ours resamples", [key for key in report.resized if key.endswith("pos_embed")] != [], True)


def _channel_mismatch(case: Case, name: str, text: str) -> None:
    """Refused or dropped by the reference; ours adapts the stem."""
    known = _shapes(case.spec["channel_mismatch"])
    width, patch, chans = known[0][0], known[0][2:], known[1][1]
    state = _mae_state(width, (2, 2, 2), patch[0])
    if name == "channel_mismatch":
        case.same(f"{name}: the reference", text.startswith("RuntimeError: size mismatch for patch_embed"), True)
    else:
        case.same(f"{name}: the reference", text.startswith("patch_embed dropped"), True)
        table = state["encoder_pos_embed"]
        state = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
        state["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    report = _taken(case, name, _unetr(width, (2, 2, 2), patch, chans), state, (2, 2, 2))
    case.same(f"{name}: ours adapts the stem", [k for k in report.adapted if "patch_embed" in k] != [], True)


def _bare(case: Case, name: str, text: str) -> None:
    case.same(f"{name}: the reference", text.startswith("accepted"), True)
    _taken(case, name, _unetr(24, (2, 2, 2), (8, 8, 8)), _mae_state(24, (2, 2, 2), 8), (2, 2, 2))


def _classifier(case: Case, name: str, facts: dict[str, Any]) -> None:
    """The reference leaves the classifier's table random; ours takes it over."""
    options = Options(facts)
    lost = set(re.findall(r"'([^']+)'", re.split("unexpected_keys", options("load_message"))[0]))
    found = {part: options(f"{part}_taken_from_pretraining") for part in ("pos_embed", "norm")}
    found["patch_embed"] = options("patch_embed_taken")
    options.done()
    case.same(f"{name}: the reference", {p: not any(key.startswith(p) for key in lost) for p in found}, found)
    model: Any = medgmae.ViT(img_size=(16, 24), patch_size=8, in_chans=1, embed_dim=24, depth=1, num_heads=2,
                             num_classes=3, pos_embed="learned", dims=2)  # fmt: skip
    _taken(case, name, model, _mae_state(24, (2, 3), 8), (2, 3), strict=False)


def _no_middle_slice(case: Case, name: str, text: str) -> None:
    """The reference's last version fails on a 2D decoder; ours predicts the middle slice."""
    case.same(f"{name}: the reference", text.startswith("IndexError"), True)
    model: Any = medgmae.create_model("unetr_vit_nano_patch8_32", img_size=(16, 16, 8), slice_axis=-1, num_classes=3)
    case.same(f"{name}: ours", tuple(model(torch.rand(1, 1, 16, 16, 8)).shape), (1, 3, 16, 16))


def _dropped(case: Case, name: str, value: Any) -> None:
    raise AssertionError(f"nothing is known of {name}")


CHECKS: dict[str, Any] = {
    "bare_state_dict": _bare,
    "grid_mismatch": _grid_mismatch,
    "channel_mismatch": _channel_mismatch,
    "stripped_keys_with_channel_mismatch": _channel_mismatch,
    "classification_finetune": _classifier,
    "head_spatial_dim_2": _no_middle_slice,
}


def _mapping(case: Case, name: str, options: Options) -> None:
    """An autoencoder's file into a UNETR: the reference drops the stem or the table, ours takes both, converted.

    What is learned on slices goes into a model whose first axis is the one across slices; the reference's is the last.
    """
    printed, message = options("printed"), options("load_message")
    note, taken = options("note", ""), options("patch_embed_taken", None)
    options.done()
    lost = set(re.findall(r"'([^']+)'", message.split("unexpected_keys")[0]))
    said = {word for line in printed for word in ("pos_embed", "patch_embed.proj.weight") if f"Skipping {word}" in line}
    case.same(
        f"{name}: what the reference says it drops {note}", said, {key for key in lost if not key.endswith("bias")}
    )
    if taken is not None:
        case.same(f"{name}: stem of the reference", "patch_embed.proj.weight" not in lost, taken)
    shapes = {word: [_shapes(line) for line in printed if re.search(key, line)] for word, key in _PRINTED.items()}
    width = shapes["stem"][0][0][0] if shapes["stem"] else shapes["table"][0][0][2]
    rows, new = (found[1] for found in shapes["table"][0]) if shapes["table"] else (5, 5)
    if name.startswith("mae2d"):
        source = _grid(rows - 2, 2)  # the table has a class row, and gets a second one
        patch = shapes["stem"][0][1][2:] if shapes["stem"] else (8, 8)
        target = source if len(patch) == 2 else (1, *source)
        patch = patch if len(patch) == 2 else (patch[2], *patch[:2])
        state = _mae_state(width, source, patch[-1])
        stem = state["encoder.patch_embed.proj.weight"]
        expected = stem if len(patch) == 2 else stem.unsqueeze(2).expand(-1, -1, patch[0], -1, -1) / patch[0]
    else:
        source, target, patch = _grid(rows - 1), _grid(new - 1), shapes["stem"][0][1][2:]
        state = _mae_state(width, source, patch[0], linear=True)
        stem = state["encoder.patch_embed.proj.weight"]
        expected = stem.reshape(len(stem), *patch, -1).movedim(-1, 1)
    model = _unetr(width, target, patch)
    _taken(case, name, model, state, (1, *source) if len(target) > len(source) else source)
    case.equal(f"{name}: stem", model.encoder.patch_embed.proj.weight, expected)


# What a printed line is about, by a part of it.
_PRINTED = {"stem": "patch_embed|Conv2d", "table": "Skipping pos_embed"}
