"""A scan in memory: voxels with the geometry that says where they lie in the patient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medgmae.data.formats.itk import simpleitk
from medgmae.data.geometry import Floats, Grid, VolumeError


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Volume:
    """A scan, feature map or label map, and where its voxels lie.

    Attributes:
        data: (C, D, H, W); axes as SimpleITK's arrays give them, (z, y, x) of the file unless reoriented.
        grid: where the voxels lie; by default voxels of 1 mm with the first one at the origin, along the body's axes.
        source: the file that it came from, for messages.

    Raises:
        VolumeError: data of another rank, or of another size than the grid.
    """

    data: Tensor
    grid: Grid
    source: str

    def __init__(self, data: Tensor, grid: Grid | None = None, source: str = "volume") -> None:
        if data.ndim != 4 or data.shape[0] < 1:
            raise VolumeError(f"{source}: data has shape {tuple(data.shape)}; expected (C, D, H, W)")
        if grid is None:
            grid = Grid(data.shape[1:])
        if tuple(data.shape[1:]) != grid.size:
            raise VolumeError(
                f"{source}: data has shape {tuple(data.shape)}, and the grid has the size {grid.size}; expected data "
                f"of shape (C, {', '.join(map(str, grid.size))})"
            )
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "source", source)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, D, H, W)."""
        return tuple(self.data.shape)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between voxel centres (d, h, w)."""
        return self.grid.spacing

    @property
    def origin(self) -> tuple[float, float, float]:
        """LPS position (x, y, z) in millimetres of voxel (0, 0, 0)."""
        return self.grid.origin

    @property
    def direction(self) -> Floats:
        """3x3 array; column k is the LPS unit vector along which array axis k grows."""
        return self.grid.direction

    @property
    def affine(self) -> Floats:
        """4x4 matrix from index (d, h, w, 1) to LPS millimetres (x, y, z, 1)."""
        return self.grid.affine

    @property
    def channels(self) -> int:
        """C."""
        return self.data.shape[0]

    @property
    def size(self) -> tuple[int, int, int]:
        """Voxels (d, h, w)."""
        return self.grid.size

    @property
    def orientation(self) -> str:
        """Three letters, for the axes in file order (x, y, z) = (w, h, d): the side of the body towards which the
        index grows."""
        return self.grid.orientation

    @property
    def tensor(self) -> Tensor:
        """(1, C, D, H, W) float32, what a model takes."""
        return self.data.to(torch.float32).contiguous()[None]

    def with_data(self, data: Tensor) -> Volume:
        """Other voxels (C', D, H, W) on the same grid."""
        return Volume(data, self.grid, self.source)

    def __repr__(self) -> str:
        spacing = ", ".join(f"{s:.4g}" for s in self.spacing)
        what = f"{tuple(self.data.shape)} {self.data.dtype}"
        return f"Volume({what}, spacing ({spacing}) mm, {self.orientation}, {self.source})"


def to_sitk(volume: Volume) -> Any:
    """The volume as a ``SimpleITK.Image``; several channels become vector pixels."""
    sitk = simpleitk()

    data = volume.data.detach().cpu()
    if data.dtype in (torch.float16, torch.bfloat16):
        data = data.float()
    array = (data.to(torch.uint8) if data.dtype == torch.bool else data).numpy()
    vector = len(array) > 1
    image = sitk.GetImageFromArray(
        np.ascontiguousarray(np.moveaxis(array, 0, -1) if vector else array[0]), isVector=vector
    )
    image.SetSpacing(volume.spacing[::-1])
    image.SetOrigin(volume.origin)
    image.SetDirection(volume.direction[:, ::-1].ravel().tolist())
    return image


def stack_channels(volumes: Sequence[Volume]) -> Volume:
    """Volumes on one grid as the channels of one volume: the four contrasts of a brain study, say.

    Raises:
        VolumeError: no volumes, or grids that differ.
    """
    if not volumes:
        raise VolumeError("no volumes to stack; expected at least one")
    first = volumes[0]
    if len(volumes) == 1:
        return first
    for other in volumes[1:]:
        if other.size != first.size or np.abs(other.grid.affine - first.grid.affine).max() > 1e-2:
            raise VolumeError(f"{other} and {first} lie on different grids; resample one like the other first")
    return first.with_data(torch.cat([v.data for v in volumes]))
