"""One run of fine-tuning: a model, the cases that it learns from, those that it is measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medgmae.checkpoints.cards import WeightCard
from medgmae.checkpoints.saving import save_pretrained
from medgmae.data import Augmentation
from medgmae.inference.outputs import scan_logits
from medgmae.training.cases import LabelledScans, View
from medgmae.training.corpus import Corpus
from medgmae.training.division import Part
from medgmae.training.engine import Engine, Plan
from medgmae.training.results import Results, report, score, write_results
from medgmae.training.runs import Run
from medgmae.training.settings import TuneSettings
from medgmae.training.states import State
from medgmae.training.targets import Targets, standardized
from medgmae.training.tuned import Predict, Tuned, class_weights, tuned_model
from medgmae.training.tuning_job import TuningJob


class FineTuning(TuningJob):
    """An encoder with a head learns labels.

    Args:
        settings: of the run.
        run: its folder.
        model: what learns.
        corpus: the scans.
        targets: of all cases.
        view: what the model sees.
        part: cases to learn from, and those held out.
        fold: number of this run.
        places: of ``tuning.select``, the folder of each result; that of the first is the run's.
        groups: of each case, or None.
    """

    title = "fine-tuning"
    model: Tuned
    settings: TuneSettings
    samples: LabelledScans
    objective: Predict

    def __init__(
        self,
        settings: TuneSettings,
        run: Run,
        model: Tuned,
        corpus: Corpus,
        targets: Targets,
        view: View,
        part: Part,
        fold: int,
        places: Mapping[str, Path],
        groups: Any = None,
    ) -> None:
        self.settings, self.run, self.model = settings, run, model
        self.corpus, self.targets, self.view, self.fold, self.groups = corpus, targets, view, fold, groups
        self.places = places
        self.training, self.held_out = part
        values, task = targets.values[self.training], settings.task
        classes = targets.classes[self.training]
        weights = class_weights(classes, len(targets.names)) if task.class_weights else None
        scale = standardized(values) if task.kind == "regress" else None
        self.objective = Predict(targets, settings.training, weights, scale)
        self.samples = LabelledScans(
            [corpus.scans[case] for case in self.training],
            values,
            view,
            Augmentation.of(settings.augmentation),
            settings.training.seed,
            classes if task.balanced else None,
        )
        self.about = self.facts(corpus)

    def rebuilt(self, state: State) -> Tuned:
        """See :class:`Job`."""
        model = tuned_model(self.settings, self.targets.outputs, pretrained=False)
        model.load_state_dict(state.model)
        return model

    def measure(self, engine: Engine, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        """The loss of the cases held out, or without any of those learned, and their AUC; the scores are those of
        ``tuning.select``, and the loss where that is "last" alone."""
        results = self._results(self.model.encoder, engine)
        cases = results.cases
        loss = float(self.objective.loss(results.logits, self.targets.values[cases]))
        values: dict[str, Any] = {"validation_loss": loss}
        inside = Results(cases, self.objective.in_units(results.logits), results.fold)
        for name in _SHOWN[self.settings.task.kind]:
            found = score(self.targets, inside, name)
            if not math.isnan(found):
                values[f"validation_{name}"] = found
        scores = {"loss": -loss, "auc": values.get("validation_auc", -math.inf)}
        named = [name for name in self.settings.tuning.selects if name != "last"] or ["loss"]
        chosen = {name: scores[name] for name in named}
        return {**values, "held_out": bool(self.held_out)}, chosen

    def _results(self, encoder: Any, engine: Engine | None) -> Results:
        """What an encoder says of the cases held out, or without any of those learned."""
        cases = self.held_out or self.training
        view, logits = self.view, []
        options: dict[str, Any] = {"window": view.size, "overlap": view.settings.overlap, "outside": view.pad}
        if engine is not None:
            options |= {"batch_size": engine.share.micro, "autocast": _autocast(engine)}
        for case in cases:
            logits.append(scan_logits(encoder, view.whole(self.corpus.scans[case]), **options))
        return Results(cases, torch.stack(logits), [self.fold] * len(cases))

    def export(self, model: Any, plan: Plan, step: int) -> None:
        """See :class:`Job`."""
        self._save(self._encoder(model), plan, step, {}, self.run.folder)

    def conclude(self, state: State, plan: Plan, select: str, folder: Path) -> None:
        """See :class:`TuningJob`."""
        encoder, step = self._encoder(self.rebuilt(state)), state.facts["step"]
        results = self._results(encoder, None)
        try:
            metrics = report(self.targets, results, self.groups)
        except ValueError as error:  # a class without a case among those held out
            metrics = {"undefined": str(error)}
        self._save(encoder, plan, step, metrics, folder)
        about = {
            "cases": len(results.cases),
            "held_out": bool(self.held_out),
            "step": step,
            "select": select,
            "metrics": metrics,
        }
        names = [scan.name for scan in self.corpus.scans]
        write_results(folder, self.targets, results, names, about)

    def _encoder(self, model: Tuned) -> Any:
        """The encoder itself, whose outputs are in units."""
        encoder = model.merged()
        self.objective.rescale(encoder)
        encoder.label_names = self.targets.names if len(self.targets.names) == self.targets.outputs else ["risk"]
        return encoder

    def _save(self, encoder: Any, plan: Plan, step: int, metrics: dict[str, Any], folder: Path) -> None:
        settings, task = self.settings, self.settings.task
        optimiser, view = settings.training, self.view
        what = {"classify": "classes", "regress": "numbers", "survive": "risk"}[task.kind]
        seen = {
            "center": "the middle of the scan",
            "resize": "the whole scan, resampled",
            "windows": f"windows with an overlap of {view.settings.overlap:g}, whose pooled vectors are averaged",
        }[view.settings.kind]
        stated = "; ".join(
            f"{name} {one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})"
            for name, one in metrics.get("macro", metrics).items()
            if isinstance(one, dict) and "value" in one
        )
        encoder.pretrained_cfg = WeightCard(
            tag=f"{settings.model}.finetuned",
            training_data=f"{len(self.training)} scans, {len(self.held_out)} more held out.",
            input=view.input,
            notes=(
                f"Fine-tuned with medgmae for {what} of {', '.join(task.labels)}: outputs "
                f"{', '.join(encoder.label_names)}. It sees {seen}, {' x '.join(map(str, view.size))} voxels. "
                f"{step} updates of {plan.batch} scans, {plan.epoch(step):.1f} epochs, encoder "
                f"{settings.tuning.encoder}; AdamW, rate {optimiser.lr:g}, weight decay {optimiser.weight_decay:g}, "
                f"seed {optimiser.seed}."
                + (f" Started from {settings.init}." if settings.init else " Started from random weights.")
                + (f" On the scans held out, with 95 % intervals: {stated}." if stated and self.held_out else "")
                + " State the licence of the scans before you publish the weights. Not a medical device."
            ),
        ).to_json()
        save_pretrained(encoder, folder)


_SHOWN = {"classify": ("auc", "accuracy"), "regress": ("mae", "r2"), "survive": ("concordance",)}


def _autocast(engine: Engine) -> torch.dtype | None:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(engine.accelerator.mixed_precision))
