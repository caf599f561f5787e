"""Line integrals of a volume along the rays of X-ray views, forward and adjoint.

The operators are ``medgmae::project_volume`` and ``medgmae::project_volume_backward``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medgmae.ops.rays import cuda, native, reference
from medgmae.ops.rays.inputs import RayInputs
from medgmae.ops.register import Operator, register


def _fake(inputs: RayInputs) -> Tensor:
    return inputs.volume.new_empty(inputs.volume.shape[0], inputs.views.shape[0], *inputs.size)


_OP = register(Operator("project_volume", RayInputs, _fake), reference, native, cuda)


def project_volume(
    volume: Tensor,
    affine: Tensor,
    views: Tensor,
    size: Sequence[int],
    *,
    beam: Literal["cone", "parallel"] = "cone",
) -> Tensor:
    """Integrals of a volume along the lines through source and pixels, over their whole length.

    The volume is interpolated trilinearly between voxel centres and falls to 0 over one voxel outside of the outermost
    ones. The integral of the interpolant is exact. Two runs give the same bits, and so does any number of CPU threads.
    The gradient is the exact adjoint.

    Args:
        volume: (B, D, H, W), float32 or float64, such as attenuation in 1/mm.
        affine: (4, 4), from index (d, h, w) to millimetres (x, y, z), with perpendicular axes: that of a
            :class:`~medgmae.Grid`.
        views: (V, 4, 3), millimetres: source (or, of a parallel beam, direction of the rays), centre of pixel (0, 0),
            step per column, step per row.
        size: pixels (rows, columns).
        beam: "cone" or "parallel".

    Returns:
        (B, V, rows, columns).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: a volume of another dtype, or tensors on several devices.
    """
    if volume.dim() != 4 or volume.dtype not in (torch.float32, torch.float64):
        raise (ValueError if volume.is_floating_point() else TypeError)(
            f"volume is {tuple(volume.shape)} {volume.dtype}: expected (B, D, H, W), float32 or float64"
        )
    rows_columns = check_views(views, size, beam)
    lines, spacing = in_indices(affine, views, beam)
    padded = F.pad(volume, (1, 1, 1, 1, 1, 1))
    device = volume.device
    projected: Tensor = _OP(padded, lines.to(device), spacing.to(device), rows_columns, beam == "parallel")
    return projected


class _Adjoint(torch.autograd.Function):
    """The adjoint as a function of its own, whose gradient is the projection."""

    @staticmethod
    def forward(ctx: Any, projections: Tensor, blank: Tensor, *rest: Any) -> Tensor:
        ctx.rest = rest
        found: Tensor = torch.ops.medgmae.project_volume_backward(projections, blank, *rest)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _OP(grads[0].contiguous(), *ctx.rest), None, *[None] * len(ctx.rest)


def back_project_volume(
    projections: Tensor,
    affine: Tensor,
    views: Tensor,
    volume_size: Sequence[int],
    *,
    beam: Literal["cone", "parallel"] = "cone",
) -> Tensor:
    """The adjoint of :func:`project_volume`: every pixel's value is spread over the voxels of its line, each with the
    weight that it has in the line's integral.

    Args:
        projections: (B, V, rows, columns).
        affine: see :func:`project_volume`, likewise ``views`` and ``beam``.
        volume_size: voxels (D, H, W).

    Returns:
        (B, D, H, W), differentiable.
    """
    if projections.dim() != 4 or projections.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"projections are {tuple(projections.shape)} {projections.dtype}: expected (B, V, rows, columns), float32 "
            "or float64"
        )
    rows_columns = check_views(views, projections.shape[2:], beam)
    if len(views) != projections.shape[1]:
        raise ValueError(f"{projections.shape[1]} projections and {len(views)} views: expected as many")
    lines, spacing = in_indices(affine, views, beam)
    device = projections.device
    blank = projections.new_zeros(len(projections), *(int(n) + 2 for n in volume_size))
    rest = lines.to(device), spacing.to(device), rows_columns, beam == "parallel"
    padded: Tensor = _Adjoint.apply(projections, blank, *rest)
    return padded[:, 1:-1, 1:-1, 1:-1]


def check_views(views: Tensor, size: Sequence[int], beam: str) -> list[int]:
    """Pixels (rows, columns) of views that are some.

    Raises:
        ValueError: other shapes, numbers that are not finite, or another beam.
    """
    rows_columns = [int(n) for n in size]
    if views.dim() != 3 or views.shape[1:] != (4, 3) or not bool(views.isfinite().all()):
        raise ValueError(f"views are {tuple(views.shape)}: expected (V, 4, 3) finite numbers")
    if len(rows_columns) != 2 or min(rows_columns) < 1:
        raise ValueError(f"size must be positive numbers of pixels (rows, columns), got {tuple(rows_columns)}")
    if beam not in ("cone", "parallel"):
        raise ValueError(f"beam must be 'cone' or 'parallel', got {beam!r}")
    return rows_columns


def in_indices(affine: Tensor, views: Tensor, beam: str) -> tuple[Tensor, Tensor]:
    """Views in indices of the volume with its rim, and the spacing (3,), both float64 on the CPU."""
    matrix, lines = torch.as_tensor(affine).double().cpu(), views.double().cpu()
    if matrix.shape != (4, 4):
        raise ValueError(f"affine is {tuple(matrix.shape)}: expected (4, 4)")
    spacing = matrix[:3, :3].norm(dim=0)
    if not torch.allclose(
        matrix[:3, :3].mT @ matrix[:3, :3], spacing.square().diag(), atol=1e-6 * float(spacing.max()) ** 2
    ):
        raise ValueError("affine has axes that are not perpendicular: resample the volume onto a regular grid first")
    back = torch.linalg.inv(matrix[:3, :3])
    points = torch.tensor([beam == "cone", True, False, False], dtype=torch.float64)[None, :, None]
    return (lines - points * matrix[:3, 3]) @ back.mT + points, spacing
