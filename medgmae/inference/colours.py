"""Feature maps as pictures in colours, and finer than the patches."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgmae.data import Grid, Volume, resample_like
from medgmae.inference.features import Features, extract_features
from medgmae.inference.latents import latent_to_spatial as latent_to_spatial
from medgmae.inference.latents import principal_axes
from medgmae.inference.windows import extend_rim


def dense_features(model: nn.Module, scan: Volume, *, steps: int = 2, overlap: float = 0.25) -> Volume:
    """A feature map finer than the patches: the scan is read several times, shifted by parts of a patch.

    Args:
        model: an encoder of this library, or a masked autoencoder, whose encoder is then used.
        scan: (C, D, H, W), preprocessed.
        steps: places per patch and axis; must divide the patch. The work grows with its cube.
        overlap: of the windows, see :func:`~medgmae.extract_features`.

    Returns:
        (E, d, h, w), a place every ``patch / steps`` voxels.

    Raises:
        ValueError: ``steps`` does not divide the patch; and what ``extract_features`` raises.
    """
    encoder: Any = getattr(model, "encoder", model)
    patch = encoder.patch_size
    if steps < 1 or any(p % steps for p in patch):
        raise ValueError(f"steps (={steps}) must be at least 1 and divide the patch {tuple(patch)}")
    size = [max(-(n // -p) * p, w) for n, p, w in zip(scan.size, patch, encoder.img_size, strict=True)]
    before = [(m - n) // 2 for n, m in zip(scan.size, size, strict=True)]
    maps: dict[tuple[int, ...], Volume] = {}
    for shift in itertools.product(range(steps), repeat=3):
        # The places of all shifts together are centred on the scan.
        start = [k * (p // steps) - (p - p // steps) // 2 - b for k, p, b in zip(shift, patch, before, strict=True)]
        maps[shift] = _map_of(extract_features(model, extend_rim(scan, start, size), overlap=overlap))
    first = maps[0, 0, 0]
    finer = torch.empty(first.data.shape[0], *(n * steps for n in first.size))
    for (i, j, k), found in maps.items():
        finer[:, i::steps, j::steps, k::steps] = found.data
    spacing = [mm / steps for mm in first.spacing]
    return Volume(finer, Grid(finer.shape[1:], spacing, first.origin, first.direction), scan.source)


def _map_of(features: Features) -> Volume:
    assert features.map is not None  # asked for by default
    return features.map


def pca_rgb(feature_map: Tensor, mask: Tensor | None = None) -> Tensor:
    """The three directions in which features vary most, as red, green and blue.

    Args:
        feature_map: (E, d, h, w), E >= 3.
        mask: (d, h, w) bool, the places whose features set directions and range; all when None.

    Returns:
        (3, d, h, w) float32 in [0, 1]: principal components, each stretched between its percentiles 2 and 98. The sign
        of a component is that of :func:`~medgmae.inference.latents.principal_axes`: equal features get equal colours.

    Raises:
        ValueError: fewer than three features, or a mask of another size or with fewer than four places.
    """
    if feature_map.dim() != 4 or feature_map.shape[0] < 3:
        raise ValueError(f"feature_map must be (E, d, h, w) with at least 3 features, got {tuple(feature_map.shape)}")
    grid = feature_map.shape[1:]
    chosen = torch.ones(grid, dtype=torch.bool) if mask is None else mask.bool().cpu()
    if chosen.shape != grid or int(chosen.sum()) < 4:
        raise ValueError(
            f"mask must be {tuple(grid)} with at least 4 places, got {tuple(chosen.shape)} with {int(chosen.sum())}"
        )
    tokens = feature_map.detach().cpu().double().flatten(1).T  # (d h w, E)
    fitted = tokens[chosen.flatten()]
    mean, axes = principal_axes(fitted, 3)
    low, high = torch.quantile((fitted - mean) @ axes, torch.tensor([0.02, 0.98], dtype=axes.dtype), dim=0)
    colours: Tensor = ((tokens - mean) @ axes - low) / (high - low).clamp(min=1e-12)
    return colours.clamp(0, 1).T.reshape(3, *grid).float()


def feature_colours(features: Volume, scan: Volume, threshold: float = 0.05) -> Volume:
    """Features (E, d, h, w) as smooth colours (3, D, H, W) on the grid of a scan, black where the scan is background.

    Args:
        features: a feature map with its geometry, such as :func:`dense_features` or ``extract_features`` gives.
        scan: (C, D, H, W), preprocessed.
        threshold: background is where the scan, smoothed over 3 x 3 x 3 voxels, is up to this value; small holes are
            filled. In a CT scaled to [0, 1], lung is at about 0.08.

    Raises:
        ValueError: see :func:`pca_rgb`.
    """
    smoothed = F.avg_pool3d(scan.data.float().amax(0, keepdim=True), 3, stride=1, padding=1, count_include_pad=False)
    wider = F.max_pool3d((smoothed > threshold).float(), 5, stride=1, padding=2)
    body = scan.with_data(-F.max_pool3d(-wider, 5, stride=1, padding=2))  # holes closed
    inside = resample_like(body, features).data[0] > 0.5
    smooth = resample_like(features.with_data(pca_rgb(features.data, inside)), scan, outside=0.0)
    return smooth.with_data(smooth.data.clamp(0, 1) * body.data)
