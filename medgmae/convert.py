"""The border: state dictionaries of every known dialect become ours, once, here.

Our language: ``encoder.*`` and ``decoder.*``; tables of positions (1, N, E) without class row; a class row of the
encoder's table added into the class token; patch weights (E, C, *patch). See :func:`convert`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medgmae import convert_gaussian as gaussian
from medgmae.cards import WeightsError
from medgmae.layers import sincos_grid

Grid = tuple[int, ...]

# Wrappers put these in front of every name; they are removed as often as they stand there.
PREFIXES = ("module.", "_orig_mod.", "model.")

STEM = "patch_embed.proj.weight"

# Parts of related architectures that our encoder does not compute; dropping them in silence would change the features.
FOREIGN = re.compile(r"(reg_token|dist_token|q_norm|k_norm|rope|w12|q_bias|gamma_1|relative_position)")


class Target(NamedTuple):
    """What the model to be filled says about itself: its patch grid, patch size and input channels."""

    grid: Grid
    patch_size: Grid
    in_chans: int


@dataclass
class Converted:
    """Weights in our language.

    source: the dialect that was recognised.
    state: our name to tensor.
    renamed: the file's name to ours.
    unused: the file's name to the reason why it has no place.
    grid: patch grid of the tables in ``state``.
    expects: settings that the model must have for the weights to mean the same, as dotted attribute to value.
    """

    source: str
    state: dict[str, Tensor] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    grid: Grid = ()
    expects: dict[str, Any] = field(default_factory=dict)


class _File:
    """A stripped state dictionary, taken apart entry by entry into a :class:`Converted`."""

    def __init__(self, state: Mapping[str, Tensor], origin: str, target: Target | None, source_grid: Grid | None):
        self.origin, self.target, self.source_grid = origin, target, source_grid
        self.rest: dict[str, tuple[str, Tensor]] = {}
        self.out = Converted("")
        for full, tensor in state.items():
            name = strip_prefixes(full)
            if name in self.rest:
                raise WeightsError(f"{origin}: {full!r} and {self.rest[name][0]!r} are both {name!r} without prefixes")
            self.rest[name] = (full, tensor)
        if any(name.startswith("backbone.") for name in self.rest):
            self._enter_backbone()

    def _enter_backbone(self) -> None:
        inside: dict[str, tuple[str, Tensor]] = {}
        for name, (full, tensor) in self.rest.items():
            if name.startswith("backbone."):
                inside[name.removeprefix("backbone.")] = (full, tensor)
            else:
                self.out.unused[full] = "beside the backbone (projector or decoder of the pre-training)"
        self.rest = inside

    def has(self, name: str) -> bool:
        return name in self.rest

    def has_any(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.rest)

    def tensor(self, name: str) -> Tensor:
        if name not in self.rest:
            raise WeightsError(f"{self.origin}: has no {name!r}; the file is incomplete, fetch or export it again")
        return self.rest[name][1]

    def table(self, name: str) -> Tensor:
        """A table of positions or a token, (1, N, E)."""
        tensor = self.tensor(name)
        if tensor.dim() != 3 or len(tensor) != 1:
            raise WeightsError(f"{self.origin}: {name!r} has shape {tuple(tensor.shape)}, expected (1, rows, width)")
        return tensor

    def take(self, name: str, ours: str, tensor: Tensor | None = None) -> None:
        """Move an entry to its place, with another tensor if one is given."""
        full, original = self.rest.pop(name)
        self.out.state[ours] = original if tensor is None else tensor
        self.out.renamed[full] = ours

    def drop(self, prefix: str, why: str) -> None:
        for name in [n for n in self.rest if n.startswith(prefix)]:
            self.out.unused[self.rest.pop(name)[0]] = why

    def take_all(self, rename: Callable[[str], str | None]) -> None:
        """Move every entry that ``rename`` gives a place."""
        for name in list(self.rest):
            ours = rename(name)
            if ours is not None:
                self.take(name, ours)


def strip_prefixes(name: str) -> str:
    """Remove the wrappers' prefixes in front of a name, however often they stand there."""
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def convert(
    state: Mapping[str, Tensor],
    *,
    origin: str = "state dictionary",
    config: Mapping[str, Any] | None = None,
    target: Target | None = None,
    source_grid: Grid | None = None,
) -> Converted:
    """Recognise a state dictionary and translate it.

    Known: TANGERINE (pre-training and fine-tuning), GL-MAE, MedGMAE, SelfMedMAE (3D, UVA, encoders of its UNETR), plain
    MAE and timm ViT dictionaries, our own files.

    Args:
        state: name to tensor.
        origin: file name for messages.
        config: the config that travels with one of our own files.
        target: the model to be filled; needed where the file alone does not say its grid or patch.
        source_grid: patch grid (d, h, w) of the file's table, where it is not a cube and not the model's.

    Raises:
        WeightsError: nothing is recognised, or the grid or patch of the file cannot be known.
    """
    file = _File(state, origin, target, source_grid)
    if config is not None:
        _own(file, config["grid"])
    elif file.has("encoder_pos_embed"):
        _mae3d(file)
    elif file.has("encoder.pos_embed") and (file.has("decoder.mask_token") or file.has("decoder.query_tokens")):
        _own(file, None)
    elif file.has("encoder.pos_embed") and file.has(f"encoder.{STEM}"):
        file.drop("decoder.", "decoder of a UNETR")
        file.rest = {n.removeprefix("encoder."): v for n, v in file.rest.items()}
        _plain(file, "UNETR encoder of SelfMedMAE")
    elif file.has(STEM) and file.has("blocks.0.norm1.weight"):
        _plain(file, "")
    else:
        names = ", ".join(list(file.rest)[:6]) or "none"
        raise WeightsError(
            f"{origin}: not recognised as a checkpoint of TANGERINE, GL-MAE, MedGMAE, SelfMedMAE, a plain MAE, a timm "
            f"ViT or of this library. Its first names: {names}. Rename the entries to timm's ViT names and try again"
        )
    return file.out


def _own(file: _File, grid: Any) -> None:
    """Our own names; an encoder's file has them without ``encoder.``. ``grid`` is the config's, if there is one."""
    file.out.source = "medgmae"
    prefix = "" if file.has_any("encoder.") else "encoder."
    table = file.table("encoder.pos_embed" if not prefix else "pos_embed")
    rows = table.shape[1]
    if grid is None:
        dims = _dims(file, f"{'' if prefix else 'encoder.'}{STEM}")
        file.out.grid = _grid(file, table, dims, class_row=False)[0]
    elif isinstance(grid, list) and all(type(n) is int and n > 0 for n in grid) and math.prod(grid) == rows:
        file.out.grid = tuple(grid)
    else:
        raise WeightsError(f"{file.origin}: the config's grid is {grid!r}, the table of positions has {rows} rows")
    file.take_all(lambda name: prefix + name)


def _plain(file: _File, source: str) -> None:
    """timm's ViT names, with a MAE decoder beside them or without: ``decoder_blocks`` and so on."""
    unknown = [full for name, (full, _) in file.rest.items() if FOREIGN.search(name)]
    if unknown:
        raise WeightsError(
            f"{file.origin}: this ViT has parts that are not supported: {', '.join(unknown[:4])}. Supported are plain "
            "pre-norm ViTs, with LayerScale or a norm before the blocks"
        )
    sigmoid = file.has("decoder_pred.0.weight")
    has_decoder = sigmoid or file.has("decoder_pred.weight")
    _linear_stem(file, STEM)
    dims = _dims(file, STEM)
    _fold_layer_scale(file)
    table = file.table("pos_embed")
    grid, class_row = _grid(file, table, dims, class_row=file.has("cls_token"))
    _take_table(file, class_row)
    if not file.has("patch_embed.proj.bias") and file.has_any("norm_pre."):  # CLIP's encoders have none
        file.out.state["encoder.patch_embed.proj.bias"] = torch.zeros(file.tensor(STEM).shape[0])
    if has_decoder:
        rows = file.table("decoder_pos_embed").shape[1] if file.has("decoder_pos_embed") else 0
        _take_decoder_table(file, rows - math.prod(grid))
        file.out.expects["decoder.sigmoid"] = sigmoid
    file.out.grid = grid
    file.out.source = source or _name_plain(file, sigmoid, has_decoder)
    file.drop("attn_pool.", "attention pooling")
    file.take_all(_plain_name)


def _name_plain(file: _File, sigmoid: bool, has_decoder: bool) -> str:
    if sigmoid:
        return "TANGERINE pre-training"
    if any(".backbone." in f".{full}" for full in [*file.out.renamed, *(v[0] for v in file.rest.values())]):
        return "GL-MAE"
    if has_decoder:
        return "masked autoencoder with timm's names"
    fine_tuned = file.has("fc_norm.weight") or file.has("head.0.weight")
    return "ViT with timm's names, fine-tuned" if fine_tuned else "ViT with timm's names"


_DECODER_NAMES = (
    (r"^decoder_embed\.", "decoder.embed."),
    (r"^decoder_blocks\.", "decoder.blocks."),
    (r"^decoder_norm\.", "decoder.norm."),
    (r"^decoder_pred\.(?:0\.)?", "decoder.head."),
    (r"^mask_token$", "decoder.mask_token"),
)


def _plain_name(name: str) -> str:
    for pattern, ours in _DECODER_NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, ours, name)
    return f"encoder.{name}"


def _mae3d(file: _File) -> None:
    """``MAE3D`` of SelfMedMAE and MedGMAE: tables beside the encoder, ``encoder_to_decoder`` as the bridge."""
    stem = f"encoder.{STEM}"
    _linear_stem(file, stem)
    weight, table = file.tensor(stem), file.table("encoder_pos_embed")
    if weight.dim() == 4 and weight.shape[1] > 1:
        raise WeightsError(
            f"{file.origin}: a 2D masked autoencoder of SelfMedMAE with {weight.shape[1]} channels stores its patches "
            "in a scrambled channel order, which is not supported; files with one channel are"
        )
    grid, class_row = _grid(file, table, _dims(file, stem), class_row=weight.dim() == 4)
    file.take("encoder_pos_embed", "encoder.pos_embed", table[:, int(class_row) :])
    file.out.grid = grid
    if gaussian.holds_gaussians(file.rest):
        _gaussian_decoder(file)
        return
    _take_decoder_table(file, int(class_row))
    file.out.expects["decoder.sigmoid"] = False
    file.out.source = "MAE3D of SelfMedMAE or MedGMAE"
    if weight.dim() == 4 and file.has("encoder_to_decoder.weight") and not file.has("encoder_to_decoder.bias"):
        file.out.state["decoder.embed.bias"] = torch.zeros(file.tensor("encoder_to_decoder.weight").shape[0])
    moved = {"encoder_to_decoder.weight": "decoder.embed.weight", "encoder_to_decoder.bias": "decoder.embed.bias"}
    file.take_all(lambda name: "decoder.mask_token" if name == "mask_token" else moved.get(name, name))


def _gaussian_decoder(file: _File) -> None:
    """The rest of a MedGMAE file: its Gaussian decoder, whatever its kind and whether it is wrapped or not."""
    kind = gaussian.decoder_kind(file.rest)
    file.out.source = "MedGMAE" if kind == "standard" else f"MedGMAE, {kind} decoder"
    file.out.expects |= {
        "decoder.kind": kind,
        "decoder.density_scale": gaussian.DENSITY_SCALE,
        "renderer.support": gaussian.SUPPORT,
    }
    for name, why in gaussian.UNUSED.items():
        file.drop(name, why)
    for name, (full, tensor) in list(file.rest.items()):
        ours = gaussian.gaussian_name(name)
        if ours in file.out.state:
            raise WeightsError(f"{file.origin}: {full!r} stands for {ours!r}, which is in the file twice")
        file.take(name, ours, gaussian.turn_rotation(ours, tensor))
    queries = file.out.state.get("decoder.query_tokens")
    if queries is not None and queries.dim() == 3:  # the authors' positions have no offset per query
        file.out.state["decoder.position_bias"] = torch.zeros(1, queries.shape[1], 3)


def _linear_stem(file: _File, name: str) -> None:
    """Turn a linear patch weight (E, ph * pw * pd * C) into a convolution's (E, C, ph, pw, pd), exactly."""
    weight = file.tensor(name)
    if weight.dim() != 2:
        return
    full = file.rest[name][0]
    if file.target is not None:
        patch, channels = file.target.patch_size, file.target.in_chans
    else:
        side = round(weight.shape[1] ** (1 / 3))
        patch, channels = (side, side, side), 1
    if math.prod(patch) * channels != weight.shape[1]:
        raise WeightsError(
            f"{file.origin}: the patch weight {full!r} is linear with {weight.shape[1]} inputs, not {channels} "
            f"channel(s) of a {patch} patch; load it into a model with its own patch_size and in_chans"
        )
    conv = weight.reshape(weight.shape[0], *patch, channels).movedim(-1, 1).contiguous()
    file.rest[name] = (full, conv)


def _fold_layer_scale(file: _File) -> None:
    """Multiply DINOv2's per-channel scale of a branch into the branch's last linear layer: the same function."""
    for name in [n for n in file.rest if re.fullmatch(r"blocks\.\d+\.ls[12]\.gamma", n)]:
        block, branch = name.rsplit(".", 2)[:2]
        linear = f"{block}.{'attn.proj' if branch == 'ls1' else 'mlp.fc2'}"
        gamma = file.tensor(name)
        for part, factor in ((f"{linear}.weight", gamma[:, None]), (f"{linear}.bias", gamma)):
            tensor = file.tensor(part)
            if gamma.shape != tensor.shape[:1]:
                raise WeightsError(f"{file.origin}: {name!r} of shape {tuple(gamma.shape)} does not fit {part!r}")
            file.rest[part] = (file.rest[part][0], tensor * factor)
        file.out.unused[file.rest.pop(name)[0]] = f"folded into {linear}"


def _take_table(file: _File, class_row: bool) -> None:
    """The encoder's table; its class row goes into the class token, which is where it would be added anyway."""
    table = file.table("pos_embed")
    if class_row:
        token = file.table("cls_token")
        if token.shape != table[:, :1].shape:
            raise WeightsError(f"{file.origin}: 'cls_token' is {tuple(token.shape)}, not as wide as the table")
        file.take("cls_token", "encoder.cls_token", token + table[:, :1])
        table = table[:, 1:]
    file.take("pos_embed", "encoder.pos_embed", table)


def _take_decoder_table(file: _File, prefix_rows: int) -> None:
    """The decoder's table and the rows for prefix tokens in front of it (zero where the file has none)."""
    if not file.has("decoder_pos_embed"):
        return
    if prefix_rows not in (0, 1):
        raise WeightsError(
            f"{file.origin}: the decoder's table has {file.tensor('decoder_pos_embed').shape[1]} rows, which does not "
            "fit the encoder's"
        )
    table = file.table("decoder_pos_embed")
    prefix = table[:, :1] if prefix_rows else torch.zeros(1, 1, table.shape[2])
    file.out.state["decoder.prefix_pos_embed"] = prefix.to(table.dtype)
    file.take("decoder_pos_embed", "decoder.pos_embed", table[:, prefix_rows:])


def _dims(file: _File, stem: str) -> int:
    dims = file.tensor(stem).dim() - 2
    if dims not in (2, 3):
        raise WeightsError(f"{file.origin}: the patch weight has shape {tuple(file.tensor(stem).shape)}, not a ViT's")
    return dims


def _grid(file: _File, table: Tensor, dims: int, class_row: bool) -> tuple[Grid, bool]:
    """Patch grid of a table of positions, and whether its first row belongs to the class token.

    Only what leaves no choice is accepted: the grid that was passed, the one that a sine-cosine table shows by itself,
    else the model's own or a cube.
    """
    rows, asked = table.shape[1], file.source_grid
    choices = [(rows - has_row, has_row) for has_row in sorted({class_row, False}, reverse=True)]
    found: set[tuple[Grid, bool]] = set()
    if asked is not None:
        found = {(tuple(asked), has_row) for n, has_row in choices if math.prod(asked) == n}
    else:
        shown = [(sincos_grid(table[:, int(has_row) :], dims), has_row) for _, has_row in choices]
        found = {(grid, has_row) for grid, has_row in shown if grid is not None}
    if asked is None and not found:
        own = [file.target.grid] if file.target and len(file.target.grid) == dims else []
        for n, has_row in choices:
            side = round(max(n, 1) ** (1 / dims))
            found |= {(tuple(grid), has_row) for grid in (*own, (side,) * dims) if math.prod(grid) == n}
    if len(found) != 1:
        could = " or ".join(f"{g}{' and a class row' if r else ''}" for g, r in sorted(found)) or "unknown"
        raise WeightsError(
            f"{file.origin}: the table of positions has {rows} rows; its patch grid is {could}"
            + (f", not {asked}" if asked else "")
            + ". Pass source_grid=(d, h, w), the grid that the file was trained with"
            + ("" if class_row else " (no row is counted for a class token: the file has no cls_token)")
        )
    return found.pop()
