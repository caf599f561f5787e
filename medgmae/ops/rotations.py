"""Quaternions (w, x, y, z) to rotation matrices and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotation_matrix(quats: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4), ordered (w, x, y, z), normalised here; 0 turns nothing."""
    w, x, y, z = F.normalize(quats, dim=-1, eps=1e-12).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def rotation_gradient(grad: Tensor, quats: Tensor) -> Tensor:
    """Gradient to quaternions (..., 4) from one to their rotation matrices (..., 3, 3), through the normalisation.

    Written out for the operators, which run below torch's autograd.
    """
    d = grad
    length: Tensor = quats.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    unit = quats / length
    w, x, y, z = unit.unbind(-1)
    by_unit = [
        x * (d[..., 2, 1] - d[..., 1, 2]) + y * (d[..., 0, 2] - d[..., 2, 0]) + z * (d[..., 1, 0] - d[..., 0, 1]),
        w * (d[..., 2, 1] - d[..., 1, 2])
        + y * (d[..., 0, 1] + d[..., 1, 0])
        + z * (d[..., 0, 2] + d[..., 2, 0])
        - 2 * x * (d[..., 1, 1] + d[..., 2, 2]),
        w * (d[..., 0, 2] - d[..., 2, 0])
        + x * (d[..., 0, 1] + d[..., 1, 0])
        + z * (d[..., 1, 2] + d[..., 2, 1])
        - 2 * y * (d[..., 0, 0] + d[..., 2, 2]),
        w * (d[..., 1, 0] - d[..., 0, 1])
        + x * (d[..., 0, 2] + d[..., 2, 0])
        + y * (d[..., 1, 2] + d[..., 2, 1])
        - 2 * z * (d[..., 0, 0] + d[..., 1, 1]),
    ]
    direction = 2 * torch.stack(by_unit, dim=-1)
    return (direction - unit * (unit * direction).sum(-1, keepdim=True)) / length


def quaternions(rotation: Tensor) -> Tensor:
    """Unit quaternions (..., 4), (w, x, y, z) with w >= 0, of rotation matrices (..., 3, 3).

    Of the four classic formulas, each of which divides by one component, the one with the largest component counts
    (S. W. Shepperd, "Quaternion from rotation matrix", 1978).
    """
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in rotation.unbind(-2))
    # 4 q qᵀ, row by row
    rows = [
        [1 + xx + yy + zz, zy - yz, xz - zx, yx - xy],
        [zy - yz, 1 + xx - yy - zz, yx + xy, xz + zx],
        [xz - zx, yx + xy, 1 - xx + yy - zz, zy + yz],
        [yx - xy, xz + zx, zy + yz, 1 - xx - yy + zz],
    ]
    outer = torch.stack([torch.stack(row, -1) for row in rows], -2)
    largest = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*outer.shape[:-2], 1, 4)
    quats = outer.gather(-2, largest).squeeze(-2)
    quats = quats / quats.norm(dim=-1, keepdim=True)
    return torch.where(quats[..., :1] < 0, -quats, quats)
