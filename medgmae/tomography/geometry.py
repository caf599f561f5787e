"""Where X-ray source and detector stand in each view of a scan: vectors, and the usual ways to write them down.

All positions are millimetres in one frame (x, y, z), that of the reconstructed volume (LPS, as :class:`~medgmae.Grid`).
A view is four vectors: the source (or, of a parallel beam, the unit direction in which its rays travel), the centre of
pixel (row 0, column 0), and the steps per column and per row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from medgmae.data import VolumeError

Beam = Literal["cone", "parallel"]
FORMAT = "medgmae-projections-1"

# A source nearer to the axis than this is written in metres, as NAF's files are.
NEAREST_MM = 10.0


@dataclass(frozen=True, eq=False)
class ProjectionGeometry:
    """Source and detector of every view.

    Attributes:
        views: (V, 4, 3) float64, millimetres: source or direction, centre of pixel (0, 0), step per column, per row.
        size: pixels (rows, columns) of the detector.
        beam: "cone", of which a fan is the case of one row, or "parallel".

    Raises:
        VolumeError: views that are none: steps that are parallel or 0, a source in the plane of its detector, a
            direction of another length than 1, numbers that are not finite.
    """

    views: Tensor
    size: tuple[int, int]
    beam: Beam = "cone"

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", torch.as_tensor(self.views, dtype=torch.float64))
        object.__setattr__(self, "size", tuple(self.size))
        if self.beam not in get_args(Beam):
            raise VolumeError(f"beam is {self.beam!r}; expected one of {list(get_args(Beam))}")
        if self.views.dim() != 3 or self.views.shape[1:] != (4, 3):
            raise VolumeError(
                f"views have shape {tuple(self.views.shape)}; expected (V, 4, 3): source or direction, centre of pixel "
                "(0, 0), step per column, step per row"
            )
        if len(self.size) != 2 or min(self.size) < 1:
            raise VolumeError(f"the detector's size is {self.size}; expected pixels (rows, columns)")
        self._check(~self.views.isfinite().all((1, 2)), "have numbers that are not finite")
        source, corner, column, row = self.views.unbind(1)
        normal = torch.linalg.cross(column, row)
        length = column.norm(dim=1) * row.norm(dim=1)
        self._check(normal.norm(dim=1) <= 1e-9 * length, "have steps per column and per row that are parallel, or 0")
        normal = normal / normal.norm(dim=1, keepdim=True)
        if self.beam == "cone":
            towards = (corner - source) * normal
            self._check(towards.sum(1).abs() <= 1e-9 * (corner - source).norm(dim=1), "have a source in the detector")
        else:
            self._check((source.norm(dim=1) - 1).abs() > 1e-6, "have a direction whose length is not 1")
            self._check((source * normal).sum(1).abs() <= 1e-9, "have rays that run in the plane of the detector")

    def _check(self, wrong: Tensor, what: str) -> None:
        if wrong.any():
            numbers = wrong.nonzero().flatten().tolist()
            shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
            raise VolumeError(f"{len(numbers)} of {len(wrong)} views {what}: {shown}")

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> ProjectionGeometry:
        """Some of the views, in this order."""
        chosen = index if isinstance(index, slice | Tensor) else torch.tensor(list(index), dtype=torch.long)
        return ProjectionGeometry(self.views[chosen], self.size, self.beam)

    def __repr__(self) -> str:
        rows, columns = self.size
        return f"ProjectionGeometry({len(self)} views of {rows} x {columns} pixels, {self.beam} beam)"

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """Distance of pixels along a column and along a row, (row step, column step), the mean of the views."""
        steps = self.views[:, 2:].norm(dim=2).mean(0).tolist()
        return steps[1], steps[0]

    def pixels(self, points: Tensor) -> Tensor:
        """Where points (n, 3) in millimetres are seen: (V, n, 2), (row, column), which need not be whole."""
        source, corner, column, row = (part[:, None] for part in self.views.unbind(1))
        normal = torch.linalg.cross(column, row)
        along = source.expand(-1, len(points), -1) if self.beam == "parallel" else points.double() - source
        start = points.double().expand(len(self), -1, -1) if self.beam == "parallel" else source
        t = ((corner - start) * normal).sum(-1, keepdim=True) / (along * normal).sum(-1, keepdim=True)
        place, square = start + t * along - corner, (normal * normal).sum(-1)
        columns = (torch.linalg.cross(row, normal) * place).sum(-1) / square
        rows = (torch.linalg.cross(normal, column) * place).sum(-1) / square
        return torch.stack([rows, columns], dim=-1)

    def binned(self, factor: int) -> ProjectionGeometry:
        """The geometry of means of ``factor`` x ``factor`` pixels; rows and columns left over are cut off."""
        rows, columns = (n // factor for n in self.size)
        if factor < 1 or min(rows, columns) < 1:
            raise VolumeError(f"pixels of {factor} x {factor} of a detector of {self.size}; expected fewer")
        source, corner, column, row = self.views.unbind(1)
        shifted = corner + (column + row) * ((factor - 1) / 2)
        return ProjectionGeometry(
            torch.stack([source, shifted, column * factor, row * factor], dim=1), (rows, columns), self.beam
        )

    def to_json(self) -> dict[str, Any]:
        """As an object of our own format: the vectors."""
        return {
            "format": FORMAT,
            "beam": self.beam,
            "unit": "mm",
            "size": list(self.size),
            "views": self.views.tolist(),
        }

    def save(self, path: str | Path) -> None:
        """Write our JSON."""
        Path(path).write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")


def circular_geometry(
    angles: Sequence[float],
    size: Sequence[int],
    pixel_mm: float | Sequence[float],
    *,
    sid: float | None = None,
    sdd: float | None = None,
    offset_mm: Sequence[float] = (0.0, 0.0),
    centre_mm: Sequence[float] = (0.0, 0.0, 0.0),
) -> ProjectionGeometry:
    """Views on a circle about an axis along z, as of a C-arm or a CT without a table's motion.

    At angle t the source stands at sid (cos t, sin t, 0) from the circle's middle, columns of the detector grow along
    (-sin t, cos t, 0), rows along -z: the top row is the upper end of the patient.

    Args:
        angles: in radians.
        size: pixels (rows, columns).
        pixel_mm: between pixels, (row step, column step) or one number for both.
        sid: from source to axis; None, with ``sdd``, for a parallel beam.
        sdd: from source to detector.
        offset_mm: of the detector's middle from the central ray, along columns' and rows' steps: (column, row).
        centre_mm: the circle's middle (x, y, z), such as that of the patient.

    Raises:
        VolumeError: distances or angles in other units, a source behind the detector.
    """
    t = torch.as_tensor(angles, dtype=torch.float64)
    if t.dim() != 1 or not t.isfinite().all():
        raise VolumeError(f"angles have shape {tuple(t.shape)}; expected one finite number for every view")
    check_angles(t)
    rows_columns = tuple(int(n) for n in size)
    row_mm, column_mm = (pixel_mm, pixel_mm) if isinstance(pixel_mm, int | float) else pixel_mm
    if min(row_mm, column_mm) <= 0:
        raise VolumeError(f"pixel_mm is {pixel_mm}; expected positive millimetres")
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    outward = torch.stack([t.cos(), t.sin(), zero], dim=1)
    column = column_mm * torch.stack([-t.sin(), t.cos(), zero], dim=1)
    row = row_mm * torch.stack([zero, zero, -one], dim=1)
    centre = torch.tensor(list(centre_mm), dtype=torch.float64)
    if (sid is None) != (sdd is None):
        raise VolumeError(f"sid is {sid} and sdd {sdd}; expected both, or none for a parallel beam")
    if sid is None or sdd is None:
        source, middle, beam = -outward, centre.expand_as(outward), "parallel"
    else:
        check_distances(sid, sdd)
        source, middle, beam = centre + sid * outward, centre + (sid - sdd) * outward, "cone"
    places = [
        (n - 1) / 2 - shift / step
        for n, shift, step in zip(reversed(rows_columns), offset_mm, (column_mm, row_mm), strict=True)
    ]
    corner = middle - places[0] * column - places[1] * row
    return ProjectionGeometry(
        torch.stack([source, corner, column, row], dim=1), cast(Any, rows_columns), cast(Beam, beam)
    )


def check_distances(sid: float, sdd: float) -> None:
    """Raise VolumeError unless a source at ``sid`` and a detector at ``sdd`` from it make a scanner in millimetres."""
    if not (0 < sid < sdd):
        raise VolumeError(f"source to axis is {sid:g} and source to detector {sdd:g}; expected 0 < sid < sdd")
    if sid < NEAREST_MM:
        raise VolumeError(f"source to axis is {sid:g}; expected millimetres: it looks like metres, times 1000")


def check_angles(radians: Tensor) -> None:
    """Raise VolumeError for angles whose spread shows that they are in degrees, or in another unit."""
    if len(radians) > 1:
        spread = float(radians.max() - radians.min())
        if spread > 4 * math.pi:
            raise VolumeError(
                f"angles reach over {spread:.3g} radians; expected at most two turns: they look like degrees, pass "
                "radians"
            )
        if 0 < spread < 0.2:
            raise VolumeError(
                f"angles reach over {spread:.3g} radians only; expected more: were radians taken for degrees?"
            )


def rtk_geometry(
    parameters: Tensor, size: Sequence[int], pixel_mm: Sequence[float], origin_mm: Sequence[float] | None = None
) -> ProjectionGeometry:
    """Views of RTK's circular geometry (IEC 61217; its axis of rotation is y).

    Source and detector stand in a frame that turns by the three angles: the source at (source offset x, y, SID), the
    point (u, v) of the detector at (u + projection offset x, v + projection offset y, SID - SDD). The frame is turned
    by Rz(-in plane) Rx(-out of plane) Ry(-gantry), as rtk::ThreeDCircularProjectionGeometry documents.

    Args:
        parameters: (V, 9): SID, SDD, gantry angle, projection offsets x and y, out of plane and in plane angles, source
            offsets x and y; millimetres and degrees. SDD 0 is a parallel beam.
        size: pixels (rows, columns).
        pixel_mm: (row step, column step).
        origin_mm: position (u, v) of pixel (0, 0); None: the detector is centred.

    Raises:
        VolumeError: views with and without SDD 0 together, or see :class:`ProjectionGeometry`.
    """
    p = torch.as_tensor(parameters, dtype=torch.float64)
    if p.dim() != 2 or p.shape[1] != 9:
        raise VolumeError(f"RTK's parameters have shape {tuple(p.shape)}; expected (V, 9)")
    flat = p[:, 1] == 0
    if flat.any() and not flat.all():
        raise VolumeError(
            f"{int(flat.sum())} of {len(p)} views have SDD 0, a parallel beam, the others not; reconstruct them apart"
        )
    gantry, out, within = (torch.deg2rad(p[:, k]) for k in (2, 5, 6))
    turn = _about(2, -within) @ _about(0, -out) @ _about(1, -gantry)  # fixed to turning frame
    back = turn.mT
    rows, columns = (int(n) for n in size)
    row_mm, column_mm = pixel_mm
    u0, v0 = origin_mm if origin_mm is not None else (-(columns - 1) / 2 * column_mm, -(rows - 1) / 2 * row_mm)
    corner = torch.stack([u0 + p[:, 3], v0 + p[:, 4], p[:, 0] - p[:, 1]], dim=1)
    source = torch.stack([p[:, 7], p[:, 8], p[:, 0]], dim=1)
    if flat.any():
        source = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64).expand(len(p), 3)
    steps = torch.tensor([[column_mm, 0.0, 0.0], [0.0, row_mm, 0.0]], dtype=torch.float64).expand(len(p), 2, 3)
    inside = torch.cat([source[:, None], corner[:, None], steps], dim=1)
    return ProjectionGeometry(inside @ back.mT, (rows, columns), "parallel" if flat.any() else "cone")


def _about(axis: int, angle: Tensor) -> Tensor:
    """Rotations (V, 3, 3) about a coordinate axis."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix = torch.eye(3, dtype=torch.float64).repeat(len(angle), 1, 1)
    matrix[:, first, first] = matrix[:, second, second] = angle.cos()
    matrix[:, first, second], matrix[:, second, first] = -angle.sin(), angle.sin()
    return matrix


def astra_geometry(vectors: Tensor, size: Sequence[int], beam: Beam) -> ProjectionGeometry:
    """Views of ASTRA's ``cone_vec`` or ``parallel3d_vec``.

    Args:
        vectors: (V, 12): source or direction, middle of the detector, step per column, step per row.
        size: pixels (rows, columns).
        beam: "cone" for ``cone_vec``.
    """
    v = torch.as_tensor(vectors, dtype=torch.float64)
    if v.dim() != 2 or v.shape[1] != 12:
        raise VolumeError(f"ASTRA's vectors have shape {tuple(v.shape)}; expected (V, 12)")
    source, middle, column, row = v.reshape(-1, 4, 3).unbind(1)
    rows, columns = (int(n) for n in size)
    if beam == "parallel":
        source = source / source.norm(dim=1, keepdim=True)
    corner = middle - (columns - 1) / 2 * column - (rows - 1) / 2 * row
    return ProjectionGeometry(torch.stack([source, corner, column, row], dim=1), (rows, columns), beam)
