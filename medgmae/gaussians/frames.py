"""Gaussians in two frames: units of a grid's axes, and millimetres in the patient."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medgmae.ops.rotations import quaternions, rotation_matrix

# The six orders of three axes.
_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


class Placed(Protocol):
    """Voxels with a place in the patient: a :class:`~medgmae.Volume`, or the grid of one.

    size: voxels (d, h, w). spacing: millimetres (d, h, w). origin: LPS position (x, y, z) of the first voxel.
    direction: 3x3, column k is the LPS unit vector along which array axis k grows.
    """

    @property
    def size(self) -> tuple[int, int, int]:
        """Voxels (d, h, w)."""

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between voxel centres (d, h, w)."""

    @property
    def origin(self) -> tuple[float, float, float]:
        """LPS position (x, y, z) in millimetres of the first voxel."""

    @property
    def direction(self) -> Any:
        """3x3 array; column k is the LPS unit vector along which array axis k grows."""


def axes_to_world(grid: Placed) -> tuple[Tensor, Tensor]:
    """Matrix (3, 3) and offset (3,), float64: ``world = matrix @ position + offset`` in LPS millimetres (x, y, z).

    ``position`` is in units of the grid's axes, (d, h, w): 0 is the first voxel, 1 the last. An axis of one voxel has
    no length; there a unit is one spacing, so that the map can be turned round.
    """
    extent = np.array(grid.spacing) * [max(n - 1, 1) for n in grid.size]
    return torch.from_numpy(np.asarray(grid.direction, dtype=np.float64) * extent), torch.tensor(
        grid.origin, dtype=torch.float64
    )


@torch.no_grad()
def transformed(
    means: Tensor, scales: Tensor, quats: Tensor, matrix: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Centres, scales and quaternions after ``x -> matrix @ x + offset``, computed in float64; dtypes are kept.

    The covariance R diag(s²) Rᵀ becomes M Mᵀ with M = matrix R diag(s). The singular value decomposition M = U D Vᵀ
    gives the new scales D and axes U without squaring the condition number. The new axes are numbered and directed
    like the own axes of the Gaussian that they come from, as far as the shear of the map leaves that open.

    Args:
        means: (..., 3).
        scales: (..., 3), standard deviations; 0 is allowed, a sign has no meaning.
        quats: (..., 4), (w, x, y, z).
        matrix: (3, 3) float64, may mirror.
        offset: (3,) float64.

    Raises:
        ValueError: a parameter is NaN or infinite.
    """
    for name, values in (("means", means), ("scales", scales), ("quats", quats)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite values; only finite Gaussians can be moved")
    matrix, offset = matrix.to(means.device), offset.to(means.device)
    spread = matrix @ (rotation_matrix(quats.double()) * scales.double().unsqueeze(-2))
    axes, lengths, own = torch.linalg.svd(spread)  # own[..., j, k]: how much of own axis k is in new axis j
    score = torch.stack([sum(own[..., o[k], k].abs() for k in range(3)) for o in _ORDERS], -1)
    order = torch.tensor(_ORDERS, device=means.device)[score.argmax(-1)]  # (..., 3): new axis for each own axis
    axes = axes.gather(-1, order.unsqueeze(-2).expand_as(axes))
    along = own.gather(-2, order.unsqueeze(-1).expand_as(own)).diagonal(dim1=-2, dim2=-1)
    axes = axes * torch.where(along < 0, -1.0, 1.0).unsqueeze(-2)
    axes = torch.where(torch.linalg.det(axes)[..., None, None] < 0, -axes, axes)  # a rotation, not a mirror
    return (
        (means.double() @ matrix.T + offset).to(means.dtype),
        lengths.gather(-1, order).to(scales.dtype),
        quaternions(axes).to(quats.dtype),
    )
