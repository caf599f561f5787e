"""Features of whole scans: windows on the patch grid, blended into one map with the scan's geometry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.data import Volume, resample

Grid = tuple[int, ...]
Blend = Literal["gaussian", "uniform"]

# Spread of the Gaussian in units of the window: a token at the rim weighs exp(-8), a 3000th of one in the middle.
SIGMA = 0.125


class Features(NamedTuple):
    """Features of one scan, float32 on the CPU.

    pooled: (F,), the model's pooled vector, averaged over the windows with equal weights.
    map: (E, d, h, w) on the grid of patches, in the scan's world: spacing is the patch's size in mm, origin the centre
        of the first patch. None when it was not asked for.
    """

    pooled: Tensor
    map: Volume | None


@dataclass(frozen=True)
class _Layout:
    """Where the windows lie on the patch grid of a padded scan; every tuple has one entry per axis.

    size: voxels of the scan. patch: voxels of a patch. window: patches of a window. grid: patches of the padded scan.
    starts: first patch of each window along the axis.
    """

    size: Grid
    patch: Grid
    window: Grid
    grid: Grid
    starts: tuple[tuple[int, ...], ...]

    @property
    def before(self) -> Grid:
        """Voxels of padding in front of the scan; as many behind it, or one more."""
        return tuple((g * p - s) // 2 for g, p, s in zip(self.grid, self.patch, self.size, strict=True))

    @property
    def inside(self) -> tuple[slice, ...]:
        """The patches that hold at least one voxel of the scan."""
        triples = zip(self.before, self.size, self.patch, strict=True)
        return tuple(slice(b // p, -((b + s) // -p)) for b, s, p in triples)

    def windows(self) -> list[Grid]:
        """First patch of every window."""
        return list(itertools.product(*self.starts))

    def patches(self, start: Grid) -> tuple[slice, ...]:
        """The patches of the window at ``start``."""
        return tuple(slice(i, i + w) for i, w in zip(start, self.window, strict=True))


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
    needed = ("grid", "patch_size", "in_chans", "num_prefix_tokens", "forward_features", "forward_head")
    if not all(hasattr(encoder, name) for name in needed):
        raise TypeError(f"extract_features needs an encoder of this library, got {type(model).__name__}")
    if len(encoder.patch_size) != 3:
        raise ValueError(f"extract_features needs an encoder for volumes, this one takes patches {encoder.patch_size}")
    return encoder


def _window_size(encoder: Any, window: Any) -> Grid | None:
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


def _lay_out(size: Grid, patch: Grid, window: Grid | None, overlap: float) -> _Layout:
    """Cover a scan with as few windows as the overlap allows, spread evenly."""
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
    needed = tuple(-(s // -p) for s, p in zip(size, patch, strict=True))
    tokens = needed if window is None else tuple(w // p for w, p in zip(window, patch, strict=True))
    grid = tuple(map(max, needed, tokens))
    starts = []
    for total, width in zip(grid, tokens, strict=True):
        stride = max(1, math.floor(width * (1 - overlap) + 1e-6))
        steps = math.ceil((total - width) / stride)
        starts.append(tuple(round(i * (total - width) / max(steps, 1)) for i in range(steps + 1)))
    return _Layout(size, patch, tokens, grid, tuple(starts))


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


def blend_weights(window: Grid, blend: Blend = "gaussian") -> Tensor:
    """Weights (d, h, w) of the tokens of one window, at most 1; averages divide by their sum over the windows.

    Raises:
        ValueError: another blend.
    """
    if blend == "uniform":
        return torch.ones(window)
    if blend != "gaussian":
        raise ValueError(f"blend must be 'gaussian' or 'uniform', got {blend!r}")
    weight = torch.ones(())
    for width in window:
        position = (torch.arange(width) - (width - 1) / 2) / width
        weight = weight.unsqueeze(-1) * torch.exp(-0.5 * (position / SIGMA) ** 2)
    return weight


def _cut(data: Tensor, layout: _Layout, start: Grid, outside: float) -> Tensor:
    """The voxels (C, *window) of the window at ``start``; ``outside`` where it reaches over the scan."""
    inner, padding = [], []
    for axis, token in enumerate(start):
        patch = layout.patch[axis]
        low = token * patch - layout.before[axis]
        high = low + layout.window[axis] * patch
        size = layout.size[axis]
        inner.append(slice(max(low, 0), min(high, size)))
        padding.append((max(-low, 0), max(high - size, 0)))
    piece = data[(slice(None), *inner)].float()
    if any(map(any, padding)):
        piece = F.pad(piece, [n for pair in reversed(padding) for n in pair], value=outside)
    return piece


def _on_patches(blended: Tensor, volume: Volume, layout: _Layout) -> Volume:
    """A map on the padded patch grid as a volume in the scan's world, without patches that lie in the padding."""
    inside = layout.inside
    triples = zip(inside, layout.patch, layout.before, strict=True)
    centre = [kept.start * patch - before + (patch - 1) / 2 for kept, patch, before in triples]  # in the scan's voxels
    d, h, w = (s * p for s, p in zip(volume.spacing, layout.patch, strict=True))
    x, y, z = volume.grid.world(centre)
    data = blended[(slice(None), *inside)].contiguous()
    return Volume(data, (d, h, w), (float(x), float(y), float(z)), volume.direction, volume.source)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every part gets its own mode back, frozen norms too."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
