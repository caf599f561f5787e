"""Weights into models: find a source, convert it, fit it, check that nothing is left out, and report what was done."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from medgmae.checkpoints.adapt import Inflate
from medgmae.checkpoints.cards import HUB_ORG, WeightsError
from medgmae.checkpoints.dialects.entries import Target, TokenOrder, grid_argument
from medgmae.checkpoints.dialects.recognise import convert
from medgmae.checkpoints.opening import OpenSource, Source, open_source
from medgmae.checkpoints.plan import make_plan
from medgmae.checkpoints.reading import SET_MARK
from medgmae.checkpoints.report import LoadReport as LoadReport
from medgmae.checkpoints.settings import encoder_of
from medgmae.checkpoints.tensors import Spans, listed, not_finite, overlaps_itself
from medgmae.layers.blocks import initialize
from medgmae.layers.patches import Shape
from medgmae.models.parts import check_choice, unwrap

log = logging.getLogger("medgmae")

SHOWN_ERRORS = 12


def load_pretrained(
    model: nn.Module,
    source: Source,
    *,
    strict: bool = True,
    source_grid: Shape | None = None,
    token_order: TokenOrder | None = None,
    inflate: Inflate = "average",
    cache_dir: str | os.PathLike[str] | None = None,
    hub_org: str = HUB_ORG,
    token: str | bool | None = None,
    force_download: bool = False,
    progress: bool = True,
    allow_nonfinite: bool = False,
) -> LoadReport:
    """Fill a model with published weights, whatever code base wrote them, and report what was done.

    Tables of positions are resampled to the model's grid. A stem for other channels, another patch size or from a 2D
    model is adapted as :mod:`medgmae.checkpoints.adapt` says. A head for another number of classes is dropped. The
    encoder of a masked autoencoder goes into an encoder; both parts go into a masked autoencoder. The model is
    unchanged when an error is raised.

    Args:
        model: an encoder or masked autoencoder of this library.
        source: a tag ("vit_large_patch16_256.tangerine"), a card, "hf-hub:org/repo[@revision]", "timm/MODEL" (2D
            weights through timm), a file, a folder (also as "local-dir:/path") or a state dictionary. Of a file with
            several sets of weights, such as a student's and a teacher's, "FILE::teacher" takes the one under that
            entry; the report names those that were not read.
        strict: False accepts a file without the decoder or with another one, a Gaussian decoder of another kind or
            support among them, and names that are not known; all is reported. An encoder entry that is missing raises
            all the same.
        source_grid: patch grid (d, h, w) of the file's tables; needed when it is neither a cube nor the model's.
        token_order: of a Primus file, the order of its tokens, "raster" or "swapped" (the first two axes exchanged, as
            nnssl's masked autoencoder has them). None: what the weight card or the trainer's name in the file says;
            the report's notes tell which was taken.
        inflate: how a 2D stem gets its depth, "average" or "center".
        cache_dir: folder for downloads, instead of the Hugging Face cache and ours.
        hub_org: organisation of a hub repository that is named without one.
        token: hub token; None for the one that ``hf auth login`` stored, False for none.
        force_download: fetch again what is in the cache.
        progress: show a progress bar while downloading.
        allow_nonfinite: accept weights with NaN or infinite values.

    Raises:
        WeightsError: the source cannot be fetched, read or recognised, an encoder entry is missing, a shape cannot be
            adapted, the file holds parts that the model would silently ignore, or values are NaN or infinite. The
            message lists the names.
        TypeError: the model is not one of this library, or the source nothing that names weights.
        ValueError: ``source_grid``, ``token_order`` or ``inflate`` is none.
    """
    check_choice("inflate", inflate, get_args(Inflate))
    check_choice("token_order", token_order, (None, *get_args(TokenOrder)))
    source_grid = grid_argument(source_grid)
    model = unwrap(model)
    _target(model)  # raises before anything is fetched
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
    outcome = rehearse(
        model,
        opened,
        strict=strict,
        source_grid=source_grid,
        token_order=token_order,
        inflate=inflate,
        allow_nonfinite=allow_nonfinite,
    )
    _fill(model, outcome.slots, _apart(outcome.tensors, outcome.slots, opened.borrowed))
    log.info("%s", outcome.report)
    return outcome.report


class Outcome(NamedTuple):
    """What loading will do.

    tensors: by the name of the parameter or buffer that they go into; likewise ``slots``, these themselves.
    """

    tensors: dict[str, Tensor]
    slots: dict[str, Tensor]
    report: LoadReport


def rehearse(
    model: nn.Module,
    opened: OpenSource,
    *,
    strict: bool = True,
    source_grid: Shape | None = None,
    token_order: TokenOrder | None = None,
    inflate: Inflate = "average",
    allow_nonfinite: bool = False,
) -> Outcome:
    """Everything of :func:`load_pretrained` but the change of the model; arguments and errors are its own."""
    converted = convert(
        opened.checkpoint.state,
        origin=opened.origin,
        config=opened.config if opened.config and opened.config.get("grid") else None,
        target=_target(model),
        source_grid=source_grid,
        token_order=token_order or opened.token_order,
        facts=opened.checkpoint.facts,
    )
    expects = {**converted.expects, **opened.expects}
    plan = make_plan(model, converted, expects, strict=strict, inflate=inflate)
    origin = f"{opened.origin} ({converted.source})"
    if plan.errors:
        raise WeightsError(_refusal(origin, plan.errors))
    slots = _slots(model, plan.tensors)
    if not allow_nonfinite:
        _check_finite(plan.tensors, slots, origin)
    notes = [*_sets_note(opened), *converted.notes, *plan.notes]
    report = LoadReport(origin, list(plan.tensors), plan.resized, plan.adapted, plan.unused, plan.missing, notes)
    return Outcome(plan.tensors, slots, report)


def _target(model: nn.Module) -> Target:
    encoder = encoder_of(model)
    if not all(hasattr(encoder, name) for name in ("grid_size", "patch_size", "in_chans", "settings")):
        raise TypeError(
            f"load_pretrained fills the models of this library, got {type(model).__name__}: make one with create_model"
        )
    settings = {name: setting.value for name, setting in encoder.settings().items()}
    decoder: Any = getattr(model, "decoder", None)
    of_decoder = decoder.settings() if hasattr(decoder, "settings") else {}
    theirs = {name: setting.value for name, setting in of_decoder.items()}
    return Target(encoder.grid_size, encoder.patch_size, encoder.in_chans, settings, theirs)


def _refusal(origin: str, errors: list[str]) -> str:
    lines = errors[:SHOWN_ERRORS]
    if len(errors) > SHOWN_ERRORS:
        lines = [*lines, f"and {len(errors) - SHOWN_ERRORS} more"]
    listed = "\n  ".join(lines)
    return (
        f"{origin} does not fit this model, which is unchanged:\n  {listed}\n"
        "Build the model that the file was made with: `medgmae info FILE` shows its sizes"
    )


def _sets_note(opened: OpenSource) -> list[str]:
    """Which of several sets of weights was read."""
    container, others = opened.checkpoint.container, opened.checkpoint.others
    if not others:
        return []
    read, rest = repr(container) if container else "the entries at the top", listed(map(repr, others))
    return [f"read are the weights under {read}, not those under {rest} (which 'FILE{SET_MARK}{others[0]}' takes)"]


def _slots(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The parameters and buffers of these names, themselves."""
    slots = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        slots[name] = getattr(model.get_submodule(owner), leaf)
    return slots


def _check_finite(tensors: dict[str, Tensor], slots: dict[str, Tensor], origin: str) -> None:
    names = [name for name, tensor in tensors.items() if not_finite(tensor, slots[name].dtype)]
    if names:
        raise WeightsError(
            f"{origin}: {len(names)} tensors have NaN or infinite values, or such as become infinite in the model's "
            f"type: {listed(names)}. The training that made the file has diverged, or the file is damaged: take an "
            "earlier one, or pass allow_nonfinite=True. The model is unchanged"
        )


def _apart(tensors: dict[str, Tensor], slots: dict[str, Tensor], borrowed: bool) -> dict[str, Tensor]:
    """Tensors as they can be put in one after another: copied where they share memory with what is filled.

    What becomes a parameter itself (where the slot is on the meta device) is copied too if its memory is anyone
    else's: another parameter's, or the caller's.
    """
    filled = Spans()
    for slot in slots.values():
        filled.take(slot)
    apart = {}
    for name, tensor in tensors.items():
        becomes = slots[name].is_meta and (borrowed or overlaps_itself(tensor) or not tensor.is_contiguous())
        apart[name] = (
            tensor if filled.is_free(tensor) and not becomes else tensor.clone(memory_format=torch.contiguous_format)
        )
        if slots[name].is_meta:
            filled.take(apart[name])
    return apart


@torch.no_grad()
def _fill(model: nn.Module, slots: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Put tensors into parameters and buffers; into those on the meta device without a copy."""
    for name, tensor in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        slot = slots[name]
        if not slot.is_meta:
            slot.copy_(tensor)
        elif isinstance(slot, nn.Parameter):
            parameter = nn.Parameter(tensor.to(slot.dtype), requires_grad=slot.requires_grad)
            setattr(model.get_submodule(owner_name), leaf, parameter)
        else:
            setattr(model.get_submodule(owner_name), leaf, tensor.to(slot.dtype))


def _give_storage(module: nn.Module) -> None:
    """Uninitialised memory for what a module itself has on the meta device; torch's to_empty imports its compiler."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.is_meta:
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))


def materialize(model: nn.Module, loaded: Iterable[str]) -> None:
    """Give storage and a random start to whatever the file did not fill (a new head, say).

    Args:
        model: on the meta device, but for what was filled.
        loaded: names of what was filled.

    Raises:
        WeightsError: tensors without values were put in: random ones in their place would look like weights.
    """
    hollow = [name for name, slot in _slots(model, loaded).items() if slot.is_meta]
    if hollow:
        raise WeightsError(
            f"{listed(hollow)}: without values in the state dictionary, which is on the meta device; gather it first"
        )
    for module in model.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if any(tensor.is_meta for _, tensor in own):
            filled = {name: tensor.detach().clone() for name, tensor in own if not tensor.is_meta}
            _give_storage(module)
            initialize(module)
            with torch.no_grad():
                for name, tensor in filled.items():
                    getattr(module, name).copy_(tensor)
