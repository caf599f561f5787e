"""How well a segmentation agrees with a reference: Dice, Hausdorff distance and surface Dice of every class.

Surfaces are those of MONAI: the voxels of a mask that one of their six neighbours does not share, the outside of the
scan included. SciPy, which comes with scikit-learn (``pip install medgmae[evaluation]``), finds them and measures the
distances, both from one search and for surfaces alone: a map of distances takes 20 bytes for each voxel around a class,
and MONAI computes two of them for each of its metrics.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgmae.data import Grid, Volume, VolumeError, as_volume
from medgmae.data.contrasts import same_place
from medgmae.data.conversion import is_bare
from medgmae.data.volume import ScanLike

_SLAB = 1 << 22  # voxels that are counted at a time
_Box = tuple[slice, ...]


class SegmentationMetrics(NamedTuple):
    """Agreement of one case, float64, one number per class (K,).

    Where the reference lacks a class, dice, hd95 and surface_dice are NaN, and means leave it out: the rule of
    SelfMedMAE. ``predicted_voxels`` then says whether the prediction claims it. Where the prediction alone lacks it,
    dice and surface_dice are 0 and hd95 is infinite, and so is its mean.

    dice: twice the common voxels by the sum of both, 0 to 1.
    hd95: the larger of the 95th percentiles of the distances from either surface to the other, in mm; in voxels where
        the case has no spacing.
    surface_dice: share of both surfaces that lies within the tolerance of the other, 0 to 1, each surface voxel
        counting once (Nikolov et al. 2021, by voxels as MONAI has it).
    label_voxels: voxels of the class in the reference, int64.
    predicted_voxels: and in the prediction, int64.
    """

    dice: Tensor
    hd95: Tensor
    surface_dice: Tensor
    label_voxels: Tensor
    predicted_voxels: Tensor

    def mean(self, classes: Sequence[int] | None = None) -> dict[str, float]:
        """dice, hd95 and surface_dice averaged over the classes that the reference has; NaN if it has none.

        Args:
            classes: positions in the tensors, all by default. SelfMedMAE chooses its best checkpoint on BTCV by
                ``[0, 1, 2, 3, 5, 6, 7, 10]``, the eight organs of TransUNet.
        """
        chosen = slice(None) if classes is None else list(classes)
        return {name: float(getattr(self, name)[chosen].nanmean()) for name in _MEANS}


_MEANS = ("dice", "hd95", "surface_dice")


def mean_metrics(cases: Sequence[SegmentationMetrics], classes: Sequence[int] | None = None) -> dict[str, float]:
    """The mean over cases of each case's :meth:`SegmentationMetrics.mean`, as SelfMedMAE reports it. Cases whose
    reference is empty are left out.

    Raises:
        ValueError: no cases.
    """
    if not cases:
        raise ValueError("no cases to average; expected at least one")
    means = [case.mean(classes) for case in cases]
    return {name: float(np.nanmean([mean[name] for mean in means])) if _any(means, name) else np.nan for name in _MEANS}


def _any(means: Sequence[dict[str, float]], name: str) -> bool:
    return not all(np.isnan(mean[name]) for mean in means)


def segmentation_metrics(
    prediction: ScanLike,
    label: ScanLike,
    *,
    classes: int | None = None,
    spacing: Literal["voxels"] | float | Sequence[float] | None = None,
    tolerance: float = 1.0,
) -> SegmentationMetrics:
    """Dice, 95th percentile of the Hausdorff distance and surface Dice of every class.

    One channel is a map of labels: 0 is background, which is not scored, and classes are 1 to ``classes - 1``. Several
    channels are a mask each, of 0 and 1, which may overlap: :func:`region_masks` makes them of a label map.

    Each class is measured in the box that holds it, so that memory beside the two maps is a few bytes for each voxel of
    the largest box. Time goes with the number of surface voxels.

    Args:
        prediction: (1, D, H, W) or (K, D, H, W) with a geometry, or an array (D, H, W), (K, D, H, W) without.
        label: the reference, of the same kind, on the same grid.
        classes: of label maps, with the background: as many as the model has outputs.
        spacing: millimetres (d, h, w) between voxel centres, one number for all axes; by default that of the grid, and
            1, which makes all distances voxels, for arrays without a geometry. "voxels" counts voxels whatever the
            grid says: SelfMedMAE's HD95.
        tolerance: of the surface Dice, in mm, or in voxels if distances are.

    Returns:
        ``classes - 1`` numbers each, or one per channel.

    Raises:
        VolumeError: grids that differ, in place or in size; only one of the two has a geometry; channels that differ.
        ValueError: values that are no classes, no number of classes, a bad spacing or tolerance.
        ImportError: SciPy is not installed.
    """
    one, other = _pair(prediction, label)
    step = _spacing(one.grid, spacing, is_bare(prediction))
    if not 0 <= tolerance < np.inf:
        raise ValueError(f"tolerance is {tolerance}; expected a distance of at least 0")
    results = [
        _score(predicted, true, counts, step, tolerance) for predicted, true, counts in _classes(one, other, classes)
    ]
    dice, hd95, surface_dice, label_voxels, predicted_voxels = (torch.tensor(row) for row in zip(*results, strict=True))
    return SegmentationMetrics(dice.double(), hd95.double(), surface_dice.double(), label_voxels, predicted_voxels)


def region_masks(labels: ScanLike, regions: Sequence[Sequence[int]]) -> Volume:
    """A mask for each region, which is a set of labels: regions may share labels, as those of brain tumours do.

    SelfMedMAE's channels of the BraTS tumours, TC, WT and ET, are ``region_masks(labels, [[2, 3], [1, 2, 3], [2]])``
    of labels as the Medical Segmentation Decathlon numbers them there.

    Args:
        labels: (1, D, H, W) whole numbers.
        regions: the labels of each.

    Returns:
        (K, D, H, W) uint8, 0 or 1, on the grid of the labels.

    Raises:
        VolumeError: several channels.
        ValueError: no regions, or one without labels.
    """
    volume = as_volume(labels)
    if volume.channels != 1:
        raise VolumeError(f"{volume.source}: the labels have {volume.channels} channels; expected one")
    if not regions or not all(regions):
        raise ValueError(f"regions are {regions!r}; expected the labels of each, such as [[2, 3], [1, 2, 3], [2]]")
    masks = [torch.isin(volume.data[0], torch.tensor(list(region), dtype=volume.dtype)) for region in regions]
    return volume.with_data(torch.stack(masks).to(torch.uint8))


def _pair(prediction: ScanLike, label: ScanLike) -> tuple[Volume, Volume]:
    """Both as volumes on one grid."""
    bare = [name for name, one in (("prediction", prediction), ("label", label)) if is_bare(one)]
    if len(bare) == 1:
        raise VolumeError(
            f"the {bare[0]} has no geometry and the other has one, so that nothing says whether they fit; expected "
            "volumes for both, as scan.with_data(array) makes them, or arrays for both"
        )
    one, other = as_volume(prediction), as_volume(label)
    if bare and one.size != other.size:
        raise VolumeError(f"the prediction has {one.size} voxels and the label {other.size}; expected the same grid")
    if not same_place(one.grid, other.grid):
        raise VolumeError(
            f"the prediction {one} and the label {other} lie on different grids; expected the same: bring the "
            "prediction to the label with medgmae.data.resample_like(prediction, label, interpolation='nearest')"
        )
    if one.channels != other.channels:
        raise VolumeError(
            f"the prediction has {one.channels} channel(s) and the label {other.channels}; expected one channel of "
            "labels for both, or as many masks: medgmae.evaluation.region_masks(label, ...) makes masks of labels"
        )
    return one, other


def _spacing(
    grid: Grid, spacing: Literal["voxels"] | float | Sequence[float] | None, bare: bool
) -> NDArray[np.float64]:
    if isinstance(spacing, str) and spacing != "voxels":
        raise ValueError(f"spacing is {spacing!r}; expected 'voxels', or millimetres (d, h, w)")
    if spacing == "voxels" or (spacing is None and bare):
        return np.ones(3)
    step = np.broadcast_to(np.asarray(grid.spacing if spacing is None else spacing, dtype=np.float64), (3,))
    if not (np.isfinite(step).all() and step.min() > 0):
        raise ValueError(f"spacing is {spacing!r}; expected positive millimetres (d, h, w), or one number")
    return step


_Item = tuple[NDArray[np.bool_], NDArray[np.bool_], tuple[int, int, int]]


def _classes(one: Volume, other: Volume, classes: int | None) -> Iterator[_Item]:
    """Of each class: masks of prediction and reference in the box that holds both, and the voxels that both have, that
    the prediction has and that the reference has."""
    if one.channels == 1:
        if classes is None or isinstance(classes, bool) or classes < 2:
            raise ValueError(
                f"classes is {classes!r}; expected how many labels there are with the background, such as 14 for 0..13"
            )
        predicted, true = _whole(one, "prediction", classes), _whole(other, "label", classes)
        yield from _labels(predicted, true, classes)
        return
    if classes not in (None, one.channels):
        raise ValueError(f"classes is {classes!r}; expected None or {one.channels}, as there are masks")
    for channel in range(one.channels):
        both = [
            _whole(volume.with_data(volume.data[channel : channel + 1]), name, 2)
            for volume, name in ((one, f"prediction's channel {channel}"), (other, f"label's channel {channel}"))
        ]
        yield from _labels(both[0], both[1], 2)


def _labels(predicted: NDArray[Any], true: NDArray[Any], classes: int) -> Iterator[_Item]:
    table = np.zeros((classes, classes), np.int64)  # voxels by their labels in prediction and reference
    rows = max(1, _SLAB // max(1, true[0].size))
    for first in range(0, len(true), rows):
        pairs = predicted[first : first + rows].astype(np.int32) * classes + true[first : first + rows]
        table += np.bincount(pairs.ravel(), minlength=classes**2).reshape(classes, classes)
    find = _scipy("ndimage").find_objects
    boxes = list(zip(find(predicted, classes - 1), find(true, classes - 1), strict=True))
    for value, (box, other) in enumerate(boxes, 1):
        counts = (int(table[value, value]), int(table[value].sum()), int(table[:, value].sum()))
        around = _joined(box, other)
        yield predicted[around] == value, true[around] == value, counts


def _joined(box: _Box | None, other: _Box | None) -> _Box:
    """The smallest box that holds both; an empty one for none."""
    if box is None or other is None:
        return box or other or (slice(0, 0),) * 3
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(box, other, strict=True))


def _whole(volume: Volume, name: str, classes: int) -> NDArray[Any]:
    """(D, H, W) of a small integer type.

    Raises:
        ValueError: values that are not whole numbers from 0 to ``classes - 1``.
    """
    array: NDArray[Any] = np.asarray(volume)[0]
    low, high = array.min(), array.max()
    if not (low >= 0 and high < classes):  # NaN too
        raise ValueError(
            f"the {name} has values from {low} to {high}; expected {'0 and 1' if classes == 2 else 'labels'} below "
            f"classes={classes}: give the number of classes that it was labelled with, or map its labels first"
        )
    if array.dtype.kind in "iu" and array.dtype.itemsize <= 2:
        return array
    small: NDArray[Any] = array.astype(np.uint8 if classes <= 256 else np.int32)
    if array.dtype.kind == "f" and not (small == array).all():
        raise ValueError(
            f"the {name} has values that are not whole numbers; expected labels, not probabilities or interpolated "
            "labels: resample labels with interpolation='nearest'"
        )
    return small


def _score(
    predicted: NDArray[np.bool_],
    true: NDArray[np.bool_],
    counts: tuple[int, int, int],
    spacing: NDArray[np.float64],
    tolerance: float,
) -> tuple[float, float, float, int, int]:
    """dice, hd95, surface_dice, voxels of the reference, voxels of the prediction."""
    both, ours, theirs = counts
    if not theirs:
        return np.nan, np.nan, np.nan, theirs, ours
    if not ours:
        return 0.0, np.inf, 0.0, theirs, ours
    there, back = _distances(predicted, true, spacing)
    near = int((there <= tolerance).sum() + (back <= tolerance).sum())
    hd95 = max(float(np.percentile(there, 95)), float(np.percentile(back, 95)))
    return 2 * both / (ours + theirs), hd95, near / (len(there) + len(back)), theirs, ours


def _distances(
    predicted: NDArray[np.bool_], true: NDArray[np.bool_], spacing: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances from each surface voxel of the prediction to the reference's surface, and the other way round."""
    ours, theirs = _surface(predicted), _surface(true)
    found = []
    tree = _scipy("spatial").cKDTree
    for some, others in ((ours, theirs), (theirs, ours)):
        distances = np.zeros(np.count_nonzero(some))
        apart = ~others[some]  # voxels of both surfaces are at distance 0, and are often most of them
        if apart.any():
            points = np.argwhere(some)[apart] * spacing
            nearest = tree(np.argwhere(others) * spacing, balanced_tree=False, compact_nodes=False)
            distances[apart] = nearest.query(points)[0]
        found.append(distances)
    return found[0], found[1]


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The voxels of a mask of which one of six neighbours is not in it."""
    return np.asarray(mask & ~_scipy("ndimage").binary_erosion(mask))


def _scipy(module: str) -> Any:
    try:
        return importlib.import_module(f"scipy.{module}")
    except ImportError as error:
        raise ImportError(
            "segmentation metrics need SciPy, which is not installed: pip install medgmae[evaluation]"
        ) from error
