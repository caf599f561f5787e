"""Line integrals of 3D Gaussians in plain torch: what the native kernels of :func:`medgmae.ops.project` must equal.

Written to be read. It computes every Gaussian for every ray in float64, in chunks that bound the memory.

With A = diag(1 / s) Rᵀ, a ray through o along w, m = A (o - μ) and b = A w, the integral is
a √(2π) |w| / |b| exp(-½ q) with q = |m x b|² / |b|²: the squared distance between line and centre, where the Gaussian
is the unit ball. y = b x (m x b) / |b|² in place of -(m x b) is the point of the line that is nearest to the centre.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from medgmae.ops.projection.inputs import ProjectInputs, check_views
from medgmae.ops.rotations import rotation_gradient, rotation_matrix

# Weights below exp(-80) are 0: exp of less is many times slower on a CPU.
LOWEST_EXPONENT = -80.0
# Values of one temporary array.
CHUNK_VALUES = 1 << 20


class Rays(NamedTuple):
    """Rays as seen from Gaussians; shapes broadcast to (..., 3).

    offset: from the Gaussian's centre to a point of the ray. direction: of the ray.
    """

    offset: Tensor
    direction: Tensor


class Weights(NamedTuple):
    """Line integrals at density 1, and where the lines are in the frames in which the Gaussians are unit balls.

    value: (...). square: (...), q. nearest: (..., 3), y. direction: (..., 3), b. along: (...), m·b / |b|².
    """

    value: Tensor
    square: Tensor
    nearest: Tensor
    direction: Tensor
    along: Tensor


def whitening(scales: Tensor, quats: Tensor) -> Tensor:
    """A = diag(1 / s) Rᵀ, (..., 3, 3), which turns a Gaussian into the unit ball."""
    return rotation_matrix(quats).transpose(-1, -2) / scales.unsqueeze(-1)


def integrate(a: Tensor, rays: Rays) -> Weights:
    """Integrals of Gaussians of density 1, with A = ``a`` (..., 3, 3), along rays."""
    m = (a @ rays.offset.unsqueeze(-1)).squeeze(-1)
    b = (a @ rays.direction.unsqueeze(-1)).squeeze(-1)
    m, b = m + torch.zeros_like(b), b + torch.zeros_like(m)
    moment = torch.linalg.cross(m, b, dim=-1)
    length = b.square().sum(-1)
    square = moment.square().sum(-1) / length
    exponent = -0.5 * square
    weight = exponent.clamp(min=LOWEST_EXPONENT).exp() * (exponent > LOWEST_EXPONENT)
    value = math.sqrt(2 * math.pi) * rays.direction.norm(dim=-1) / length.sqrt() * weight
    nearest = torch.linalg.cross(b, moment, dim=-1) / length.unsqueeze(-1)
    return Weights(value, square, nearest, b, (m * b).sum(-1) / length)


def line_integrals(
    means: Tensor, scales: Tensor, quats: Tensor, densities: Tensor, origins: Tensor, directions: Tensor
) -> Tensor:
    """Integral of each of N Gaussians along each of R lines, (N, R).

    Differentiable by autograd. ``origins`` and ``directions`` are (R, 3): a point of each line and its direction, of
    any length; the Gaussians are those of :func:`medgmae.ops.project`. Computed in float64.
    """
    dtype = means.dtype
    means, scales, quats, densities = (t.double() for t in (means, scales, quats, densities))
    rays = Rays(origins.double() - means.unsqueeze(-2), directions.double().unsqueeze(0))
    weights = integrate(whitening(scales, quats).unsqueeze(-3), rays)
    return (densities.unsqueeze(-1) * weights.value).to(dtype)


def forward(inputs: ProjectInputs) -> Tensor:
    """See ``medgmae::project``: (B, V, H, W)."""
    scene = _Scene(inputs)
    out = scene.means.new_zeros(*inputs.views.shape[:2], inputs.size[0] * inputs.size[1])
    for view, pixels in scene.chunks():
        weights = scene.weights(scene.rays(view, pixels), view)
        out[:, view, pixels] = torch.einsum("bn,bpn->bp", scene.densities, weights.value)
    out = torch.where(scene.bad.any(1)[:, None, None], math.nan, out)
    return out.reshape(*out.shape[:2], *inputs.size).to(inputs.means.dtype)


def backward(grad: Tensor, inputs: ProjectInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to means, scales, quats and densities; the support carries none.

    With w the integral at density 1, g the gradient of a pixel and a the density, the moments M0 = Σ g w,
    M1 = Σ g w y and M2 = Σ g w (y yᵀ + b bᵀ / |b|²) give dL/da = M0, dL/dμ = a Aᵀ M1 and dL/dA = -a M2 A⁻ᵀ.
    """
    scene = _Scene(inputs)
    grad = grad.double().flatten(-2)
    m0, m1 = torch.zeros_like(scene.densities), torch.zeros_like(scene.means)
    m2, means = torch.zeros_like(scene.a), torch.zeros_like(scene.means)
    for view, pixels in scene.chunks():
        rays = scene.rays(view, pixels)
        weights = scene.weights(rays, view)
        t = grad[:, view, pixels].unsqueeze(-1) * weights.value
        y, b = weights.nearest, weights.direction / weights.direction.norm(dim=-1, keepdim=True)
        m0 += t.sum(1)
        m1 += torch.einsum("bpn,bpnk->bnk", t, y)
        m2 += torch.einsum("bpn,bpnk,bpnl->bnkl", t, y, y) + torch.einsum("bpn,bpnk,bpnl->bnkl", t, b, b)
        if scene.affine:
            means += scene.through_affine_rays(view, rays, weights, t)
    amplitude = scene.densities.unsqueeze(-1)
    means = amplitude * ((scene.a.transpose(-1, -2) @ m1.unsqueeze(-1)).squeeze(-1) + means)
    scales = amplitude * m2.diagonal(dim1=-2, dim2=-1) / scene.scales
    rotation = scene.scales.unsqueeze(-1) * m2 / scene.scales.unsqueeze(-2)
    rotation = -amplitude.unsqueeze(-1) * (rotation_matrix(scene.quats) @ rotation)
    rows, dtype = scene.bad.unsqueeze(-1), inputs.means.dtype
    return (
        torch.where(rows, math.nan, means).to(dtype),
        torch.where(rows, math.nan, scales).to(dtype),
        torch.where(rows, math.nan, rotation_gradient(rotation, scene.quats)).to(dtype),
        torch.where(scene.bad, math.nan, m0).to(dtype),
    )


class _Scene:
    """The inputs in float64, with what is made of them once.

    bad: (B, N), Gaussians that cannot be projected; they are replaced by ordinary ones of density 0.
    a: (B, N, 3, 3), A. depth: (B, V, N), t such that μ is on the detector at t = 1 and at the source at t = 0.
    """

    def __init__(self, inputs: ProjectInputs) -> None:
        if inputs.views.device.type == "cpu":
            check_views(inputs.views, inputs.parallel)
        self.size, self.support, self.parallel = inputs.size, inputs.support, inputs.parallel
        self.affine = inputs.affine and not inputs.parallel
        self.bad = _is_bad(inputs)
        rows = self.bad.unsqueeze(-1)
        self.means = inputs.means.double().masked_fill(rows, 0.0)
        self.scales = inputs.scales.double().masked_fill(rows, 1.0)
        self.quats = inputs.quats.double().masked_fill(rows, 0.0)
        self.densities = inputs.densities.double().masked_fill(self.bad, 0.0)
        self.a = whitening(self.scales, self.quats)
        self.source, self.corner, self.column, self.row = inputs.views.double().unbind(-2)
        normal = torch.linalg.cross(self.column, self.row, dim=-1)
        reach = self.source if self.parallel else self.corner - self.source
        self.depth_slope = normal / (normal * reach).sum(-1, keepdim=True)
        offset = self.means.unsqueeze(1) - self.source.unsqueeze(2)
        self.depth = (offset * self.depth_slope.unsqueeze(2)).sum(-1)

    def chunks(self) -> Iterator[tuple[int, slice]]:
        """Views, and in each the pixels to compute at a time."""
        pixels = self.size[0] * self.size[1]
        step = max(1, CHUNK_VALUES // max(3 * self.densities.numel(), 1))
        for view in range(self.source.shape[1]):
            for start in range(0, pixels, step):
                yield view, slice(start, min(start + step, pixels))

    def rays(self, view: int, pixels: slice) -> Rays:
        """Those of some pixels of a view, as every Gaussian sees them: (B, P, N, 3) or 1 in place of P or N."""
        numbers = torch.arange(pixels.start, pixels.stop, device=self.means.device)
        row, column = (numbers // self.size[1]).double(), (numbers % self.size[1]).double()
        point = self.corner[:, view, None] + column[:, None] * self.column[:, view, None]
        point = (point + row[:, None] * self.row[:, view, None]).unsqueeze(2)
        means, source = self.means.unsqueeze(1), self.source[:, view, None, None]
        if self.parallel:
            return Rays(point - means, source)
        if not self.affine:
            return Rays(source - means, point - source)
        depth = self.depth[:, view, None, :, None]
        return Rays(depth * (point - source) - (means - source), (means - source) / depth)

    def weights(self, rays: Rays, view: int) -> Weights:
        """Integrals along rays of a view, 0 for those outside the support and for Gaussians behind the source."""
        weights = integrate(self.a.unsqueeze(1), rays)
        counts = weights.square <= self.support**2
        if not self.parallel:
            counts &= (self.depth[:, view] > 0).unsqueeze(1)
        safe = (torch.where(counts.unsqueeze(-1), vector, 0.0) for vector in (weights.nearest, weights.direction))
        nearest, direction = safe
        direction = direction + (~counts).unsqueeze(-1)  # a length other than 0
        return Weights(torch.where(counts, weights.value, 0.0), weights.square, nearest, direction, weights.along)

    def through_affine_rays(self, view: int, rays: Rays, weights: Weights, t: Tensor) -> Tensor:
        """What the centre's movement changes in its own rays, (B, N, 3), at density 1.

        The rays go through μ + δ along w with δ = t (p - s) - (μ - s) and w = (μ - s) / t; the movement -μ in δ is
        counted already. dL/dδ = -Σ g w Aᵀ y; dL/dw is orthogonal to w, because its length does not matter.
        """
        front = self.depth[:, view] > 0
        t = t * front.unsqueeze(1)
        depth = torch.where(front, self.depth[:, view], 1.0).unsqueeze(-1)
        source = self.source[:, view, None, None]
        arm = (rays.offset + self.means.unsqueeze(1) - source) / depth.unsqueeze(1)  # p - s
        w = rays.direction.squeeze(1)
        by_offset = (weights.nearest.unsqueeze(-2) @ self.a.unsqueeze(1)).squeeze(-2)  # Aᵀ y
        slope = torch.einsum("bpn,bpnk,bpnk->bn", t, arm.expand_as(by_offset), by_offset).unsqueeze(-1)
        b = weights.direction
        turned = (weights.along.unsqueeze(-1) * weights.nearest - b / b.square().sum(-1, keepdim=True)) * t.unsqueeze(
            -1
        )
        by_direction = (turned.sum(1).unsqueeze(-2) @ self.a).squeeze(-2)
        by_direction = by_direction + t.sum(1).unsqueeze(-1) * w / w.square().sum(-1, keepdim=True)
        gradient = by_direction / depth - slope * self.depth_slope[:, view, None]
        return torch.where(front.unsqueeze(-1), gradient, 0.0)


def _is_bad(inputs: ProjectInputs) -> Tensor:
    """Gaussians (B, N) that cannot be projected: a parameter is NaN or infinite, or 1 / s² of a scale is."""
    means, scales, quats, densities = inputs[:4]
    finite = means.isfinite().all(-1) & scales.isfinite().all(-1) & quats.isfinite().all(-1) & densities.isfinite()
    return ~(finite & scales.square().reciprocal().isfinite().all(-1))
