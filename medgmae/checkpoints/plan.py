"""Which tensor goes where, part by part: everything is decided and checked here, before a model is touched."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medgmae.checkpoints.adapt import Inflate, adapt_stem, adapt_table, wide
from medgmae.checkpoints.dialects.entries import ENCODER, Converted
from medgmae.checkpoints.settings import compare_settings, encoder_of, model_settings
from medgmae.layers.patches import Shape

# Names that belong to a task rather than to the encoder: never required, dropped when they do not fit.
HEAD = ("head.", "fc_norm.", "attn_pool.")

# The last layer of a decoder that belongs to a task.
LAST = "out."

# What can be fitted to another model, in either part.
TABLE = "pos_embed"
STEM = "patch_embed.proj.weight"

# Voxels along an axis of a patch: to resize one takes matrices of so many rows and columns.
MAX_PATCH = 512


class Rules(NamedTuple):
    """How tensors are fitted.

    source_grid: patch grid of the file's tables; likewise ``grid`` of the model's.
    strict: whether the decoder must be whole, and every name known.
    inflate: how a 2D stem gets its depth; likewise ``depth_axis``, the axis of a volume that a 2D file does not have.
    offset: of the encoder's table, see :func:`medgmae.resample_pos_embed`.
    """

    source_grid: Shape
    grid: Shape
    strict: bool
    inflate: Inflate
    depth_axis: int = 0
    offset: float = 0.0


class Decision(NamedTuple):
    """What becomes of one tensor of the file: it is taken (with a note where it had to be changed), left or refused.

    unused: why it is left out.
    error: why it cannot be loaded.
    """

    tensor: Tensor | None = None
    resized: str = ""
    adapted: str = ""
    unused: str = ""
    error: str = ""


@dataclass
class Plan:
    """The outcome; names are the model's, in ``unused`` the file's.

    tensors: what is filled in.
    resized, adapted, unused, missing, notes: see :class:`~medgmae.LoadReport`.
    errors: reasons why nothing can be loaded.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    adapted: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def extend(self, other: Plan) -> None:
        """Add what was decided elsewhere."""
        self.tensors |= other.tensors
        self.resized |= other.resized
        self.adapted |= other.adapted
        self.unused |= other.unused
        self.missing += other.missing
        self.notes += other.notes
        self.errors += other.errors


def make_plan(
    model: nn.Module, converted: Converted, expects: Mapping[str, Any], *, strict: bool, inflate: Inflate
) -> Plan:
    """Decide what of a file goes where in a model; ``expects`` are the settings that the weights need."""
    encoder, decoder = model_parts(model, converted)
    depth_axis = _depth_axis(model, converted.encoder.get(STEM))
    rules = Rules(converted.grid, encoder_of(model).grid_size, strict, inflate, depth_axis)
    offset = model_settings(model).get("encoder.interpolate_offset")
    plan = Plan(unused=dict(converted.unused))
    plan.errors += [f"{name}: in the file, but the model has no such part" for name in converted.unknown]
    plan.extend(plan_settings(model, expects, encoder, decoder, strict))
    plan.extend(plan_part(encoder, rules._replace(offset=offset.value) if offset else rules))
    plan.notes += _lifting_notes(model, converted, rules)
    plan.extend(plan_part(decoder, rules))
    if decoder.is_new():
        plan.notes.append(
            f"the decoder is new: none of its {len(decoder.slots)} tensors is in the file, all are random"
        )
    plan.extend(plan_rest(model, (encoder, decoder), strict))
    return plan


def _depth_axis(model: nn.Module, stem: Tensor | None) -> int:
    """The axis (0 to 2) of the model's volumes that the images of a 2D file do not have.

    The one of which the model predicts a slice, or that it knows to be lifted; else the one without which its patch is
    the file's, if there is one such axis alone; else the first.
    """
    stated: Any = getattr(model, "slice_axis", None)
    stated = getattr(encoder_of(model), "lifted_axis", None) if stated is None else stated
    if stated is not None:
        return int(stated)
    patch = tuple(encoder_of(model).patch_size)
    fitting = [] if stem is None else [a for a in range(3) if patch[:a] + patch[a + 1 :] == tuple(stem.shape[2:])]
    return fitting[0] if len(fitting) == 1 else 0


def _lifting_notes(model: nn.Module, converted: Converted, rules: Rules) -> list[str]:
    """Of weights of images in a model of volumes: whether a volume of one slice repeated has that slice's features."""
    stem, encoder = converted.encoder.get(STEM), encoder_of(model)
    if stem is None or stem.dim() != 4 or len(rules.grid) != 3:
        return []
    axis = rules.depth_axis
    flat, patch = (tuple(size[:axis]) + tuple(size[axis + 1 :]) for size in (rules.grid, tuple(encoder.patch_size)))
    reasons = []
    if encoder.num_prefix_tokens and getattr(encoder, "lifted_axis", None) is None:
        reasons.append(
            f"attention counts class tokens once among all copies of a patch, as lifted_axis={axis} would not"
        )
    if patch != tuple(stem.shape[2:]):
        reasons.append(f"patches of {tuple(stem.shape[2:])} were resized to {patch}")
    if TABLE in converted.encoder and flat != tuple(rules.source_grid):
        reasons.append(f"the table of positions was resampled from {tuple(rules.source_grid)} to {flat}")
    if reasons:
        return [
            f"weights of images: features of a slice repeated along axis {axis} are near the image's, not the same: "
            f"{'; '.join(reasons)}"
        ]
    return [f"weights of images: a slice repeated along axis {axis} has the image's features"]


def model_parts(model: nn.Module, converted: Converted) -> tuple[EncoderPart, DecoderPart]:
    """The parts of a model, each with what a file has for it."""
    encoder = encoder_of(model)
    alone = encoder is model
    return (
        EncoderPart(encoder, "" if alone else "encoder.", converted.encoder, converted.file_names("encoder")),
        DecoderPart(
            None if alone else getattr(model, "decoder", None),
            "decoder.",
            converted.decoder,
            converted.file_names("decoder"),
        ),
    )


def plan_settings(
    model: nn.Module, expects: Mapping[str, Any], encoder: EncoderPart, decoder: DecoderPart, strict: bool
) -> Plan:
    """Compare the settings of the parts that are taken from the file."""
    if decoder.is_other_type():
        expects = {name: value for name, value in expects.items() if name.startswith("encoder.")}
    alone = (decoder.module is None or decoder.is_new()) and bool(decoder.tensors)
    compared = compare_settings(model_settings(model), expects, strict=strict, alone=alone)
    hidden = "" if encoder.prefix else "encoder."  # an encoder's own settings have no prefix
    return Plan(
        adapted={name.removeprefix(hidden): text for name, text in compared.accepted.items()},
        errors=[f"{name.removeprefix(hidden)}: {text}" for name, text in compared.refused.items()],
    )


class ModelPart(ABC):
    """One part of the model and what the file has for it.

    Args:
        module: the part; None where the model has no such part.
        prefix: what stands in front of the part's names in the model's state dictionary.
        tensors: the part's names to the file's tensors.
        file_names: the part's names to the file's; what conversion added has none.
    """

    def __init__(
        self, module: nn.Module | None, prefix: str, tensors: Mapping[str, Tensor], file_names: Mapping[str, str]
    ) -> None:
        self.module, self.prefix, self.tensors, self.file_names = module, prefix, tensors, file_names
        self.slots: dict[str, Tensor] = {} if module is None else module.state_dict(keep_vars=True)

    @abstractmethod
    def is_other_type(self) -> bool:
        """Whether the file has another type of this part than the model."""

    @abstractmethod
    def without_slot(self, name: str, rules: Rules) -> Decision:
        """What becomes of a tensor that the model has no place for."""

    @abstractmethod
    def of_other_shape(self, name: str, shape: Shape, expected: Shape, rules: Rules) -> str:
        """Why a tensor may be left out whose shape does not fit; "" where it may not."""

    @abstractmethod
    def is_required(self, name: str, rules: Rules) -> bool:
        """Whether the file must have this."""


class EncoderPart(ModelPart):
    """The encoder: it must be whole, and nothing that would change the features is left out in silence."""

    def is_other_type(self) -> bool:
        """Never: an encoder that does not fit is an error, name by name."""
        return False

    def without_slot(self, name: str, rules: Rules) -> Decision:
        """Heads and a norm that the model replaces are left out; other names are errors, or unknown if not strict."""
        if name.startswith(HEAD):
            return Decision(unused="head")
        if name.startswith("projection."):
            return Decision(unused="head of the pre-training: projection_dim= (Primus) or prototypes= (ViT) builds it")
        if name.startswith("norm."):
            return Decision(unused="last norm of the tokens: the model normalises the pooled vector instead")
        if name == "cls_token" and not rules.strict:
            return Decision(unused="class token: the model has none")
        if not name.startswith(ENCODER) and not rules.strict:
            return Decision(unused="unknown name")
        return Decision(error="in the file, but the model has no such part")

    def of_other_shape(self, name: str, shape: Shape, expected: Shape, rules: Rules) -> str:
        """Only a head."""
        return f"head of shape {shape}, the model's is {expected}" if name.startswith(HEAD) else ""

    def is_required(self, name: str, rules: Rules) -> bool:
        """All but the head."""
        return not name.startswith(HEAD)


class DecoderPart(ModelPart):
    """The decoder: ``strict=False`` takes what of it fits.

    One that belongs to a task rather than to the pre-training, a UNETR's, may be missing from the file, and its last
    layer may be for other classes.
    """

    @property
    def of_task(self) -> bool:
        """Whether the model's decoder can begin with random numbers."""
        return bool(getattr(self.module, "CAN_START_FRESH", False))

    def is_new(self) -> bool:
        """Whether the model's decoder begins with random numbers: the file has none, or one of another type."""
        return self.of_task and (not self.tensors or self.is_other_type())

    def is_other_type(self) -> bool:
        """Whether the file's decoder is not of the model's class, by that class's own word."""
        if self.module is None or not self.tensors:
            return False
        own: Any = type(self.module)
        return own.read_sizes(self.tensors) is None

    def without_slot(self, name: str, rules: Rules) -> Decision:
        """Left out where the model has no decoder, an error in a strict load."""
        if self.module is None:
            return Decision(unused="decoder")
        if self.of_task and name.startswith(LAST):
            return Decision(unused="head")
        if rules.strict and name in self.file_names:
            return Decision(error="the model's decoder has no such part")
        return Decision(unused="unknown to the decoder")

    def of_other_shape(self, name: str, shape: Shape, expected: Shape, rules: Rules) -> str:
        """Left out unless strict."""
        if self.of_task and name.startswith(LAST):
            return f"head of shape {shape}, the model's is {expected}"
        return "" if rules.strict else "decoder of another shape"

    def is_required(self, name: str, rules: Rules) -> bool:
        """All of it, if strict; but a whole decoder of a task, or its last layer, may be new."""
        return rules.strict and not (self.is_new() or (self.of_task and name.startswith(LAST)))


def plan_part(part: ModelPart, rules: Rules) -> Plan:
    """Decide about every tensor that the file has for a part, and every one that the part needs."""
    if part.is_other_type():
        return _plan_other_type(part, rules)
    plan = Plan()
    refused = set()
    for name, tensor in part.tensors.items():
        slot, ours = part.slots.get(name), part.prefix + name
        decision = part.without_slot(name, rules) if slot is None else _place(part, name, tensor, slot, rules)
        if decision.error:
            refused.add(name)
            plan.errors.append(f"{part.file_names.get(name, ours) if slot is None else ours}: {decision.error}")
        elif decision.tensor is None:
            if name in part.file_names:  # what conversion added is nobody's loss
                plan.unused[part.file_names[name]] = decision.unused
        else:
            plan.tensors[ours] = decision.tensor
            plan.resized |= {ours: decision.resized} if decision.resized else {}
            plan.adapted |= {ours: decision.adapted} if decision.adapted else {}
    for name in part.slots:
        if part.prefix + name not in plan.tensors:
            plan.missing.append(part.prefix + name)
            if part.is_required(name, rules) and name not in refused:
                plan.errors.append(f"{part.prefix}{name}: not in the file")
    return plan


def _plan_other_type(part: ModelPart, rules: Rules) -> Plan:
    """Nothing is taken of a part of another type: its names may be the same, their meaning is not."""
    text = f"the file has another type of decoder than the model's {type(part.module).__name__}"
    return Plan(
        unused=dict.fromkeys(part.file_names.values(), text),
        missing=[part.prefix + name for name in part.slots],
        errors=[f"decoder: {text}; strict=False leaves it out"] if part.is_required("", rules) else [],
    )


def plan_rest(model: nn.Module, parts: tuple[ModelPart, ...], strict: bool) -> Plan:
    """What a model has beside its encoder and decoder is in no file that is known."""
    known = {part.prefix + name for part in parts for name in part.slots}
    missing = [name for name in model.state_dict() if name not in known]
    return Plan(missing=missing, errors=[f"{name}: not in the file" for name in missing if strict])


def _place(part: ModelPart, name: str, tensor: Tensor, slot: Tensor, rules: Rules) -> Decision:
    """Decide about a tensor that the model has a place for."""
    hollow = tensor.is_meta and not slot.is_meta
    if hollow or tensor.layout != torch.strided or tensor.is_floating_point() < slot.is_floating_point():
        kind = "no values" if hollow else f"{tensor.dtype}, {tensor.layout}"
        return Decision(error=f"{kind} in the file, expected a dense {slot.dtype}")
    fitted = fit(name, tensor, slot, rules)
    if fitted.tensor is not None and fitted.tensor.shape == slot.shape:
        return fitted
    shape, expected = tuple(tensor.shape), tuple(slot.shape)
    if why := part.of_other_shape(name, shape, expected, rules):
        return Decision(unused=why)
    return Decision(error=f"{shape} in the file, {expected} in the model")


def fit(name: str, tensor: Tensor, slot: Tensor, rules: Rules) -> Decision:
    """A tensor in the shape of its place where there is a rule for that, else as it is."""
    source, target = tuple(rules.source_grid), tuple(rules.grid)
    if name == TABLE and source != target and tensor.shape[1:2] == (math.prod(source),):
        if len(source) > len(target):
            return Decision(tensor)  # volumes into images: there is no rule
        table = adapt_table(wide(tensor), source, target, rules.depth_axis, rules.offset)
        return Decision(table, resized=f"grid {source} to {target}")
    if name == STEM and tensor.shape != slot.shape and _is_stem_for(tensor, slot):
        adapted, changes = adapt_stem(wide(tensor), slot.shape, rules.inflate, rules.depth_axis)
        return Decision(adapted, adapted="; ".join(changes))
    return Decision(tensor)


def _is_stem_for(tensor: Tensor, slot: Tensor) -> bool:
    """Whether a patch weight can be adapted: as wide, of no more dimensions, with no axis empty or out of measure."""
    fits = 4 <= tensor.dim() <= slot.dim() and len(tensor) == len(slot) and tensor.numel() > 0
    return fits and max(tensor.shape[2:]) <= MAX_PATCH
