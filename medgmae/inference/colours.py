"""Feature maps as pictures in colours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medgmae.data import Volume, resample_like
from medgmae.inference.latents import principal_axes


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
        features: a feature map with its geometry, such as ``dense_features`` or ``extract_features`` gives.
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
