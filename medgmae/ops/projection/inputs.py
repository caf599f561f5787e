"""What ``medgmae::project`` takes, and which views it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from medgmae.ops.register import Index

# The sine of an angle below this is none: rounding decides about it.
LEAST_SINE = 1e-9


class ProjectInputs(NamedTuple):
    """Gaussians, and the detectors to project them onto.

    means, scales: (B, N, 3); quats: (B, N, 4); densities: (B, N).
    views: (B, V, 4, 3) float64: source, or direction of the rays if `parallel`; centre of pixel (0, 0); step per
    column; step per row.
    size: pixels (rows, columns). support: standard deviations, infinity for no truncation. affine: whether rays are
    taken to be parallel near each Gaussian.
    """

    means: Tensor
    scales: Tensor
    quats: Tensor
    densities: Tensor
    views: Index
    size: Sequence[int]
    support: float
    parallel: bool
    affine: bool


def check_views(views: Tensor, parallel: bool) -> None:
    """Refuse views that are no detector: ValueError names the first one and what is wrong with it."""
    source, corner, column, row = views.unbind(-2)
    ray = source if parallel else corner - source
    normal = torch.linalg.cross(column, row, dim=-1)
    flat = column.norm(dim=-1) * row.norm(dim=-1)
    problems = {
        "has numbers that are NaN or infinite": ~views.isfinite().flatten(-2).all(-1),
        "has no area: its steps per column and per row are parallel or zero; a detector of one row has a step per row "
        "too": ~(normal.norm(dim=-1) > LEAST_SINE * flat),
    }
    along = ~((normal * ray).sum(-1).abs() > LEAST_SINE * flat * ray.norm(dim=-1))
    if parallel:
        problems["has rays that run along the detector or have no direction"] = along
    else:
        problems["has its source in the plane of the detector"] = along
    for problem, found in problems.items():
        if bool(found.any()):
            sample, view = found.nonzero()[0].tolist()
            raise ValueError(
                f"view {view} {problem}: {views[sample, view].tolist()}; expected [source, or direction of the rays; "
                "centre of pixel (0, 0); step per column; step per row] in millimetres"
            )
