"""Adapters for line integrals of 3D Gaussians: single rays, and the images of detectors with their gradients.

Each case is computed in float64 and in float32, against what it states for each.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from medgmae.ops import project
from medgmae.ops.projection.reference import line_integrals
from parity import adapter
from parity.case import Case, Options

PROSE = (
    "parity_kind",
    "case",
    "kind",
    "semantics",
    "note",
    "tolerance",
    "tensors",
    "closed_form_vs_quadrature",
    "affine_relative_difference",
    "support_margin",
)
PARAMETERS = ("means", "scales", "quats", "densities")


@adapter("tomography/line_integrals")
def single_rays(case: Case) -> None:
    options = settings(case)
    case.same("number of Gaussians", len(case.input("means")), options("num_gaussians"))
    case.same("number of rays", len(case.input("origins")), options("rays"))
    options.done()
    # The tolerance is a part of the integral through the centre along the longest axis, for each Gaussian.
    peaks = case.input("densities").double().abs() * math.sqrt(2 * math.pi) * case.input("scales").double().amax(-1)
    for dtype in (torch.float64, torch.float32):
        leaves = parameters(case, dtype)
        rays = (case.input(name).to(dtype) for name in ("origins", "directions"))
        found = line_integrals(*leaves, *rays)
        scaled = [integrals.double() / peaks.unsqueeze(-1) for integrals in (found, case.outputs["integrals"])]
        case.offer("integrals", found, tolerance=(float(peaks.max()), 0.0))
        case.equal("integrals over their peaks", *scaled, (bound(case, dtype), 0.0))
        compare_gradients(case, found, leaves, "grad_integrals")


@adapter("tomography/project")
def images(case: Case) -> None:
    options = settings(case)
    size, views = options("detector"), case.input("views")
    case.same("number of Gaussians", len(case.input("means")), options("num_gaussians"))
    case.same("number of views", len(views), options("views"))
    beam, support = options("beam"), options("support")
    options.done()
    peak = float(case.outputs["projections"].abs().max())
    for dtype in (torch.float64, torch.float32):
        leaves = parameters(case, dtype)
        found = project(*leaves, views, size, beam=beam, support=support)
        case.offer("projections", found, tolerance=(bound(case, dtype) * peak, 0.0))
        compare_gradients(case, found, leaves, "grad_projections")
        if case.has("affine_projections"):
            affine = project(*leaves, views, size, beam=beam, affine=True)
            case.offer("affine_projections", affine, tolerance=(bound(case, dtype) * peak, 0.0))
    case.offer("centres", centres(case, beam), tolerance=(1e-9, 0.0))


def settings(case: Case) -> Options:
    options = Options(case.spec)
    options.ignore(*PROSE)
    return options


def parameters(case: Case, dtype: torch.dtype) -> list[Tensor]:
    return [case.input(name).to(dtype).requires_grad_() for name in PARAMETERS]


def bound(case: Case, dtype: torch.dtype) -> float:
    """What the case's text says of values: "float64: 1e-10 of ...; float32: 2e-6 of ..."."""
    name = str(dtype).removeprefix("torch.")
    return float(re.findall(rf"{name}:? ([0-9.e-]+)", case.spec["tolerance"])[0])


def compare_gradients(case: Case, found: Tensor, leaves: list[Tensor], cotangent: str) -> None:
    """Relative L2 difference of each tensor: 1e-5 in float32 and 1e-9 in float64."""
    gradients = torch.autograd.grad((found * case.input(cotangent).to(found)).sum(), leaves)
    limit = 1e-9 if found.dtype == torch.float64 else 1e-5
    for name, gradient in zip(PARAMETERS, gradients, strict=True):
        wanted = case.outputs[f"grad_{name}"]
        case.offer(f"grad_{name}", gradient, tolerance=(float(wanted.abs().max()), 0.0))
        error = float((gradient.double() - wanted).norm() / wanted.norm())
        case.close(f"relative error of grad_{name}", error, 0.0, (limit, 0.0))


def centres(case: Case, beam: str) -> Tensor:
    """Where a needle through each mean and its ray hits the detector: the pixel, in fractions, of its largest value.

    The operator has no such result. A tiny round Gaussian at the mean has its largest value there, and the logarithm
    of its affine image is a quadratic function of the pixel, so three pixels along an axis tell.
    """
    means, views = case.input("means").double(), case.input("views")
    count = len(means)
    scales = torch.full((count, 3), 50.0, dtype=torch.float64)
    quats = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand(count, 4)
    size, found = (3, 3), []
    # One image for each Gaussian: a set of its own.
    sets = (means[:, None], scales[:, None], quats[:, None], torch.ones(count, 1, dtype=torch.float64))
    logs = project(*sets, views, size, beam=beam, affine=True).log()  # (N, V, 3, 3)
    gradient = torch.stack([logs[..., 0, 2] - logs[..., 0, 0], logs[..., 2, 0] - logs[..., 0, 0]], -1) / 2  # at (1, 0)
    along = torch.stack([logs[..., 0, 2] - 2 * logs[..., 0, 1] + logs[..., 0, 0]], -1)
    down = torch.stack([logs[..., 2, 0] - 2 * logs[..., 1, 0] + logs[..., 0, 0]], -1)
    cross = (logs[..., 2, 2] - logs[..., 2, 0] - logs[..., 0, 2] + logs[..., 0, 0]) / 4
    matrix = torch.stack([along[..., 0], cross, cross, down[..., 0]], -1).unflatten(-1, (2, 2))
    slope = gradient - torch.stack([along[..., 0], down[..., 0]], -1)  # at pixel (0, 0)
    found = torch.linalg.solve(matrix, -slope.unsqueeze(-1)).squeeze(-1)
    return found.transpose(0, 1)
