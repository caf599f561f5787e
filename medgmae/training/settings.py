"""Everything that decides what comes out of a run, as one value: read from a recipe, changed by name, written down."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from medgmae.factory import card_input

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


class TrainingError(ValueError):
    """Settings that are not valid, data that cannot be used, or a run that cannot go on."""


@dataclass(frozen=True)
class CropSettings:
    """Crops that the model sees.

    size: voxels (d, h, w), or (h, w) of planes; None: what the model was made for.
    per_scan: crops of a scan in an epoch.
    foreground: share of crops whose centre lies in the foreground, see :class:`~medgmae.data.Crops`; None: anywhere.
    normalize: "none", "zscore" or "zscore_nonzero" of each crop and channel.
    """

    size: list[int] | None = None
    per_scan: int = 1
    foreground: float | None = None
    normalize: str = "none"


@dataclass(frozen=True)
class Phase:
    """A part of the training in which only some parameters learn.

    until: epoch (with ``epochs``) or step (with ``steps``) where it ends.
    train: patterns such as "decoder.residual_*"; a parameter learns whose name matches one of them.
    """

    until: float
    train: list[str]


@dataclass(frozen=True)
class TrainingSettings:
    """Optimisation.

    steps, epochs: length, one of them; an epoch is ``per_scan`` crops of every scan.
    batch_size: crops per update, of all processes and micro-batches together.
    micro_batch: crops that a process computes at once; None: its share of the batch.
    lr: peak; with ``lr_per_256`` that of a batch of 256.
    min_lr, warmup_steps, warmup_epochs: linear from 0 to the peak, then half a cosine to ``min_lr``.
    weight_decay, betas: of AdamW; biases, norms and what the model names are not decayed.
    clip: largest norm of the gradient; None: not clipped.
    precision: "fp32", "bf16", "fp16", or "auto": bf16 where the GPU has it, else fp16; fp32 on the CPU.
    seed: of every random draw.
    phases: see :class:`Phase`; after the last one everything learns.
    checkpointing: recompute activations in the backward pass instead of keeping them.
    compile: compile the model.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    micro_batch: int | None = None
    lr: float = 1e-3
    lr_per_256: bool = False
    min_lr: float = 0.0
    warmup_steps: int | None = None
    warmup_epochs: float | None = None
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip: float | None = None
    precision: str = "auto"
    seed: int = 0
    phases: list[Phase] = field(default_factory=list)
    checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True)
class Settings:
    """A run.

    model: architecture, as :func:`~medgmae.create_model` takes it.
    model_options: its options.
    init: weights to start from, anything that ``load_pretrained`` takes; None: random.
    input: preprocessing, the ``input`` block of a weight card, or the tag of one.
    crops, augmentation, training: see there; ``augmentation`` is that of :class:`~medgmae.data.Augmentation`.
    held_out: what is measured on and not trained on: a share of the scans below 1, or "column=value" of a table, such
        as "fold=0".
    """

    model: str
    model_options: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    input: dict[str, Any] | str = field(default_factory=dict)
    crops: CropSettings = field(default_factory=CropSettings)
    augmentation: dict[str, Any] = field(default_factory=dict)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    held_out: float | str = 0.1

    def __post_init__(self) -> None:
        training, crops = self.training, self.crops
        expect((training.steps is None) != (training.epochs is None), "training needs steps or epochs, and one of them")
        for name, least in (("steps", 1), ("batch_size", 1), ("micro_batch", 1), ("warmup_steps", 0), ("seed", 0)):
            value = getattr(training, name)
            expect(value is None or value >= least, f"training.{name} is {value}; expected at least {least}")
        for name in ("epochs", "lr", "clip"):
            value = getattr(training, name)
            expect(value is None or value > 0, f"training.{name} is {value}; expected more than 0")
        for name in ("min_lr", "warmup_epochs", "weight_decay"):
            value = getattr(training, name)
            expect(value is None or value >= 0, f"training.{name} is {value}; expected at least 0")
        betas, two = training.betas, len(training.betas) == 2
        expect(two and all(0 <= b < 1 for b in betas), f"training.betas are {betas}; expected two numbers in [0, 1)")
        expect(
            training.precision in PRECISIONS,
            f"training.precision is {training.precision!r}; expected one of {', '.join(PRECISIONS)}",
        )
        expect(
            training.warmup_steps is None or training.warmup_epochs is None,
            "training.warmup_steps and training.warmup_epochs both say how long the warm-up is; leave one out",
        )
        expect(crops.per_scan >= 1, f"crops.per_scan is {crops.per_scan}; expected at least 1")
        share = isinstance(self.held_out, float) and 0 <= self.held_out < 1
        column = isinstance(self.held_out, str) and "=" in self.held_out
        expect(share or column, f"held_out is {self.held_out!r}; expected a share from 0 to below 1, or 'column=value'")

    @property
    def input_block(self) -> dict[str, Any]:
        """The ``input`` block itself."""
        return dict(card_input(self.input) if isinstance(self.input, str) else self.input)

    def changed(self, changes: Mapping[str, Any]) -> Settings:
        """The settings with others by dotted name, such as ``{"training.lr": 1e-4, "model": "vit_..."}``.

        Raises:
            TrainingError: an unknown name, or a value of another kind.
        """
        table = asdict(self)
        for name, value in changes.items():
            *path, last = name.split(".")
            inner = table
            for key in path:
                inner = inner.get(key)  # type: ignore[assignment]
                expect(isinstance(inner, dict), f"{name}: there are no settings below {key!r}")
            inner[last] = value
            other = _EITHER.get(name)
            if other is not None and value is not None and other not in changes:
                inner[other.rsplit(".", 1)[-1]] = None  # of steps and epochs, the one that is named now is meant
        return read_settings(table)

    def lasting(self, *, steps: int | None = None, epochs: float | None = None) -> Settings:
        """The settings with another length; the warm-up keeps its share of it."""
        training = self.training
        before, after = training.steps or training.epochs or 1, steps or epochs or 1
        own = training.warmup_epochs if training.steps is None else training.warmup_steps
        if own is None and (training.warmup_steps or training.warmup_epochs):
            raise TrainingError("the warm-up is in epochs and the length in steps, or the other way round; change both")
        warmup = (own or 0) * after / before
        unit = {"steps": steps, "warmup_steps": int(warmup)} if steps else {"epochs": epochs, "warmup_epochs": warmup}
        none = dict.fromkeys(("steps", "epochs", "warmup_steps", "warmup_epochs"))
        return self.changed({f"training.{name}": value for name, value in {**none, **unit}.items()})

    def toml(self) -> str:
        """The settings as a recipe."""
        return _toml(asdict(self))


_PAIRS = [("training.steps", "training.epochs"), ("training.warmup_steps", "training.warmup_epochs")]
_EITHER = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}


def recipes() -> list[str]:
    """Names of the recipes that the library has."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_recipe(name: str | Path) -> Settings:
    """The settings of a recipe of the library, or of a TOML file, such as a run's ``settings.toml``.

    Raises:
        TrainingError: no such recipe, or one that is not valid.
    """
    path = RECIPES / f"{name}.toml"
    if str(name) not in recipes():
        path = Path(name)
        expect(path.suffix == ".toml", f"{name} is not a recipe; expected {', '.join(recipes())}, or a .toml file")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"the recipe {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # not TOML, not UTF-8
        raise TrainingError(f"the recipe {path} is not valid TOML: {error}") from None
    try:
        return read_settings(table)
    except TrainingError as error:
        raise TrainingError(f"the recipe {path}: {error}") from None


def read_settings(table: Mapping[str, Any]) -> Settings:
    """Settings of nested tables.

    Raises:
        TrainingError: an unknown name, a value of another kind, or values that do not go together.
    """
    return _read(Settings, table, "")  # type: ignore[no-any-return]


def parse_change(text: str) -> tuple[str, Any]:
    """``"training.lr=1e-4"`` as a name and a value of TOML; what is not TOML is text.

    Raises:
        TrainingError: no "=" in it.
    """
    name, equals, value = text.partition("=")
    expect(bool(equals and name.strip()), f"{text!r} is not a setting; expected NAME=VALUE, as in training.lr=1e-4")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"] if value.strip() != "none" else None
    except ValueError:
        return name.strip(), value.strip()


def expect(holds: bool, message: str) -> None:
    """Raise a TrainingError where something does not hold."""
    if not holds:
        raise TrainingError(message)


def _read(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``: a dataclass of a table, lists of them, numbers and text as they are."""
    options = get_args(kind) or (kind,)
    if is_dataclass(kind):
        expect(isinstance(value, Mapping), f"{where} is {value!r}; expected a table")
        hints = get_type_hints(kind)
        prefix = f"{where}." if where else ""
        unknown = sorted(set(value) - set(hints))
        expect(not unknown, f"{prefix}{unknown[0] if unknown else ''} is not a setting; expected {', '.join(hints)}")
        needed = [one.name for one in fields(kind) if one.name == "model"]
        expect(all(value.get(name) for name in needed), "no model is named; give one, such as mae_vit_base_patch16_96")
        return kind(**{name: _read(hints[name], inner, prefix + name) for name, inner in value.items()})  # type: ignore[operator]
    if getattr(kind, "__origin__", None) is list:
        expect(isinstance(value, (list, tuple)), f"{where} is {value!r}; expected a list")
        return [_read(options[0], inner, where) for inner in value]
    if getattr(kind, "__origin__", None) is dict:
        expect(isinstance(value, Mapping), f"{where} is {value!r}; expected a table")
        return dict(value)
    if len(options) > 1:
        if value is None and type(None) in options:
            return None
        for option in options:
            try:
                return _read(option, value, where)
            except TrainingError:
                continue
        raise TrainingError(f"{where} is {value!r}; expected {' or '.join(map(_named, options))}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    expect(fits, f"{where} is {value!r}; expected {_named(kind)}")
    return value


def _named(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(kind) or ("a list" if getattr(kind, "__origin__", None) is list else "a table")


def _toml(table: Mapping[str, Any], name: str = "") -> str:
    """Tables below values; None is left out, as TOML has none."""
    values = {key: value for key, value in table.items() if value is not None}
    inner = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in values.items() if key not in inner]
    lines = [*([f"[{name}]"] if name and lines else []), *lines]
    blocks = ["\n".join(lines)] if lines else []
    blocks += [_toml(value, f"{name}.{_key(key)}" if name else _key(key)) for key, value in inner.items()]
    return "\n\n".join(block for block in blocks if block)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_value(one)}" for key, one in value.items() if one is not None) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False)
