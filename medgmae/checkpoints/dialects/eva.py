"""The dialect of timm's Eva models: DINOv3 with rotary positions alone, EVA-02 with a table beside them, EVA.

Queries, keys and values become one layer, whose keys have a bias of zero; LayerScale is folded into the layers before
it. DINOv3 turns the two halves of a head, which a permutation of rows makes our pairs: the same function.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import STEM, Converted, File
from medgmae.checkpoints.dialects.recognise import register_dialect
from medgmae.checkpoints.dialects.vit import convert_vit, fold_layer_scale, join_registers, split_gates
from medgmae.checkpoints.heads import from_halves, permute_heads

DINO = "DINOv3 with timm's names"
EVA = "EVA or EVA-02 with timm's names"

_MARKS = ("blocks.0.attn.q_proj.weight", "blocks.0.attn.q_bias", "blocks.0.gamma_1")
_FOREIGN = re.compile(r"[qk]_norm\.|attn\.norm\.|attn\.gate\.|relative_position|rope\.")

# Of every published DINOv3; a model of timm's says it itself.
_HEAD = 64


def _matches(file: File) -> bool:
    return file.has(STEM) and file.tensor(STEM).dim() == 4 and any(map(file.has, _MARKS))


@register_dialect("DINOv3, EVA and EVA-02 with timm's names", order=36, matches=_matches)
def convert_eva(file: File) -> Converted:
    """An encoder of images, for images or lifted to volumes."""
    foreign = [file.full_name(name) for name in file.names if _FOREIGN.search(name)]
    if foreign:
        raise WeightsError(
            f"{file.origin}: this model has parts that are not supported: {', '.join(foreign[:4])}. Supported are "
            "DINOv3, EVA and EVA-02 without norms inside the attention"
        )
    table, gated = file.has("pos_embed"), _is_gated(file)
    _fuse(file)
    _rename_scales(file)
    if table and not gated:
        return convert_vit(file, EVA)
    if table:
        return convert_vit(file, EVA, {"encoder.rope": "scaled", "encoder.rope_base": 10000.0, **_lifting(file)})
    heads = file.target.settings.get("num_heads") if file.target else None
    width = len(file.tensor(STEM))
    size = width // heads if heads and width % heads == 0 else _HEAD
    if width % size or size % 4:
        raise WeightsError(f"{file.origin}: {width} channels in heads of {size}; expected heads of a multiple of 4")
    _halves_to_pairs(file, size)
    fold_layer_scale(file)
    split_gates(file)
    join_registers(file, "reg_token")
    file.take_all(lambda name: f"encoder.{name}")
    settings: dict[str, Any] = {"num_heads": width // size, "norm_eps": 1e-5, "rope": "unit", "rope_base": 100.0}
    expects = {f"encoder.{name}": value for name, value in settings.items()}
    grid = file.source_grid or (file.target.grid[-2:] if file.target else (16, 16))
    return file.finish(DINO, tuple(grid), {**expects, **_lifting(file)})


def _is_gated(file: File) -> bool:
    first = "blocks.0.mlp.fc1.weight"
    return not file.has(first) or len(file.tensor(first)) == 2 * file.tensor("blocks.0.mlp.fc2.weight").shape[-1]


def _lifting(file: File) -> dict[str, Any]:
    """Rotary positions of images do not turn along the third axis of a volume: a model of volumes must know which."""
    target = file.target
    if target is None or len(target.patch_size) == 2 or target.settings.get("lifted_axis") is not None:
        return {}
    return {"encoder.lifted_axis": 0}


def _fuse(file: File) -> None:
    """One layer for queries, keys and values, with one bias."""
    for block in sorted({name.rsplit(".attn.", 1)[0] for name in file.names if ".attn." in name}):
        start = f"{block}.attn."
        if file.has(f"{start}q_proj.weight"):
            weights = [file.numbers(f"{start}{part}_proj.weight") for part in "qkv"]
            file.replace(f"{start}q_proj.weight", torch.cat(weights))
            file.rename(f"{start}q_proj.weight", f"{start}qkv.weight")
            for part in "kv":
                file.take_beside(f"{start}{part}_proj.weight", f"encoder.{start}qkv.weight")
        for q, v in (("q_bias", "v_bias"), ("q_proj.bias", "v_proj.bias")):
            if file.has(start + q):
                query, value = file.numbers(start + q), file.numbers(start + v)
                file.replace(start + q, torch.cat([query, torch.zeros_like(query), value]))
                file.rename(start + q, f"{start}qkv.bias")
                file.take_beside(start + v, f"encoder.{start}qkv.bias")
        if not file.has(f"{start}qkv.bias"):
            file.add(f"encoder.{start}qkv.bias", torch.zeros(len(file.tensor(f"{start}qkv.weight"))))


def _rename_scales(file: File) -> None:
    """LayerScale by the names that it has in timm's ViTs."""
    for name in [n for n in file.names if re.fullmatch(r"blocks\.\d+\.gamma_[12]", n)]:
        file.rename(name, name.replace("gamma_", "ls") + ".gamma")


def _halves_to_pairs(file: File, size: int) -> None:
    """Rows of queries and keys whose two halves of a head are turned, in our order."""
    rows = from_halves(size)
    for name in [n for n in file.names if re.fullmatch(r"blocks\.\d+\.attn\.qkv\.(weight|bias)", n)]:
        query, key, value = file.numbers(name).chunk(3)
        file.replace(name, torch.cat([permute_heads(query, rows), permute_heads(key, rows), value]))
