"""Adapters for SelfMedMAE's evaluation: metrics of segmentations, training losses, sliding windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medgmae.evaluation import SegmentationMetrics, mean_metrics, segmentation_metrics
from medgmae.inference.segmentation import predict_logits
from medgmae.losses import dice_ce_loss, dice_loss
from parity import adapter
from parity.case import Case, Options

# TransUNet's eight of the 13 organs, whose mean chooses the best checkpoint.
EIGHT = [0, 1, 2, 3, 5, 6, 7, 10]


@adapter("selfmedmae/metrics")
def metrics(case: Case) -> None:
    settings = Options(case.spec["config"])
    multilabel = {"btcv": False, "msd_brats": True}[settings("dataset")]
    settings.done()
    logits, label = case.input("logits"), case.input("label")
    predicted = (logits.sigmoid() > 0.5).to(torch.uint8) if multilabel else logits.argmax(1)
    case.offer("prediction", predicted)
    scores = [_score(one, other, None if multilabel else logits.shape[1]) for one, other in zip(predicted, label)]  # noqa: B905
    _offer_numbers(case, "dice", torch.stack([score.dice for score in scores]))
    _offer_numbers(case, "hd95", torch.stack([score.hd95 for score in scores]))
    case.offer("loss", dice_loss(logits, label, multilabel=True) if multilabel else dice_ce_loss(logits, label))
    stated = dict(case.spec["aggregate_over_batches_of_one"])
    words = {"Dice": ("dice", None), "HD": ("hd95", None), "cls8_Dice": ("dice", EIGHT), "cls8_HD": ("hd95", EIGHT)}
    for word, expected in stated.items():
        name, classes = words[word]
        case.close(f"aggregate {word}", mean_metrics(scores, classes)[name], expected, case.tolerance(name))


def _score(predicted: Tensor, label: Tensor, classes: int | None) -> SegmentationMetrics:
    return segmentation_metrics(predicted, label if classes is None else label[0], classes=classes, spacing="voxels")


def _offer_numbers(case: Case, name: str, actual: Tensor) -> None:
    """Compare numbers of which some are NaN: the same ones, and the others by value."""
    expected = case.outputs[name]
    case.same(f"{name}: which are NaN", actual.isnan().tolist(), expected.isnan().tolist())
    case.outputs[name] = expected.nan_to_num(-1)
    case.offer(name, actual.nan_to_num(-1))


class _Weighted(nn.Module):
    """Multiplies each window by tensors (K, d, h, w): what comes out shows which windows were averaged where."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@adapter("selfmedmae/sliding_window")
def sliding_window(case: Case) -> None:
    settings = Options(case.spec["config"])
    blend: Any = {"constant": "uniform", "gaussian": "gaussian"}[settings("mode")]
    image, model = case.input("image"), _Weighted(case.input("window_weight"))
    window, overlap, batch = settings("roi"), settings("overlap"), settings("sw_batch_size")
    settings.done()
    logits = [
        predict_logits(
            model, scan, window=window, overlap=overlap, blend=blend, placement="strided", batch_size=batch
        ).data
        for scan in image
    ]
    case.offer("output", torch.stack(logits))
