"""3D Gaussians and the renderer that turns them into a volume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from medgmae.ops.voxelize import Support, support_code, voxelize


class Gaussians(NamedTuple):
    """A batch of sets of K Gaussians; the value of one at distance d of its centre is density · exp(-½ dᵀ Σ⁻¹ d).

    means: (B, K, 3) centres, in units of the axis (0 first voxel, 1 last voxel), ordered (d, h, w).
    scales: (B, K, 3) standard deviations along the Gaussian's own axes, in the same units.
    quats: (B, K, 4) rotations (w, x, y, z) from its own axes to the volume's: Σ = R diag(scales²) Rᵀ.
    densities: (B, K) values at the centres.
    """

    means: Tensor
    scales: Tensor
    quats: Tensor
    densities: Tensor


class GaussianRenderer(nn.Module):
    """Renders Gaussians into volumes or patches; differentiable, on CPU and CUDA. It has no parameters.

    Args:
        support: where a Gaussian counts. A number k: inside its ellipsoid of k standard deviations; at the default 4
            a Gaussian ends at 0.03 % of its peak. None: everywhere. "box": MedGMAE's box of ±2 scales that is not
            turned with the Gaussian, for its checkpoints; there a Gaussian ends at 14 % of its peak or less.
    """

    def __init__(self, support: Support = 4.0) -> None:
        super().__init__()
        support_code(support)
        self.support: Support = support

    def forward(
        self,
        gaussians: Gaussians,
        size: Sequence[int],
        patches: Tensor | None = None,
        patch_size: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Render; see :func:`medgmae.ops.voxelize` for the grid, the patches and the errors.

        Args:
            gaussians: K Gaussians for each of B samples.
            size: voxels (D, H, W).
            patches: (B, n) long, the only patches to render, as numbered by :class:`~medgmae.masking.Masking`.
            patch_size: voxels of a patch, with ``patches``.

        Returns:
            (B, 1, D, H, W), or (B, n, prod(patch_size)) for the patches.
        """
        return voxelize(*gaussians, size, support=self.support, patches=patches, patch_size=patch_size)

    def extra_repr(self) -> str:
        """The support, for ``print``."""
        return f"support={self.support!r}"
