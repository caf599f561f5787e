"""Dice, Hausdorff distance, surface Dice: against MONAI, by hand, and what wrong input is told."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import warm_python
from torch import Tensor

import medgmae
from medgmae.data import Grid, Volume, VolumeError
from medgmae.evaluation import SegmentationMetrics, mean_metrics, region_masks, segmentation_metrics


def blobs(seed: int, size: tuple[int, int, int] = (18, 21, 15), classes: int = 4) -> Tensor:
    """Labels (D, H, W) in a few connected pieces, of all classes."""
    noise = torch.randn(classes, *size, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool3d(noise[None], 7, stride=1, padding=3)[0]
    smooth[0] += 0.05
    return smooth.argmax(0).to(torch.uint8)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(labels.long(), classes).movedim(-1, 0)[None]


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI warns of itself
@pytest.mark.parametrize("spacing", [None, (3.0, 0.8, 1.1)])
@pytest.mark.parametrize("seed", [0, 5, 9])
def test_equal_to_monai(seed: int, spacing: Any) -> None:
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    ours, theirs = blobs(seed), blobs(seed + 100)
    theirs[theirs == 2] = ours[theirs == 2]  # a class that agrees better than the others
    scores = segmentation_metrics(ours, theirs, classes=4, spacing=spacing, tolerance=1.5)
    both = one_hot(ours, 4), one_hot(theirs, 4)
    dice = compute_dice(*both, include_background=False)[0]
    hd95 = compute_hausdorff_distance(*both, percentile=95, spacing=spacing)[0]
    near = compute_surface_dice(*both, class_thresholds=[1.5] * 3, spacing=spacing)[0]
    torch.testing.assert_close(scores.dice, dice.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.hd95, hd95.double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.surface_dice, near.double(), atol=1e-6, rtol=0)
    assert scores.hd95.min() > 0
    assert scores.surface_dice.unique().numel() == 3


def test_masks_equal_each_class_by_itself() -> None:
    ours, theirs = one_hot(blobs(1), 4)[0, 1:], one_hot(blobs(2), 4)[0, 1:]
    apart = segmentation_metrics(blobs(1), blobs(2), classes=4)
    for kind in (torch.uint8, torch.bool, torch.float32):
        scores = segmentation_metrics(ours.to(kind), theirs.to(kind))
        assert all(map(torch.equal, scores, apart))


def test_distances_are_in_millimetres_of_the_grid_or_in_voxels() -> None:
    label = torch.zeros(1, 12, 12, 12, dtype=torch.uint8)
    prediction = label.clone()
    label[:, 2:8, 2:8, 2:8], prediction[:, 5:11, 2:8, 2:8] = 1, 1
    grid = Grid((12, 12, 12), (2.5, 1.0, 1.0), (10.0, -20.0, 30.0))
    volumes = Volume(prediction, grid), Volume(label, grid)
    assert segmentation_metrics(*volumes, classes=2).hd95.tolist() == [7.5]  # three voxels of 2.5 mm
    assert segmentation_metrics(*volumes, classes=2, spacing="voxels").hd95.tolist() == [3.0]
    assert segmentation_metrics(prediction, label, classes=2).hd95.tolist() == [3.0]
    assert segmentation_metrics(prediction, label, classes=2, spacing=4).hd95.tolist() == [12.0]
    assert segmentation_metrics(*volumes, classes=2).dice.tolist() == [0.5]
    exact, near, all_near = (segmentation_metrics(*volumes, classes=2, tolerance=t) for t in (0, 1, 7.5))
    assert exact.surface_dice < near.surface_dice < all_near.surface_dice
    assert all_near.surface_dice.tolist() == [1.0]


def test_equal_masks_and_masks_at_the_rim() -> None:
    for mask in (torch.ones(1, 3, 4, 5), torch.zeros(1, 3, 4, 5).index_fill_(1, torch.tensor([0]), 1)):
        scores = segmentation_metrics(mask, mask, classes=2)
        assert [float(score) for score in scores[:3]] == [1.0, 0.0, 1.0]
        assert scores.label_voxels.tolist() == [int(mask.sum())]


def test_the_rule_for_classes_that_are_not_there() -> None:
    """NaN where the reference lacks a class, whatever the prediction claims; 0 and infinity where it was missed."""
    label, prediction = torch.zeros(2, 9, 9, 9, dtype=torch.uint8)
    label[2:5, 2:5, 2:5] = prediction[2:5, 2:5, 2:5] = 1
    prediction[6, 6, 6] = 2
    label[7, 7, 7] = 3
    scores = segmentation_metrics(prediction, label, classes=5)
    np.testing.assert_array_equal(scores.dice, [1, np.nan, 0, np.nan])
    np.testing.assert_array_equal(scores.hd95, [0, np.nan, np.inf, np.nan])
    np.testing.assert_array_equal(scores.surface_dice, [1, np.nan, 0, np.nan])
    assert (scores.label_voxels.tolist(), scores.predicted_voxels.tolist()) == ([27, 0, 1, 0], [27, 1, 0, 0])
    assert scores.mean() == {"dice": 0.5, "hd95": math.inf, "surface_dice": 0.5}
    assert scores.mean([0, 1]) == {"dice": 1.0, "hd95": 0.0, "surface_dice": 1.0}
    empty = segmentation_metrics(prediction, torch.zeros_like(label), classes=5)
    assert all(map(math.isnan, empty.mean().values()))
    assert mean_metrics([scores, empty], [0]) == {"dice": 1.0, "hd95": 0.0, "surface_dice": 1.0}
    assert math.isnan(mean_metrics([empty])["dice"])
    with pytest.raises(ValueError, match="no cases"):
        mean_metrics([])


def test_means_are_of_cases_then_of_all() -> None:
    cases = [SegmentationMetrics(*[torch.tensor(row)] * 5) for row in ([1.0, math.nan], [0.0, 0.5])]
    assert mean_metrics(cases)["dice"] == pytest.approx((1.0 + 0.25) / 2)  # not (1 + 0 + 0.5) / 3


def test_regions_of_brain_tumours_overlap() -> None:
    labels = Volume(torch.tensor([0, 1, 2, 3]).reshape(1, 1, 1, 4), Grid((1, 1, 4), 2.0))
    masks = region_masks(labels, [[2, 3], [1, 2, 3], [2]])
    assert masks.data.flatten(1).tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 0]]
    assert (masks.spacing, masks.dtype) == ((2.0, 2.0, 2.0), torch.uint8)
    with pytest.raises(VolumeError, match="3 channels; expected one"):
        region_masks(masks, [[1]])
    with pytest.raises(ValueError, match="regions are"):
        region_masks(labels, [[]])


LABEL = Volume(torch.ones(1, 4, 4, 4, dtype=torch.uint8), Grid((4, 4, 4), 1.0))


@pytest.mark.parametrize(
    ("prediction", "options", "message"),
    [
        (Volume(LABEL.data, Grid((4, 4, 4), 2.0)), {"classes": 2}, "different grids.*resample_like"),
        (Volume(LABEL.data, Grid((4, 4, 4), 1.0, (0, 0, 1))), {"classes": 2}, "different grids.*resample_like"),
        (Volume(LABEL.data[:, :2], Grid((2, 4, 4), 1.0)), {"classes": 2}, "different grids.*resample_like"),
        (LABEL.data, {"classes": 2}, "prediction has no geometry.*volumes for both"),
        (LABEL.with_data(LABEL.data.repeat(3, 1, 1, 1)), {}, "3 channel.*and the label 1.*region_masks"),
        (LABEL, {}, "classes is None; expected how many"),
        (LABEL, {"classes": 1}, "classes is 1; expected how many"),
        (LABEL.with_data(LABEL.data * 5), {"classes": 5}, "prediction has values from 5 to 5.*below classes=5"),
        (LABEL.with_data(-LABEL.data.float()), {"classes": 5}, "values from -1.0 to -1.0"),
        (LABEL.with_data(LABEL.data * math.nan), {"classes": 5}, "values from nan to nan"),
        (LABEL.with_data(LABEL.data * 0.5), {"classes": 2}, "not whole numbers"),
        (LABEL, {"classes": 2, "spacing": 0}, "spacing is 0; expected positive"),
        (LABEL, {"classes": 2, "spacing": "mm"}, "spacing is 'mm'; expected 'voxels'"),
        (LABEL, {"classes": 2, "tolerance": -1}, "tolerance is -1"),
        (LABEL, {"classes": 2, "tolerance": math.nan}, "tolerance is nan"),
    ],
)
def test_one_error_for_each_wrong_input(prediction: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        segmentation_metrics(prediction, LABEL, **options)


def test_arrays_of_other_sizes_and_masks_that_do_not_fit() -> None:
    with pytest.raises(VolumeError, match=r"\(2, 4, 4\) voxels and the label \(4, 4, 4\)"):
        segmentation_metrics(LABEL.data[:, :2], LABEL.data, classes=2)
    masks = LABEL.data.repeat(3, 1, 1, 1)
    with pytest.raises(ValueError, match="classes is 4; expected None or 3"):
        segmentation_metrics(masks, masks, classes=4)
    masks[1] = 2
    with pytest.raises(ValueError, match="label's channel 1 has values from 2 to 2; expected 0 and 1"):
        segmentation_metrics(torch.ones_like(masks), masks)


def test_headers_that_are_rounded_are_the_same_grid() -> None:
    near = Volume(LABEL.data, Grid((4, 4, 4), 1.0 + 1e-5, (1e-4, 0, 0)))
    assert segmentation_metrics(near, LABEL, classes=2).dice.tolist() == [1.0]


def test_without_scipy_it_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['scipy'] = None; sys.modules['scipy.ndimage'] = None; import torch\n"
        "from medgmae.evaluation import segmentation_metrics\n"
        "x = torch.ones(1, 3, 3, 3)\n"
        "try: segmentation_metrics(x, x, classes=2)\n"
        "except ImportError as error: sys.exit('' if 'pip install medgmae[evaluation]' in str(error) else str(error))\n"
        "sys.exit('no error')"
    )
    done = warm_python.run("-c", script)
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip() == ""


def test_intensities_are_scored_in_the_same_place() -> None:
    from medgmae import evaluation

    assert (evaluation.psnr, evaluation.ssim3d) == (medgmae.psnr, medgmae.ssim3d)
