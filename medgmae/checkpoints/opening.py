"""A source of weights, found and read: tensors, the config that travels with them, what they expect of a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgmae.checkpoints.cards import HUB_ORG, WeightCard, WeightsError
from medgmae.checkpoints.dialects.entries import TokenOrder
from medgmae.checkpoints.hub import Fetching
from medgmae.checkpoints.paths import check_source
from medgmae.checkpoints.reading import SET_MARK, Checkpoint, find_state
from medgmae.checkpoints.settings import saved_settings
from medgmae.checkpoints.sharded import read_weights
from medgmae.checkpoints.sources import resolve
from medgmae.layers.rope import REFERENCE


@dataclass(frozen=True)
class OpenSource:
    """A source of weights, opened: its name for messages, its tensors, and the config that travels with it.

    expects: settings that a model needs for the weights to mean the same, such as "encoder.num_heads".
    token_order: of the tokens, where a weight card says it; see :func:`~medgmae.load_pretrained`.
    borrowed: whether the tensors are someone else's, who may change them later.
    """

    origin: str
    checkpoint: Checkpoint = field(repr=False)
    config: dict[str, Any] | None
    expects: dict[str, Any] = field(default_factory=dict)
    borrowed: bool = False
    token_order: TokenOrder | None = None


Source = str | os.PathLike[str] | WeightCard | Mapping[str, Any] | OpenSource


def open_source(
    source: Source,
    architecture: str | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    hub_org: str = HUB_ORG,
    token: str | bool | None = None,
    force_download: bool = False,
    progress: bool = True,
) -> OpenSource:
    """Find and read a source of weights.

    Args:
        source: a tag ("vit_large_patch16_256.tangerine"), a card, "hf-hub:org/repo[@revision]", "timm/MODEL" (2D
            weights through timm), a file, a folder (also as "local-dir:/path") or a state dictionary. Of a file with
            several sets of weights, "FILE::teacher" takes the one under that entry.
        architecture: completes a tag that is given without it ("tangerine").
        cache_dir: see :class:`~medgmae.checkpoints.hub.Fetching`.
        hub_org: likewise.
        token: likewise.
        force_download: likewise.
        progress: likewise.

    Raises:
        WeightsError: nothing is there, it cannot be fetched or read, or its hash is wrong.
    """
    if isinstance(source, OpenSource):
        return source
    if isinstance(source, Mapping):
        return OpenSource("state dictionary", find_state(source, "state dictionary"), None, borrowed=True)
    if isinstance(source, str) and source.startswith("timm/"):
        return _open_timm(source)
    wanted = ""
    if not isinstance(source, WeightCard):
        check_source(source)
        source, wanted = split_set(source)
    resolved = resolve(source, architecture, Fetching(cache_dir, hub_org, token, force_download, progress))
    if resolved.card is not None:
        wanted = wanted or resolved.card.hub_file[1]
    try:
        checkpoint = read_weights(resolved.path, wanted)
    except WeightsError as error:
        if not resolved.fetched:
            raise
        remedy = "if the download was damaged, force_download=True fetches it again"
        raise type(error)(f"{resolved.name}: {error}; {remedy}") from error
    config = resolved.config or checkpoint.config
    # The config in the header was written with the weights; the one beside the file may be another edition's.
    settings = saved_settings(config, checkpoint.state, resolved.name)
    if checkpoint.config and checkpoint.config != config:
        settings |= saved_settings(checkpoint.config, checkpoint.state, resolved.name)
    order = resolved.card.token_order if resolved.card else None
    return OpenSource(resolved.name, checkpoint, config, settings, token_order=order)


def split_set(source: str | os.PathLike[str]) -> tuple[str | os.PathLike[str], str]:
    """A source and the set of weights in it that is asked for: "last.ckpt::teacher" as ("last.ckpt", "teacher")."""
    name, mark, wanted = os.fspath(source).partition(SET_MARK)
    if not mark or os.path.exists(source):  # a file may have the mark in its name
        return source, ""
    return (Path(name) if isinstance(source, os.PathLike) else name), wanted


def _open_timm(source: str) -> OpenSource:
    """A model of timm's 2D zoo with the weights that timm publishes."""
    import timm

    try:
        model: Any = timm.create_model(source.removeprefix("timm/"), pretrained=True, num_classes=0)
    except Exception as error:  # timm and the hub client raise many kinds
        raise WeightsError(f"{source}: timm could not provide these weights ({error})") from error
    return OpenSource(source, Checkpoint(dict(model.state_dict()), "", None), None, timm_settings(model, source))


def timm_settings(model: Any, origin: str) -> dict[str, Any]:
    """The settings of one of timm's ViTs that its weights need.

    Raises:
        WeightsError: not a plain ViT, or one that computes something which our blocks do not: another activation, norms
            behind the branches, another kind of rotary positions.
    """
    block = model.blocks[0] if len(getattr(model, "blocks", ())) else None
    if block is None or not hasattr(block, "attn") or not hasattr(block, "mlp"):
        raise WeightsError(f"{origin}: {type(model).__name__} is not a plain ViT; choose a vit_* model of timm")
    if "Post" in type(block).__name__:
        raise WeightsError(f"{origin}: its norms stand behind the branches of a block; supported are those before them")
    act, gated = type(block.mlp.act).__name__, not getattr(block.mlp, "gate_last", not hasattr(block.mlp, "fc1_g"))
    if act != ("SiLU" if gated else "GELU"):
        raise WeightsError(f"{origin}: its activation is {act}, supported is GELU, and SiLU as a gate")
    settings = {"encoder.num_heads": block.attn.num_heads, "encoder.norm_eps": block.norm1.eps}
    rope = getattr(model, "rope", None)
    return settings if rope is None else settings | _timm_rope(rope, origin)


def _timm_rope(rope: Any, origin: str) -> dict[str, Any]:
    """The rotary positions of one of timm's models, in our words.

    Raises:
        WeightsError: they are others than DINOv3's and EVA-02's.
    """
    names = ("rotate_half", "grid_offset", "grid_indexing", "normalize_coords", "in_pixels", "ref_feat_shape")
    found = {name: getattr(rope, name, None) for name in names}
    usual = not found["grid_offset"] and found["grid_indexing"] in (None, "ij")
    shape = found["ref_feat_shape"]
    if type(rope).__name__ == "RotaryEmbeddingDinoV3":
        usual &= bool(found["rotate_half"]) and found["normalize_coords"] == "separate" and bool(rope.temperature)
        usual &= rope.min_period is None and rope.max_period is None
        kind = "unit"
    else:
        usual &= type(rope).__name__ == "RotaryEmbeddingCat" and not found["in_pixels"] and not found["rotate_half"]
        usual &= shape is not None and tuple(shape) == (REFERENCE, REFERENCE)
        kind = "scaled"
    if not usual:
        shown = ", ".join(f"{name}={value}" for name, value in found.items() if value is not None)
        raise WeightsError(
            f"{origin}: its rotary positions ({type(rope).__name__}, {shown}) are not supported; those of DINOv3 and "
            f"of EVA-02 (ref_feat_shape {REFERENCE}x{REFERENCE}) are"
        )
    return {"encoder.rope": kind, "encoder.rope_base": float(rope.temperature)}
