"""Labels of a scan on the patch grid of a model's features, by geometry alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medgmae.data.conversion import is_bare
from medgmae.data.geometry import SNAP, Floats, Grid, VolumeError
from medgmae.data.volume import HasMap, ScanLike, Volume, as_volume, map_of

_SLAB = 1 << 20  # label voxels that are looked up at a time


def patch_labels(
    labels: ScanLike, patches: ScanLike | HasMap | Grid, *, share: int | Sequence[int] | None = None
) -> Volume:
    """The label of each patch: that of most of the label voxels whose centres lie in it.

    Where the labels are depends on their geometry alone: they may be of another orientation, spacing or field of view
    than the scan that the model saw, and oblique to it. ``patch_labels(read_volume("segmentation.nii.gz"), features)``
    is a target for a probe of ``features.map``.

    A patch is a voxel of the map: a box of ``map.spacing`` around its centre. A voxel centre on the border of two
    patches belongs to the one with the higher index. Of labels that are equally frequent, the smallest is taken. A
    patch too small to hold the centre of a label voxel takes the label voxel that its own centre lies in.

    Args:
        labels: one whole number per voxel; a volume (1, D, H, W), or an image of another library with its geometry.
        patches: what ``extract_features`` gives, its feature map (E, d, h, w), or the grid of that.
        share: a label; the result is then the share of each patch's label voxels that have it. Of several labels, the
            share of the voxels that have any of them.

    Returns:
        (1, d, h, w) on the map's grid: int64 labels, -1 in patches without a label voxel; with ``share`` float32 from
        0 to 1, NaN in patches without a label voxel.

    Raises:
        VolumeError: labels without a geometry (arrays, plain tensors), of several channels, or that are not whole
            numbers; features without a map, or a map without a geometry; a share of something that is not a label.
    """
    if is_bare(labels):
        raise VolumeError(
            f"the labels are a {type(labels).__name__} without a geometry, and could lie anywhere in the scan; "
            "expected scan.with_data(labels) of shape (1, D, H, W), or an image with its geometry"
        )
    volume, grid = as_volume(labels), patches if isinstance(patches, Grid) else map_of(patches).grid
    values, array = _values(volume, share)
    counts = np.zeros((int(np.prod(grid.size)), len(values)), dtype=np.int64)
    for patch, label in _in_patches(array, volume.grid, grid):
        key = patch * len(values) + np.searchsorted(values, label)
        if len(key):
            first = key.min()
            slab = np.bincount(key - first)
            counts.reshape(-1)[first : first + len(slab)] += slab
    empty = np.flatnonzero(counts.sum(axis=1) == 0)
    inside, label = _at_centres(array, volume.grid, grid, empty)
    counts[empty[inside], np.searchsorted(values, label)] = 1
    total = counts.sum(axis=1)
    result: NDArray[Any]
    if share is None:
        result = np.where(total > 0, values.astype(np.int64)[counts.argmax(axis=1)], -1)
    else:
        result = np.where(total > 0, counts[:, -1] / np.maximum(total, 1), np.nan).astype(np.float32)
    return Volume(torch.from_numpy(result.reshape(1, *grid.size)), grid, volume.source)


def label_channels(labels: ScanLike, groups: Sequence[int | Sequence[int]]) -> Volume:
    """A channel per group of labels: (len(groups), D, H, W) of uint8, 1 where a voxel has one of the group's labels.

    ``label_channels(labels, [(2, 3), (1, 2, 3), 2])`` gives tumour core, whole tumour and enhancing tumour as
    SelfMedMAE takes them of the Medical Segmentation Decathlon's labels (lib/data/med_transforms.py).

    Args:
        labels: one whole number per voxel, (1, D, H, W), or an image of another library.
        groups: a label, or several, for each channel; they may overlap.

    Raises:
        VolumeError: several channels, labels that are not whole numbers, or no groups.
    """
    volume = as_volume(labels)
    if not len(groups):
        raise VolumeError("groups is empty; expected at least one label, or one list of labels")
    channels = [torch.from_numpy(_values(volume, group)[1]) for group in groups]
    return volume.with_data(torch.stack(channels))


def _values(labels: Volume, share: int | Sequence[int] | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """The different labels in order, and where they are (D, H, W); for a share: 0 and 1."""
    if labels.channels != 1:
        raise VolumeError(f"{labels.source}: the labels have {labels.channels} channels; expected one")
    array = np.asarray(labels)[0]
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.round(array)).all()):
        raise VolumeError(f"{labels.source}: the labels are not whole numbers; expected one label per voxel")
    if share is not None:
        having = np.zeros(array.shape, np.uint8)
        for label in _labels(share):
            having |= array == label
        return np.array([0, 1], np.uint8), having
    return np.unique(array), array


def _labels(share: int | Sequence[int]) -> list[int]:
    labels = list(share) if isinstance(share, Sequence | np.ndarray) else [share]
    if not labels or not all(isinstance(label, int | np.integer) and not isinstance(label, bool) for label in labels):
        raise VolumeError(f"share is {share!r}; expected a label, such as share=1, or several, such as share=[1, 2]")
    return labels


def _in_patches(array: NDArray[Any], labels: Grid, patches: Grid) -> Iterator[tuple[NDArray[np.intp], NDArray[Any]]]:
    """Flat indices of the patches that label voxels lie in, and the voxels' labels, some planes at a time."""
    matrix = np.linalg.inv(patches.affine) @ labels.affine
    rows = max(1, _SLAB // array[0].size)
    for first in range(0, len(array), rows):
        slab = array[first : first + rows]
        index = [np.arange(n, dtype=np.float64) for n in slab.shape]
        index[0] += first
        # A position is a sum of one term per axis of the labels: no array of coordinates is needed.
        terms = [[matrix[axis, k] * index[k] for k in range(3)] for axis in range(3)]
        position = [(d[:, None, None] + h[:, None] + w) + matrix[k, 3] for k, (d, h, w) in enumerate(terms)]
        flat, inside = _flat(position, patches.size)
        yield flat[inside], slab[inside]


def _at_centres(
    array: NDArray[Any], labels: Grid, patches: Grid, which: NDArray[np.intp]
) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    """Of some patches: whether the centre lies in a label voxel, and the labels of those voxels."""
    centres = np.stack(np.unravel_index(which, patches.size), axis=-1)
    flat, inside = _flat(list(labels.index(patches.world(centres)).T), labels.size)
    return inside, array.reshape(-1)[flat[inside]]


def _flat(position: list[Floats], size: tuple[int, int, int]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Flat indices of the voxels that positions lie in, borders to the higher index, and whether there is one."""
    whole = [np.floor(p + (0.5 + SNAP)).astype(np.intp) for p in position]
    inside = np.logical_and.reduce([(p >= 0) & (p < n) for p, n in zip(whole, size, strict=True)])
    d, h, w = whole
    return (d * size[1] + h) * size[2] + w, inside
