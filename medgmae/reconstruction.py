"""Whole scans through a masked autoencoder: hide patches, let the model predict them, say how close it came."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from medgmae.data import Volume, crop_or_pad
from medgmae.features import blend_weights
from medgmae.masking import Masking, random_masking, visible_count
from medgmae.rendering import Gaussians


class Reconstruction(NamedTuple):
    """A masked scan and what a model made of it; volumes are on the grid of the scan and in its units.

    visible: (C, D, H, W), NaN where a voxel was hidden.
    filled: (C, D, H, W), the prediction where a voxel was hidden, the scan elsewhere.
    predicted: (C, D, H, W), the prediction everywhere. From Gaussians: all of them in one rendering.
    gaussians: of a GaussianMAE, (1, K, ...) of all windows in LPS millimetres, float32 on the CPU.
    apart: (1, D, H, W), of a GaussianMAE: each window's Gaussians rendered inside their window only, as in training.
    """

    visible: Volume
    filled: Volume
    predicted: Volume
    gaussians: Gaussians | None = None
    apart: Volume | None = None


def reconstruct_scan(
    model: nn.Module,
    scan: Volume,
    *,
    mask_ratio: float | None = None,
    generator: torch.Generator | None = None,
    overlap: float | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> Reconstruction:
    """Hide patches of a whole scan and let a masked autoencoder fill them, window by window.

    Windows have the size that the model was made for.

    - A model of voxels: one mask is drawn for the whole scan. The windows lie on its patch grid and overlap; their
      predictions are averaged, the middle of a window counting most.
    - A model of Gaussians: windows lie side by side, each with a mask of its own, as in training. Their Gaussians are
      moved into the patient's frame, joined, and rendered on the scan's grid at once; they can be written, moved and
      rendered without the model. Overlapping windows would show what they share twice, since Gaussians add up. For the
      same reason what a Gaussian contributes beyond its own window, which training never saw, is in ``predicted``;
      ``apart`` is without it. A box support belongs to the window's grid and cannot be moved exactly.

    Args:
        model: a :class:`~medgmae.MaskedAutoencoder` that predicts intensities (``norm_target=None``), or a
            :class:`~medgmae.GaussianMAE` without ``image_norm``; in eval mode.
        scan: (C, D, H, W), preprocessed; its rim is repeated up to whole patches and windows.
        mask_ratio: share of hidden patches, 0 to below 1; the model's own when None.
        generator: source of the mask.
        overlap: of a model of voxels, the share of a window that it has in common with the next, 0 to below 1; 0.5
            when None.
        batch_size: of a model of Gaussians, windows per pass.
        progress: show a progress bar over the windows.

    Raises:
        TypeError: the model has no decoder.
        ValueError: the model predicts normalised intensities, whose mean only the hidden voxels know; or an overlap,
            ratio or number of channels that is not possible.
    """
    if not hasattr(model, "reconstruct") or not hasattr(model, "encoder"):
        raise TypeError(f"reconstruct_scan needs a masked autoencoder of this library, got {type(model).__name__}")
    owner: Any = model
    gaussian = hasattr(model, "gaussians")
    channels = 1 if gaussian else owner.encoder.in_chans
    if (scan.channels, owner.encoder.in_chans) != (channels, channels):
        raise ValueError(
            f"the scan has {scan.channels} channel(s), the model takes {owner.encoder.in_chans}"
            + (": expected one of each, since Gaussians have one density" if gaussian else "")
        )
    _check_intensities(owner)
    ratio = float(owner.mask_ratio if mask_ratio is None else mask_ratio)
    share = overlap if overlap is not None else 0.0 if gaussian else 0.5
    if not 0 <= ratio < 1 or not 0 <= share < 1:
        raise ValueError(f"mask_ratio and overlap must be at least 0 and below 1, got {ratio} and {share}")
    if gaussian and share:
        raise ValueError(f"overlap (={share}) must be 0 for Gaussians: they add up, and would count twice")
    with torch.no_grad():
        if gaussian:
            return _through_gaussians(owner, scan, ratio, generator, batch_size, progress)
        return _through_voxels(owner, scan, ratio, generator, share, progress)


def _check_intensities(model: Any) -> None:
    for option, plain in (("norm_target", None), ("image_norm", False)):
        value = getattr(model, option, plain)
        if value != plain:
            raise ValueError(
                f"the model predicts normalised intensities ({option}={value!r}); only one that predicts "
                f"intensities ({option}={plain}) can fill what was never seen"
            )


def psnr(found: Tensor, true: Tensor, *, data_range: float = 1.0, where: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(data_range² / mean squared error); infinite where nothing differs.

    Args:
        found: any shape.
        true: the same shape.
        data_range: largest minus smallest possible value.
        where: bool, of a shape that broadcasts to theirs: the voxels that count; all when None.

    Raises:
        ValueError: shapes differ, no voxel counts, or the range is not positive.
    """
    if found.shape != true.shape or not data_range > 0:
        raise ValueError(
            f"psnr needs two volumes of one shape and a positive data_range, got {tuple(found.shape)}, "
            f"{tuple(true.shape)} and {data_range}"
        )
    squared = (found.double() - true.double()).square()
    squared = squared if where is None else squared[where.expand_as(squared)]
    if not squared.numel():
        raise ValueError("psnr of no voxels; expected at least one that counts")
    error = float(squared.mean())
    return 10 * math.log10(data_range**2 / error) if error > 0 else math.inf


def extend_rim(scan: Volume, start: Sequence[int], size: Sequence[int]) -> Volume:
    """``size`` voxels from voxel ``start`` on, float32; beyond the scan its rim, as black would look like air."""
    data = scan.data.float()
    for axis, (first, count, n) in enumerate(zip(start, size, scan.size, strict=True)):
        data = data.index_select(axis + 1, torch.arange(first, first + count).clamp(0, n - 1))
    return Volume.on(scan.grid.part(start, size), data, scan.source)


def _padded(scan: Volume, size: Sequence[int]) -> Volume:
    """The scan in the middle of ``size`` voxels; ``crop_or_pad`` takes it out again."""
    return extend_rim(scan, [n // 2 - m // 2 for n, m in zip(scan.size, size, strict=True)], size)


def _result(scan: Volume, padded: Volume, hidden: Tensor, patch: Sequence[int], predicted: Volume) -> Reconstruction:
    """From the hidden patches (d, h, w) of the padded scan and a prediction on the scan's grid."""
    voxels = hidden
    for axis, p in enumerate(patch):
        voxels = voxels.repeat_interleave(p, axis)
    visible = crop_or_pad(padded.with_data(padded.data.masked_fill(voxels, math.nan)), scan.size)
    filled = torch.where(visible.data.isnan(), predicted.data, visible.data)
    return Reconstruction(visible, visible.with_data(filled), predicted)


def _bar(total: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="windows", leave=False, disable=not shown)


def _through_gaussians(
    model: Any, scan: Volume, ratio: float, generator: torch.Generator | None, batch_size: int, progress: bool
) -> Reconstruction:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    patch, window = model.encoder.patch_size, model.encoder.img_size
    device = next(model.parameters()).device
    tiles = [-(n // -w) for n, w in zip(scan.size, window, strict=True)]
    padded = _padded(scan, [t * w for t, w in zip(tiles, window, strict=True)])
    places = dict(zip("ijk", tiles, strict=True))
    pieces = rearrange(padded.data, "c (i d) (j h) (k w) -> (i j k) c d h w", **places)
    starts = itertools.product(*(range(0, t * w, w) for t, w in zip(tiles, window, strict=True)))
    grids = [padded.grid.part(start, window) for start in starts]
    cells = dict(zip("dhw", (w // p for w, p in zip(window, patch, strict=True)), strict=True))
    masks = random_masking(len(pieces), math.prod(cells.values()), ratio, generator=generator)
    parts, alone = [], []
    with _bar(len(pieces), progress) as bar:
        for first in range(0, len(pieces), batch_size):
            some = slice(first, first + batch_size)
            found: Gaussians = model.gaussians(pieces[some].to(device), Masking(*(t[some].to(device) for t in masks)))
            alone.append(model.renderer(found, window).float().cpu())
            for sample, grid in enumerate(grids[some]):
                parts.append(Gaussians(*(t[sample : sample + 1] for t in found)).to_world(grid))
            bar.update(len(alone[-1]))
    world = Gaussians.concat(parts)
    rendered = model.renderer(world.to_grid(scan.grid), scan.size)[0].float().cpu()
    apart = rearrange(torch.cat(alone), "(i j k) c d h w -> c (i d) (j h) (k w)", **places)
    hidden = rearrange(masks.mask.bool(), "(i j k) (d h w) -> (i d) (j h) (k w)", **places, **cells)
    return _result(scan, padded, hidden, patch, scan.with_data(rendered))._replace(
        gaussians=Gaussians(*(t.cpu() for t in world)), apart=crop_or_pad(padded.with_data(apart), scan.size)
    )


def _through_voxels(
    model: Any, scan: Volume, ratio: float, generator: torch.Generator | None, overlap: float, progress: bool
) -> Reconstruction:
    patch, window = model.encoder.patch_size, model.encoder.img_size
    size = [max(-(n // -p) * p, w) for n, p, w in zip(scan.size, patch, window, strict=True)]
    padded = _padded(scan, size)
    hidden = _draw([n // p for n, p in zip(size, patch, strict=True)], ratio, generator)
    predicted = padded.with_data(_fill_windows(model, padded.data, hidden, overlap, progress))
    return _result(scan, padded, hidden, patch, crop_or_pad(predicted, scan.size))


def _draw(grid: list[int], ratio: float, generator: torch.Generator | None) -> Tensor:
    """A random mask on a patch grid (d, h, w), True = hidden."""
    count = math.prod(grid)
    hidden = torch.ones(count, dtype=torch.bool)
    hidden[torch.randperm(count, generator=generator)[: max(visible_count(count, ratio), 1)]] = False
    return hidden.reshape(grid)


def _masking(hidden: Tensor) -> Masking:
    """The masking (batch of one) in which the patches of a grid (d, h, w) that are True in ``hidden`` are hidden."""
    mask = hidden.flatten()
    order = torch.cat([torch.nonzero(~mask).flatten(), torch.nonzero(mask).flatten()])
    return Masking(order[None, : int((~mask).sum())], torch.argsort(order)[None], mask.float()[None])


def _fill_windows(model: Any, x: Tensor, hidden: Tensor, overlap: float, progress: bool) -> Tensor:
    """Predict all of x (C, D, H, W) from its visible patches; the middle of a window counts most."""
    patch, window = model.encoder.patch_size, model.encoder.img_size
    device = next(model.parameters()).device
    weight = blend_weights(window)
    total, summed = torch.zeros(x.shape[1:]), torch.zeros_like(x)
    starts = []
    for extent, w, p in zip(hidden.shape, window, patch, strict=True):
        room, step = extent - w // p, max(1, round(w // p * (1 - overlap)))
        count = math.ceil(room / step)
        starts.append([round(i * room / max(count, 1)) for i in range(count + 1)])
    with _bar(math.prod(map(len, starts)), progress) as bar:
        for start in itertools.product(*starts):
            cells = tuple(slice(s, s + w // p) for s, w, p in zip(start, window, patch, strict=True))
            voxels = tuple(slice(s * p, s * p + w) for s, w, p in zip(start, window, patch, strict=True))
            masking = Masking(*(t.to(device) for t in _masking(hidden[cells])))
            piece = x[(slice(None), *voxels)].unsqueeze(0).to(device)
            found = model.reconstruct(piece, masking, paste_visible=False)[0].cpu()
            summed[(slice(None), *voxels)] += found * weight
            total[voxels] += weight
            bar.update()
    return summed / total
