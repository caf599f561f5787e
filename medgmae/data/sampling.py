"""Voxels of one grid at the positions of another."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ._itk import simpleitk
from .geometry import _SNAP, AxisMap, Floats, Grid, VolumeError, axis_maps
from .io import Volume, to_sitk

Interpolation = Literal["nearest", "linear", "bspline"]


def _inside(positions: Floats, voxels: int) -> tuple[int, int]:
    """The interval of indices whose positions lie within the source's voxels, edges at -0.5 and n - 0.5. Positions
    are monotonic."""
    inside = np.flatnonzero((positions >= -0.5 - _SNAP) & (positions < voxels - 0.5 + _SNAP))
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)


def _pick(data: Tensor, dim: int, index: Floats) -> Tensor:
    """Slices of ``data`` at whole positions; a view where their order allows it."""
    steps = np.diff(index)
    if len(index) and (steps == 1).all():
        return data.narrow(dim, int(index[0]), len(index))
    if len(index) and (steps == -1).all():
        return data.narrow(dim, int(index[-1]), len(index)).flip(dim)
    return data.index_select(dim, torch.from_numpy(index.astype(np.int64)))


def _along(data: Tensor, dim: int, positions: Floats, interpolation: Interpolation) -> Tensor:
    """``data`` resampled along one axis; positions beyond the outermost voxel centres take the outermost voxel."""
    last = data.shape[dim] - 1
    positions = positions.clip(0, last)
    if interpolation == "nearest":
        return _pick(data, dim, np.floor(positions + 0.5).clip(0, last))
    below = np.floor(positions)
    if (below == positions).all():
        return _pick(data, dim, positions)
    kind = data.dtype if data.dtype == torch.float64 else torch.float32
    weight = torch.from_numpy(positions - below).to(kind).reshape([-1 if k == dim else 1 for k in range(4)])
    lower = _pick(data, dim, below).to(kind)
    upper = _pick(data, dim, (below + 1).clip(0, last)).to(kind)
    return lower.lerp(upper, weight)


def _separable(data: Tensor, maps: list[AxisMap], interpolation: Interpolation, outside: float | None) -> Tensor:
    source = data.shape[1:]
    data = data.permute(0, *(1 + m.source for m in maps))
    bounds = [(0, len(m.positions)) if outside is None else _inside(m.positions, source[m.source]) for m in maps]
    ratio = [(stop - start) / source[m.source] for m, (start, stop) in zip(maps, bounds, strict=True)]
    for k in sorted(
        range(3), key=lambda k: (not maps[k].whole, ratio[k])
    ):  # what shrinks most first: the rest then has less to do
        start, stop = bounds[k]
        data = _along(data, k + 1, maps[k].positions[start:stop], interpolation)
    if outside is not None and any(bound != (0, len(m.positions)) for m, bound in zip(maps, bounds, strict=True)):
        margins = [n for m, (start, stop) in zip(maps, bounds, strict=True) for n in (start, len(m.positions) - stop)]
        flat = [margins[i] for k in (2, 1, 0) for i in (2 * k, 2 * k + 1)]
        return torch.nn.functional.pad(data, flat, value=outside)
    return data


def _itk(volume: Volume, target: Grid, interpolation: Interpolation, outside: float | None) -> Tensor:
    """SimpleITK's resampler, for oblique grids and for B-splines (order 3, prefiltered). Integers stay integers,
    rounded."""
    sitk = simpleitk()

    kinds = {"nearest": sitk.sitkNearestNeighbor, "linear": sitk.sitkLinear, "bspline": sitk.sitkBSpline}
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize([int(n) for n in target.size[::-1]])
    resampler.SetOutputSpacing(target.spacing[::-1])
    resampler.SetOutputOrigin(target.origin)
    resampler.SetOutputDirection(target.direction[:, ::-1].ravel().tolist())
    resampler.SetInterpolator(kinds[interpolation])
    resampler.SetDefaultPixelValue(0.0 if outside is None else float(outside))
    resampler.SetUseNearestNeighborExtrapolator(outside is None)
    channels: list[Any] = []
    for channel in volume.data:
        image = to_sitk(volume.with_data(channel[None]))
        channels.append(torch.from_numpy(sitk.GetArrayFromImage(resampler.Execute(image))))
    return torch.stack(channels)


def sample(volume: Volume, target: Grid, interpolation: Interpolation, outside: float | None) -> Volume:
    """The volume's values at the voxel centres of ``target``.

    Args:
        volume: (C, D, H, W).
        target: any grid; parallel axes go through one-dimensional steps, which are exact where voxel centres coincide.
        interpolation: linear and B-spline give float32 (float64 stays) unless voxel centres coincide; nearest keeps
            the type.
        outside: value beyond the volume's outermost voxel edges; ``None`` repeats the outermost voxels.
    """
    if interpolation not in ("nearest", "linear", "bspline"):
        raise VolumeError(f"interpolation is {interpolation!r}; expected 'nearest', 'linear' or 'bspline'")
    maps = axis_maps(volume.grid, target)
    if maps is not None and (interpolation != "bspline" or all(m.whole for m in maps)):
        return Volume.on(target, _separable(volume.data, maps, interpolation, outside), volume.source)
    if interpolation != "nearest" and not volume.data.is_floating_point():
        volume = volume.with_data(volume.data.to(torch.float32))
    return Volume.on(target, _itk(volume, target, interpolation, outside), volume.source)


def onto(volume: Volume, target: Grid, interpolation: Interpolation, outside: float | None, keep_dtype: bool) -> Volume:
    """``sample``; with ``keep_dtype`` integers come back rounded, B-splines as SimpleITK gives them when it is handed
    integers."""
    if keep_dtype and interpolation == "bspline":
        return Volume.on(target, _itk(volume, target, "bspline", outside), volume.source)
    result = sample(volume, target, interpolation, outside)
    if keep_dtype and result.data.dtype != volume.data.dtype:
        result = result.with_data(
            (result.data if volume.data.is_floating_point() else result.data.round()).to(volume.data.dtype)
        )
    return result
