"""The dialect of VoxelFM: DINOv2's names, registers, and rotary positions whose periods are in the file.

Its rotations are ours, pair by pair. The class token and the registers become one tensor; LayerScale is folded into the
layers before it, as for every ViT.
"""

from __future__ import annotations

import re

import torch

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import STEM, Converted, File
from medgmae.checkpoints.dialects.recognise import register_dialect
from medgmae.checkpoints.dialects.vit import add_qkv_bias, fold_layer_scale, join_registers, split_gates
from medgmae.checkpoints.tensors import listed

SOURCE = "VoxelFM"
NORM_EPS = 1e-5
BASE = 100.0

# The grid that it was trained on, for files whose model is not known yet: nothing in them depends on it.
_GRID = (8, 8, 8)

_BACKBONE = "backbone."
_PERIODS = "rope_embed.periods"
_UNKNOWN = re.compile(r"pos_embed$|[qk]_norm|storage_tokens|patch_embed_\dD|attn\.(q|k|v)_")


@register_dialect(SOURCE, order=43, matches=lambda file: any(file.has(prefix + _PERIODS) for prefix in ("", _BACKBONE)))
def convert_voxelfm(file: File) -> Converted:
    """The backbone, which may lie beside the heads of its pre-training."""
    for head in ("dino_head.", "ibot_head."):
        file.drop_all(head, "head of the pre-training")
    if file.has_any(_BACKBONE):
        file.enter(_BACKBONE)
    foreign = [file.full_name(name) for name in file.names if _UNKNOWN.search(name)]
    if foreign or not file.has(STEM) or file.tensor(STEM).dim() != 5:
        raise WeightsError(
            f"{file.origin}: has {_PERIODS!r} as VoxelFM's files have, but not VoxelFM's parts beside it "
            f"({listed(foreign) or 'no patch embedding of volumes'}); other models with rotary positions are not read"
        )
    if file.has("mask_token"):
        file.drop("mask_token", "stands for hidden patches in the pre-training")
    bands, base = _read_periods(file)
    width = len(file.tensor(STEM))
    if width % (6 * bands):
        raise WeightsError(f"{file.origin}: {_PERIODS!r} has {bands} periods, which {width} channels cannot have")
    join_registers(file, "register_tokens")
    fold_layer_scale(file)
    add_qkv_bias(file)
    split_gates(file)
    file.take_all(lambda name: f"encoder.{name}")
    grid = file.source_grid or (file.target.grid if file.target else _GRID)
    settings = {"num_heads": width // (6 * bands), "norm_eps": NORM_EPS, "rope": "unit", "rope_base": base}
    return file.finish(SOURCE, tuple(grid), {f"encoder.{name}": value for name, value in settings.items()})


def _read_periods(file: File) -> tuple[int, float]:
    """How many bands an axis has, and the base that their periods are powers of; the entry is left out then.

    Raises:
        WeightsError: they are the powers of no base.
    """
    periods = file.numbers(_PERIODS)
    if periods.dim() != 1 or not len(periods):
        raise WeightsError(f"{file.origin}: {_PERIODS!r} has shape {tuple(periods.shape)}, expected (bands,)")
    bands = len(periods)
    exact = periods.detach().double().cpu()
    base = float(file.target.settings.get("rope_base", BASE)) if file.target else BASE
    if not periods.is_meta:  # without values the base cannot be checked
        room = 1e-4 if periods.itemsize > 2 else 1e-2
        last = float(exact[-1]) ** (bands / (bands - 1)) if bands > 1 else base
        bases = [known for known in (base, BASE, last) if _agree(exact, known, room)]
        if not bases:
            shown = ", ".join(f"{value:.5g}" for value in exact[:6].tolist())
            raise WeightsError(
                f"{file.origin}: the periods of {_PERIODS!r} begin with {shown}; expected base^(k / {bands}) for "
                f"k = 0 to {bands - 1}, base 100 for the published model. Weights trained with others are not read"
            )
        base = bases[0] if bases[0] != last else float(f"{last:.4g}")
    file.drop(_PERIODS, f"the periods of the rotary positions, which base {base:g} gives")
    return bands, base


def _agree(periods: torch.Tensor, base: float, room: float) -> bool:
    expected = base ** (torch.arange(len(periods), dtype=torch.float64) / len(periods))
    return bool(torch.isfinite(periods).all()) and torch.allclose(periods, expected, rtol=room, atol=0)
