"""From a scan as stored to what a model takes, and back: plain functions ``Volume -> Volume`` that keep the geometry
true. Wherever they take a volume, they take what ``as_volume`` takes; of a bare array the voxels are cubes of 1 mm.

``create_transform`` composes them as a weight card's ``input`` block says. ``resample_like`` is the one inverse: it
puts a feature map or label map back on the grid of the scan, by geometry alone, so that nothing has to be recorded on
the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from medgmae.data.geometry import Grid, Origin, Rounding, VolumeError, centred_start, sizes
from medgmae.data.intensities import Counted, bounding_box, counted, mostly_true
from medgmae.data.sampling import Interpolation, KeepDtype, onto, sample
from medgmae.data.volume import ScanLike, Volume, as_volume


def reorient(volume: ScanLike, code: str) -> Volume:
    """Axes permuted and reversed, without interpolation, until the orientation is ``code``.

    Args:
        volume: (C, D, H, W).
        code: the side of the body towards which each axis grows, in file order (x, y, z) = (w, h, d): ``"LPS"`` is
            SimpleITK's and DICOM's own, ``"RAS"`` is NIfTI's. An oblique volume goes to the nearest code. ``"SAR"``,
            read backwards, gives the array (x, y, z) that nibabel and MONAI call RAS.

    Raises:
        VolumeError: not a code of three different axes.
    """
    volume = as_volume(volume)
    return sample(volume, volume.grid.reoriented(code), "nearest", None)


def resample(
    volume: ScanLike,
    *,
    spacing: float | Sequence[float] | None = None,
    size: int | Sequence[int] | None = None,
    interpolation: Interpolation = "linear",
    origin: Origin = "centered",
    outside: float | None = None,
    keep_dtype: KeepDtype = False,
    rounding: Rounding = "round",
) -> Volume:
    """The same field of view on another spacing or another number of voxels.

    Args:
        volume: (C, D, H, W).
        spacing: millimetres (d, h, w), or one number for all axes; give this or ``size``.
        size: voxels (d, h, w), or one number for all axes.
        interpolation: ``"linear"``, ``"nearest"`` (labels) or ``"bspline"`` (order 3, SimpleITK's).
        origin: what stays in place: the centre of the volume; its outer edges, with a spacing near the one that is
            asked for; or the centre of its first voxel (SimpleITK recipes and MONAI do this; the grid can then reach
            up to half a new voxel beyond the far side).
        outside: value beyond the volume's edge; ``None`` repeats the outermost voxels.
        keep_dtype: whether integers come back as integers of the stored type: rounded, or with ``"truncate"`` cut
            towards zero, as TorchIO gives them.
        rounding: how a spacing's number of voxels becomes whole, ``"round"`` or ``"floor"``, TorchIO's.

    Raises:
        VolumeError: both or neither of ``spacing`` and ``size``, or numbers that are not positive.
    """
    volume = as_volume(volume)
    if spacing is not None and size is None:
        target = volume.grid.with_spacing(spacing, origin, rounding)
    elif size is not None and spacing is None:
        target = volume.grid.with_size(size, origin)
    else:
        raise VolumeError(f"spacing is {spacing} and size is {size}; expected exactly one of them")
    return onto(volume, target, interpolation, outside, keep_dtype)


def resample_like(
    volume: ScanLike, like: ScanLike | Grid, *, interpolation: Interpolation = "linear", outside: float = 0.0
) -> Volume:
    """A map put on the grid of another volume: predictions back on the source scan, or one contrast on the grid of
    another.

    Flips, permutations, crops and pads come back exactly; anything else is interpolated: use ``"nearest"`` for labels.

    Args:
        volume: feature map, label map or scan (C, d, h, w).
        like: the volume, or the grid, whose voxels are to be filled.
        interpolation: ``"linear"``, ``"nearest"`` or ``"bspline"``.
        outside: value where ``volume`` has no voxels.
    """
    grid = like if isinstance(like, Grid) else as_volume(like).grid
    return sample(as_volume(volume), grid, interpolation, outside)


def feature_map(data: torch.Tensor, of: ScanLike) -> Volume:
    """A feature map (E, d, h, w) of a model's input, as a volume in the same place: each voxel covers the patch that
    it came from.

    Raises:
        VolumeError: a map of another rank, or the input's axes are not multiples of the map's.
    """
    of = as_volume(of)
    if data.ndim != 4 or any(n % m for n, m in zip(of.size, data.shape[1:], strict=True)):
        raise VolumeError(f"a map of {tuple(data.shape)} does not divide a volume of {of.size} into patches")
    steps = [n // m for n, m in zip(of.size, data.shape[1:], strict=True)]
    centre = of.grid.world([(step - 1) / 2 for step in steps])
    return Volume(
        data,
        Grid(
            data.shape[1:], [step * mm for step, mm in zip(steps, of.spacing, strict=True)], tuple(centre), of.direction
        ),
        of.source,
    )


def percentiles(volume: ScanLike, bounds: tuple[float, float], of: Counted = "all") -> tuple[float, float]:
    """Intensities at two percentiles ``(low, high)``, 0 to 100, for ``window``. A constant volume gives a window of
    width 1.

    Args:
        volume: (C, D, H, W).
        bounds: the percentiles.
        of: the voxels that count: ``"all"``, ``"nonzero"``, or those ``"above_mean"`` of the volume, as a coarse
            foreground; all where none is of that kind.

    Raises:
        VolumeError: not a pair 0 <= low < high <= 100, or another kind of voxels.
    """
    low, high = _pair("percentiles are", bounds)
    if not 0 <= low < high <= 100:
        raise VolumeError(f"percentiles are {low} and {high}; expected 0 <= low < high <= 100")
    volume = as_volume(volume)
    values = counted(volume.data.detach().cpu(), of)
    if values.dtype == torch.bfloat16:  # numpy has no such type
        values = values.float()
    bottom, top = map(float, np.percentile(values.numpy(), [low, high]))
    return (bottom, top) if top > bottom else (bottom, bottom + 1.0)


def window(volume: ScanLike, bounds: tuple[float, float], out: tuple[float, float] | None = (0.0, 1.0)) -> Volume:
    """Intensities clipped to ``bounds`` and mapped linearly to ``out``; float32.

    Args:
        volume: (C, D, H, W).
        bounds: the lowest and the highest intensity that is kept, such as ``(-1000, 400)`` of a CT in HU, or
            ``percentiles(volume, (0.5, 99.5))``.
        out: what they become; None only clips.

    Raises:
        VolumeError: not a pair low < high.
    """
    volume, (low, high) = as_volume(volume), _pair("the window is", bounds)
    data = volume.data.to(torch.float32, copy=True).clamp_(low, high)
    if out is None:
        return volume.with_data(data)
    return volume.with_data(data.sub_(low).mul_((out[1] - out[0]) / (high - low)).add_(out[0]))


def _pair(what: str, bounds: tuple[float, float]) -> tuple[float, float]:
    pair = list(bounds) if isinstance(bounds, Sequence) else [bounds]
    if len(pair) != 2 or not pair[0] < pair[1]:
        raise VolumeError(f"{what} {pair}; expected two increasing numbers (low, high)")
    low, high = pair
    return low, high


def zscore(
    volume: ScanLike,
    *,
    nonzero: bool = False,
    together: bool = False,
    like: ScanLike | None = None,
    of: Counted = "all",
) -> Volume:
    """Zero mean and unit variance; float32. A constant channel becomes zero.

    Args:
        volume: (C, D, H, W).
        nonzero: whether only non-zero voxels count and change, as for skull-stripped brains.
        together: one mean and one unbiased deviation of all channels and voxels, which keeps the contrast between
            channels (the recipe of 3D Mamba MAE), instead of each channel's own mean and population deviation.
        like: with ``together``, the volume that the statistics are taken of; ``volume`` itself by default.
        of: the voxels that each channel's statistics are of, see ``percentiles``; all voxels change.

    Raises:
        VolumeError: more than one of ``nonzero``, ``together`` and ``of``, or ``like`` without ``together``.
    """
    volume, like = as_volume(volume), None if like is None else as_volume(like)
    if nonzero + together + (of != "all") > 1 or (like is not None and not together):
        raise VolumeError(
            f"nonzero={nonzero}, together={together}, like={like}, of={of!r}; expected at most one of nonzero, "
            "together and of, and like only with together"
        )
    if together:
        values = (volume if like is None else like).data.double()
        std, mean = torch.std_mean(values, correction=min(1, values.numel() - 1))
        return standardize(volume, float(mean), float(std))
    data = volume.data.to(torch.float32, copy=True)
    for channel in data:
        mask = channel != 0 if nonzero else torch.ones_like(channel, dtype=torch.bool)
        if mask.any():
            std, mean = torch.std_mean(counted(channel, "nonzero" if nonzero else of).double(), correction=0)
            channel[mask] = ((channel[mask] - mean) / (std if std > 0 else 1.0)).float()
    return volume.with_data(data)


def standardize(volume: ScanLike, mean: float, std: float) -> Volume:
    """``(volume - mean) / std``, with the mean and deviation of a training set, say; float32. A deviation of 0 counts
    as 1.

    Raises:
        VolumeError: a negative deviation.
    """
    if not std >= 0:
        raise VolumeError(f"the standard deviation is {std}; expected a positive number")
    volume = as_volume(volume)
    return volume.with_data(volume.data.to(torch.float32, copy=True).sub_(mean).div_(std or 1.0))


def crop_or_pad(
    volume: ScanLike, size: int | Sequence[int], value: float = 0.0, start: Sequence[int] | None = None
) -> Volume:
    """Exactly ``size`` voxels, cut or padded.

    Args:
        volume: (C, D, H, W).
        size: voxels (d, h, w), or one number for all axes.
        value: intensity of padded voxels.
        start: first voxel (d, h, w), may be negative; by default that of ``centred_start``, so that a crop undoes a
            pad.

    Raises:
        VolumeError: a size that is not positive.
    """
    volume, wanted = as_volume(volume), sizes(size)
    target = volume.grid.part(centred_start(volume.size, wanted) if start is None else start, wanted)
    return sample(volume, target, "nearest", value)


def crop_foreground(
    volume: ScanLike, threshold: float = 0.0, margin: int = 0, *, nonzero: bool = False, within: int = 1
) -> Volume:
    """The smallest box that holds every voxel above ``threshold`` in any channel, widened by ``margin`` voxels within
    the volume.

    Args:
        volume: (C, D, H, W).
        threshold: intensity.
        margin: voxels.
        nonzero: every voxel that is not 0 counts instead.
        within: an odd number of voxels: a voxel counts where more than half of the cube of this edge around it do, what
            lies beyond the volume being background. That leaves out the table and noise in the air.

    Raises:
        VolumeError: no voxel counts, or an even ``within``.
    """
    volume = as_volume(volume)
    if within < 1 or within % 2 == 0 or within > 39:
        raise VolumeError(f"within is {within}; expected an odd number of voxels, 1 to 39")
    mask = ((volume.data != 0) if nonzero else (volume.data > threshold)).any(dim=0).cpu().numpy()
    box = bounding_box(mostly_true(mask, within))
    if box is None:
        kind = "voxel other than 0" if nonzero else f"voxel above {threshold:g}"
        among = f" with most of the {within} x {within} x {within} voxels around it" if within > 1 else ""
        raise VolumeError(f"{volume.source}: no {kind}{among}; the largest is {volume.data.max().item():g}")
    start = [max(0, first - margin) for first, _ in box]
    size = [min(n, end + margin) - s for n, (_, end), s in zip(volume.size, box, start, strict=True)]
    return crop_or_pad(volume, size, start=start)
