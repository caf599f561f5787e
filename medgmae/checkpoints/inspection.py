"""What a checkpoint file holds, which architecture it fits, and what would go where; nothing in it is executed."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medgmae.checkpoints import loading, opening
from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import STEM, Converted, Target
from medgmae.checkpoints.dialects.gaussian import decoder_kind, decoder_ratios
from medgmae.checkpoints.dialects.recognise import convert
from medgmae.checkpoints.settings import ABSENT, SETTINGS, setting
from medgmae.checkpoints.sources import WEIGHTS_FILE
from medgmae.layers.patches import Shape
from medgmae.models.registry import model_builder, model_names


@dataclass(frozen=True)
class _Sizes:
    """What tells one architecture from another by the shapes of its weights alone."""

    embed_dim: int
    depth: int
    mlp_dim: int | None
    inner_dim: int | None
    d_state: int | None
    patch_size: Shape
    in_chans: int
    grid: Shape
    class_token: bool | str | None
    pre_norm: bool
    decoder_embed_dim: int | None
    decoder_depth: int | None
    sigmoid: bool | None
    off_by_one: bool | None
    rope: str | None
    scan_order: str | None
    num_gaussians: int | None
    kind: str | None
    ratios: tuple[int, ...]
    support: Any


# What stands for a setting of a Vim that the file does not tell.
UNTOLD = "not told"

# These must be equal; the other sizes are options of the architecture.
_FIXED = ("embed_dim", "depth", "mlp_dim", "inner_dim", "patch_size")
_FIXED_DECODER = ("decoder_embed_dim", "decoder_depth", "kind")


def inspect_checkpoint(path: str | os.PathLike[str], *, source_grid: Shape | None = None) -> dict[str, Any]:
    """Say what a weight file is and what would be loaded from it.

    Args:
        path: a weight file, or a folder that :func:`~medgmae.save_pretrained` wrote.
        source_grid: patch grid (d, h, w) of the file's table of positions, where the file leaves it open.

    Returns:
        JSON-ready facts:

        - path, bytes, container (entry that held the weights), source (the dialect), tensors, parameters, dtypes
        - sizes: embed_dim, depth, grid and so on; head: num_classes and hidden widths
        - config: of a file or folder of this library, else None
        - architecture, model_args: what to give ``create_model``; None when no registered architecture fits. The number
          of attention heads is the architecture's: files do not tell it
        - encoder_architecture: the same for the encoder alone, when the file is a masked autoencoder
        - renamed: the file's name to ours; unused: the file's name to the reason; missing: parameters that would keep
          a random start; resized, adapted: see :class:`~medgmae.LoadReport`; problem: why it would not load, or None

    Raises:
        WeightsError: the file is not readable or not recognised.
    """
    path = Path(path).expanduser()
    opened = opening.open_source(path)
    config = opened.config if opened.config and "architecture" in opened.config else None
    converted, chosen = _recognise(opened, source_grid)
    sizes = _sizes(converted.state, converted.grid, converted.expects)
    if sizes is None:
        raise WeightsError(
            f"{path} ({converted.source}): this is neither a ViT nor a Vim, the architecture cannot be told"
        )
    whole = sizes.decoder_depth is not None
    if config is not None:
        chosen = str(config["architecture"]), dict(config.get("model_args", {}))
    chosen = chosen or _fit(sizes, converted.state, whole)
    encoder = _fit(sizes, converted.state, whole=False) if whole else None
    tensors = opened.checkpoint.state.values()
    return {
        "path": str(path),
        "bytes": (path / WEIGHTS_FILE if path.is_dir() else path).stat().st_size,
        "container": opened.checkpoint.container,
        "source": converted.source,
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "sizes": {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(sizes).items()},
        "head": _head(converted.state),
        "config": config,
        "architecture": chosen[0] if chosen else None,
        "model_args": chosen[1] if chosen else {},
        "encoder_architecture": encoder[0] if encoder else None,
        "renamed": dict(converted.renamed),
        **_rehearse(opened, converted, chosen, source_grid),
    }


def _recognise(
    opened: opening.OpenSource, source_grid: Shape | None
) -> tuple[Converted, tuple[str, dict[str, Any]] | None]:
    """The file in our language; where it does not say its own grid or patch, as the registered model that it fits."""
    config = opened.config if opened.config and "grid" in opened.config else None
    arguments: dict[str, Any] = {"origin": opened.origin, "config": config, "source_grid": source_grid}
    try:
        return convert(opened.checkpoint.state, **arguments), None
    except WeightsError:
        for name in model_names():
            sizes = _architecture(name)[0]
            if sizes is None:
                continue
            target = Target(sizes.grid, sizes.patch_size, sizes.in_chans)
            try:
                converted = convert(opened.checkpoint.state, target=target, **arguments)
            except WeightsError:
                continue
            found = _sizes(converted.state, converted.grid, converted.expects)
            if found is not None and (fit := _fit(found, converted.state, found.decoder_depth is not None)):
                return converted, fit
        raise


def _sizes(state: Mapping[str, Tensor], grid: Shape, settings: Mapping[str, Any]) -> _Sizes | None:
    """Sizes of a ViT, a Vim or an autoencoder of either from its tensors and settings; None for another family."""
    stem, hidden = state.get(f"encoder.{STEM}"), state.get("encoder.blocks.0.mlp.fc1.weight")
    states = state.get("encoder.blocks.0.mixer.A_log")
    if stem is None or (hidden is None and states is None):
        return None
    bridge, queries = state.get("decoder.embed.weight"), state.get("decoder.query_tokens")
    gaussians = queries is not None and queries.dim() == 3
    return _Sizes(
        embed_dim=stem.shape[0],
        depth=_count_blocks(state, "encoder"),
        mlp_dim=None if hidden is None else hidden.shape[0],
        inner_dim=None if states is None else states.shape[0],
        d_state=None if states is None else states.shape[-1],
        patch_size=tuple(stem.shape[2:]),
        in_chans=stem.shape[1],
        grid=tuple(grid),
        class_token=_class_token(state, settings),
        pre_norm="encoder.norm_pre.weight" in state,
        decoder_embed_dim=None if bridge is None else bridge.shape[0],
        decoder_depth=None if bridge is None else _count_blocks(state, "decoder"),
        sigmoid=None if bridge is None else settings.get("decoder.sigmoid"),
        off_by_one=None if bridge is None or states is None else _off_by_one(state),
        rope=None if states is None else settings.get("encoder.rope", UNTOLD),
        scan_order=None if states is None or bridge is None else settings.get("encoder.scan_order", UNTOLD),
        num_gaussians=queries.shape[1] if queries is not None and gaussians else None,
        kind=decoder_kind(state) if gaussians else None,
        ratios=decoder_ratios(state) if gaussians else (),
        support=settings.get("renderer.support"),
    )


def _class_token(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool | str | None:
    """Whether a ViT has a class token; where a Vim has it, which a file of one does not tell: as on conversion."""
    token = state.get("encoder.cls_token")
    if "encoder.blocks.0.mixer.A_log" not in state:
        return token is not None
    if token is None or token.shape[1] == 2:
        return None if token is None else "double"
    return settings.get("encoder.class_token") or ("front" if "decoder.embed.weight" in state else "middle")


def _off_by_one(state: Mapping[str, Tensor]) -> bool:
    """Whether the decoder of a Vim has a place for one more token in front than the encoder has class tokens."""
    prefix, tokens = state.get("decoder.prefix_pos_embed"), state.get("encoder.cls_token")
    return prefix is not None and prefix.shape[1] > (0 if tokens is None else tokens.shape[1])


def _count_blocks(state: Mapping[str, Tensor], part: str) -> int:
    return len({name.split(".")[2] for name in state if name.startswith(f"{part}.blocks.")})


@functools.cache
def _architecture(name: str) -> tuple[_Sizes | None, bool]:
    """Sizes of a registered architecture, and whether it is a whole autoencoder; built without storage."""
    with torch.device("meta"):
        model: Any = model_builder(name)()
    whole = hasattr(model, "decoder")
    state = model.state_dict(prefix="" if whole else "encoder.")
    grid = getattr(model.encoder if whole else model, "grid", ())
    settings = {path: value for path in SETTINGS if (value := setting(model, path)) is not ABSENT}
    return _sizes(state, grid, settings), whole


def _fit(sizes: _Sizes, state: Mapping[str, Tensor], whole: bool) -> tuple[str, dict[str, Any]] | None:
    """The registered architecture that is nearest to ``sizes`` and the options that make it equal."""
    fixed = _FIXED + (_FIXED_DECODER if whole else ())
    candidates = []
    for name in model_names():
        known, known_whole = _architecture(name)
        if known is None or known_whole != whole:
            continue
        if any(getattr(known, key) != getattr(sizes, key) for key in fixed):
            continue
        distance = abs(math.prod(known.grid) - math.prod(sizes.grid))
        differs = [known.grid != sizes.grid, known.in_chans != sizes.in_chans, whole and known.sigmoid != sizes.sigmoid]
        candidates.append((sum(differs), distance, name))
    if not candidates:
        return None
    name = min(candidates)[2]
    known = _architecture(name)[0]
    assert known is not None
    return name, _options(sizes, known, state, whole)


def _options(sizes: _Sizes, known: _Sizes, state: Mapping[str, Tensor], whole: bool) -> dict[str, Any]:
    """Options of ``create_model`` that turn the architecture ``known`` into the one of the file."""
    options: dict[str, Any] = {}
    if known.grid != sizes.grid:
        size = [g * p for g, p in zip(sizes.grid, sizes.patch_size, strict=True)]
        options["img_size"] = size[0] if len(set(size)) == 1 else size
    keys = ("in_chans", "class_token", "pre_norm", "d_state", *(("sigmoid",) if whole else ()))
    options |= {key: getattr(sizes, key) for key in keys if getattr(known, key) != getattr(sizes, key)}
    if sizes.d_state is not None:
        return options | _vim_options(sizes, known, state, whole)
    if whole:
        return options | _gaussian_options(sizes, known)
    pooled = state.get("encoder.fc_norm.weight")
    if pooled is not None:
        options["global_pool"] = "token_avg" if len(pooled) == 2 * sizes.embed_dim else "avg"
    elif not sizes.class_token:
        options |= {"global_pool": "avg", "fc_norm": False}
    return options | {key: value for key, value in _head(state).items() if value}


def _vim_options(sizes: _Sizes, known: _Sizes, state: Mapping[str, Tensor], whole: bool) -> dict[str, Any]:
    """The options of a state-space encoder and its decoder, as far as the file tells them."""
    found = {key: getattr(sizes, key) for key in ("rope", "scan_order", "off_by_one") if whole or key == "rope"}
    options = {key: value for key, value in found.items() if value not in (UNTOLD, getattr(known, key))}
    if whole:
        return options
    pool = {"global_pool": "token"} if sizes.class_token else {}
    return options | pool | {key: value for key, value in _head(state).items() if key == "num_classes" and value}


def _gaussian_options(sizes: _Sizes, known: _Sizes) -> dict[str, Any]:
    """The options of a Gaussian decoder and its renderer; the support where the file's dialect has one."""
    if sizes.num_gaussians is None:
        return {}
    keys = ("num_gaussians", "ratios", *(("support",) if sizes.support is not None else ()))
    found = {key: getattr(sizes, key) for key in keys if getattr(known, key) != getattr(sizes, key)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def _head(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes and hidden widths of the classifier in a file."""
    layers = {
        name: t for name, t in state.items() if re.fullmatch(r"encoder\.head\.(\d+\.)?weight", name) and t.dim() == 2
    }
    widths = [
        len(layers[name]) for name in sorted(layers, key=lambda name: int("0" + "".join(filter(str.isdigit, name))))
    ]
    return {"num_classes": widths[-1] if widths else 0, "head_hidden": widths[:-1]}


def _rehearse(
    opened: opening.OpenSource,
    converted: Converted,
    chosen: tuple[str, dict[str, Any]] | None,
    source_grid: Shape | None,
) -> dict[str, Any]:
    """Load into a model without storage and tell what happened."""
    told: dict[str, Any] = {"unused": dict(converted.unused), "missing": [], "resized": {}, "adapted": {}}
    if chosen is None:
        return {**told, "problem": "no registered architecture has these sizes"}
    try:
        with torch.device("meta"):
            model = model_builder(chosen[0])(**chosen[1])
        report = loading.load_pretrained(model, opened, source_grid=source_grid)
    except (WeightsError, ValueError, TypeError) as error:
        return {**told, "problem": str(error)}
    told = {"unused": report.unused, "missing": report.missing, "resized": report.resized, "adapted": report.adapted}
    return {**told, "problem": None}
