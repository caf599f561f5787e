"""FreeSurfer's MGH format (.mgh, .mgz), the layout of https://surfer.nmr.mgh.harvard.edu/fswiki/FsTutorial/MghFormat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medgmae.data.formats.headers import spatial_shape
from medgmae.data.formats.image import Image, Limits
from medgmae.data.formats.streams import Part, Stored, first_bytes, is_gzip, read_voxels
from medgmae.data.geometry import VolumeError

_LAYOUT: list[Any] = [
    ("version", ">i4"), ("size", ">i4", 4), ("type", ">i4"), ("dof", ">i4"), ("placed", ">i2"),
    ("spacing", ">f4", 3), ("axes", ">f4", (3, 3)), ("centre", ">f4", 3),
]  # fmt: skip
_VOXELS = 284  # byte at which they start
_TYPES = {0: "u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}
_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])


def is_mgh(path: Path, start: bytes) -> bool:
    """Whether a file's name and first bytes, unzipped, are those of an MGH file, which has no mark but its version."""
    return path.name.lower().endswith((".mgh", ".mgz", ".mgh.gz")) and start[:4] == b"\0\0\0\1"


def read_mgh(path: Path, limits: Limits) -> Image:
    """A ``.mgh`` or ``.mgz`` file.

    Raises:
        VolumeError: the file is truncated, broken or not a volume.
    """
    start = first_bytes(path, _VOXELS)
    if len(start) < _VOXELS:
        raise VolumeError(f"the file ends within its header, after {len(start)} bytes; expected {_VOXELS}")
    header = np.frombuffer(start, np.dtype(_LAYOUT), count=1)[0]
    sizes = [int(n) for n in header["size"]]
    if min(sizes) < 1 or int(header["type"]) not in _TYPES:
        raise VolumeError(
            f"the header says {sizes} voxels of type {int(header['type'])}; expected positive numbers and a type of "
            f"{sorted(_TYPES)}"
        )
    if header["placed"] <= 0:
        raise VolumeError("the header says nothing of spacing and position (goodRASFlag is 0); expected both")
    spacing = header["spacing"].astype(np.float64)
    if not (np.isfinite(spacing).all() and spacing.min() > 0):
        raise VolumeError(f"the spacing is {spacing.tolist()} (x, y, z); expected three positive numbers")
    linear = header["axes"].astype(np.float64).T * spacing  # a row of the file is the direction of an axis
    affine = np.eye(4)
    affine[:3, :3] = _RAS_TO_LPS @ linear
    affine[:3, 3] = _RAS_TO_LPS @ (header["centre"].astype(np.float64) - linear @ (np.array(sizes[:3]) / 2.0))
    shape = spatial_shape(sizes)
    with path.open("rb") as file:
        part = Part(path, "gzip" if is_gzip(file.read(3)) else "raw", offset=_VOXELS, tail=True)
    # scan parameters and tags may follow the voxels
    voxels, odd = read_voxels([part], Stored(np.dtype(_TYPES[int(header["type"])]), shape), limits)
    return Image(voxels, affine, shape[0] if shape[0] > 1 else 0, odd)
