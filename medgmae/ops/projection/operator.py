"""Project 3D Gaussians onto detectors: the exact integral of Σ_i a_i exp(-½ (x - μ_i)ᵀ Σ_i⁻¹ (x - μ_i)) along each ray.

The operators are ``medgmae::project`` and ``medgmae::project_backward``, with plain torch for every device and native
kernels for CPU and CUDA where ``medgmae._C`` has them. docs/projection.md tells the whole story.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from medgmae.ops.projection import cuda, native, reference
from medgmae.ops.projection.inputs import ProjectInputs
from medgmae.ops.register import Operator, register

Beam = Literal["cone", "parallel"]


def _fake(inputs: ProjectInputs) -> Tensor:
    return inputs.means.new_empty(*inputs.views.shape[:2], *inputs.size)


_OP = register(Operator("project", ProjectInputs, _fake, joins_batch=True), reference, native, cuda)
# The kernels find pixels from 32-bit numbers.
MOST_PIXELS_ALONG_AN_AXIS = 2**24


def project(
    means: Tensor,
    scales: Tensor,
    quats: Tensor,
    densities: Tensor,
    views: Tensor,
    size: int | Sequence[int],
    *,
    beam: Beam = "cone",
    support: float | None = None,
    affine: bool = False,
) -> Tensor:
    """Integrate Gaussians along the rays of flat detectors.

    The value of a pixel is the integral over the whole line through its centre and the source, or along the direction
    of the rays. Of a cone, Gaussians whose centre is not in front of the source (on the detector's side of the plane
    through the source that is parallel to the detector) are left out. The covariance is R diag(s²) Rᵀ. With
    coordinates in millimetres and densities in 1/mm the values are pure numbers. Float32 and float64 are computed in
    their own precision, float16 and bfloat16 in float32; the result has the dtype of the computation. Two runs give
    the same bits, and so does any number of CPU threads.

    Args:
        means: (N, 3) centres, or (B, N, 3) for B sets of Gaussians.
        scales: (N, 3) or (B, N, 3) standard deviations along the Gaussian's own axes.
        quats: (N, 4) or (B, N, 4) rotations (w, x, y, z), of any length but taken as directions; 0 is no rotation.
        densities: (N,) or (B, N) values at the centres, of any sign.
        views: (V, 4, 3) float64, the same for all sets: source position, or direction of the rays of a parallel beam
            (of any length); centre of pixel (0, 0); step per column; step per row. No gradient goes to them.
        size: pixels (rows, columns) of the detector, or one number for both. One row makes a fan beam.
        beam: "cone" or "parallel".
        support: where a Gaussian counts. A number k: for the rays that meet its ellipsoid of k standard deviations.
            None: everywhere. The support has no gradient.
        affine: approximate a cone as R2-Gaussian does: near each Gaussian, the rays are parallel to the one through
            its centre.

    Returns:
        (V, rows, columns), or (B, V, rows, columns) for sets. A set in which a parameter is NaN or infinite, or a
        scale s is so small that 1 / s² is not finite in the dtype of the computation, is NaN throughout, and so are
        the gradients of that Gaussian.

    Raises:
        ValueError: shapes, size, beam or support do not fit, or a view is no detector (steps that are parallel, a
            source in the plane of the detector, rays along it). Other devices than the CPU are not waited for: a view
            without area is NaN there.
        TypeError: dtypes or devices are mixed, or are not floating point, or views are not float64.
        NotImplementedError: the call is inside of torch.func.grad, vjp or jacrev, or a second-order gradient is asked
            for.
    """
    batched, parameters = _check_parameters(means, scales, quats, densities)
    size = _pair(size)
    if beam not in ("cone", "parallel"):
        raise ValueError(f'beam must be "cone" or "parallel", got {beam!r}')
    if views.dim() != 3 or views.shape[1:] != (4, 3):
        raise ValueError(
            f"views has shape {tuple(views.shape)}: expected (V, 4, 3), for each view [source, or direction of the "
            "rays; centre of pixel (0, 0); step per column; step per row]"
        )
    if views.dtype != torch.float64 or views.device != means.device:
        raise TypeError(
            f"views is {views.dtype} on {views.device}: expected torch.float64 on {means.device}, where means is; pass "
            "views.to(means.device, torch.float64)"
        )
    views = views.expand(parameters[0].shape[0], *views.shape)
    images: Tensor = _OP(*parameters, views, size, support_code(support), beam == "parallel", affine)
    return images if batched else images.squeeze(0)


def _check_parameters(means: Tensor, scales: Tensor, quats: Tensor, densities: Tensor) -> tuple[bool, list[Tensor]]:
    """Whether there are sets of Gaussians, and the parameters with a batch axis in the precision of the computation."""
    named = {"means": (means, 3), "scales": (scales, 3), "quats": (quats, 4), "densities": (densities, 0)}
    lead = tuple(means.shape[:-1])
    for name, (tensor, width) in named.items():
        expected = (*lead, width) if width else lead
        if tensor.shape != expected or len(lead) not in (1, 2):
            form = f"(N, {width}) or (B, N, {width})" if width else "(N,) or (B, N)"
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: expected {form}"
                + (f", here {expected}, as means is {tuple(means.shape)}" if means.dim() in (2, 3) else "")
            )
        if tensor.dtype != means.dtype or tensor.device != means.device or not tensor.is_floating_point():
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, means is {means.dtype} on {means.device}: expected one "
                "floating point dtype and one device for all"
            )
    wide = means.dtype if means.dtype == torch.float64 else torch.float32
    batched = means.dim() == 3
    return batched, [(tensor if batched else tensor.unsqueeze(0)).to(wide) for tensor, _ in named.values()]


def _pair(size: int | Sequence[int]) -> list[int]:
    values = [size] * 2 if isinstance(size, int) else [int(s) for s in size]
    if len(values) != 2 or any(s < 1 for s in values):
        raise ValueError(f"size must be one or two positive numbers of pixels (rows, columns), got {tuple(values)}")
    if max(values) > MOST_PIXELS_ALONG_AN_AXIS:
        raise ValueError(f"size {tuple(values)} is too large: expected at most 2**24 pixels along an axis")
    return values


def support_code(support: object) -> float:
    """The number for the operators: infinity is no truncation."""
    if support is None:
        return math.inf
    if isinstance(support, (int, float)) and not isinstance(support, bool) and 0 < support < math.inf:
        return float(support)
    box = "; the box is one of voxels" if support == "box" else ""
    raise ValueError(f"support must be a number of standard deviations above 0, or None, got {support!r}{box}")
