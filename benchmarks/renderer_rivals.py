"""Ways to render Gaussians in plain torch: what renderer.py compares with. Box support throughout.

Each takes (1, N, ...) parameters and a cotangent or None. With None it returns the volume; else it runs forward and
backward, leaves the gradients in `.grad`, and returns the volume. Every one is written to be as fast as torch allows:
no gradient is saved longer than needed, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from medgmae.ops.voxel import reference
from medgmae.ops.voxel.inputs import VoxelInputs

LOWEST_EXPONENT = -80.0
Rival = Callable[[Sequence[Tensor], tuple[int, int, int], "Tensor | None"], Tensor]


def positions(size: tuple[int, int, int]) -> list[Tensor]:
    """Voxel positions along each axis."""
    return [torch.arange(n, dtype=torch.float32) / max(n - 1, 1) for n in size]


def box_slices(means: Tensor, scales: Tensor, size: tuple[int, int, int]) -> list[tuple[slice, ...]]:
    """The box of each Gaussian as slices."""
    first, last = (bound[0].long().tolist() for bound in reference.box_bounds(means, scales, size))
    return [
        tuple(slice(a, max(a, b + 1)) for a, b in zip(low, high, strict=True))
        for low, high in zip(first, last, strict=True)
    ]


def separable_exponent(p: Tensor, d: list[Tensor]) -> Tensor:
    """-½ dᵀ P d on the grid of three lines d[k], with two operations per voxel. p: (..., 3, 3), d[k]: (..., n_k)."""
    z, y, x = d[0][..., :, None], d[1][..., None, :], d[2]
    e = p[..., None, None, :, :]
    plane = -0.5 * (e[..., 0, 0] * z * z + e[..., 1, 1] * y * y) - e[..., 0, 1] * z * y
    slope = -(e[..., 0, 2] * z + e[..., 1, 2] * y)
    line = -0.5 * p[..., 2, 2, None] * x * x
    return torch.addcmul(plane[..., None] + line[..., None, None, :], slope[..., None], x[..., None, None, :])


def boxes(parameters: Sequence[Tensor], size: tuple[int, int, int]) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Each Gaussian on the slice of its box."""
    means, scales, quats, densities = parameters
    lines = positions(size)
    precision = reference.precision_matrix(scales, quats)[0].unbind(0)
    rows = zip(means[0].unbind(0), precision, densities[0].unbind(0), strict=True)
    for (mean, p, density), part in zip(rows, box_slices(means.detach(), scales.detach(), size), strict=True):
        distance = [line[own] - c for line, own, c in zip(lines, part, mean.unbind(0), strict=True)]
        yield part, separable_exponent(p, distance).exp() * density


def slice_loop(parameters: Sequence[Tensor], size: tuple[int, int, int], cotangent: Tensor | None = None) -> Tensor:
    """A Python loop over the Gaussians, each added to the slice of its box; autograd does the rest."""
    volume = torch.zeros(size)
    with torch.set_grad_enabled(cotangent is not None):
        for part, piece in boxes(parameters, size):
            volume[part] += piece
    if cotangent is not None:
        volume.backward(cotangent[0, 0])
    return volume.detach()[None, None]


def fed_slice_loop(parameters: Sequence[Tensor], size: tuple[int, int, int], cotangent: Tensor | None = None) -> Tensor:
    """The same with the backward fed by hand: autograd would copy the whole volume's gradient for every Gaussian."""
    volume = torch.zeros(size)
    pieces, cotangents = [], []
    with torch.set_grad_enabled(cotangent is not None):
        for part, piece in boxes(parameters, size):
            volume[part] += piece.detach()
            if cotangent is not None:
                pieces.append(piece)
                cotangents.append(cotangent[0, 0][part])
    if pieces:
        torch.autograd.backward(pieces, cotangents)
    return volume[None, None]


def separable_chunk(
    means: Tensor, precision: Tensor, densities: Tensor, first: Tensor, last: Tensor, size: tuple[int, int, int]
) -> Tensor:
    """The sum of a few Gaussians, (n, ...) each, at every voxel."""
    lines = positions(size)
    exponent = separable_exponent(precision, [line - means[:, k, None] for k, line in enumerate(lines)])
    weights = exponent.clamp(min=LOWEST_EXPONENT).exp()
    for k, n in enumerate(size):
        i = torch.arange(n)
        inside = ((i >= first[:, k, None]) & (i <= last[:, k, None])).float()
        weights = weights * inside.reshape(-1, *[n if j == k else 1 for j in range(3)])
    return torch.einsum("n,nzyx->zyx", densities, weights)


def textbook_chunk(
    means: Tensor, precision: Tensor, densities: Tensor, first: Tensor, last: Tensor, size: tuple[int, int, int]
) -> Tensor:
    """The same as one reads it: d for every pair, P d, the exponential, the mask, the sum."""
    grid = torch.stack(torch.meshgrid(*positions(size), indexing="ij"), -1)
    index = torch.stack(torch.meshgrid(*[torch.arange(n) for n in size], indexing="ij"), -1)
    d = grid - means[:, None, None, None]
    square = (d * torch.einsum("nij,nzyxj->nzyxi", precision, d)).sum(-1)
    inside = ((index >= first[:, None, None, None]) & (index <= last[:, None, None, None])).all(-1)
    return (densities[:, None, None, None] * torch.exp(-0.5 * square) * inside).sum(0)


def in_chunks(chunk: Callable[..., Tensor], count: int) -> Rival:
    """A rival that sums `count` Gaussians at a time; the backward runs chunk by chunk, so that memory stays bounded."""

    def run(parameters: Sequence[Tensor], size: tuple[int, int, int], cotangent: Tensor | None = None) -> Tensor:
        means, scales, quats, densities = parameters
        first, last = (bound[0].long() for bound in reference.box_bounds(means.detach(), scales.detach(), size))
        volume = torch.zeros(size)
        for start in range(0, means.shape[1], count):
            part = slice(start, start + count)
            with torch.set_grad_enabled(cotangent is not None):
                precision = reference.precision_matrix(scales[0, part], quats[0, part])
                piece = chunk(means[0, part], precision, densities[0, part], first[part], last[part], size)
            volume += piece.detach()
            if cotangent is not None:
                piece.backward(cotangent[0, 0])
        return volume[None, None]

    return run


def torch_reference(
    parameters: Sequence[Tensor], size: tuple[int, int, int], cotangent: Tensor | None = None
) -> Tensor:
    """The library's own reference, without its kernels."""
    inputs = VoxelInputs(*(p.detach() for p in parameters), torch.zeros(1, 1, dtype=torch.int64), size, size, 0.0)
    volume = reference.forward(inputs).reshape(1, 1, *size)
    if cotangent is not None:
        gradients = reference.backward(cotangent.reshape(1, 1, -1), inputs)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
    return volume


def rivals(compiled: bool) -> dict[str, tuple[Rival, int]]:
    """Name -> rival and how many Gaussians it is timed with (0: all). The dense ones cost the same for every Gaussian,
    so a few are timed and the time is scaled up."""
    found: dict[str, tuple[Rival, int]] = {
        "torch, loop over box slices": (slice_loop, 0),
        "torch, loop over box slices, backward fed by hand": (fed_slice_loop, 0),
        "torch, separable dense": (in_chunks(separable_chunk, 8), 16),
        "torch, textbook dense": (in_chunks(textbook_chunk, 4), 4),
        "torch reference of this library": (torch_reference, 16),
    }
    if compiled:
        found["torch.compile, separable dense"] = (in_chunks(torch.compile(separable_chunk, dynamic=False), 8), 16)
    return found
