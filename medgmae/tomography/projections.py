"""X-ray projections with their geometry: line integrals of attenuation, checked before anything is computed of them."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medgmae.data import Grid, VolumeError
from medgmae.tomography.geometry import ProjectionGeometry

_log = logging.getLogger("medgmae")

# Attenuation of water in 1/mm at the usual mean energies of CT, about 70 keV.
MU_WATER = 0.02
# No patient attenuates by exp(-30).
MOST = 30.0
_AIR = 0.02  # line integral of what is no body
_LOST = 0.05  # part of a body that may be outside of the detector
_MANY = 0.01  # part of the pixels beyond what a beam can give
_RIM = 0.1  # share of a detector's sides that is looked at for the unattenuated beam


@dataclass(frozen=True, eq=False)
class Projections:
    """Line integrals of attenuation, pure numbers, with the geometry they were measured in.

    Attributes:
        data: (V, H, W) float32.
        geometry: of the V views.

    Raises:
        VolumeError: numbers that are not finite, other sizes than the geometry's, views of nothing but 0, or values
            that look like intensities rather than line integrals.
    """

    data: Tensor
    geometry: ProjectionGeometry

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", torch.as_tensor(self.data).to(torch.float32))
        check_stack(self.data, self.geometry)
        for view, values in enumerate(self.data):
            if len(self) > 0 and not values.any():
                raise VolumeError(f"view {view} is 0 everywhere: a missing exposure? Leave it out of data and geometry")
        if self.data.numel():
            _refuse_intensities(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: slice | list[int]) -> Projections:
        """Some of the views."""
        return Projections(self.data[index], self.geometry[index])

    def __repr__(self) -> str:
        return f"Projections({self.geometry!r})"

    def binned(self, factor: int) -> Projections:
        """Means of ``factor`` x ``factor`` pixels; rows and columns that are left over are cut off."""
        rows, columns = (n // factor * factor for n in self.geometry.size)
        data = F.avg_pool2d(self.data[:, None, :rows, :columns], factor)[:, 0]
        return Projections(data, self.geometry.binned(factor))


def check_stack(data: Tensor, geometry: ProjectionGeometry) -> None:
    """Raise VolumeError unless these numbers (V, H, W) are finite and have the geometry's sizes."""
    if data.dim() != 3:
        raise VolumeError(f"projections have shape {tuple(data.shape)}; expected (views, rows, columns)")
    if len(data) != len(geometry):
        raise VolumeError(
            f"there are {len(data)} projections and a geometry of {len(geometry)} views; expected as many"
        )
    if tuple(data.shape[1:]) != geometry.size:
        swapped = tuple(data.shape[:0:-1]) == geometry.size
        more = ": rows and columns are exchanged, pass data.transpose(1, 2) or the geometry's size" if swapped else ""
        raise VolumeError(
            f"projections have {tuple(data.shape[1:])} pixels (rows, columns), the geometry {geometry.size}{more}"
        )
    finite = data.isfinite()
    if not bool(finite.all()):
        views = (~finite).flatten(1).any(1).nonzero().flatten().tolist()
        shown = f"{views[:8]}{'...' if len(views) > 8 else ''}"
        raise VolumeError(
            f"{int((~finite).sum())} pixels are NaN or infinite, in views {shown}; "
            "expected finite numbers: repair them or leave these views out"
        )


def _refuse_intensities(data: Tensor) -> None:
    """Line integrals are small where the beam meets nothing; intensities are large there."""
    most, least = float(data.max()), float(data.min())
    advice = "pass i0= (--i0), the counts of the beam that nothing attenuates, to take the logarithm"
    if most > MOST:
        raise VolumeError(
            f"projections reach {most:.4g}; line integrals of attenuation stay below {MOST:g}. Are these intensities? "
            f"Then {advice}; otherwise scale them to pure numbers (attenuation in 1/mm times millimetres)"
        )
    rim = _rim(data)
    bright = float(rim.mean()) if rim.numel() else 0.0
    if least > 0 and most <= 1.1 and bright > 0.8 * most and bright > 1.05 * float(data.mean()):
        raise VolumeError(
            f"projections lie in ({least:.3g}, {most:.3g}] and are largest at the detector's sides, as intensities: "
            f"{advice} (1 if they are parts of it)"
        )


def _rim(data: Tensor) -> Tensor:
    """The columns at both sides of the detector."""
    width = max(1, round(_RIM * data.shape[2]))
    return torch.cat([data[..., :width], data[..., -width:]], dim=-1)


def line_integrals(intensities: Tensor, i0: float) -> Tensor:
    """-log(I / I0) of intensities (V, H, W), of which less than one count is taken for one.

    Raises:
        VolumeError: ``i0`` that is not positive, negative intensities, many beyond ``i0``, or a detector that was
            saturated below it.
    """
    if not i0 > 0:
        raise VolumeError(f"i0 is {i0}; expected the positive number of counts that arrive where nothing attenuates")
    counts = intensities.double()
    negative = int((counts < 0).sum())
    if negative:
        raise VolumeError(
            f"{negative} intensities are negative, the least {float(counts.min()):.4g}; expected counts: subtract the "
            "detector's offset first, or leave i0 out for line integrals"
        )
    _refuse_saturated(counts, i0)
    floor = 1.0 if i0 > 1 else 1e-6  # parts of the beam have no counts
    return -(counts.clamp(min=floor) / i0).log().float()


def _refuse_saturated(counts: Tensor, i0: float) -> None:
    """Nothing exceeds the beam but by noise; and many pixels of exactly the largest number are a detector's end."""
    if counts.numel() == 0:
        return
    most = float(counts.max())
    noise = 10 * math.sqrt(i0) if i0 > 1 else 0.4  # of parts of the beam nothing says how many photons they were
    beyond = float((counts > 1.1 * i0 + noise).double().mean())
    if beyond > _MANY:
        raise VolumeError(
            f"{100 * beyond:.0f} % of the intensities are above i0, {i0:g}, by more than noise: the largest is "
            f"{most:.4g}; expected the counts that arrive where nothing attenuates, pass a larger i0 (--i0)"
        )
    saturated = float((counts == most).double().mean())
    if _MANY < saturated < 1 and most < 0.95 * i0:
        raise VolumeError(
            f"{100 * saturated:.0f} % of the intensities are exactly {most:.6g}, below i0, {i0:g}: the detector was "
            "saturated there, and what it did not count cannot be known; expose less, or pass i0 (--i0) of "
            f"{most:.6g} if that is the beam that nothing attenuates"
        )


def to_hounsfield(attenuation: Tensor, mu_water: float = MU_WATER) -> Tensor:
    """Hounsfield units of attenuation in 1/mm: 1000 (mu / mu_water - 1)."""
    return 1000 * (attenuation / mu_water - 1)


def from_hounsfield(values: Tensor, mu_water: float = MU_WATER) -> Tensor:
    """Attenuation in 1/mm, at least 0, of Hounsfield units."""
    return (mu_water * (1 + values / 1000)).clamp(min=0)


def add_noise(projections: Projections, photons: float, generator: torch.Generator | None = None) -> Projections:
    """Projections as counted photons give them: Poisson numbers of mean ``photons`` exp(-p), their logarithm.

    Args:
        projections: line integrals.
        photons: that arrive at a pixel where nothing attenuates.
        generator: of the numbers, on the CPU; None: one with seed 0.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    counts = torch.poisson(photons * (-projections.data.double()).exp(), generator=generator)
    return Projections(line_integrals(counts, photons), projections.geometry)


def check_coverage(projections: Projections, grid: Grid) -> None:
    """Log a warning where bodies on a grid would reach beyond the detector, as attenuation without an end.

    Looked at are 9 x 9 x 9 places of the grid, those with a body: which attenuate more than air in every view that has
    them on its detector.
    """
    axes = [torch.linspace(0, n - 1, 9, dtype=torch.float64) for n in grid.size]
    points = torch.from_numpy(grid.world(torch.cartesian_prod(*axes).numpy()))
    places = projections.geometry.pixels(points).round().long()  # (V, n, 2)
    rows, columns = projections.geometry.size
    inside = ((places >= 0) & (places < torch.tensor([rows, columns]))).all(-1)
    view = torch.arange(len(projections))[:, None]
    seen = projections.data[view, places[..., 0].clamp(0, rows - 1), places[..., 1].clamp(0, columns - 1)]
    body = ((seen > _AIR) | ~inside).all(0)
    lost = body & ~inside.all(0)
    share = float(lost.sum()) / max(int(body.sum()), 1)
    if share > _LOST:
        _log.warning(
            "%.0f %% of the body on the grid is outside of the detector in some view: expect a bright rim, and values "
            "that are too high towards it; take a grid or a detector that holds the body",
            100 * share,
        )
