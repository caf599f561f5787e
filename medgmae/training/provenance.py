"""What a pre-trained model says about itself: its input, and what it was trained on and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medgmae.checkpoints.cards import WeightCard
from medgmae.data.input_block import ORDER, uncut
from medgmae.training.corpus import Corpus
from medgmae.training.engine import Plan
from medgmae.training.settings import Settings


def card_of(
    settings: Settings, size: Sequence[int], corpus: Corpus, numbers: Sequence[int], plan: Plan, step: int, part: str
) -> dict[str, Any]:
    """The weight card of a run's model: its preprocessing and provenance.

    Args:
        settings: of the run.
        size: of the crops.
        corpus: its scans.
        numbers: how many scans were trained on, and how many held out.
        plan: of the run.
        step: updates so far.
        part: "pretrained", or of a run with two networks "teacher" or "student".
    """
    block = dict(corpus.input)
    volume = list(size) if len(size) == 3 else [1, *size]
    if settings.crops.normalize != "none":
        block["normalize"] = settings.crops.normalize  # of the crop, which the centre crop stands for: after it
        block["order"] = [*(step for step in block.get("order") or ORDER if step != "normalize"), "normalize"]
    crop = uncut(block)
    block |= {"size": volume, "crop": crop if (block.get("resample") or {}).get("to") == "size" else [*crop, "center"]}
    training, held_out = numbers
    names = [scan.name for scan in corpus.scans]
    listed = ", ".join(names) if len(names) <= 10 else f"{', '.join(names[:10])} and {len(names) - 10} more"
    done = "" if step == plan.steps else f" of {plan.steps}, interrupted or still running"
    optimiser = settings.training
    return WeightCard(
        tag=f"{settings.model.split('.')[0]}.{part}",
        training_data=f"{training} scans, {held_out} more held out: {listed}.",
        input=block,
        notes=(
            f"Pre-trained by masked autoencoding with medgmae: {step} updates{done}, {plan.batch} crops of "
            f"{' x '.join(map(str, size))} voxels each, {plan.epoch(step):.1f} epochs; AdamW, rate {optimiser.lr:g}, "
            f"weight decay {optimiser.weight_decay:g}, seed {optimiser.seed}."
            + (f" Started from {settings.init}." if settings.init else "")
            + " State the licence of the scans before you publish the weights."
        ),
    ).to_json()
