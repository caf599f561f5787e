"""Weights into models: find a source, convert it, fit it, check that nothing is left out, and report what was done."""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor, nn

from medgmae.checkpoints.adapt import Inflate
from medgmae.checkpoints.cards import HUB_ORG, WeightsError
from medgmae.checkpoints.dialects.entries import Target
from medgmae.checkpoints.dialects.recognise import convert
from medgmae.checkpoints.opening import Source, open_source
from medgmae.checkpoints.plan import make_plan
from medgmae.checkpoints.report import LoadReport as LoadReport
from medgmae.checkpoints.settings import encoder_of
from medgmae.layers.blocks import initialize
from medgmae.layers.patches import Shape
from medgmae.models.parts import unwrap

log = logging.getLogger("medgmae")

SHOWN_ERRORS = 12


def load_pretrained(
    model: nn.Module,
    source: Source,
    *,
    strict: bool = True,
    source_grid: Shape | None = None,
    inflate: Inflate = "average",
    cache_dir: str | os.PathLike[str] | None = None,
    hub_org: str = HUB_ORG,
    token: str | bool | None = None,
    force_download: bool = False,
    progress: bool = True,
) -> LoadReport:
    """Fill a model with published weights, whatever code base wrote them, and report what was done.

    Tables of positions are resampled to the model's grid. A stem for other channels, another patch size or from a 2D
    model is adapted as :mod:`medgmae.checkpoints.adapt` says. A head for another number of classes is dropped. The
    encoder of a masked autoencoder goes into an encoder; both parts go into a masked autoencoder. The model is
    unchanged when an error is raised.

    Args:
        model: an encoder or masked autoencoder of this library.
        source: a tag ("vit_large_patch16_256.tangerine"), a card, "hf-hub:org/repo[@revision]", "timm/MODEL" (2D
            weights through timm), a file, a folder (also as "local-dir:/path") or a state dictionary.
        strict: False accepts a file without the decoder or with another one, a Gaussian decoder of another kind or
            support among them, and names that are not known; all is reported. An encoder entry that is missing raises
            all the same.
        source_grid: patch grid (d, h, w) of the file's tables; needed when it is neither a cube nor the model's.
        inflate: how a 2D stem gets its depth, "average" or "center".
        cache_dir: folder for downloads, instead of the Hugging Face cache and ours.
        hub_org: organisation of a hub repository that is named without one.
        token: hub token; None for the one that ``hf auth login`` stored, False for none.
        force_download: fetch again what is in the cache.
        progress: show a progress bar while downloading.

    Raises:
        WeightsError: the source cannot be fetched, read or recognised, an encoder entry is missing, a shape cannot be
            adapted, or the file holds parts that the model would silently ignore. The message lists the names.
        TypeError: the model is not one of this library.
    """
    model = unwrap(model)
    target = _target(model)
    config = getattr(model, "config", None) or {}
    opened = open_source(
        source,
        config.get("architecture"),
        cache_dir=cache_dir,
        hub_org=hub_org,
        token=token,
        force_download=force_download,
        progress=progress,
    )
    converted = convert(
        opened.checkpoint.state,
        origin=opened.origin,
        config=opened.config if opened.config and opened.config.get("grid") else None,
        target=target,
        source_grid=source_grid,
    )
    expects = {**converted.expects, **opened.expects}
    plan = make_plan(model, converted, expects, strict=strict, inflate=inflate)
    origin = f"{opened.origin} ({converted.source})"
    if plan.errors:
        raise WeightsError(_refusal(origin, plan.errors))
    _fill(model, plan.tensors)
    report = LoadReport(origin, list(plan.tensors), plan.resized, plan.adapted, plan.unused, plan.missing)
    log.info("%s", report)
    return report


def _target(model: nn.Module) -> Target:
    encoder = encoder_of(model)
    if not all(hasattr(encoder, name) for name in ("grid_size", "patch_size", "in_chans", "settings")):
        raise TypeError(
            f"load_pretrained fills the models of this library, got {type(model).__name__}: make one with create_model"
        )
    settings = {name: setting.value for name, setting in encoder.settings().items()}
    return Target(encoder.grid_size, encoder.patch_size, encoder.in_chans, settings)


def _refusal(origin: str, errors: list[str]) -> str:
    lines = errors[:SHOWN_ERRORS]
    if len(errors) > SHOWN_ERRORS:
        lines = [*lines, f"and {len(errors) - SHOWN_ERRORS} more"]
    listed = "\n  ".join(lines)
    return (
        f"{origin} does not fit this model, which is unchanged:\n  {listed}\n"
        "Build the model that the file was made with: `medgmae info FILE` shows its sizes"
    )


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors into parameters and buffers; into those on the meta device without a copy."""
    for name, tensor in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        slot = getattr(owner, leaf)
        if not slot.is_meta:
            slot.copy_(tensor)
        elif isinstance(slot, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(tensor.to(slot.dtype), requires_grad=slot.requires_grad))
        else:
            setattr(owner, leaf, tensor.to(slot.dtype))


def materialize(model: nn.Module) -> None:
    """Give storage and a random start to whatever the file did not fill (a new head, say)."""
    for module in model.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if any(tensor.is_meta for _, tensor in own):
            filled = {name: tensor.detach() for name, tensor in own if not tensor.is_meta}
            module.to_empty(device="cpu", recurse=False)
            initialize(module)
            with torch.no_grad():
                for name, tensor in filled.items():
                    getattr(module, name).copy_(tensor)
