"""A source of weights, found and read: tensors, the config that travels with them, what they expect of a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medgmae.checkpoints.cards import WeightCard, WeightsError
from medgmae.checkpoints.reading import Checkpoint, find_state, read_checkpoint
from medgmae.checkpoints.settings import saved_settings
from medgmae.checkpoints.sources import resolve


@dataclass(frozen=True)
class OpenSource:
    """A source of weights, opened: its name for messages, its tensors, and the config that travels with it.

    expects: settings that a model needs for the weights to mean the same.
    """

    origin: str
    checkpoint: Checkpoint
    config: dict[str, Any] | None
    expects: dict[str, Any] = field(default_factory=dict)


Source = str | os.PathLike[str] | WeightCard | Mapping[str, Any] | OpenSource


def open_source(source: Source, architecture: str | None = None, **options: Any) -> OpenSource:
    """Find and read a source of weights.

    Args:
        source: a tag ("vit_large_patch16_256.tangerine"), a card, "hf-hub:org/repo[@revision]", "timm/MODEL" (2D
            weights through timm), a file, a folder (also as "local-dir:/path") or a state dictionary.
        architecture: completes a tag that is given without it ("tangerine").
        **options: handed to :func:`medgmae.checkpoints.sources.resolve`: cache_dir, hub_org, token, progress.

    Raises:
        WeightsError: nothing is there, it cannot be fetched or read, or its hash is wrong.
    """
    if isinstance(source, OpenSource):
        return source
    if isinstance(source, Mapping):
        return OpenSource("state dictionary", find_state(source, "state dictionary"), None)
    if isinstance(source, str) and source.startswith("timm/"):
        return _open_timm(source)
    found = resolve(source, architecture=architecture, **options)
    checkpoint = read_checkpoint(found.path)
    config = found.config or checkpoint.config
    return OpenSource(found.name, checkpoint, config, saved_settings(config, found.name))


def _open_timm(source: str) -> OpenSource:
    """A model of timm's 2D zoo with the weights that timm publishes."""
    import timm

    try:
        model: Any = timm.create_model(source.removeprefix("timm/"), pretrained=True, num_classes=0)
    except Exception as error:  # timm and the hub client raise many kinds
        raise WeightsError(f"{source}: timm could not give these weights ({error})") from error
    return OpenSource(source, Checkpoint(dict(model.state_dict()), "", None), None, timm_settings(model, source))


def timm_settings(model: Any, origin: str) -> dict[str, Any]:
    """The settings of one of timm's ViTs that its weights need.

    Raises:
        WeightsError: not a plain ViT, or one with another activation than GELU, which our blocks do not compute.
    """
    block = model.blocks[0] if len(getattr(model, "blocks", ())) else None
    if block is None or not hasattr(block, "attn") or not hasattr(block, "mlp"):
        raise WeightsError(f"{origin}: {type(model).__name__} is not a plain ViT; choose a vit_* model of timm")
    if type(block.mlp.act).__name__ != "GELU":
        raise WeightsError(f"{origin}: its activation is {type(block.mlp.act).__name__}, supported is GELU")
    return {"encoder.blocks.0.attn.num_heads": block.attn.num_heads, "encoder.blocks.0.norm1.eps": block.norm1.eps}
