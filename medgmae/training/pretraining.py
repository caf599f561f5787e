"""What pre-training is: crops with masks, the loss of completing them, what is measured, and the model that is left."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medgmae.checkpoints.saving import save_pretrained
from medgmae.data import Augmentation, Crops, PreparedScan
from medgmae.data.input_block import padding
from medgmae.factory import create_model
from medgmae.training.batches import MaskedBatch, MaskedCrops
from medgmae.training.corpus import Corpus, split
from medgmae.training.engine import Engine, Objective, Plan
from medgmae.training.optim import param_groups
from medgmae.training.provenance import card_of
from medgmae.training.runs import Run
from medgmae.training.session import Job
from medgmae.training.settings import Settings, TrainingSettings
from medgmae.training.states import State
from medgmae.training.tables import expect
from medgmae.training.validation import Validation


class Pretraining(Job):
    """A masked autoencoder learns crops of scans by heart.

    Args:
        settings: of the run.
        run: its folder.
        model: a masked autoencoder.
        corpus: the scans.
    """

    title = "pre-training"
    model: Any
    settings: Settings

    def __init__(self, settings: Settings, run: Run, model: nn.Module, corpus: Corpus) -> None:
        self.settings = settings
        self.run, self.model, self.corpus = run, model, corpus
        training, held_out = split(corpus.scans, settings)
        self._learn(training)
        self.validation = Validation(self._crops(held_out or training, augment=False), 8, bool(held_out))
        self.numbers = [len(training), len(held_out)]
        self.about = {
            "data": [str(one) for one in corpus.sources],
            "prepared": str(corpus.folder),
            "scans": len(training),
            "held_out": len(held_out),
            "broken": corpus.broken,
        }

    def _learn(self, scans: Sequence[PreparedScan]) -> None:
        """What is learned of which samples."""
        self.objective = Reconstruct(self.model, self.settings.training)
        self.samples = self._crops(scans, augment=True)

    def rebuilt(self, state: State) -> nn.Module:
        """See :class:`Job`."""
        model: nn.Module = self._built()
        model.load_state_dict(state.model)
        return model

    def _built(self) -> Any:
        """A model of its own, with random weights."""
        with torch.random.fork_rng(devices=[]):
            return create_model(self.settings.model, **self.settings.model_options)

    def measure(self, engine: Engine, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        """Loss, PSNR and SSIM of fixed crops with fixed masks; the score is the PSNR, else the loss."""
        values = self.validation.measure(engine, step)
        psnr = values.get("validation_psnr")
        score = {"loss": -values["validation_loss"]} if psnr is None else {"psnr": psnr}
        return {**values, "held_out": self.validation.held_out}, score

    def export(self, model: Any, plan: Plan, step: int) -> None:
        """See :class:`Job`."""
        model.pretrained_cfg = self._card(plan, step, "pretrained")
        save_pretrained(model, self.run.folder)

    def _card(self, plan: Plan, step: int, part: str) -> dict[str, Any]:
        size = self.validation.crops.crops.size
        return card_of(self.settings, size, self.corpus, self.numbers, plan, step, part)

    def picture(self, model: nn.Module, path: Path, title: str) -> None:
        """What the model makes of the first measured crop."""
        self.validation.picture(model, path, title)

    @property
    def _autoencoder(self) -> Any:
        """The masked autoencoder of the run."""
        return self.model

    def _crops(self, scans: Sequence[PreparedScan], *, augment: bool) -> MaskedCrops:
        settings, encoder = self.settings, self._autoencoder.encoder
        size = crop_size(settings, self._autoencoder)
        channels = {scan.channels for scan in scans}
        expect(
            channels == {encoder.in_chans},
            f"the scans have {sorted(channels)} channels and the model {encoder.in_chans}; give model_options.in_chans",
        )
        crops = Crops(
            scans,
            size,
            per_scan=settings.crops.per_scan,
            foreground=settings.crops.foreground,
            pad=padding(self.corpus.input),
            normalize=settings.crops.normalize,
            augmentation=Augmentation.of(settings.augmentation) if augment else None,
            seed=settings.training.seed,
        )
        patches = math.prod(n // p for n, p in zip(size, encoder.patch_size, strict=True))
        return MaskedCrops(crops, patches, settings.training.seed)


class Reconstruct(Objective):
    """The loss of a masked autoencoder, for crops and the masks that are made of their noise."""

    def __init__(self, model: Any, training: TrainingSettings) -> None:
        self.ratio, self.training = model.mask_ratio, training
        self.takes_step = "step" in inspect.signature(model.forward).parameters

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Without layer-wise rates, which the decoder has no place in."""
        return param_groups(model, weight_decay=self.training.weight_decay)

    def __call__(self, model: nn.Module, part: MaskedBatch, step: int) -> dict[str, Tensor]:
        """The loss and the terms of the model's own."""
        output = model(part.x, part.masking(self.ratio), **({"step": step} if self.takes_step else {}))
        return {"loss": output.loss, **getattr(output, "terms", {})}


def crop_size(settings: Settings, model: Any) -> tuple[int, ...]:
    """The size of the crops, (d, h, w) or (h, w).

    Raises:
        TrainingError: it is not made of whole patches.
    """
    size, patch = tuple(settings.crops.size or model.encoder.img_size), model.encoder.patch_size
    fits = len(size) == len(patch) and all(n > 0 and n % p == 0 for n, p in zip(size, patch, strict=True))
    expect(fits, f"crops.size is {list(size)}; expected multiples of the patch {list(patch)}")
    return size
