"""What ``medgmae::voxelize`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from medgmae.ops.register import Index


class VoxelInputs(NamedTuple):
    """Gaussians, and the voxels to render them at.

    means, scales: (B, K, 3); quats: (B, K, 4); densities: (B, K); patches: (B, n) numbers in raster order.
    size, patch_size: voxels (d, h, w). support: standard deviations, 0 for the box, infinity for no truncation.
    """

    means: Tensor
    scales: Tensor
    quats: Tensor
    densities: Tensor
    patches: Index
    size: Sequence[int]
    patch_size: Sequence[int]
    support: float
