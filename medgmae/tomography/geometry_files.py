"""Files of geometry: our JSON, RTK's XML, ASTRA's vectors."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medgmae.data import VolumeError
from medgmae.tomography.geometry import (
    FORMAT,
    Beam,
    ProjectionGeometry,
    astra_geometry,
    check_angles,
    circular_geometry,
    rtk_geometry,
)

MAX_BYTES = 64 << 20
_CIRCLE = ("angles_deg", "size", "pixel_mm")
_RTK = {
    "SourceToIsocenterDistance": None,
    "SourceToDetectorDistance": None,
    "GantryAngle": None,
    "ProjectionOffsetX": 0.0,
    "ProjectionOffsetY": 0.0,
    "OutOfPlaneAngle": 0.0,
    "InPlaneAngle": 0.0,
    "SourceOffsetX": 0.0,
    "SourceOffsetY": 0.0,
}
"""The nine numbers of a view and what RTK takes where a file leaves one out; None: it must be there."""
# RTK writes neither where it is 0 in every view: the first of a parallel beam, the second of a single view.
_UNWRITTEN = ("SourceToDetectorDistance", "GantryAngle")


@dataclass(frozen=True)
class Detector:
    """What an image says of the detector it is of.

    size: pixels (rows, columns). pixel_mm: (row step, column step). origin_mm: (u, v) of pixel (0, 0).
    """

    size: tuple[int, int]
    pixel_mm: tuple[float, float] | None = None
    origin_mm: tuple[float, float] | None = None


def read_geometry(path: str | Path, detector: Detector | None = None, beam: Beam = "cone") -> ProjectionGeometry:
    """Geometry from a file, by its ending.

    - ``.json``, our own: ``{"format": "medgmae-projections-1", "beam": "cone", "unit": "mm", "size": [rows, columns],
      "views": [[source, pixel00, du, dv], ...]}``; or, for a circle, ``{"format", "sid", "sdd", "angles_deg",
      "pixel_mm", "size", "offset_mm", "centre_mm"}``, see :func:`~medgmae.tomography.circular_geometry`; without sid
      and sdd a parallel beam.
    - ``.xml``: RTK's circular geometry; the detector is that of the image.
    - ``.npy`` or text: ASTRA's vectors, twelve numbers in a row for each view; ``beam`` says whether they are of
      ``cone_vec`` or ``parallel3d_vec``.

    Args:
        path: of the file.
        detector: of the image that the geometry is for, where the file does not say it.
        beam: of ASTRA's vectors.

    Raises:
        VolumeError: no such file, another format, or numbers that are no geometry.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if len(content) > MAX_BYTES:
            raise VolumeError(f"{len(content)} bytes; expected a geometry of at most {MAX_BYTES}")
        kind = path.suffix.lower()
        if kind == ".json":
            return _of_json(json.loads(content))
        if detector is None:
            raise VolumeError("says nothing of the detector's pixels; read it with the projections it is for")
        if kind == ".xml":
            return _of_xml(content, detector)
        rows = np.load(path, allow_pickle=False) if kind == ".npy" else np.loadtxt(path, ndmin=2)
        return astra_geometry(torch.from_numpy(np.asarray(rows, dtype=np.float64)), detector.size, beam)
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ET.ParseError) as error:
        raise VolumeError(
            f"{path}: no geometry can be read ({str(error)[:200]}); expected our JSON, RTK's XML or ASTRA's vectors"
        ) from error


def _of_json(content: Any) -> ProjectionGeometry:
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        shown = content.get("format") if isinstance(content, Mapping) else type(content).__name__
        raise VolumeError(f"its format is {str(shown)[:60]!r}; expected {FORMAT!r}")
    if content.get("unit", "mm") != "mm":
        raise VolumeError(f"its unit is {content['unit']!r}; expected 'mm'")
    if "views" in content:
        size = content.get("size")
        if size is None:
            raise VolumeError('has views but no size; expected "size": [rows, columns]')
        return ProjectionGeometry(
            torch.tensor(content["views"], dtype=torch.float64), tuple(size), content.get("beam", "cone")
        )
    missing = [name for name in _CIRCLE if name not in content]
    if missing:
        raise VolumeError(f"lacks {', '.join(missing)}; expected views, or a circle with {', '.join(_CIRCLE)}")
    angles = torch.tensor(content["angles_deg"], dtype=torch.float64)
    return circular_geometry(
        torch.deg2rad(angles).tolist(),
        content["size"],
        content["pixel_mm"],
        sid=content.get("sid"),
        sdd=content.get("sdd"),
        offset_mm=content.get("offset_mm", (0.0, 0.0)),
        centre_mm=content.get("centre_mm", (0.0, 0.0, 0.0)),
    )


def _of_xml(content: bytes, detector: Detector) -> ProjectionGeometry:
    if b"<!ENTITY" in content:  # which could expand to any size; RTK's files have none
        raise VolumeError("declares XML entities, which RTK's geometry does not have")
    root = ET.fromstring(content)
    if root.tag != "RTKThreeDCircularGeometry":
        raise VolumeError(f"its root is <{root.tag}>; expected <RTKThreeDCircularGeometry>")
    views = root.findall("Projection")
    shared = {name: 0.0 for name in _UNWRITTEN if all(view.find(name) is None for view in views)}
    # What all views share stands once, above them.
    shared |= {name: float(found) for name in _RTK if (found := root.findtext(name)) is not None}
    rows = []
    for number, view in enumerate(views):
        own = {name: float(found) for name in _RTK if (found := view.findtext(name)) is not None}
        row = [own.get(name, shared.get(name, usual)) for name, usual in _RTK.items()]
        if None in row:
            lacking = [name for name, value in zip(_RTK, row, strict=True) if value is None]
            raise VolumeError(f"view {number} lacks {', '.join(lacking)}")
        rows.append(row)
    if not rows:
        raise VolumeError("has no <Projection>")
    if detector.pixel_mm is None:
        raise VolumeError("says nothing of the size of pixels, nor does the image; use MetaImage, whose header does")
    parameters = torch.tensor(rows, dtype=torch.float64)
    check_angles(torch.deg2rad(parameters[:, 2]))
    return rtk_geometry(parameters, detector.size, detector.pixel_mm, detector.origin_mm)


def natural(name: str) -> list[tuple[int, int, str]]:
    """Key that puts view10 behind view9."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]
