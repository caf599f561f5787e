"""Weights into models: find a source, convert it, fit it, check that nothing is left out, and say what was done."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from medgmae.checkpoints.adapt import Inflate, adapt_stem, adapt_table
from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.dialects.entries import Converted, Target
from medgmae.checkpoints.dialects.gaussian import holds_gaussians
from medgmae.checkpoints.dialects.recognise import convert
from medgmae.checkpoints.opening import Source, open_source
from medgmae.checkpoints.saving import unwrap
from medgmae.checkpoints.settings import ABSENT, LENIENT, OF_PRETRAINING, remedy, setting
from medgmae.layers.blocks import initialize
from medgmae.layers.patches import Shape

log = logging.getLogger("medgmae")

# Names that belong to a task rather than to the encoder: never required, dropped when they do not fit.
HEAD = ("encoder.head.", "encoder.fc_norm.")

# What can be fitted to another model.
TABLES = ("encoder.pos_embed", "decoder.pos_embed")
STEM = "encoder.patch_embed.proj.weight"


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_pretrained` did; names are the model's, in ``unused`` the file's.

    source: where the weights came from and what they were recognised as.
    loaded: parameters and buffers that were filled, adapted ones included.
    resized: table of positions to the grids "from to".
    adapted: other tensor to what was done to fit it; setting to what the file's model has and this one has.
    unused: name in the file to the reason why it was left out.
    missing: parameters that the file has not and that keep their random start.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    adapted: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        lines += [f"  {name}: {what}" for name, what in {**self.resized, **self.adapted}.items()]
        if self.missing:
            lines.append(f"  not in the file, randomly initialised: {', '.join(self.missing)}")
        reasons = sorted(set(self.unused.values()))
        lines += [f"  unused ({why}): {sum(v == why for v in self.unused.values())} tensors" for why in reasons]
        return "\n".join(lines)


def load_pretrained(
    model: nn.Module,
    source: Source,
    *,
    strict: bool = True,
    source_grid: Shape | None = None,
    inflate: Inflate = "average",
    **options: Any,
) -> LoadReport:
    """Fill a model with published weights, whatever code base wrote them, and report what was done.

    Tables of positions are resampled to the model's grid. A stem for other channels, another patch size or from a 2D
    model is adapted as :mod:`medgmae.checkpoints.adapt` says. A head for another number of classes is dropped. The
    encoder of a masked autoencoder goes into an encoder; both parts go into a masked autoencoder. The model is
    unchanged when an error is raised.

    Args:
        model: an encoder or masked autoencoder of this library.
        source: what :func:`open_source` takes.
        strict: False accepts a file without the decoder or with another one, a Gaussian decoder of another kind or
            support among them, and names that are not known; all is reported. An encoder entry that is missing raises
            all the same.
        source_grid: patch grid (d, h, w) of the file's tables; needed when it is neither a cube nor the model's.
        inflate: how a 2D stem gets its depth, "average" or "center".
        **options: cache_dir, hub_org, token, progress: see :func:`medgmae.checkpoints.sources.resolve`.

    Raises:
        WeightsError: the source cannot be read or recognised, an encoder entry is missing, a shape cannot be adapted,
            or the file holds parts that the model would silently ignore. The message lists the names.
        TypeError: the model is not one of this library.
    """
    model = unwrap(model)
    encoder = _encoder(model)
    config = getattr(model, "config", None) or {}
    opened = open_source(source, config.get("architecture"), **options)
    target = Target(encoder.grid_size, encoder.patch_size, encoder.in_chans, getattr(encoder, "class_token", None))
    converted = convert(
        opened.checkpoint.state,
        origin=opened.origin,
        config=opened.config if opened.config and opened.config.get("grid") else None,
        target=target,
        source_grid=source_grid,
    )
    converted.expects.update(opened.expects)
    plan = _Plan(model, converted, opened.origin, strict, inflate)
    _fill(model, plan.tensors)
    log.info("%s", plan.report)
    return plan.report


def _encoder(model: nn.Module) -> Any:
    encoder = getattr(model, "encoder", model)
    if not all(hasattr(encoder, name) for name in ("grid_size", "patch_size", "in_chans")):
        raise TypeError(
            f"load_pretrained fills the models of this library, got {type(model).__name__}: make one with create_model"
        )
    return encoder


class _Plan:
    """Which tensor goes where. Everything is decided and checked here, before the model is touched."""

    def __init__(self, model: nn.Module, converted: Converted, origin: str, strict: bool, inflate: Inflate) -> None:
        self.origin, self.strict, self.inflate = origin, strict, inflate
        self.grid, self.source_grid = _encoder(model).grid_size, converted.grid
        self.whole = hasattr(model, "decoder")
        self.slots = {self._ours(name): value for name, value in model.state_dict(keep_vars=True).items()}
        self.file_names = {ours: full for full, ours in converted.renamed.items()}
        self.tensors: dict[str, Tensor] = {}
        self.report = LoadReport(f"{origin} ({converted.source})", unused=dict(converted.unused))
        self.errors: list[str] = []
        self.other_decoder = self._find_other_decoder(converted)
        self._check_expectations(model, converted)
        for ours, tensor in converted.state.items():
            self._place(ours, tensor)
        self._check_missing()
        if self.errors:
            listed = "\n  ".join(self.errors[:12])
            if len(self.errors) > 12:
                listed += f"\n  and {len(self.errors) - 12} more"
            raise WeightsError(
                f"{origin} ({converted.source}) does not fit this model, which is unchanged:\n  {listed}\n"
                "Build the model that the file was made with: `medgmae info FILE` shows its sizes"
            )

    def _find_other_decoder(self, converted: Converted) -> str:
        """What the file's decoder makes, "Gaussians" or "voxels", if the model's makes the other; else ""."""
        decoder = [ours for ours in converted.state if ours.startswith("decoder.")]
        theirs = holds_gaussians(decoder)
        if not decoder or not self.whole or theirs == holds_gaussians(self.slots):
            return ""
        makes, other = ("Gaussians", "voxels") if theirs else ("voxels", "Gaussians")
        if self.strict:
            self.errors.append(f"decoder: it makes {makes} in the file, {other} in the model")
        return makes

    def _ours(self, name: str) -> str:
        return name if self.whole else f"encoder.{name}"

    def _models(self, ours: str) -> str:
        return ours if self.whole else ours.removeprefix("encoder.")

    def _place(self, ours: str, tensor: Tensor) -> None:
        slot = self.slots.get(ours)
        if self.other_decoder and ours.startswith("decoder."):
            self._unused(ours, f"decoder that makes {self.other_decoder}")
            return
        if slot is None:
            self._leave_out(ours)
            return
        hollow = tensor.is_meta and not slot.is_meta
        if hollow or tensor.layout != torch.strided or tensor.is_floating_point() < slot.is_floating_point():
            kind = "no values" if hollow else f"{tensor.dtype}, {tensor.layout}"
            self.errors.append(f"{self._models(ours)}: {kind} in the file, expected a dense {slot.dtype}")
            return
        fitted = self._fit(ours, tensor, slot)
        if tuple(fitted.shape) == tuple(slot.shape):
            self.tensors[self._models(ours)] = fitted
            self.report.loaded.append(self._models(ours))
        elif ours.startswith(HEAD):
            self._unused(ours, f"head of shape {tuple(tensor.shape)}, the model's is {tuple(slot.shape)}")
        elif ours.startswith("decoder.") and not self.strict:
            self._unused(ours, "decoder of another shape")
        else:
            self.errors.append(
                f"{self._models(ours)}: {tuple(tensor.shape)} in the file, {tuple(slot.shape)} in the model"
            )

    def _fit(self, ours: str, tensor: Tensor, slot: Tensor) -> Tensor:
        """The tensor in the slot's shape where there is a rule for it, noted in the report."""
        name = self._models(ours)
        source, target = tuple(self.source_grid), tuple(self.grid)
        if ours in TABLES and source != target and tensor.shape[1:2] == (math.prod(source),):
            if len(source) > len(target):
                return tensor  # volumes into images: there is no rule
            self.report.resized[name] = f"grid {source} to {target}"
            return adapt_table(tensor, source, target)
        if ours == STEM and _is_stem_for(tensor, slot) and tensor.shape != slot.shape:
            tensor, done = adapt_stem(tensor, slot.shape, self.inflate)
            self.report.adapted[name] = "; ".join(done)
        return tensor

    def _unused(self, ours: str, why: str) -> None:
        if ours in self.file_names:
            self.report.unused[self.file_names[ours]] = why

    def _leave_out(self, ours: str) -> None:
        """Note a tensor that the model has no place for; anything that would change the features is an error."""
        if ours.startswith("decoder."):
            if self.whole and self.strict and ours in self.file_names:
                self.errors.append(f"{self.file_names[ours]}: the model's decoder has no such part")
            self._unused(ours, "decoder" if not self.whole else "unknown to the decoder")
        elif ours.startswith(HEAD):
            self._unused(ours, "head")
        elif ours.startswith("encoder.norm."):
            self._unused(ours, "last norm of the tokens: the model normalises the pooled vector instead")
        elif ours == "encoder.cls_token" and not self.strict:
            self._unused(ours, "class token: the model has none")
        elif ours.startswith("encoder.") and not _known_encoder_part(ours) and not self.strict:
            self._unused(ours, "unknown name")
        else:
            self.errors.append(f"{self.file_names.get(ours, ours)}: in the file, but the model has no such part")

    def _check_missing(self) -> None:
        filled = set(self.report.loaded)
        for ours in self.slots:
            name = self._models(ours)
            if name in filled:
                continue
            self.report.missing.append(name)
            required = ours.startswith("encoder.") or self.strict
            if required and not ours.startswith(HEAD) and not any(name in line for line in self.errors):
                self.errors.append(f"{name}: not in the file")

    def _check_expectations(self, model: nn.Module, converted: Converted) -> None:
        alone = not self.whole and any(ours.startswith("decoder.") for ours in converted.state)
        for path, wanted in converted.expects.items():
            found = setting(model, path)
            if found is ABSENT or found == wanted:
                continue
            name, differ = self._models(path), f"{wanted!r} in the file's model, {found!r} in this one"
            if path in LENIENT and self.strict:
                self.errors.append(f"{name}: {differ}; strict=False takes over what both have")
            elif path in LENIENT or (alone and path in OF_PRETRAINING):
                self.report.adapted[name] = differ
            else:
                self.errors.append(f"{name}: {differ}{remedy(path, wanted)}")


def _is_stem_for(tensor: Tensor, slot: Tensor) -> bool:
    """Whether a patch weight can be adapted: as wide, of no more dimensions, with no empty axis."""
    return 4 <= tensor.dim() <= slot.dim() and len(tensor) == len(slot) and tensor.numel() > 0


def _known_encoder_part(ours: str) -> bool:
    parts = ("blocks.", "patch_embed.", "pos_embed", "norm_pre.", "cls_token")
    return ours.removeprefix("encoder.").startswith(parts)


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
