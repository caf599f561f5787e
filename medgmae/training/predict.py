"""Predictions of a fine-tuned run: of its model, or of all its folds together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medgmae.data.preparation import Preparation
from medgmae.factory import create_model
from medgmae.inference.outputs import scan_logits
from medgmae.training.cases import View
from medgmae.training.runs import Run
from medgmae.training.settings import TuneSettings
from medgmae.training.tables import TrainingError, expect
from medgmae.training.tuned import columns_of, probabilities


class Predictor:
    """The models of one run or several, which see a scan as in their training; their predictions are averaged.

    Probabilities are averaged, and numbers; so are risks, which differ between runs by a constant that a Cox model
    leaves open, and only their order means something.

    Args:
        runs: folders that :func:`~medgmae.training.finetune` has written; one with folds stands for all of them.
        device: of torch.

    Attributes:
        models: on the device, in evaluation mode.
        columns: names of the predictions: "probability_CLASS", "predicted_COLUMN" or "risk".
        input: the ``input`` block by which scans are prepared.

    Raises:
        TrainingError: not such a run, one without a model yet, or runs that do not predict the same.
    """

    def __init__(self, runs: str | Path | Sequence[str | Path], device: str = "cpu") -> None:
        folders = [Path(one) for one in ([runs] if isinstance(runs, str | Path) else runs)]
        expect(bool(folders), "no run to predict with; expected at least one folder")
        self.models: list[Any] = []
        kinds: list[tuple[Any, ...]] = []
        for folder in folders:
            settings = Run(folder).settings(TuneSettings)
            expect(
                settings.task.kind != "segment",
                f"{folder} segments; its label maps are made by: medgmae segment SCANS --model local-dir:{folder}",
            )
            for member in members(folder, settings):
                try:
                    model: Any = create_model(f"local-dir:{member}")
                    model.to(device)
                except RuntimeError as error:  # WeightsError, too
                    raise TrainingError(f"{member}: {error}") from error
                self.models.append(model.eval())
                view = View.of(settings.view, settings.input_block, model.img_size, model.patch_size)
                task = settings.task
                kinds.append((task.kind, task.multilabel, model.label_names, view))
        self.settings = settings
        for kind, first in zip(kinds, kinds[:1] * len(kinds), strict=True):
            expect(
                kind == first,
                f"the runs differ in what they predict or see: {first[:3]} and {kind[:3]}; predict with each alone",
            )
        self.view: View = kinds[0][3]
        self.columns = columns_of(kinds[0][2], self.settings.task)
        self.input = self.view.input
        self._prepare = Preparation(self.input, whole=self.settings.view.kind == "windows")

    def __call__(self, scan: Any, *, batch_size: int = 1, autocast: torch.dtype | None = None) -> Tensor:
        """The predictions for a scan: (outputs,) float32, in the order of ``columns``.

        Args:
            scan: a file, a DICOM folder, a volume; of a case in several contrasts also a mapping from their names.
            batch_size: windows per pass.
            autocast: run the models under autocast with this dtype.

        Raises:
            VolumeError: a scan that cannot be read or prepared.
        """
        volume, view = self._prepare(scan), self.view
        said = []
        for model in self.models:
            logits = scan_logits(
                model,
                volume,
                window=view.size,
                overlap=view.settings.overlap,
                outside=view.pad,
                batch_size=batch_size,
                autocast=autocast,
            )
            said.append(probabilities(logits, self.settings.task))
        return torch.stack(said).mean(0)

    def best(self, values: Tensor) -> str:
        """The class with the largest probability, empty where classes do not exclude each other."""
        task = self.settings.task
        if task.kind != "classify" or task.multilabel or not math.isfinite(float(values.sum())):
            return ""
        return str(self.models[0].label_names[int(values.argmax())])


def members(folder: Path, settings: TuneSettings) -> list[Path]:
    """The folders of a run's models.

    Raises:
        TrainingError: it is not complete.
    """
    single = not settings.folds or (folder / "config.json").exists()  # the folder of one fold has its settings, too
    found = [folder] if single else [folder / f"fold_{number}" for number in range(settings.folds)]
    missing = [one for one in found if not (one / "metrics.json").exists()]
    expect(
        not missing,
        f"{missing[0] if missing else ''} is not trained to its end; medgmae finetune --resume --out {folder} goes on",
    )
    return found
