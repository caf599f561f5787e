"""Whole scans through a masked autoencoder: hide patches, let the model predict them, say how close it came."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from medgmae.data import Volume
from medgmae.data.volume import ScanLike
from medgmae.gaussians.rendering import GaussianRenderer, Gaussians
from medgmae.inference.inputs import check_channels, encoder_of, volume_of
from medgmae.inference.windows import Layout, WindowMean, batches, blend_weights, evaluating, lay_out
from medgmae.layers.masking import Masking, visible_count
from medgmae.models.parts import unwrap
from medgmae.ops.progress import Bar, progress_bar


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


class Autoencoder(Protocol):
    """What a reconstruction asks of a masked autoencoder; one of Gaussians predicts ``gaussians`` for its renderer."""

    mask_ratio: float
    renderer: GaussianRenderer

    def reconstruct(self, x: Tensor, masking: Masking, *, paste_visible: bool) -> Tensor:
        """Intensities (B, C, D, H, W)."""

    def gaussians(self, x: Tensor, masking: Masking) -> Gaussians:
        """Gaussians in units of the window's axes."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them."""


def reconstruct_scan(
    model: nn.Module,
    scan: ScanLike,
    *,
    mask_ratio: float | None = None,
    generator: torch.Generator | None = None,
    overlap: float = 0.5,
    progress: bool | None = None,
) -> Reconstruction:
    """Hide patches of a whole scan and let a masked autoencoder fill them, window by window.

    One random mask is drawn for the whole scan. Windows of the size that the model was made for lie on its patch grid
    and overlap. The model runs in evaluation mode and gets its own mode back.

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
            :class:`~medgmae.GaussianMAE` without ``image_norm``.
        scan: (C, D, H, W), preprocessed; its rim is repeated up to whole patches and at least one window.
        mask_ratio: share of hidden patches, 0 to below 1; the model's own when None.
        generator: source of the mask.
        overlap: least share of a window that it has in common with the next, 0 to below 1. Gaussians of windows that
            do not overlap count fully.
        progress: show a progress bar over the windows; by default in terminals and notebooks.

    Raises:
        TypeError: the model has no decoder or is not one of this library, or the scan is not a scan.
        ValueError: the model predicts normalised intensities, whose mean only the hidden voxels know; or an overlap,
            ratio or number of channels that is not possible.
    """
    model = unwrap(model)
    if not hasattr(model, "reconstruct") or not hasattr(model, "decoder"):
        raise TypeError(f"reconstruct_scan needs a masked autoencoder of this library, got {type(model).__name__}")
    encoder, autoencoder, volume = encoder_of(model, "reconstruct_scan"), cast(Autoencoder, model), volume_of(scan)
    check_channels(encoder, volume.channels)
    _check_intensities(model)
    ratio = float(autoencoder.mask_ratio if mask_ratio is None else mask_ratio)
    if not 0 <= ratio < 1:
        raise ValueError(f"mask_ratio must be at least 0 and below 1, got {ratio}")
    layout = lay_out(volume.size, encoder.patch_size, encoder.img_size, overlap)
    hidden = _hide(layout, ratio, generator)
    with torch.no_grad(), evaluating(model), progress_bar(len(layout.windows()), "windows", progress) as bar:
        blended, parts = _predict(autoencoder, volume, hidden, layout, bar)
        if not parts:
            return _result(volume, hidden, layout, blended)
        world = Gaussians.concat(parts)
        rendered = autoencoder.renderer(world.to_grid(volume.grid), volume.size)[0].float().cpu()
    reconstruction = _result(volume, hidden, layout, volume.with_data(rendered))
    return reconstruction._replace(gaussians=world.to("cpu"), apart=blended)


def _check_intensities(model: nn.Module) -> None:
    for option, plain in (("norm_target", None), ("image_norm", False)):
        value = getattr(model, option, plain)
        if value != plain:
            raise ValueError(
                f"the model predicts normalised intensities ({option}={value!r}); only one that predicts "
                f"intensities ({option}={plain}) can fill what was never seen"
            )


def _result(scan: Volume, hidden: Tensor, layout: Layout, predicted: Volume) -> Reconstruction:
    """From the hidden patches (d, h, w) of the padded scan and a prediction on the scan's grid."""
    for axis, p in enumerate(layout.patch):
        hidden = hidden.repeat_interleave(p, axis)
    hidden = hidden[layout.scan]
    visible = scan.data.float().masked_fill(hidden, math.nan)
    filled = torch.where(hidden, predicted.data, visible)
    return Reconstruction(scan.with_data(visible), scan.with_data(filled), predicted)


def _hide(layout: Layout, ratio: float, generator: torch.Generator | None) -> Tensor:
    """A random mask on the patches (d, h, w) of the padded scan, True = hidden.

    It is drawn for the patches that hold a voxel of the scan. Those of the padding are hidden like the ones at the rim,
    whose voxels they repeat.
    """
    inside = [kept.stop - kept.start for kept in layout.inside]
    count = math.prod(inside)
    hidden = torch.ones(count, dtype=torch.bool)
    hidden[torch.randperm(count, generator=generator)[: max(visible_count(count, ratio), 1)]] = False
    nearest = [
        (torch.arange(n) - kept.start).clamp(0, k - 1)
        for n, kept, k in zip(layout.grid, layout.inside, inside, strict=True)
    ]
    return hidden.reshape(inside)[torch.meshgrid(*nearest, indexing="ij")]


def _masking(hidden: Tensor, device: torch.device) -> Masking:
    """The masking (batch of one) in which the patches of a window (d, h, w) that are True in ``hidden`` are hidden."""
    mask = hidden.flatten()
    order = torch.cat([torch.nonzero(~mask).flatten(), torch.nonzero(mask).flatten()])
    masking = Masking(order[None, : int((~mask).sum())], torch.argsort(order)[None], mask.float()[None])
    return Masking(*(t.to(device) for t in masking))


def _predict(
    model: Autoencoder, scan: Volume, hidden: Tensor, layout: Layout, bar: Bar
) -> tuple[Volume, list[Gaussians]]:
    """All voxels of a scan from its visible patches, the middle of a window counting most; and the Gaussians of every
    window by their shares, in LPS millimetres, where the model makes some."""
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    mean = WindowMean(layout.padded_size, blend_weights(layout.window_size))
    parts = []
    for (start,), batch in batches(scan.data, layout, "rim"):
        x, masking = batch.to(device, dtype), _masking(hidden[layout.patches(start)], device)
        if hasattr(model, "gaussians"):
            gaussians = model.gaussians(x, masking)
            predicted = model.renderer(gaussians, layout.window_size)
            place = scan.grid.part(layout.corner(start), layout.window_size)
            parts.append(_counted(gaussians, layout.shares(start, gaussians.means)).to_world(place))
        else:
            predicted = model.reconstruct(x, masking, paste_visible=False)
        mean.add(layout.voxels(start), predicted[0].float().cpu())
        bar.update()
    return scan.with_data(mean.result()[(slice(None), *layout.scan)].contiguous()), parts


def _counted(gaussians: Gaussians, shares: Tensor) -> Gaussians:
    return Gaussians(gaussians.means, gaussians.scales, gaussians.quats, gaussians.densities * shares)
