"""One run of fine-tuning a segmentation: crops with their labels, and whole scans that it is measured on."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medgmae.checkpoints.cards import WeightCard
from medgmae.checkpoints.saving import save_pretrained
from medgmae.data import Augmentation, PreparedScan, crop_or_pad, draws
from medgmae.data.store import write_whole
from medgmae.evaluation import segmentation_metrics
from medgmae.inference.segmentation import segment_scan
from medgmae.losses import dice_ce_loss, dice_loss
from medgmae.training.batches import CaseBatch, Samples, stacked
from medgmae.training.cases import View
from medgmae.training.corpus import Corpus
from medgmae.training.division import Part
from medgmae.training.engine import Engine, Objective, Plan
from medgmae.training.masks import Masks, mean_and_interval
from medgmae.training.optim import param_groups
from medgmae.training.results import METRICS, plain
from medgmae.training.runs import Run
from medgmae.training.settings import TrainingSettings, TuneSettings
from medgmae.training.states import State
from medgmae.training.tables import TrainingError, expect
from medgmae.training.tuned import segmenter
from medgmae.training.tuning_job import TuningJob

CASES = "cases.csv"
_CROP = 2  # of the counters of a draw


class LabelledCrops(Samples[CaseBatch]):
    """Random crops of scans with their labels.

    Args:
        scans: prepared.
        maps: their label maps, in the same order.
        masks: what the labels mean.
        view: size of the crops, how many of each scan, and the share of them around labelled voxels.
        augmentation: changes of each crop; flips and turns change the labels alike.
        seed: of everything.

    Raises:
        TrainingError: changes that would bend the labels.
    """

    def __init__(
        self,
        scans: Sequence[PreparedScan],
        maps: Sequence[PreparedScan],
        masks: Masks,
        view: View,
        augmentation: Augmentation,
        seed: int,
    ) -> None:
        expect(augmentation.affine is None, "augmentation.affine would bend the labels; leave it out")
        augmentation.check(view.size)
        self.scans, self.maps, self.masks, self.view, self.seed = list(scans), list(maps), masks, view, seed
        still: dict[str, Any] = dict.fromkeys(("scale", "shift", "gamma", "smooth", "contrast", "noise"))
        self.moves = replace(augmentation, **still)
        self.shades = replace(augmentation, flip=0.0, rotate90=0.0)

    def __len__(self) -> int:
        return len(self.scans) * self.view.settings.windows

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, str]:
        """Position counts on over the epochs: (x, target, what it is)."""
        epoch, index = divmod(position, len(self))
        case = int(draws(self.seed, epoch).permutation(len(self))[index]) // self.view.settings.windows
        scan, labels, rng = self.scans[case], self.maps[case], draws(self.seed, epoch, index, _CROP)
        centre = labels.foreground_table().draw(rng, bool(rng.random() < self.view.settings.foreground))
        start = []
        for axis, (n, m) in enumerate(zip(scan.size, self.view.size, strict=True)):
            first = int(rng.integers(n - m + 1)) if n > m else (n - m) // 2
            start.append(min(max(centre[axis] - m // 2, 0), n - m) if n > m and centre is not None else first)
        x, y = (self._crop(one, start, pad) for one, pad in ((scan, self.view.pad), (labels, 0.0)))
        moved = self.moves(torch.cat([x, y]), rng)
        x = self.shades(moved[:-1].contiguous(), rng)
        return x, self.masks.target(moved[-1:]), f"{scan.source} at {start}"

    def _crop(self, scan: PreparedScan, start: Sequence[int], pad: float) -> Tensor:
        """Exactly the view's size from ``start`` on, reading no more than that."""
        size = self.view.size
        first = [max(0, s) for s in start]
        ends = [min(n, s + m) for n, s, m in zip(scan.size, start, size, strict=True)]
        inner = scan.read(first, [e - f for e, f in zip(ends, first, strict=True)])
        moved = [s - f for s, f in zip(start, first, strict=True)]
        return crop_or_pad(inner, size, pad, start=moved).data

    def stack(self, samples: Sequence[tuple[Tensor, Tensor, str]]) -> CaseBatch:
        """One batch of crops: ``x`` (B, C, *size), ``targets`` (B, 1 or K, *size)."""
        x, targets, of = zip(*samples, strict=True)
        return CaseBatch(stacked(x), torch.stack(targets), list(of))


class Segment(Objective):
    """The loss of a segmentation: Dice and cross-entropy of classes; Dice of masks that may overlap (SelfMedMAE)."""

    def __init__(self, masks: Masks, training: TrainingSettings) -> None:
        self.masks, self.training = masks, training

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups, with layer-wise rates of the encoder where they are asked for."""
        training = self.training
        return param_groups(model, weight_decay=training.weight_decay, layer_decay=training.layer_decay)

    def __call__(self, model: nn.Module, part: CaseBatch, step: int) -> dict[str, Tensor]:
        """The loss alone."""
        logits = model(part.x)
        if self.masks.overlap:
            return {"loss": dice_loss(logits, part.targets, multilabel=True)}
        return {"loss": dice_ce_loss(logits, part.targets)}


class SegmentTuning(TuningJob):
    """A UNETR learns label maps.

    Args:
        settings: of the run.
        run: its folder.
        model: a UNETR.
        corpus: the scans.
        masks: their label maps.
        view: size of the crops, and how windows overlap.
        part: cases to learn from, and those held out.
        fold: number of this run.
        places: of ``tuning.select``, the folder of each result; that of the first is the run's.
    """

    title = "fine-tuning"
    settings: TuneSettings
    samples: LabelledCrops

    def __init__(
        self,
        settings: TuneSettings,
        run: Run,
        model: nn.Module,
        corpus: Corpus,
        masks: Masks,
        view: View,
        part: Part,
        fold: int,
        places: Mapping[str, Path],
    ) -> None:
        self.settings, self.run, self.model, self.corpus = settings, run, model, corpus
        self.masks, self.view, self.fold, self.places = masks, view, fold, places
        self.training, self.held_out = part
        self.objective = Segment(masks, settings.training)
        chosen = [corpus.scans[case] for case in self.training]
        maps = [masks.maps[case] for case in self.training]
        augmentation = Augmentation.of(settings.augmentation)
        self.samples = LabelledCrops(chosen, maps, masks, view, augmentation, settings.training.seed)
        self.about = self.facts(corpus)

    def rebuilt(self, state: State) -> nn.Module:
        """See :class:`Job`."""
        model = segmenter(self.settings, len(self.masks.names), pretrained=False)
        model.load_state_dict(state.model)
        return model

    def measure(self, engine: Engine, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        """The mean Dice of whole scans that are held out, or without any of those learned; it is the score."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(engine.accelerator.mixed_precision))
        rows = self._rows(engine.plain, dtype)
        found = [value for row in rows for name, value in row.items() if name.startswith("dice_") and value == value]
        dice = sum(found) / len(found) if found else 0.0
        return {"validation_dice": dice, "held_out": bool(self.held_out)}, {"dice": dice}

    def _rows(self, model: nn.Module, dtype: torch.dtype | None) -> list[dict[str, float]]:
        """Dice and HD95 in mm of every case, class by class; NaN where the reference lacks the class."""
        rows, classes = [], list(self.masks.regions)
        for case in self.held_out or self.training:
            scan = self.corpus.scans[case].volume()
            labels = segment_scan(
                model,
                scan,
                window=self.view.size,
                overlap=self.view.settings.overlap,
                outside=self.view.pad,
                multilabel=self.masks.overlap,
                autocast=dtype,
                progress=False,
            ).labels
            count = None if self.masks.overlap else len(self.masks.names)
            scores = segmentation_metrics(labels, self.masks.volume(case), classes=count)
            row = {f"dice_{name}": float(value) for name, value in zip(classes, scores.dice, strict=True)}
            row |= {f"hd95_{name}": float(value) for name, value in zip(classes, scores.hd95, strict=True)}
            rows.append(row)
        return rows

    def export(self, model: nn.Module, plan: Plan, step: int) -> None:
        """See :class:`Job`."""
        self._save(model, plan, step, {}, self.run.folder)

    def conclude(self, state: State, plan: Plan, select: str, folder: Path) -> None:
        """See :class:`TuningJob`."""
        model, step = self.rebuilt(state), state.facts["step"]
        rows = self._rows(model, None)
        cases = self.held_out or self.training
        names = [self.corpus.scans[case].name for case in cases]
        metrics = metrics_of(rows)
        self._save(model, plan, step, metrics, folder)
        about = {"cases": len(cases), "held_out": bool(self.held_out), "step": step, "select": select}
        about["metrics"] = metrics
        write_cases(folder, names, [self.fold] * len(names), rows, about)

    def _save(self, model: Any, plan: Plan, step: int, metrics: Mapping[str, Any], folder: Path) -> None:
        settings, optimiser, view = self.settings, self.settings.training, self.view
        stated = "; ".join(f"{name} {one['value']:.3f}" for name, one in metrics.items() if name.startswith("dice"))
        model.label_names = self.masks.names
        model.pretrained_cfg = WeightCard(
            tag=f"{settings.model}.finetuned",
            training_data=f"{len(self.training)} scans, {len(self.held_out)} more held out.",
            input=view.input,
            notes=(
                f"Segmentation, fine-tuned with medgmae: {', '.join(self.masks.regions)}"
                f"{', which may overlap' if self.masks.overlap else ''}. Windows of {' x '.join(map(str, view.size))} "
                f"voxels with an overlap of {view.settings.overlap:g}. {step} updates of {plan.batch} crops; AdamW, "
                f"rate {optimiser.lr:g}, weight decay {optimiser.weight_decay:g}, seed {optimiser.seed}."
                + (f" Started from {settings.init}." if settings.init else " Started from random weights.")
                + (f" On the scans held out, mean over cases: {stated}." if stated and self.held_out else "")
                + " State the licence of the scans before you publish the weights. Not a medical device."
            ),
        ).to_json()
        save_pretrained(model, folder)


def metrics_of(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The mean over cases of every column, and of all classes together, each with its bootstrap interval."""
    found: dict[str, Any] = {}
    for kind in ("dice", "hd95"):
        columns = [name for name in rows[0] if name.startswith(f"{kind}_")]
        means = []
        for row in rows:
            known = [row[name] for name in columns if math.isfinite(row[name])]
            means.append(sum(known) / len(known) if known else math.nan)
        found[kind] = mean_and_interval(means)
        found |= {name: mean_and_interval([row[name] for row in rows]) for name in columns}
    return {name: one for name, one in found.items() if one is not None}


def write_cases(
    folder: Path, names: Sequence[str], folds: Sequence[int], rows: Sequence[Mapping[str, float]], about: Any
) -> None:
    """Write cases.csv, a row for each case, and last metrics.json."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = list(rows[0])
    writer.writerow(["name", "fold", *columns])
    for name, fold, row in zip(names, folds, rows, strict=True):
        writer.writerow([name, fold, *("" if row[column] != row[column] else repr(row[column]) for column in columns)])
    write_whole(folder / CASES, text.getvalue().encode())
    write_whole(folder / METRICS, (json.dumps(plain(about), indent=2) + "\n").encode())


def summarize_cases(home: Path, folders: Sequence[Path]) -> None:
    """The metrics of every fold, and those of all cases together, each by the model that has not seen it."""
    names: list[str] = []
    folds: list[int] = []
    rows: list[dict[str, float]] = []
    for number, folder in enumerate(folders):
        try:
            lines = list(csv.DictReader(io.StringIO((folder / CASES).read_text(encoding="utf-8"))))
        except OSError as error:
            raise TrainingError(f"{folder / CASES} cannot be read: {error}; remove the folder and resume") from error
        for line in lines:
            names.append(line.pop("name"))
            line.pop("fold")
            folds.append(number)
            rows.append({key: float(value) if value else math.nan for key, value in line.items()})
    parts = [json.loads((folder / METRICS).read_text(encoding="utf-8"))["metrics"] for folder in folders]
    write_cases(home, names, folds, rows, {"cases": len(rows), "folds": parts, "pooled": metrics_of(rows)})
