"""Filtered back-projection of views on a circle: Feldkamp, Davis and Kress (1984, J. Opt. Soc. Am. A 1, 612)."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medgmae.data import Grid, Volume, VolumeError
from medgmae.tomography.geometry import ProjectionGeometry
from medgmae.tomography.projections import Projections, check_coverage

_log = logging.getLogger("medgmae")
# Of a full turn, the largest gap between neighbouring views that still closes it, in mean steps.
_CLOSES = 2.5


class Orbit(NamedTuple):
    """A circle that sources stand on.

    centre: (3,), where the central rays meet. normals: (V, 3), from detector to source, unit vectors across the
    detector. angles: (V,), of the sources about the axis. distance: of the sources from the centre along the normals,
    infinite for a parallel beam.
    """

    centre: Tensor
    normals: Tensor
    angles: Tensor
    distance: float


def fdk(projections: Projections, grid: Grid) -> Volume:
    """Attenuation in 1/mm on a grid, by filtered back-projection.

    Exact for a parallel beam and in the plane of the circle; a cone's approximation elsewhere. The filter is the ramp
    (Ram-Lak). Over less than a full turn views are weighted after Parker (1982, Med. Phys. 9, 254); less than half a
    turn and the fan cannot be reconstructed so.

    Args:
        projections: line integrals.
        grid: of the result.

    Raises:
        VolumeError: fewer than two views, sources that are on no circle, or too short an arc.
    """
    check_coverage(projections, grid)
    geometry = projections.geometry
    orbit = orbit_of(geometry)
    weights = view_weights(geometry, orbit)  # (V, columns)
    found = torch.zeros(grid.size, dtype=torch.float32)
    for view in range(len(geometry)):
        filtered = _filtered(projections.data[view], geometry, orbit, view, weights[view])
        found += _spread(filtered, geometry, orbit, view, grid)
    return Volume(found[None], grid)


def default_grid(geometry: ProjectionGeometry, spacing: float | None = None) -> Grid:
    """The box about the middle of a circle that a detector sees, with axes (z, y, x) of the frame.

    Args:
        geometry: views on a circle.
        spacing: millimetres between voxels; None: that of the pixels, seen from the source at the middle.

    Raises:
        VolumeError: sources that are on no circle.
    """
    orbit = orbit_of(geometry)
    rows, columns = geometry.size
    shrink = 1.0
    if geometry.beam == "cone":
        source, corner = geometry.views[0, :2]
        shrink = orbit.distance / float((source - corner) @ orbit.normals[0])
    row_mm, column_mm = (shrink * step for step in geometry.pixel_mm)
    step = min(row_mm, column_mm) if spacing is None else float(spacing)
    across, along = columns * column_mm, rows * row_mm
    axis = torch.linalg.cross(orbit.normals[0], orbit.normals[len(geometry) // 4 or 1]).abs()
    lengths = [along if int(axis.argmax()) == k else across for k in range(3)]  # x, y, z
    size = [max(1, math.ceil(length / step)) for length in reversed(lengths)]
    origin = [float(orbit.centre[k]) - (size[2 - k] - 1) / 2 * step for k in range(3)]
    return Grid(size, step, origin)


def orbit_of(geometry: ProjectionGeometry) -> Orbit:
    """The circle of a scan.

    Raises:
        VolumeError: there is none.
    """
    if len(geometry) < 2:
        raise VolumeError(f"filtered back-projection needs views from around, got {len(geometry)}")
    source, corner, column, row = geometry.views.unbind(1)
    normals = torch.linalg.cross(column, row)
    normals = normals / normals.norm(dim=1, keepdim=True)
    back = source - corner if geometry.beam == "cone" else -source
    normals = normals * torch.where((back * normals).sum(1, keepdim=True) < 0, -1.0, 1.0)
    points = source if geometry.beam == "cone" else corner + _middle(geometry, column, row)
    # The point that is nearest to all central rays, and of all such points the one nearest to the middle of the points.
    across = torch.eye(3, dtype=torch.float64) - normals[:, :, None] * normals[:, None, :]
    around = points.mean(0)
    shift = torch.linalg.lstsq(across.sum(0), (across @ (points - around)[..., None]).sum(0), driver="gelsd").solution
    centre = around + shift[:, 0]
    axis = torch.linalg.svd(normals - normals.mean(0) if len(normals) > 2 else normals).Vh[-1]
    if len(normals) == 2:
        axis = torch.linalg.cross(normals[0], normals[1])
    first = normals[0] - axis * (normals[0] @ axis)
    first = first / first.norm()
    second = torch.linalg.cross(axis, first)
    angles = torch.atan2(normals @ second, normals @ first)
    if geometry.beam == "parallel":
        return Orbit(centre, normals, angles, math.inf)
    distances = ((source - centre) * normals).sum(1)
    if float(distances.std()) > 0.02 * float(distances.mean()):
        raise VolumeError(
            f"sources are {float(distances.min()):.4g} to {float(distances.max()):.4g} mm from the middle; expected a "
            "circle: use sart or cg, which take any views"
        )
    return Orbit(centre, normals, angles, float(distances.mean()))


def _middle(geometry: ProjectionGeometry, column: Tensor, row: Tensor) -> Tensor:
    rows, columns = geometry.size
    return (columns - 1) / 2 * column + (rows - 1) / 2 * row


def view_weights(geometry: ProjectionGeometry, orbit: Orbit) -> Tensor:
    """Of every view and column, (V, columns): the angle that it stands for, over the number of times that its lines are
    measured.

    Raises:
        VolumeError: the arc is too short.
    """
    columns, turn = geometry.size[1], math.pi if geometry.beam == "parallel" else 2 * math.pi
    # A parallel beam's lines are the same from behind.
    angles = torch.remainder(orbit.angles, turn)
    order = angles.argsort()
    sorted_angles = angles[order]
    gaps = torch.diff(sorted_angles, append=sorted_angles[:1] + turn)
    widest = int(gaps.argmax())
    steps = torch.empty_like(gaps)
    rest = torch.cat([gaps[:widest], gaps[widest + 1 :]])
    if float(gaps[widest]) <= _CLOSES * float(rest.max()):
        steps[order] = (gaps + gaps.roll(1)) / 2
        return (steps * math.pi / turn)[:, None].expand(-1, columns)
    if geometry.beam == "parallel":
        raise VolumeError(
            f"views leave a gap of {math.degrees(float(gaps[widest])):.4g} degrees in half a turn; filtered "
            "back-projection needs all of it: use sart or cg"
        )
    start = sorted_angles[(widest + 1) % len(gaps)]
    arc = float(rest.sum())
    along = torch.remainder(orbit.angles - start, 2 * math.pi)
    within = torch.where(gaps == gaps[widest], 0.0, gaps)
    steps[order] = (within + within.roll(1)) / 2
    steps[order[[widest, (widest + 1) % len(gaps)]]] += float(rest.mean()) / 2  # the ends stand for half a step more
    fan, signs = _fan_angles(geometry, orbit)
    extra = (arc - math.pi) / 2
    if extra < float(fan.abs().max()) - 0.02:
        need = math.degrees(math.pi + 2 * float(fan.abs().max()))
        raise VolumeError(
            f"views reach over {math.degrees(arc):.4g} degrees; filtered back-projection needs {need:.4g}, half a turn "
            "and the fan: use sart or cg"
        )
    return steps[:, None] * _parker(along[:, None], signs * fan[None], max(extra, 1e-9))


def _fan_angles(geometry: ProjectionGeometry, orbit: Orbit) -> tuple[Tensor, float]:
    """Angles (columns,) of the columns from the central ray, and the sense of them along the orbit."""
    source, corner, column, row = geometry.views[0]
    rows, columns = geometry.size
    towards = corner + (rows - 1) / 2 * row + torch.arange(columns, dtype=torch.float64)[:, None] * column - source
    depth, aside = -(towards @ orbit.normals[0]), towards @ (column / column.norm())
    axis = torch.linalg.cross(orbit.normals[0], orbit.normals[1])
    turning = float(torch.linalg.cross(axis, orbit.normals[0]) @ column) * (
        1.0 if float(torch.remainder(orbit.angles[1] - orbit.angles[0], 2 * math.pi)) < math.pi else -1.0
    )
    return torch.atan2(aside, depth), -1.0 if turning > 0 else 1.0


def _parker(beta: Tensor, gamma: Tensor, extra: float) -> Tensor:
    """Parker's weights of views at beta (from 0) and rays at gamma, where the arc is pi + 2 extra."""
    rising = torch.sin(math.pi / 4 * beta / (extra - gamma).clamp(min=1e-9)).square()
    falling = torch.sin(math.pi / 4 * (math.pi + 2 * extra - beta) / (extra + gamma).clamp(min=1e-9)).square()
    weights = torch.where(beta < 2 * (extra - gamma), rising, torch.ones_like(rising))
    weights = torch.where(beta > math.pi - 2 * gamma, falling, weights)
    return torch.where((beta < 0) | (beta > math.pi + 2 * extra), 0.0, weights)


def _filtered(image: Tensor, geometry: ProjectionGeometry, orbit: Orbit, view: int, weights: Tensor) -> Tensor:
    """A projection weighted and filtered along its rows, (rows, columns), in 1/mm."""
    source, corner, column, row = geometry.views[view]
    rows, columns = geometry.size
    values, step = image.double() * weights, float(column.norm())
    if geometry.beam == "cone":
        across = torch.arange(columns, dtype=torch.float64)[None, :, None] * column
        down = torch.arange(rows, dtype=torch.float64)[:, None, None] * row
        towards = corner + across + down - source
        depth = float((source - corner) @ orbit.normals[view])
        values = values * (depth / towards.norm(dim=-1))
        step *= orbit.distance / depth  # on the detector that is moved to the middle
    padded = 1 << (2 * columns - 1).bit_length()
    ramp = torch.fft.rfft(_ramp(padded, step))
    spectrum = torch.fft.rfft(values, n=padded, dim=1) * ramp
    filtered: Tensor = torch.fft.irfft(spectrum, n=padded, dim=1)
    return filtered[:, :columns].float() * step


def _ramp(count: int, step: float) -> Tensor:
    """The ramp filter of samples ``step`` apart, in space and wrapped around (Kak and Slaney 1988, 3.30)."""
    places = torch.arange(count, dtype=torch.float64)
    places = torch.minimum(places, count - places)
    odd = places % 2 == 1
    kernel = torch.where(odd, -1 / (math.pi * places.clamp(min=1) * step).square(), 0.0)
    kernel[0] = 1 / (4 * step**2)
    return kernel


def _spread(image: Tensor, geometry: ProjectionGeometry, orbit: Orbit, view: int, grid: Grid) -> Tensor:
    """A filtered projection at every voxel of a grid, (D, H, W)."""
    source, corner, column, row = geometry.views[view]
    affine = torch.from_numpy(grid.affine)
    steps, origin = affine[:3, :3], affine[:3, 3]
    normal = torch.linalg.cross(column, row)
    # Coordinates on the detector are quotients of linear functions of the index.
    gram = torch.stack([torch.linalg.cross(row, normal), torch.linalg.cross(normal, column)]) / (normal @ normal)

    def linear(vector: Tensor, point: Tensor) -> Tensor:
        parts = [torch.arange(n, dtype=torch.float64) * (steps[:, k] @ vector) for k, n in enumerate(grid.size)]
        return (parts[0][:, None, None] + parts[1][:, None] + parts[2] + (origin - point) @ vector).float()

    if geometry.beam == "cone":
        depth = linear(normal, source)
        scale = float((corner - source) @ normal) / depth
        places = [linear(vector, source) * scale + float((source - corner) @ vector) for vector in gram]
        away = depth / float(-normal @ orbit.normals[view])
        weight = (orbit.distance / away).square()
    else:
        slope = [float(source @ vector) / float(source @ normal) for vector in gram]
        depth = linear(normal, corner)
        places = [linear(vector, corner) - depth * tilt for vector, tilt in zip(gram, slope, strict=True)]
        weight = torch.ones(1)
    rows, columns = geometry.size
    u = places[0] * (2 / max(columns - 1, 1)) - 1 if columns > 1 else places[0] * 0
    v = places[1] * (2 / max(rows - 1, 1)) - 1 if rows > 1 else places[1] * 0
    at = torch.stack([u, v], dim=-1).reshape(1, grid.size[0], -1, 2)
    sampled = F.grid_sample(image[None, None], at, align_corners=True)[0, 0].reshape(grid.size)
    return sampled * weight
