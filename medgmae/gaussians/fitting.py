"""Fit 3D Gaussians to a scan: descent through the renderer, with Gaussians added and moved to where the error is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from medgmae.gaussians.rendering import GaussianRenderer, Gaussians
from medgmae.ops.progress import progress_bar
from medgmae.ops.voxel.operator import Support

# Standard deviations stay above this many voxels: thinner Gaussians fall between voxels and get no gradient.
THINNEST = 0.3
# The fit begins with this share of the Gaussians; the others join where the first ones fail.
FIRST_SHARE = 0.1
# Gaussians join and move this often, evenly spread over the first part of the steps; the rest is for settling.
ROUNDS = 10
GROWING = 0.5
# Share of the Gaussians that move in each round: those that add the least.
MOVED_SHARE = 0.1
# Standard deviation of the Gaussians of the start, in spacings between them, and of those that join, in voxels.
FIRST_SCALE = 0.7
JOINING_SCALE = 0.7
# Added to the gradient where the first ones are drawn, in parts of the range per voxel: flat regions get some too.
EDGE_FLOOR = 1e-3
# Of the residual at its place, what a joining Gaussian takes over: its neighbours are about to take their share.
JOINING_DENSITY = 0.5


class Rates(NamedTuple):
    """Learning rates of Adam at the first step.

    means: voxels per step.
    scales: of the logarithm of the standard deviations.
    quats: of the quaternions, which start with length 1.
    densities: in parts of the scan's range of values.
    final: the part of every rate that is left at the last step; they fall exponentially.
    """

    means: float = 0.3
    scales: float = 0.1
    quats: float = 0.06
    densities: float = 0.02
    final: float = 0.2


class _Parameters(NamedTuple):
    """What is optimised, one row per Gaussian.

    means: (K, 3) in voxels, (d, h, w). log_scales: (K, 3), of standard deviations in voxels. quats: (K, 4), (w, x, y,
    z). densities: (K,), in parts of the scan's range.
    """

    means: Tensor
    log_scales: Tensor
    quats: Tensor
    densities: Tensor


class Voxels(Protocol):
    """Voxels and their spacing: what a fit asks of a :class:`~medgmae.Volume`."""

    @property
    def data(self) -> Tensor:
        """(1, D, H, W)."""

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between voxel centres (d, h, w)."""


def fit_gaussians(
    scan: Voxels | Tensor,
    count: int,
    steps: int = 1000,
    *,
    support: Support = 3.0,
    thinnest: float = THINNEST,
    rates: Rates | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[int, float], None] | None = None,
    progress: bool | None = None,
) -> Gaussians:
    """Find Gaussians whose rendering is close to a scan, in mean squared error.

    Adam moves, turns, scales and weighs them. A tenth of them starts at places drawn by the size of the gradient,
    round in millimetres and as wide as the places are apart. In ten rounds the others join, and the tenth that adds
    the least moves, to places drawn by the squared residual; there they start with part of the residual. Densities
    may become negative: a vessel in bright tissue costs one Gaussian then.

    Args:
        scan: (1, D, H, W) volume with its spacing; or a tensor of that shape, with voxels of 1 mm. No Gaussians give
            0: background should be 0, as after a window to 0..1.
        count: Gaussians, K.
        steps: of Adam, each a rendering forward and backward. With 0 the start is returned.
        support: where a Gaussian counts, see :class:`~medgmae.GaussianRenderer`; render the result with the same.
        thinnest: least standard deviation, in voxels. Below 0.6 or so the values at the voxels say little of what lies
            between them: where that matters, as for line integrals, ask for as much.
        rates: learning rates.
        generator: source of the places, on the CPU. None: one with seed 0, so that equal calls give equal Gaussians.
        callback: called after every step with the number of steps done and the PSNR in dB before the step, whose peak
            is the scan's range of values.
        progress: show a progress bar with the PSNR; by default in terminals and notebooks.

    Returns:
        (1, K, ...) in units of the scan's axes, float32 on the scan's device, without gradients; ``to_world(scan)``
        moves them into the patient's frame.

    Raises:
        TypeError: what is neither a volume nor a plain tensor; :func:`~medgmae.as_volume` reads images.
        ValueError: a scan of another shape or without a range of values, or with NaN or infinite voxels; count below 1
            or steps below 0; or a fit that diverges.
    """
    if count < 1 or steps < 0:
        raise ValueError(f"count (={count}) must be at least 1 and steps (={steps}) at least 0")
    if not thinnest > 0:
        raise ValueError(f"thinnest (={thinnest}) must be more than 0 voxels")
    fit = _Fit(scan, count, steps, GaussianRenderer(support), rates or Rates(), thinnest)
    fit.start(torch.Generator().manual_seed(0) if generator is None else generator)
    with progress_bar(steps, "fit", progress, unit="step") as bar:
        for done in range(1, steps + 1):
            psnr = fit.step(done)
            bar.set_postfix_str(f"PSNR {psnr:.2f} dB", refresh=False)
            bar.update()
            if callback is not None:
                callback(done, psnr)
    return fit.gaussians(count).detach()


def _voxels(scan: Voxels | Tensor) -> tuple[Tensor, Tensor]:
    """The values (D, H, W) and the spacing in mm, checked."""
    plain = isinstance(scan, Tensor) and not hasattr(scan, "affine")  # a MetaTensor has other axes and its own spacing
    if not plain and not hasattr(scan, "spacing"):
        raise TypeError(f"expected a Volume or a tensor (1, D, H, W), got {type(scan).__name__}; medgmae.as_volume(it)")
    data, spacing = (scan, (1.0, 1.0, 1.0)) if isinstance(scan, Tensor) else (scan.data, scan.spacing)
    if data.dim() != 4 or data.shape[0] != 1 or not data.numel():
        raise ValueError(f"the scan is {tuple(data.shape)}: expected (1, D, H, W), one channel, as a Gaussian has one")
    values = data[0].detach().float()
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(f"{bad} of {values.numel()} voxels are NaN or infinite; replace them before the fit")
    if float(values.max()) == float(values.min()):
        raise ValueError(f"every voxel is {float(values.min()):g}: there is nothing to fit; check the scan's window")
    return values, torch.tensor(spacing, device=values.device)


def draw_places(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` places (count, 3) in voxels, (d, h, w), as dense as the weights (D, H, W) are large.

    Systematic: equal steps along the running sum, each with its own offset. Repeats are as rare as the weights allow.
    """
    total = weights.flatten().double().cumsum(0).cpu()
    offsets = torch.rand(count, generator=generator, dtype=torch.float64)
    aims = (torch.arange(count, dtype=torch.float64) + offsets) / count * total[-1]
    index = torch.searchsorted(total, aims).clamp(max=len(total) - 1)
    size = weights.shape
    corners = torch.stack([index // (size[1] * size[2]), index // size[2] % size[1], index % size[2]], dim=1)
    shifts = torch.rand(count, 3, generator=generator) - 0.5
    last = torch.tensor(size) - 1
    return torch.minimum((corners + shifts).clamp(min=0), last).to(weights.device)


def _round_gaussians(places: Tensor, scales: Tensor, densities: Tensor, thinnest: float) -> _Parameters:
    """Gaussians that are not turned, from places and standard deviations (n, 3) in voxels and densities (n,)."""
    quats = torch.zeros(len(places), 4, device=places.device)
    quats[:, 0] = 1
    return _Parameters(places, scales.clamp(min=thinnest).log(), quats, densities)


def _at(volume: Tensor, places: Tensor) -> Tensor:
    """Values (n,) of a volume (D, H, W) at the voxels nearest to places (n, 3) inside it."""
    d, h, w = places.round().long().unbind(1)
    return volume[d, h, w]


class _Fit:
    """The state of one fit. Rows from ``active`` on have not joined yet: they are not rendered and do not move."""

    def __init__(
        self,
        scan: Voxels | Tensor,
        count: int,
        steps: int,
        renderer: GaussianRenderer,
        rates: Rates,
        thinnest: float,
    ) -> None:
        self.values, self.spacing = _voxels(scan)
        self.count, self.steps, self.renderer, self.rates, self.thinnest = count, steps, renderer, rates, thinnest
        self.span = float(self.values.max() - self.values.min())
        self.unit = 1 / (self.values.new_tensor(self.values.shape) - 1).clamp(min=1)
        shares = [(k + 1) / ROUNDS for k in range(ROUNDS)]
        joined = {
            round(GROWING * steps * s): max(1, round(count * (FIRST_SHARE + (1 - FIRST_SHARE) * s))) for s in shares
        }
        self.active_after = {done: active for done, active in joined.items() if 0 < done < steps}
        self.active = max(1, round(count * FIRST_SHARE)) if self.active_after else count

    def start(self, generator: torch.Generator) -> None:
        """Place the first Gaussians and set up the descent."""
        self.generator = generator
        first = self._first()
        self.parameters = _Parameters(*(rows.new_zeros(self.count, *rows.shape[1:]) for rows in first))
        for parameter, rows in zip(self.parameters, first, strict=True):
            parameter[: self.active] = rows
            parameter.requires_grad_()
        rates = (self.rates.means, self.rates.scales, self.rates.quats, self.rates.densities)
        groups = [{"params": [p], "lr": rate} for p, rate in zip(self.parameters, rates, strict=True)]
        self.adam = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15)
        self.decline = torch.optim.lr_scheduler.ExponentialLR(self.adam, self.rates.final ** (1 / max(1, self.steps)))

    def step(self, done: int) -> float:
        """One step of Adam, and a round of joining and moving where one is due; the PSNR in dB before it."""
        rendered = self.renderer(self.gaussians(self.active), self.values.shape)[0, 0]
        loss = (rendered - self.values).div(self.span).square().mean()
        error = float(loss.detach())
        if not math.isfinite(error):
            raise ValueError(f"the fit diverged at step {done} of {self.steps}; lower the rates, {self.rates}")
        self.adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        self.decline.step()
        with torch.no_grad():
            self.parameters.log_scales.clamp_(min=math.log(self.thinnest))
            if done in self.active_after:
                self._join_and_move(self.values - rendered, self.active_after[done])
        return -10 * math.log10(error) if error > 0 else math.inf

    def gaussians(self, count: int) -> Gaussians:
        """The first ``count`` Gaussians as the renderer takes them."""
        return self._in_axes(_Parameters(*(parameter[:count] for parameter in self.parameters)))

    def _in_axes(self, rows: _Parameters) -> Gaussians:
        """Rows as Gaussians (1, K, ...) in units of the scan's axes."""
        means, log_scales, quats, densities = (row[None] for row in rows)
        return Gaussians(means * self.unit, log_scales.exp() * self.unit, quats, densities * self.span)

    def _first(self) -> _Parameters:
        """Gaussians where the scan has edges, as wide as they are apart: the rows that are active at the start."""
        weights = self._edges() + EDGE_FLOOR * self.span
        places = draw_places(weights, self.active, self.generator)
        apart = (self.spacing.prod() * weights.sum() / (self.active * _at(weights, places))) ** (1 / 3)  # mm
        values = _at(self.values, places)
        scales = FIRST_SCALE * apart[:, None] / self.spacing
        rows = _round_gaussians(places, scales, values / self.span, self.thinnest)
        # Neighbours overlap: where their sum overshoots the scan, each gets its part of the value.
        overshoot = _at(self.renderer(self._in_axes(rows), self.values.shape)[0, 0], places) / values
        return rows._replace(densities=rows.densities / overshoot.nan_to_num(1.0).clamp(min=1.0))

    def _edges(self) -> Tensor:
        """Size of the gradient (D, H, W), per mean width of a voxel."""
        size = self.spacing.prod() ** (1 / 3)
        slopes = [
            torch.gradient(self.values, dim=axis)[0] * (size / self.spacing[axis])
            for axis, n in enumerate(self.values.shape)
            if n > 1
        ]
        return torch.stack(slopes).square().sum(0).sqrt()

    def _join_and_move(self, residual: Tensor, active: int) -> None:
        """New Gaussians, and those that add the least, to places drawn by the squared residual (D, H, W)."""
        energy = self.parameters.densities.square().log() + self.parameters.log_scales.sum(1)
        moved = energy[: self.active].topk(round(MOVED_SHARE * self.active), largest=False).indices
        rows = torch.cat([moved, torch.arange(self.active, active, device=moved.device)])
        places = draw_places(residual.square(), len(rows), self.generator)
        scales = (JOINING_SCALE * self.spacing.prod() ** (1 / 3) / self.spacing).expand(len(rows), 3)
        joining = _round_gaussians(places, scales, JOINING_DENSITY / self.span * _at(residual, places), self.thinnest)
        for parameter, values in zip(self.parameters, joining, strict=True):
            parameter[rows] = values
            for average in ("exp_avg", "exp_avg_sq"):
                self.adam.state[parameter][average][rows] = 0
        self.active = active
