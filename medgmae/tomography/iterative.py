"""Iterative reconstruction on voxels: SART and conjugate gradients, on the exact projector and its adjoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from medgmae.data import Grid, Volume, VolumeError
from medgmae.ops.progress import progress_bar
from medgmae.ops.rays.operator import back_project_volume, project_volume
from medgmae.tomography.geometry import ProjectionGeometry
from medgmae.tomography.projections import Projections, check_coverage

Watch = Callable[[int, Volume, float], None]
"""Called after each iteration with its number, the volume and the seconds since the call."""


def project(volume: Volume, geometry: ProjectionGeometry, views: Sequence[int] | None = None) -> Projections:
    """Line integrals of a volume of attenuation in 1/mm.

    Args:
        volume: one channel.
        geometry: of the views.
        views: numbers of those to compute; None for all.

    Raises:
        VolumeError: several channels, or a volume that no ray meets.
    """
    if volume.channels != 1:
        raise VolumeError(f"the volume has {volume.channels} channels; expected one, attenuation in 1/mm")
    chosen = geometry if views is None else geometry[list(views)]
    return Projections(Rays(volume.grid, chosen).forward(volume.data[0].float()), chosen)


class Rays:
    """Projector of one grid and its adjoint."""

    def __init__(self, grid: Grid, geometry: ProjectionGeometry) -> None:
        self.grid, self.geometry = grid, geometry
        self.affine = torch.from_numpy(grid.affine)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(D, H, W) to (V, rows, columns)."""
        geometry = self.geometry
        return project_volume(x[None], self.affine, geometry.views, geometry.size, beam=geometry.beam)[0]

    @torch.no_grad()
    def back(self, y: Tensor) -> Tensor:
        """(V, rows, columns) to (D, H, W)."""
        geometry = self.geometry
        return back_project_volume(y[None], self.affine, geometry.views, self.grid.size, beam=geometry.beam)[0]


def sart(
    projections: Projections,
    grid: Grid,
    iterations: int = 3,
    *,
    start: Volume | None = None,
    relaxation: float = 0.5,
    nonnegative: bool = True,
    seed: int = 0,
    watch: Watch | None = None,
    progress: bool | None = None,
) -> Volume:
    """Attenuation in 1/mm by SART (Andersen and Kak 1984, Ultrason. Imaging 6, 81).

    One view after the other corrects the volume: its residuals, each over the length of its line, are spread back and
    divided by what each voxel got.

    Args:
        projections: line integrals, of any views.
        grid: of the result.
        iterations: times that every view is used.
        start: volume to begin with; None for 0.
        relaxation: part of each correction that is made.
        nonnegative: set negative attenuation to 0.
        seed: of the order of the views.
        watch: called after each iteration.
        progress: show a progress bar; by default in terminals and notebooks.
    """
    begin = time.perf_counter()
    check_coverage(projections, grid)
    x = _first(start, grid)
    views = [Rays(grid, projections.geometry[[k]]) for k in range(len(projections))]
    ones = torch.ones(grid.size)
    lengths = [rays.forward(ones) for rays in views]
    shares = [rays.back((length > 0).float()) for rays, length in zip(views, lengths, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    with progress_bar(iterations * len(views), "views", progress) as bar:
        for iteration in range(iterations):
            for k in torch.randperm(len(views), generator=generator).tolist():
                residual = projections.data[k : k + 1] - views[k].forward(x)
                scaled = torch.where(lengths[k] > 0, residual / lengths[k].clamp(min=1e-6), 0.0)
                x += relaxation * views[k].back(scaled) / shares[k].clamp(min=1e-6)
                if nonnegative:
                    x.clamp_(min=0)
                bar.update(1)
            if watch is not None:
                watch(iteration + 1, Volume(x[None].clone(), grid), time.perf_counter() - begin)
    return Volume(x[None], grid)


def cg(
    projections: Projections,
    grid: Grid,
    iterations: int = 10,
    *,
    start: Volume | None = None,
    watch: Watch | None = None,
    progress: bool | None = None,
) -> Volume:
    """Attenuation in 1/mm by conjugate gradients on the normal equations (CGLS, Hestenes and Stiefel 1952).

    What is left of noise grows with the iterations: few are the regularisation.

    Args:
        projections: line integrals, of any views.
        grid: of the result.
        iterations: steps.
        start: volume to begin with; None for 0.
        watch: called after each iteration.
        progress: show a progress bar; by default in terminals and notebooks.
    """
    begin = time.perf_counter()
    check_coverage(projections, grid)
    x, rays = _first(start, grid), Rays(grid, projections.geometry)
    residual = projections.data - rays.forward(x) if start is not None else projections.data.clone()
    gradient = rays.back(residual)
    direction, norm = gradient.clone(), float(gradient.double().square().sum())
    with progress_bar(iterations, "iterations", progress) as bar:
        for iteration in range(iterations):
            if norm == 0:
                break
            seen = rays.forward(direction)
            step = norm / float(seen.double().square().sum())
            x += step * direction
            residual -= step * seen
            gradient = rays.back(residual)
            last, norm = norm, float(gradient.double().square().sum())
            direction = gradient + norm / last * direction
            bar.update(1)
            if watch is not None:
                watch(iteration + 1, Volume(x[None].clone(), grid), time.perf_counter() - begin)
    return Volume(x[None], grid)


def _first(start: Volume | None, grid: Grid) -> Tensor:
    if start is None:
        return torch.zeros(grid.size)
    if start.grid != grid:
        raise VolumeError(f"the start is on {start.grid}; expected the grid of the result, {grid}: resample it")
    return start.data[0].float().clone()
