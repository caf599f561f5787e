"""Ways to project Gaussians in plain torch: what project.py compares with. Exact cone beams, an ellipsoid as support.

Each takes (N, ...) parameters, one view (4, 3), the detector's size, the support and a cotangent or None. With None it
returns the image; else it runs forward and backward, leaves the gradients in `.grad`, and returns the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Rival = Callable[[Sequence[Tensor], Tensor, tuple[int, int], float, "Tensor | None"], Tensor]
# Values of one temporary array of the footprints: of 2^14, 2^16, 2^18 and 2^20 the fastest at s = 6 (760 ms, 2^20 takes
# 871) and 5 % behind 2^20 at s = 1.5 (86 and 82 ms; one thread, forward and backward).
CHUNK_VALUES = 1 << 18


def rotation(quats: Tensor) -> Tensor:
    """Rotation matrices (N, 3, 3)."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def pixel_rays(view: Tensor, size: tuple[int, int]) -> Tensor:
    """From the source to every pixel, (H, W, 3)."""
    source, corner, column, row = view.float()
    r, c = torch.meshgrid(torch.arange(size[0]).float(), torch.arange(size[1]).float(), indexing="ij")
    return corner - source + c[..., None] * column + r[..., None] * row


def dense(
    parameters: Sequence[Tensor], view: Tensor, size: tuple[int, int], support: float, cotangent: Tensor | None = None
) -> Tensor:
    """Every Gaussian at every pixel, by the textbook formula, one Gaussian after the other."""
    rays, source = pixel_rays(view, size), view[0].float()
    image = torch.zeros(size)
    with torch.set_grad_enabled(cotangent is not None):
        means, scales, quats, densities = parameters
        whitening = rotation(quats).mT / scales.unsqueeze(-1)
        for a, mean, density in zip(whitening, means, densities, strict=True):
            m, b = a @ (source - mean), rays @ a.T
            length = b.square().sum(-1)
            square = torch.linalg.cross(m.expand_as(b), b, dim=-1).square().sum(-1) / length
            value = density * math.sqrt(2 * math.pi) * rays.norm(dim=-1) / length.sqrt() * torch.exp(-0.5 * square)
            value = value * (square <= support**2)
            if cotangent is not None:
                value.backward(cotangent, retain_graph=True)
            image = image + value.detach()
    return image


class Conics(NamedTuple):
    """What a Gaussian is on the detector, around its centre (u, v); see docs/projection.md."""

    u: Tensor
    v: Tensor
    k: tuple[Tensor, Tensor, Tensor]
    l: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # noqa: E741 - the formula's letter
    amplitude: Tensor


def conics(parameters: Sequence[Tensor], view: Tensor) -> Conics:
    """The quadratic functions n and L of every Gaussian."""
    means, scales, quats, densities = parameters
    source, corner, column, row = view
    basis = torch.linalg.inv(torch.stack([column, row, corner - source], 1)).float()
    source, column, row = source.float(), column.float(), row.float()
    x, y, depth = ((means - source) @ basis.T).unbind(-1)
    whitening = rotation(quats).mT / scales.unsqueeze(-1)
    toward = (whitening @ ((means - source) / depth.unsqueeze(-1)).unsqueeze(-1)).squeeze(-1)
    along, down = whitening @ column, whitening @ row
    across, below = torch.linalg.cross(toward, along), torch.linalg.cross(toward, down)
    square = toward.square().sum(-1)
    scale = depth.square() / square
    k = (across.square().sum(-1), (across * below).sum(-1), below.square().sum(-1))
    pairs = ((toward, along, 2), (toward, down, 2), (along, along, 1), (along, down, 2), (down, down, 1))
    level = tuple(factor * (p * q).sum(-1) / square for p, q, factor in pairs)
    amplitude = densities * torch.sqrt(2 * math.pi / square)
    return Conics(x / depth, y / depth, tuple(scale * value for value in k), level, amplitude)  # type: ignore[arg-type]


def boxes(c: Conics, size: tuple[int, int], support: float) -> tuple[Tensor, Tensor, Tensor]:
    """First row, first column and side (a multiple of 8) of the square around each ellipse."""
    with torch.no_grad():
        s = support**2
        q00, q01, q11 = c.k[0] - s * c.l[2], c.k[1] - 0.5 * s * c.l[3], c.k[2] - s * c.l[4]
        r0, r1 = -0.5 * s * c.l[0], -0.5 * s * c.l[1]
        determinant = q00 * q11 - q01.square()
        u, v = (q01 * r1 - q11 * r0) / determinant, (q01 * r0 - q00 * r1) / determinant
        height = s - r0 * u - r1 * v
        wide, high = (height * q11 / determinant).sqrt(), (height * q00 / determinant).sqrt()
        top, left = (c.v + v - high).ceil(), (c.u + u - wide).ceil()
        side = torch.maximum((c.v + v + high).floor() - top, (c.u + u + wide).floor() - left).clamp(min=0) + 1
        return top.long(), left.long(), (side / 8).ceil().long() * 8


def groups(side: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Sides, and numbers of the Gaussians that have them, as many as fit into a chunk."""
    for value in side.unique().tolist():
        for part in (side == value).nonzero().squeeze(-1).split(max(1, CHUNK_VALUES // value**2)):
            yield value, part


def footprints(
    parameters: Sequence[Tensor], view: Tensor, size: tuple[int, int], support: float, cotangent: Tensor | None = None
) -> Tensor:
    """Gaussians of like size together, each on the square around its ellipse, by autograd."""
    lengths = pixel_rays(view, size).norm(dim=-1)
    image = torch.zeros(size[0] * size[1] + 1)  # the last is for what lies outside
    with torch.set_grad_enabled(cotangent is not None):
        c = conics(parameters, view)
        top, left, side = boxes(c, size, support)
        for length, part in groups(side):
            grid = torch.arange(length)
            rows, columns = top[part, None, None] + grid[:, None], left[part, None, None] + grid
            du, dv = columns - c.u[part, None, None], rows - c.v[part, None, None]
            k0, k1, k2 = (value[part, None, None] for value in c.k)
            l0, l1, l2, l3, l4 = (value[part, None, None] for value in c.l)
            n = k0 * du * du + 2 * k1 * du * dv + k2 * dv * dv
            level = 1 + l0 * du + l1 * dv + l2 * du * du + l3 * du * dv + l4 * dv * dv
            square = n / level
            value = c.amplitude[part, None, None] * level.rsqrt() * torch.exp(-0.5 * square)
            inside = (square <= support**2) & (rows >= 0) & (rows < size[0]) & (columns >= 0) & (columns < size[1])
            index = torch.where(inside, rows * size[1] + columns, size[0] * size[1])
            image = image.index_add(0, index.flatten(), value.flatten())
        image = image[:-1].reshape(size) * lengths
        if cotangent is not None:
            image.backward(cotangent)
    return image.detach()


def pairs(parameters: Sequence[Tensor], view: Tensor, size: tuple[int, int], support: float) -> int:
    """(pixel, Gaussian) with the pixel inside the Gaussian's support."""
    ones = [p.detach() for p in parameters]
    c = conics(ones, view)
    top, left, side = boxes(c, size, support)
    count = 0
    for length, part in groups(side):
        grid = torch.arange(length)
        rows, columns = top[part, None, None] + grid[:, None], left[part, None, None] + grid
        du, dv = columns - c.u[part, None, None], rows - c.v[part, None, None]
        k0, k1, k2 = (value[part, None, None] for value in c.k)
        l0, l1, l2, l3, l4 = (value[part, None, None] for value in c.l)
        level = 1 + l0 * du + l1 * dv + l2 * du * du + l3 * du * dv + l4 * dv * dv
        inside = k0 * du * du + 2 * k1 * du * dv + k2 * dv * dv <= support**2 * level
        inside &= (rows >= 0) & (rows < size[0]) & (columns >= 0) & (columns < size[1])
        count += int(inside.sum())
    return count
