"""CT from few projections with 3D Gaussians: descent through the exact projector."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from medgmae.data import Grid, Volume, VolumeError
from medgmae.gaussians.fitting import JOINING_SCALE, MOVED_SHARE, draw_places
from medgmae.gaussians.rendering import GaussianRenderer, Gaussians
from medgmae.losses import psnr
from medgmae.ops.progress import progress_bar
from medgmae.ops.projection.operator import project
from medgmae.ops.rotations import quaternions
from medgmae.tomography.geometry import ProjectionGeometry
from medgmae.tomography.iterative import Rays
from medgmae.tomography.projections import Projections
from medgmae.tomography.starts import THINNEST

KEEP_EVERY_S = 60.0


@dataclass(frozen=True)
class Descent:
    """How Gaussians are moved.

    The rates are for Gaussians that were fitted to a first reconstruction; others need five to ten times as high ones.

    Attributes:
        views: random views in a step.
        support: standard deviations to which a Gaussian counts.
        means: learning rate of centres at the first step, in voxels; those of ``scales`` (logarithms), ``quats`` and
            ``densities`` (parts of the start's largest) likewise.
        final: part of every rate that is left at the end.
        coarse: part of the run that sees pixels of 2 x 2, a quarter as many.
        rounds: times that Gaussians join and move to where the residual is, evenly over the first half of the run.
        growth: part of the number of Gaussians that joins in all rounds together.
        tv: weight of the total variation of a random block of the volume (R2-Gaussian: 0.05); 0 for none.
        tv_size: voxels of the block along each axis.
    """

    views: int = 2
    support: float = 3.5
    means: float = 0.02
    scales: float = 0.004
    quats: float = 0.01
    densities: float = 0.002
    final: float = 0.1
    coarse: float = 0.0
    rounds: int = 0
    growth: float = 1.0
    tv: float = 0.0
    tv_size: int = 32


class Progress(NamedTuple):
    """What is known after a step: its number, seconds, the root mean square residual of its views, and the PSNR in dB
    of the volume where truth is known and was looked at."""

    step: int
    seconds: float
    residual: float
    psnr: float | None


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Gaussians in LPS millimetres with densities in 1/mm, the volume that they render to, and the way there.

    ``state`` continues the descent: ``reconstruct_ct(..., resume=result.state)``.
    """

    gaussians: Gaussians
    volume: Volume
    curve: list[Progress]
    state: dict[str, Tensor] = field(repr=False)


def render_attenuation(gaussians: Gaussians, grid: Grid, support: float | None = 3.5) -> Volume:
    """Attenuation in 1/mm on a grid, of Gaussians in LPS millimetres."""
    placed = gaussians.detach().to_grid(grid)
    with torch.no_grad():
        return Volume(GaussianRenderer(support)(placed, grid.size)[0].float(), grid)


def reconstruct_ct(
    projections: Projections,
    grid: Grid,
    start: Gaussians | None,
    *,
    steps: int = 500,
    budget_s: float | None = None,
    descent: Descent | None = None,
    truth: Volume | None = None,
    peak: float = 0.06,
    look_every: int = 25,
    resume: dict[str, Tensor] | None = None,
    seed: int = 0,
    callback: Callable[[Progress], None] | None = None,
    keep: Callable[[dict[str, Tensor]], None] | None = None,
    progress: bool | None = None,
) -> Reconstruction:
    """Reconstruct attenuation from projections by Gaussians whose exact projections come close to them.

    Adam moves, turns, scales and weighs the Gaussians; each step sees some random views and the mean squared residual
    of their pixels. Densities may become negative. Where rounds are asked for, further Gaussians join at places drawn
    by the residual, spread back over its lines, and those that add the least move there, as dense together as leaves
    the least residual.

    Args:
        projections: line integrals.
        grid: of the volume in the result; its spacing is the unit of the rates.
        start: (1, K, ...) in LPS millimetres, densities in 1/mm: see :func:`~medgmae.tomography.start_gaussians`. Not
            needed, and not looked at, with ``resume``.
        steps: of Adam.
        budget_s: seconds after which it ends early; rates fall with the larger share of steps or seconds that is over.
        descent: rates and rounds.
        truth: to look at while it runs; never used otherwise.
        peak: of the PSNR, in 1/mm: 0.06 for 3000 HU at 0.02 1/mm.
        look_every: steps between two looks at the truth.
        resume: ``state`` of an earlier result, whose steps and seconds count.
        seed: of the views and places.
        callback: called after every step.
        keep: called with the state every minute, for a run that may be ended before its time.
        progress: show a progress bar with residual and PSNR; by default in terminals and notebooks.

    Raises:
        VolumeError: no Gaussians, numbers that are not finite, or a descent that diverges.
    """
    if resume is not None:
        start = _gaussians_of(resume)
    if start is None:
        raise VolumeError("there is nothing to begin with; expected start= Gaussians, or resume=")
    run = _Descent(projections, grid, start, steps, descent or Descent(), seed)
    if resume is not None:
        run.resume(resume)
    begin, spent, curve = time.perf_counter(), run.seconds, []
    kept = begin
    with progress_bar(steps - run.done, "reconstruct", progress, unit="step") as bar:
        while run.done < steps and (budget_s is None or run.seconds < budget_s):
            over = run.done / steps if budget_s is None else max(run.done / steps, run.seconds / budget_s)
            residual = run.step(over)
            run.seconds = spent + time.perf_counter() - begin
            seen = None
            if truth is not None and (run.done % look_every == 0 or run.done == steps):
                looked = time.perf_counter()
                rendered = render_attenuation(run.gaussians(), grid, run.options.support)
                seen = psnr(rendered.data, truth.data, data_range=peak)
                begin += time.perf_counter() - looked  # looking is not a part of the method
            curve.append(Progress(run.done, run.seconds, residual, seen))
            shown = f"residual {residual:.4g}" + ("" if seen is None else f", PSNR {seen:.2f} dB")
            bar.set_postfix_str(shown, refresh=False)
            bar.update()
            if keep is not None and time.perf_counter() - kept >= KEEP_EVERY_S:
                keep(run.state())
                kept = time.perf_counter()
            if callback is not None:
                callback(curve[-1])
    found = run.gaussians()
    return Reconstruction(found, render_attenuation(found, grid, run.options.support), curve, run.state())


class _Descent:
    """Parameters (K, ...) in millimetres, logarithms of scales among them, and their Adam."""

    NAMES = ("means", "log_scales", "quats", "densities")

    def __init__(
        self, projections: Projections, grid: Grid, start: Gaussians, steps: int, options: Descent, seed: int
    ) -> None:
        if len(start) != 1 or start.means.shape[1] < 1:
            raise VolumeError(f"the start is {start}; expected one set of Gaussians")
        if not all(bool(tensor.isfinite().all()) for tensor in start.tensors()):
            raise VolumeError("the start has NaN or infinite numbers; expected finite Gaussians")
        self.projections, self.grid, self.steps, self.options = projections, grid, steps, options
        self.coarse = projections.binned(2) if min(projections.geometry.size) > 1 else projections
        if options.tv and max(grid.spacing) > 1.001 * min(grid.spacing):
            raise VolumeError(
                f"tv needs voxels that are cubes, the grid has {grid.spacing} mm; resample it or leave tv 0"
            )
        self.voxel = float(torch.tensor(grid.spacing).prod()) ** (1 / 3)
        self.generator = torch.Generator().manual_seed(seed)
        self.done, self.seconds = 0, 0.0
        means, scales, quats, densities = (tensor[0].detach().float().clone() for tensor in start.tensors())
        self.span = max(float(densities.abs().max()), 1e-12)
        self._set([means, scales.abs().clamp(min=THINNEST * self.voxel).log(), quats, densities / self.span])
        self.first = len(means)

    def _joining(self) -> int:
        """How many Gaussians join after the step that was just made: a share of those at the start."""
        options = self.options
        due = {round(self.steps * 0.5 * (k + 1) / options.rounds) for k in range(options.rounds)}
        return round(self.first * options.growth / options.rounds) if self.done in due else 0

    def _set(self, values: list[Tensor]) -> None:
        self.parameters = [value.detach().requires_grad_() for value in values]
        rates = (self.options.means * self.voxel, self.options.scales, self.options.quats, self.options.densities)
        self.rates = rates
        groups = [{"params": [p], "lr": rate} for p, rate in zip(self.parameters, rates, strict=True)]
        self.adam = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15)

    def gaussians(self) -> Gaussians:
        """(1, K, ...) in millimetres, without gradients."""
        means, log_scales, quats, densities = (p.detach()[None] for p in self.parameters)
        return Gaussians(means.clone(), log_scales.exp(), quats.clone(), densities * self.span)

    def step(self, over: float) -> float:
        """One step of Adam when the share ``over`` of the run is over; the residual of its views."""
        options = self.options
        data = self.coarse if over < options.coarse else self.projections
        chosen = torch.randperm(len(data), generator=self.generator)[: options.views]
        geometry = data.geometry
        means, log_scales, quats, densities = self.parameters
        current = Gaussians(means[None], log_scales.exp()[None], quats[None], densities[None] * self.span)
        seen = self._project(current, geometry.views[chosen], geometry)
        loss = (seen - data.data[chosen]).square().mean()
        residual = math.sqrt(float(loss.detach()))
        if not math.isfinite(residual):
            raise VolumeError(f"the descent diverged at step {self.done + 1}; lower the rates, {options}")
        if options.tv:
            loss = loss + options.tv * self._variation()
        self.adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * options.final**over
        self.adam.step()
        self.done += 1
        with torch.no_grad():
            log_scales.clamp_(min=math.log(THINNEST * self.voxel))
            if joining := self._joining():
                self._join(joining)
        return residual

    def _project(self, gaussians: Gaussians, views: Tensor, geometry: ProjectionGeometry) -> Tensor:
        """Line integrals (V, rows, columns) of one set."""
        images = project(
            gaussians.means,
            gaussians.scales,
            gaussians.quats,
            gaussians.densities,
            views,
            geometry.size,
            beam=geometry.beam,
            support=self.options.support,
        )
        return images[0]

    def _variation(self) -> Tensor:
        """Mean absolute difference of neighbouring voxels in a random block, in parts of the largest density."""
        size = [min(self.options.tv_size, *self.grid.size)] * 3
        starts = [int(torch.randint(n - size[0] + 1, (), generator=self.generator)) for n in self.grid.size]
        extent = (size[0] - 1) * self.grid.spacing[0]  # equal along all axes, or the constructor had refused
        axes = torch.from_numpy(self.grid.direction.T.copy())
        means, log_scales, quats, densities = self.parameters
        placed = (means - torch.from_numpy(self.grid.world(starts)).float()) @ axes.float().T / extent
        # A Gaussian is its own mirror image: axes of the other hand are turned as their opposites are.
        turn = quaternions(axes * torch.linalg.det(axes).sign())[None].float()
        near = Gaussians(placed[None], log_scales.exp()[None] / extent, _product(turn, quats)[None], densities[None])
        block = GaussianRenderer(self.options.support)(near, size)[0, 0]
        return torch.stack([block.diff(dim=axis).abs().mean() for axis in range(3)]).mean()

    def _join(self, count: int) -> None:
        """New Gaussians, and those that add the least, to places drawn by the residual spread back over its lines.

        They take the densities that it has there, times the one factor that leaves the least of the residual: where
        many join in one place, each has less.
        """
        values = self.parameters
        energy = values[3].square().log() + values[1].sum(1)
        moved = energy.topk(round(MOVED_SHARE * len(energy)), largest=False).indices
        values[3][moved] = 0
        residual = self.projections.data - self._views(self.gaussians())
        spread = self._spread(residual)
        places = draw_places(spread.square(), len(moved) + count, self.generator)
        nearest = places.round().long()
        quats = torch.zeros(len(places), 4)
        quats[:, 0] = 1
        means = torch.from_numpy(self.grid.world(places.numpy())).float()
        log_scales = torch.full((len(places), 3), math.log(JOINING_SCALE * self.voxel))
        densities = spread[tuple(nearest.unbind(1))]
        added = self._views(Gaussians(means[None], log_scales.exp()[None], quats[None], densities[None]))
        factor = (added * residual).sum() / added.square().sum().clamp(min=1e-30)
        rows = [means, log_scales, quats, factor.clamp(0, 1) * densities / self.span]
        old = [dict(self.adam.state[p]) for p in values]
        joined = []
        for value, row in zip(values, rows, strict=True):
            kept = value.detach().clone()
            kept[moved] = row[: len(moved)]
            joined.append(torch.cat([kept, row[len(moved) :]]))
        self._set(joined)
        for parameter, state in zip(self.parameters, old, strict=True):
            fresh = {"step": state["step"]}
            for name in ("exp_avg", "exp_avg_sq"):
                average = state[name].clone()
                average[moved] = 0
                fresh[name] = torch.cat([average, average.new_zeros(count, *average.shape[1:])])
            self.adam.state[parameter] = fresh

    def _views(self, gaussians: Gaussians) -> Tensor:
        """Line integrals (V, rows, columns) of all views, one after the other."""
        geometry = self.projections.geometry
        return torch.cat([self._project(gaussians, geometry.views[k : k + 1], geometry) for k in range(len(geometry))])

    def _spread(self, residual: Tensor) -> Tensor:
        """(D, H, W), 1/mm: the mean over all lines through a voxel of their residuals over their lengths."""
        rays = Rays(self.grid, self.projections.geometry)
        lengths = rays.forward(torch.ones(self.grid.size))
        share = rays.back((lengths > 0).float()).clamp(min=1e-6)
        return rays.back(torch.where(lengths > 0, residual / lengths.clamp(min=1e-6), 0.0)) / share

    def state(self) -> dict[str, Tensor]:
        """What :meth:`resume` takes."""
        state = {"done": torch.tensor(self.done), "first": torch.tensor(self.first)}
        state |= {"seconds": torch.tensor(self.seconds, dtype=torch.float64)}
        state |= {"span": torch.tensor(self.span, dtype=torch.float64), "generator": self.generator.get_state()}
        for name, parameter in zip(self.NAMES, self.parameters, strict=True):
            state[name] = parameter.detach().clone()
            for part, value in self.adam.state[parameter].items():
                state[f"{name}.{part}"] = value.clone()
        return state

    def resume(self, state: dict[str, Tensor]) -> None:
        """Go on where another descent of the same projections ended."""
        self.done, self.first = int(state["done"]), int(state["first"])
        self.seconds, self.span = float(state["seconds"]), float(state["span"])
        self.generator.set_state(state["generator"])
        self._set([state[name].clone() for name in self.NAMES])
        for name, parameter in zip(self.NAMES, self.parameters, strict=True):
            parts = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{name}.")}
            if parts:
                self.adam.state[parameter] = {part: value.clone() for part, value in parts.items()}


def _gaussians_of(state: dict[str, Tensor]) -> Gaussians:
    """Those of a state.

    Raises:
        VolumeError: it is not one.
    """
    missing = [name for name in (*_Descent.NAMES, "done", "first", "seconds", "span", "generator") if name not in state]
    if missing:
        raise VolumeError(f"resume lacks {', '.join(missing)}; expected the state of a Reconstruction")
    means, log_scales, quats, densities = (state[name][None] for name in _Descent.NAMES)
    return Gaussians(means, log_scales.exp(), quats, densities * state["span"].float())


def _product(first: Tensor, second: Tensor) -> Tensor:
    """Hamilton product (K, 4) of quaternions (w, x, y, z): the rotation ``second``, then ``first``."""
    w, v = first[..., :1], first[..., 1:]
    s, u = second[..., :1], second[..., 1:]
    across = torch.linalg.cross(v.expand_as(u), u)
    return torch.cat([w * s - (v * u).sum(-1, keepdim=True), w * u + s * v + across], dim=-1)
