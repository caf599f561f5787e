"""Everything that decides what comes out of a run, as one value: read from a recipe, changed by name, written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, overload

from medgmae.factory import card_input
from medgmae.training.global_local_settings import GlobalLocalSettings
from medgmae.training.tables import Table, TrainingError, expect, load_table, read_table

RECIPES = Path(__file__).parent / "recipes"
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
KINDS = ("classify", "regress", "survive", "segment")
VIEWS = ("center", "resize", "windows")
ENCODERS = ("full", "frozen", "lora")

S = TypeVar("S", bound="RunSettings")


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
    layer_decay: factor on the rate per layer from the head down, see :func:`~medgmae.training.param_groups`.
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
    layer_decay: float | None = None
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

    def __post_init__(self) -> None:
        expect((self.steps is None) != (self.epochs is None), "training needs steps or epochs, and one of them")
        for name, least in (("steps", 1), ("batch_size", 1), ("micro_batch", 1), ("warmup_steps", 0), ("seed", 0)):
            value = getattr(self, name)
            expect(value is None or value >= least, f"training.{name} is {value}; expected at least {least}")
        for name in ("epochs", "lr", "clip", "layer_decay"):
            value = getattr(self, name)
            expect(value is None or value > 0, f"training.{name} is {value}; expected more than 0")
        for name in ("min_lr", "warmup_epochs", "weight_decay"):
            value = getattr(self, name)
            expect(value is None or value >= 0, f"training.{name} is {value}; expected at least 0")
        betas, two = self.betas, len(self.betas) == 2
        expect(two and all(0 <= b < 1 for b in betas), f"training.betas are {betas}; expected two numbers in [0, 1)")
        expect(
            self.precision in PRECISIONS,
            f"training.precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}",
        )
        expect(
            self.warmup_steps is None or self.warmup_epochs is None,
            "training.warmup_steps and training.warmup_epochs both say how long the warm-up is; leave one out",
        )


@dataclass(frozen=True)
class RunSettings(Table):
    """What every run has.

    model: architecture, as :func:`~medgmae.create_model` takes it.
    model_options: its options.
    init: weights to start from, anything that ``load_pretrained`` takes; None: random.
    input: preprocessing, the ``input`` block of a weight card, or the tag of one.
    augmentation: that of :class:`~medgmae.data.Augmentation`.
    training: see there.
    held_out: what is measured on and not trained on: a share of the scans below 1, or "column=value" of a table, such
        as "fold=0".
    """

    alternatives: ClassVar[tuple[tuple[str, str], ...]] = (
        ("training.steps", "training.epochs"),
        ("training.warmup_steps", "training.warmup_epochs"),
    )

    model: str
    model_options: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    input: dict[str, Any] | str = field(default_factory=dict)
    augmentation: dict[str, Any] = field(default_factory=dict)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    held_out: float | str = 0.1

    def __post_init__(self) -> None:
        share = isinstance(self.held_out, float) and 0 <= self.held_out < 1
        column = isinstance(self.held_out, str) and "=" in self.held_out
        expect(share or column, f"held_out is {self.held_out!r}; expected a share from 0 to below 1, or 'column=value'")

    @property
    def input_block(self) -> dict[str, Any]:
        """The ``input`` block itself."""
        return dict(card_input(self.input) if isinstance(self.input, str) else self.input)

    def lasting(self: S, *, steps: int | None = None, epochs: float | None = None) -> S:
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


@dataclass(frozen=True)
class Settings(RunSettings):
    """A run of pre-training: what every run has, its ``crops``, and with ``global_local`` views and a teacher."""

    crops: CropSettings = field(default_factory=CropSettings)
    global_local: GlobalLocalSettings | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.crops.per_scan >= 1, f"crops.per_scan is {self.crops.per_scan}; expected at least 1")


@dataclass(frozen=True)
class TaskSettings:
    """What is predicted of a scan.

    kind: "classify", "regress", "survive" (Cox's proportional hazards) or "segment".
    labels: columns of the table. "classify" takes one with the name of a class in each row; with ``multilabel`` any
        number, each with 0 or 1, empty where it is not known. "regress" takes any number, in their own units.
        "survive" takes two: the time, and 1 for an event at that time or 0 for the end of observation. "segment" takes
        one with the files of label maps.
    classes: names of the classes in the order of the outputs; empty: those of the table, sorted.
    regions: of "segment", the label numbers of every class by its name; empty: those of the data set, or each label
        that the maps have.
    multilabel: every column is a question of its own (sigmoid), with one output each; of "segment", regions overlap.
    label_smoothing: share of the target that all classes get alike.
    class_weights: weight the loss of a case by the inverse share of its class.
    balanced: draw cases such that all classes are seen equally often.
    """

    kind: str = "classify"
    labels: list[str] = field(default_factory=lambda: ["label"])
    classes: list[str] = field(default_factory=list)
    regions: dict[str, Any] = field(default_factory=dict)
    multilabel: bool = False
    label_smoothing: float = 0.0
    class_weights: bool = False
    balanced: bool = False

    def __post_init__(self) -> None:
        expect(self.kind in KINDS, f"task.kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        expect(bool(self.labels), "task.labels is empty; expected the names of columns")
        expect(len(set(self.labels)) == len(self.labels), f"task.labels has a column twice: {self.labels}")
        count = len(self.labels)
        if self.kind == "survive":
            expect(count == 2, f"task.labels is {self.labels}; expected two columns, the time and the event")
        if self.kind == "segment" or (self.kind == "classify" and not self.multilabel):
            more = "" if self.kind == "segment" else ", or task.multilabel = true"
            expect(count == 1, f"task.labels is {self.labels}; expected one column{more}")
        own = self.classes or self.label_smoothing or self.class_weights or self.balanced
        expect(
            self.kind == "classify" or not (own or (self.multilabel and self.kind != "segment")),
            f"task.kind is {self.kind!r}, which has none of classes, multilabel, label_smoothing, class_weights and "
            "balanced",
        )
        expect(self.kind == "segment" or not self.regions, f"task.regions is for 'segment', not for {self.kind!r}")
        for name, numbers in self.regions.items():
            whole = isinstance(numbers, list) and numbers and all(type(n) is int and n > 0 for n in numbers)
            expect(bool(whole), f"task.regions.{name} is {numbers!r}; expected a list of label numbers above 0")
        expect(
            not self.multilabel or not (self.classes or self.balanced),
            "task.multilabel has a column for each class: leave out classes and balanced",
        )
        expect(0 <= self.label_smoothing < 1, f"task.label_smoothing is {self.label_smoothing}; expected 0 to below 1")


@dataclass(frozen=True)
class ViewSettings:
    """What the model sees of a scan.

    kind: "center": the middle of the scan, padded to ``size``; "resize": the whole scan, resampled to ``size``, which
        changes its proportions; "windows": windows of ``size``, whose pooled vectors are averaged.
    size: voxels (d, h, w); None: what the model was made for.
    overlap: of windows, least share in common with the next.
    windows: how many of them, drawn at random, are looked at in a step of training; of "segment", how many crops of
        each scan an epoch has.
    foreground: of "segment", share of crops whose centre is drawn from the labelled voxels.
    """

    kind: str = "center"
    size: list[int] | None = None
    overlap: float = 0.0
    windows: int = 1
    foreground: float = 0.5

    def __post_init__(self) -> None:
        expect(0 <= self.foreground <= 1, f"view.foreground is {self.foreground}; expected a share 0 to 1")
        expect(self.kind in VIEWS, f"view.kind is {self.kind!r}; expected one of {', '.join(VIEWS)}")
        expect(0 <= self.overlap < 1, f"view.overlap is {self.overlap}; expected 0 to below 1")
        expect(self.windows >= 1, f"view.windows is {self.windows}; expected at least 1")


@dataclass(frozen=True)
class TuningSettings:
    """Which parameters learn, and which weights are kept.

    encoder: "full": all of them; "frozen": the head and the pooling alone, the linear probe, or with
        ``model_options.global_pool = "attention"`` the attentive one; "lora": low-rank changes of the linear layers of
        the blocks, and the head (Hu et al. 2021, with ``peft``).
    lora_rank, lora_alpha: rank, and scale of the changes times the rank.
    head_std: standard deviation of the head's first weights.
    select: whose weights are the result: "last", or those with the best "loss", "auc" or "dice" on the cases held out;
        of a list the first is the result, and each other one is beside it in a folder of its own, ``best_NAME``.
    patience: measurements without a better one (of the loss, or of the first of ``select``) after which the run ends;
        None: never.
    """

    encoder: str = "full"
    lora_rank: int = 8
    lora_alpha: int = 16
    head_std: float = 2e-5
    select: str | list[str] = "last"
    patience: int | None = None

    def __post_init__(self) -> None:
        expect(self.encoder in ENCODERS, f"tuning.encoder is {self.encoder!r}; expected one of {', '.join(ENCODERS)}")
        expect(self.lora_rank >= 1, f"tuning.lora_rank is {self.lora_rank}; expected at least 1")
        for name in ("lora_alpha", "head_std"):
            expect(getattr(self, name) > 0, f"tuning.{name} is {getattr(self, name)}; expected more than 0")
        known = {"last", "loss", "auc", "dice"}.issuperset(self.selects)
        expect(known, f"tuning.select is {self.select!r}; expected 'last', 'loss', 'auc' or 'dice'")
        expect(0 < len(self.selects) == len(set(self.selects)), f"tuning.select is {self.select!r}; expected each once")
        expect(self.patience is None or self.patience >= 1, f"tuning.patience is {self.patience}; expected at least 1")

    @property
    def selects(self) -> list[str]:
        """``select`` as a list."""
        return [self.select] if isinstance(self.select, str) else self.select


@dataclass(frozen=True)
class TuneSettings(RunSettings):
    """A run of fine-tuning: what every run has, and what is predicted, from which view, by what.

    task, view, tuning: see there.
    folds: runs, each of which holds another part of the cases out; 0: one run, by ``held_out``.
    fold: column of the table that says the fold of each case, 0, 1, ...; None: drawn by the seed, stratified by class.
    group: column whose cases stay together, such as the patient.
    """

    task: TaskSettings = field(default_factory=TaskSettings)
    view: ViewSettings = field(default_factory=ViewSettings)
    tuning: TuningSettings = field(default_factory=TuningSettings)
    folds: int = 0
    fold: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.folds != 1 and self.folds >= 0, f"folds is {self.folds}; expected 0 for one run, or at least 2")
        expect(self.fold is None or self.folds > 0, f"fold is {self.fold!r}, and folds is 0; say how many there are")
        kind = self.task.kind
        fits = {"auc": kind == "classify", "dice": kind == "segment", "loss": kind != "segment"}
        for select in self.tuning.selects:
            expect(
                fits.get(select, True), f"tuning.select is {select!r}, which {kind!r} does not measure; choose another"
            )
        if kind == "segment":
            expect(self.view.kind == "windows", f"view.kind is {self.view.kind!r}; segmentation has 'windows'")
            expect(self.tuning.encoder != "lora", "tuning.encoder = 'lora' is for encoders, not for segmentation")


def recipes(kind: type[RunSettings] = Settings) -> list[str]:
    """Names of the recipes that the library has, of pre-training or of fine-tuning."""
    return sorted(path.stem for path in _folder(kind).glob("*.toml"))


@overload
def read_recipe(name: str | Path) -> Settings: ...


@overload
def read_recipe(name: str | Path, kind: type[S]) -> S: ...


def read_recipe(name: str | Path, kind: type[RunSettings] = Settings) -> RunSettings:
    """The settings of a recipe of the library, or of a TOML file.

    Raises:
        TrainingError: no such recipe, or one that is not valid.
    """
    path = _folder(kind) / f"{name}.toml"
    if str(name) not in recipes(kind):
        path, known = Path(name), ", ".join(recipes(kind))
        expect(path.suffix == ".toml", f"{name} is not a recipe; expected {known}, or a .toml file")
    return _of_file(path, load_table(path), kind)


def read_run_settings(path: Path) -> RunSettings:
    """The settings that a run keeps in its ``settings.toml``.

    Raises:
        TrainingError: they cannot be read, or are not valid.
    """
    table = load_table(path)
    return _of_file(path, table, TuneSettings if "task" in table else Settings)


def read_settings(table: Mapping[str, Any]) -> Settings:
    """Settings of pre-training of nested tables.

    Raises:
        TrainingError: an unknown name, a value of another kind, or values that do not go together.
    """
    return read_table(Settings, table)


def _folder(kind: type[RunSettings]) -> Path:
    return RECIPES / "finetune" if issubclass(kind, TuneSettings) else RECIPES


def _of_file(path: Path, table: Mapping[str, Any], kind: type[S]) -> S:
    try:
        return read_table(kind, table)
    except TrainingError as error:
        raise TrainingError(f"the recipe {path}: {error}") from None
