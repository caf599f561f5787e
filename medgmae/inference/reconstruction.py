"""Whole scans through a masked autoencoder: hide patches, let the model predict them, say how close it came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medgmae.data import Volume, crop_or_pad
from medgmae.gaussians.rendering import Gaussians
from medgmae.inference.windows import _Cover, _covered, blend_weights, extend_rim
from medgmae.layers.masking import Masking, visible_count


class Reconstruction(NamedTuple):
    """A masked scan and what a model made of it; volumes are on the grid of the scan and in its units.

    visible: (C, D, H, W), NaN where a voxel was hidden.
    filled: (C, D, H, W), the prediction where a voxel was hidden, the scan elsewhere.
    predicted: (C, D, H, W), the prediction everywhere. From Gaussians: all of them in one rendering.
    gaussians: of a GaussianMAE, (1, K, ...) of all windows in LPS millimetres, float32 on the CPU.
    apart: (1, D, H, W), of a GaussianMAE: windows rendered one by one, as in training, and averaged.
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
    overlap: float = 0.5,
    progress: bool = False,
) -> Reconstruction:
    """Hide patches of a whole scan and let a masked autoencoder fill them, window by window.

    One random mask is drawn for the whole scan. Windows of the size that the model was made for lie on its patch grid
    and overlap.

    - A model of voxels: predictions of windows are averaged, the middle of a window counting most.
    - A model of Gaussians: those of all windows are moved into the patient's frame, joined, and rendered on the scan's
      grid at once, so that the joined set is the reconstruction, to be written, moved and rendered without the model.
      Gaussians add up and reach beyond their window, where training never looked. So each density is multiplied by the
      share of its window at its centre: a tent over the window, divided by the sum of the tents of all windows. What
      overlaps then counts once, and little of what reaches over a window's rim counts at all. ``apart`` shows what
      this costs against windows that are rendered by themselves and averaged like voxels. A box support belongs to the
      window's grid and is moved approximately.

    Args:
        model: a :class:`~medgmae.MaskedAutoencoder` that predicts intensities (``norm_target=None``), or a
            :class:`~medgmae.GaussianMAE` without ``image_norm``; in eval mode.
        scan: (C, D, H, W), preprocessed; its rim is repeated up to whole patches and at least one window.
        mask_ratio: share of hidden patches, 0 to below 1; the model's own when None.
        generator: source of the mask.
        overlap: share of a window that it has in common with the next, 0 to below 1. At 0 Gaussians count fully.
        progress: show a progress bar over the windows.

    Raises:
        TypeError: the model has no decoder.
        ValueError: the model predicts normalised intensities, whose mean only the hidden voxels know; or an overlap,
            ratio or number of channels that is not possible.
    """
    if not hasattr(model, "reconstruct") or not hasattr(model, "decoder"):
        raise TypeError(f"reconstruct_scan needs a masked autoencoder of this library, got {type(model).__name__}")
    owner: Any = model
    if scan.channels != owner.encoder.in_chans:
        raise ValueError(f"the scan has {scan.channels} channel(s), the model takes {owner.encoder.in_chans}")
    _check_intensities(owner)
    ratio = float(owner.mask_ratio if mask_ratio is None else mask_ratio)
    if not 0 <= ratio < 1 or not 0 <= overlap < 1:
        raise ValueError(f"mask_ratio and overlap must be at least 0 and below 1, got {ratio} and {overlap}")
    patch, window = owner.encoder.patch_size, owner.encoder.img_size
    size = [max(-(n // -p) * p, w) for n, p, w in zip(scan.size, patch, window, strict=True)]
    padded = extend_rim(scan, [n // 2 - m // 2 for n, m in zip(scan.size, size, strict=True)], size)
    hidden = _hide(scan.size, size, patch, ratio, generator)
    with torch.no_grad():
        blended, parts = _predict(owner, padded, hidden, _covered(size, patch, window, overlap), progress)
        apart = crop_or_pad(padded.with_data(blended), scan.size)
        if not parts:
            return _result(scan, padded, hidden, patch, apart)
        world = Gaussians.concat(parts)
        rendered = owner.renderer(world.to_grid(scan.grid), scan.size)[0].float().cpu()
    found = _result(scan, padded, hidden, patch, scan.with_data(rendered))
    return found._replace(gaussians=world.to("cpu"), apart=apart)


def _check_intensities(model: Any) -> None:
    for option, plain in (("norm_target", None), ("image_norm", False)):
        value = getattr(model, option, plain)
        if value != plain:
            raise ValueError(
                f"the model predicts normalised intensities ({option}={value!r}); only one that predicts "
                f"intensities ({option}={plain}) can fill what was never seen"
            )


def _result(scan: Volume, padded: Volume, hidden: Tensor, patch: Sequence[int], predicted: Volume) -> Reconstruction:
    """From the hidden patches (d, h, w) of the padded scan and a prediction on the scan's grid."""
    voxels = hidden
    for axis, p in enumerate(patch):
        voxels = voxels.repeat_interleave(p, axis)
    visible = crop_or_pad(padded.with_data(padded.data.masked_fill(voxels, math.nan)), scan.size)
    filled = torch.where(visible.data.isnan(), predicted.data, visible.data)
    return Reconstruction(visible, visible.with_data(filled), predicted)


def _hide(
    size: Sequence[int], padded: Sequence[int], patch: Sequence[int], ratio: float, generator: torch.Generator | None
) -> Tensor:
    """A random mask on the patch grid (d, h, w) of ``padded`` voxels with a scan in their middle, True = hidden.

    It is drawn for the patches that hold a voxel of the scan. Those of the padding are hidden like the ones at the rim,
    whose voxels they repeat.
    """
    sources = []
    for n, m, p in zip(size, padded, patch, strict=True):
        before = m // 2 - n // 2
        first, last = before // p, (before + n - 1) // p
        sources.append(torch.arange(m // p).clamp(first, last) - first)
    grid = [int(source.max()) + 1 for source in sources]
    count = math.prod(grid)
    hidden = torch.ones(count, dtype=torch.bool)
    hidden[torch.randperm(count, generator=generator)[: max(visible_count(count, ratio), 1)]] = False
    return hidden.reshape(grid)[torch.meshgrid(*sources, indexing="ij")]


def _masking(hidden: Tensor) -> Masking:
    """The masking (batch of one) in which the patches of a grid (d, h, w) that are True in ``hidden`` are hidden."""
    mask = hidden.flatten()
    order = torch.cat([torch.nonzero(~mask).flatten(), torch.nonzero(mask).flatten()])
    return Masking(order[None, : int((~mask).sum())], torch.argsort(order)[None], mask.float()[None])


def _predict(
    model: Any, padded: Volume, hidden: Tensor, cover: _Cover, progress: bool
) -> tuple[Tensor, list[Gaussians]]:
    """All voxels (C, D, H, W) of a padded scan from its visible patches, the middle of a window counting most; and the
    Gaussians of every window by their shares, in LPS millimetres, where the model makes some."""
    from tqdm.auto import tqdm

    device = next(model.parameters()).device
    weight = blend_weights(cover.window)
    total, summed = torch.zeros(padded.size), torch.zeros_like(padded.data)
    parts = []
    for start in tqdm(cover.windows(), desc="windows", leave=False, disable=not progress):
        masking = Masking(*(t.to(device) for t in _masking(hidden[cover.patches(start)])))
        where = cover.voxels(start)
        piece = padded.data[(slice(None), *where)].unsqueeze(0).to(device)
        if hasattr(model, "gaussians"):
            gaussians: Gaussians = model.gaussians(piece, masking)
            found = model.renderer(gaussians, cover.window)
            counted = replace(gaussians, densities=gaussians.densities * cover.shares(start, gaussians.means))
            parts.append(counted.to_world(padded.grid.part(start, cover.window)))
        else:
            found = model.reconstruct(piece, masking, paste_visible=False)
        summed[(slice(None), *where)] += found[0].float().cpu() * weight
        total[where] += weight
    return summed / total, parts
