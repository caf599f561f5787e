"""Feature maps as pictures in colours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medgmae.data import Volume, resample_like
from medgmae.data.volume import HasMap, ScanLike, is_scan, map_of
from medgmae.inference.inputs import argument_volume
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


def feature_colours(features: ScanLike | HasMap, scan: ScanLike, threshold: float = 0.05) -> Volume:
    """Features (E, d, h, w) as smooth colours (3, D, H, W) on the grid of a scan, black where the scan is background.

    Args:
        features: what ``extract_features`` or ``dense_features`` gives, or a feature map with its geometry.
        scan: (C, D, H, W), preprocessed; what :func:`~medgmae.data.as_volume` takes.
        threshold: background is where the scan, smoothed over 3 x 3 x 3 voxels, is up to this value; small holes are
            filled. In a CT scaled to [0, 1], lung is at about 0.08.

    Raises:
        TypeError: not features, or not a scan; a model gives its features by ``extract_features(model, scan)``.
        ValueError: features without a map, a map without a geometry; and see :func:`pca_rgb`.
    """
    if not is_scan(features) and not hasattr(features, "map"):
        raise TypeError(
            "feature_colours(features, scan): features must be what extract_features(model, scan) or dense_features("
            f"model, scan) gives; got {type(features).__name__}"
        )
    features = map_of(features)
    scan = argument_volume(scan, "feature_colours(features, scan): scan must be the scan that the features are of")
    smoothed = F.avg_pool3d(scan.data.float().amax(0, keepdim=True), 3, stride=1, padding=1, count_include_pad=False)
    wider = F.max_pool3d((smoothed > threshold).float(), 5, stride=1, padding=2)
    body = scan.with_data(-F.max_pool3d(-wider, 5, stride=1, padding=2))  # holes closed
    inside = resample_like(body, features).data[0] > 0.5
    smooth = resample_like(features.with_data(pca_rgb(features.data, inside)), scan, outside=0.0)
    return smooth.with_data(smooth.data.clamp(0, 1) * body.data)
