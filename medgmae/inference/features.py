"""Features of whole scans: windows on the patch grid, blended into one map with the scan's geometry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from medgmae.data import Grid, Volume, resample
from medgmae.inference.windows import Blend, _cut, _lay_out, _Layout, blend_weights, evaluating
from medgmae.layers.patches import Shape


class Features(NamedTuple):
    """Features of one scan, float32 on the CPU.

    pooled: (F,), the model's pooled vector, averaged over the windows with equal weights.
    map: (E, d, h, w) on the grid of patches, in the scan's world: spacing is the patch's size in mm, origin the centre
        of the first patch. None when it was not asked for.
    """

    pooled: Tensor
    map: Volume | None


def extract_features(
    model: nn.Module,
    volume: Volume,
    *,
    window: Literal["model"] | int | Sequence[int] | None = "model",
    overlap: float = 0.5,
    blend: Blend = "gaussian",
    resize: bool = False,
    outside: float = 0.0,
    want_map: bool = True,
    batch_size: int = 1,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> Features:
    """Pooled vector and feature map of a whole scan that has been through the model's transform.

    Windows lie on one patch grid, so that their tokens fall onto each other exactly. A scan smaller than the window, or
    of a size that is no multiple of the patch, is padded on both sides. Only one batch of windows is on the model's
    device at a time; the map is summed up on the CPU.

    Args:
        model: an encoder of this library, or a masked autoencoder, whose encoder is then used.
        volume: (C, D, H, W), preprocessed.
        window: voxels (d, h, w) that the model sees at once, multiples of the patch: "model" for the size it was built
            for, an int for a cube, None for the whole scan in one pass.
        overlap: least share of a window that it has in common with the next, 0 to below 1.
        blend: how overlapping windows are averaged: "gaussian" trusts the middle of a window more than its rim.
        resize: first resample the scan to the window's size, changing its proportions; one pass then.
        outside: intensity of the padding, in the units of the volume.
        want_map: False gives ``map=None`` and spares its memory.
        batch_size: windows per pass.
        autocast: run the model under autocast with this dtype.
        progress: show a progress bar over the windows.

    Raises:
        ValueError: channels that the model does not take, a window, overlap, blend or batch size that is not possible.
        TypeError: the model is not one of this library.
    """
    encoder = _encoder(model)
    if volume.data.shape[0] != encoder.in_chans:
        raise ValueError(f"the scan has {volume.data.shape[0]} channel(s), the model takes {encoder.in_chans}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    size = _window_size(encoder, window)
    if resize:
        if size is None:
            raise ValueError("resize=True needs a window to resize to, got window=None")
        volume = resample(volume, size=size)
    layout = _lay_out(tuple(volume.data.shape[1:]), tuple(encoder.patch_size), size, overlap)
    found = _run(encoder, volume.data, layout, blend, outside, want_map, batch_size, autocast, progress)
    return Features(found[0], None if found[1] is None else _on_patches(found[1], volume, layout))


def _encoder(model: nn.Module) -> Any:
    encoder: Any = getattr(model, "encoder", model)
    needed = ("grid_size", "patch_size", "in_chans", "num_prefix_tokens", "forward_features", "forward_head")
    if not all(hasattr(encoder, name) for name in needed):
        raise TypeError(f"extract_features needs an encoder of this library, got {type(model).__name__}")
    if len(encoder.patch_size) != 3:
        raise ValueError(f"extract_features needs an encoder for volumes, this one takes patches {encoder.patch_size}")
    return encoder


def _window_size(encoder: Any, window: Any) -> Shape | None:
    """Voxels of a window per axis; None for the whole scan."""
    if window is None:
        return None
    if window == "model":
        return tuple(encoder.img_size)
    size = (window,) * 3 if isinstance(window, int) else tuple(int(v) for v in window)
    if len(size) != 3 or any(s < 1 or s % p for s, p in zip(size, encoder.patch_size, strict=True)):
        raise ValueError(
            f"window must be 'model', None, or one size per axis in multiples of the patch "
            f"{tuple(encoder.patch_size)}, got {window!r}"
        )
    return size


def _run(
    encoder: Any,
    data: Tensor,
    layout: _Layout,
    blend: Blend,
    outside: float,
    want_map: bool,
    batch_size: int,
    autocast: torch.dtype | None,
    progress: bool,
) -> tuple[Tensor, Tensor | None]:
    """Stream the windows through the model: the mean pooled vector (F,) and the blended map (E, d, h, w)."""
    from tqdm.auto import tqdm

    parameter = next(encoder.parameters())
    weight = blend_weights(layout.window, blend)
    total = torch.zeros(layout.grid)
    summed: Tensor | None = None
    pooled = torch.zeros((), dtype=torch.float64)
    windows = layout.windows()
    with evaluating(encoder), tqdm(total=len(windows), desc="windows", leave=False, disable=not progress) as bar:
        for first in range(0, len(windows), batch_size):
            chosen = windows[first : first + batch_size]
            batch = torch.stack([_cut(data, layout, start, outside) for start in chosen])  # (B, C, D, H, W)
            x = batch.to(parameter.device, parameter.dtype)
            tokens, vectors = _forward(encoder, x, autocast)
            pooled = pooled + vectors.float().cpu().double().sum(0)  # sums, since a view would keep all tokens alive
            if want_map:
                maps = tokens[:, encoder.num_prefix_tokens :].float().cpu().mT.reshape(len(chosen), -1, *layout.window)
                summed = torch.zeros(maps.shape[1], *layout.grid) if summed is None else summed
                for image, start in zip(maps, chosen, strict=True):
                    where = layout.patches(start)
                    summed[(slice(None), *where)] += image * weight
                    total[where] += weight
            bar.update(len(chosen))
    mean = (pooled / len(windows)).float()
    return mean, None if summed is None else summed.div_(total)


def _forward(encoder: Any, x: Tensor, autocast: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Tokens (B, P + N, E) and pooled vectors (B, F) of a batch."""
    with torch.inference_mode(), torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        tokens = encoder.forward_features(x)
        return tokens, encoder.forward_head(tokens, pre_logits=True)


def _on_patches(blended: Tensor, volume: Volume, layout: _Layout) -> Volume:
    """A map on the padded patch grid as a volume in the scan's world, without patches that lie in the padding."""
    inside = layout.inside
    triples = zip(inside, layout.patch, layout.before, strict=True)
    centre = [kept.start * patch - before + (patch - 1) / 2 for kept, patch, before in triples]  # in the scan's voxels
    spacing = [s * p for s, p in zip(volume.spacing, layout.patch, strict=True)]
    data = blended[(slice(None), *inside)].contiguous()
    grid = Grid(data.shape[1:], spacing, volume.grid.world(centre).tolist(), volume.direction)
    return Volume(data, grid, volume.source)
