"""A scan in memory: voxels with the geometry that says where they lie in the patient."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard, cast

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from medgmae.data import conversion
from medgmae.data.formats.itk import write_image
from medgmae.data.geometry import Floats, Grid, VolumeError
from medgmae.data.notebook import volume_html

if TYPE_CHECKING:
    import SimpleITK
    from monai.data.meta_tensor import MetaTensor
    from nibabel.filebasedimages import FileBasedImage
    from nibabel.nifti1 import Nifti1Image


_SLAB = 1 << 18  # voxels


class HasSitk(Protocol):
    """An image of TorchIO."""

    def as_sitk(self) -> SimpleITK.Image:
        """As an image of SimpleITK."""


ScanLike: TypeAlias = "Volume | Tensor | NDArray[Any] | SimpleITK.Image | FileBasedImage | HasSitk"
"""A scan in memory, of this library or another; a MONAI ``MetaTensor`` is a tensor."""


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
        if not isinstance(data, Tensor):
            raise VolumeError(
                f"{source}: data is a {type(data).__name__}; expected a tensor (C, D, H, W). An array or an image of "
                "another library: medgmae.as_volume(image)"
            )
        if grid is None and not conversion.is_bare(data):
            raise VolumeError(
                f"{source}: data is a {type(data).__name__}, which has axes and a geometry of its own: "
                "medgmae.as_volume(image)"
            )
        if data.ndim != 4 or data.shape[0] < 1:
            add = ": data[None] adds the channel" if data.ndim == 3 else ""
            raise VolumeError(f"{source}: data has shape {tuple(data.shape)}; expected (C, D, H, W){add}")
        grid = Grid(data.shape[1:]) if grid is None else grid
        if not isinstance(grid, Grid):
            raise VolumeError(f"{source}: grid is {grid!r}; expected Grid(data.shape[1:], spacing)")
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
    def dtype(self) -> torch.dtype:
        """Type of the voxels."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """Where the voxels are."""
        return self.data.device

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
        return _single(self).contiguous()[None]

    def with_data(self, data: Tensor) -> Volume:
        """Other voxels (C', D, H, W) on the same grid."""
        return Volume(data, self.grid, self.source)

    def to(self, target: torch.dtype | torch.device | str) -> Volume:
        """The voxels as another type, or on another device, as in ``volume.to(torch.float32)``; the grid stays."""
        return self.with_data(self.data.to(target))

    def numpy(self) -> NDArray[Any]:
        """``numpy.asarray(volume)``: the voxels (C, D, H, W), shared where type and device allow it."""
        return np.asarray(self)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """The voxels (C, D, H, W), for ``numpy.asarray(volume)``: shared where type and device allow it."""
        data = self.data.detach()
        if data.dtype == torch.bfloat16:  # numpy has no such type
            data = data.float()
        array: NDArray[Any] = data.cpu().numpy()
        if copy is False and (data.data_ptr() != self.data.data_ptr() or dtype not in (None, array.dtype)):
            raise ValueError(f"{self} cannot be an array of {dtype or array.dtype} without a copy")
        return array.astype(array.dtype if dtype is None else dtype, copy=bool(copy))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the voxels with their geometry; the suffix decides the format, and everything but ``.nii`` and
        ``.mhd`` is compressed.

        Raises:
            VolumeError: an unknown suffix, a folder that does not exist, or a file that cannot be written.
        """
        write_image(self.to_sitk(), Path(path))

    def to_sitk(self) -> SimpleITK.Image:
        """A ``SimpleITK.Image``; several channels become vector pixels."""
        return conversion.to_sitk(self.data, self.grid)

    def to_nibabel(self) -> Nifti1Image:
        """A ``nibabel.Nifti1Image`` with axes (x, y, z), or (x, y, z, C) of several channels, and an affine to RAS.

        Raises:
            ImportError: nibabel is not installed.
        """
        return conversion.to_nibabel(self.data, self.grid)

    def to_metatensor(self) -> MetaTensor:
        """A MONAI ``MetaTensor`` (C, x, y, z) with an affine to RAS, what ``LoadImage`` gives with its channel first.

        Raises:
            ImportError: MONAI is not installed.
        """
        return conversion.to_metatensor(self.data, self.grid, self.source)

    def _repr_html_(self) -> str:
        return volume_html(self.data, self.grid, self.source)

    def __repr__(self) -> str:
        spacing = ", ".join(f"{s:.4g}" for s in self.spacing)
        what = f"{tuple(self.data.shape)} {self.data.dtype}"
        return f"Volume({what}, spacing ({spacing}) mm, {self.orientation}, {self.source})"


def as_volume(scan: ScanLike) -> Volume:
    """A scan in memory as a volume; a volume comes back as it is.

    Voxels keep their type, unsigned 16 and 32 bits widened; vector pixels and a fourth axis become channels. Images
    give their geometry in full: ``as_volume(nibabel.load(file))``, ``as_volume(SimpleITK.ReadImage(file))`` and
    ``as_volume(monai.transforms.LoadImage(ensure_channel_first=True)(file))`` have the voxels and the grid of
    ``read_volume(file)``. A bare array has none: voxels of 1 mm along the body's axes are assumed, and
    ``Volume(tensor, Grid(size, spacing))`` says better.

    Nothing is checked of the intensities, which may be NaN, as in a map that is known in part. ``read_volume(image)``
    refuses NaN and infinity, and so does whatever prepares a scan or runs a model on it.

    Args:
        scan: volume; array or tensor (D, H, W) or (C, D, H, W); ``SimpleITK.Image``; nibabel image with axes (x, y,
            z) or (x, y, z, C); MONAI ``MetaTensor`` (x, y, z) or (C, x, y, z); TorchIO image, or another object with
            ``as_sitk()``.

    Raises:
        VolumeError: another type or rank, axes that are not perpendicular, or numbers that are neither integers nor
            floats.
    """
    if isinstance(scan, Volume):
        return scan
    data, grid, source, _ = conversion.read(scan)
    return Volume(data, grid, source)


def is_scan(value: object) -> TypeGuard[ScanLike]:
    """Whether this is of a type that :func:`as_volume` takes."""
    return isinstance(value, Volume) or conversion.is_image(value)


def finite(volume: Volume) -> Volume:
    """The volume itself.

    Raises:
        VolumeError: NaN or infinite voxels.
    """
    data = volume.data
    if data.is_floating_point():
        bad = sum(int((~torch.isfinite(plane)).sum()) for plane in _planes(data))
        if bad:
            raise VolumeError(
                f"{volume.source}: {bad} of {data.numel()} voxels are NaN or infinite; expected finite intensities"
            )
    return volume


def _planes(data: Tensor) -> Iterator[Tensor]:
    """A slab (C, d, H, W) at a time, so that what is calculated of it takes little memory."""
    rows = max(1, _SLAB // max(1, data[:, :1].numel()))
    return (data[:, first : first + rows] for first in range(0, data.shape[1], rows))


def _single(volume: Volume) -> Tensor:
    """The voxels in float32.

    Raises:
        VolumeError: finite voxels of double precision that float32 cannot hold.
    """
    data = volume.data
    single = data.to(torch.float32)
    if data.dtype == torch.float64 and torch.isinf(single).any() and bool(torch.isfinite(data).all()):
        raise VolumeError(
            f"{volume.source}: voxels reach {float(data.abs().max()):.4g}, beyond float32 (3.4e38), which models take; "
            "expected intensities of a scan: scale them first"
        )
    return single


class HasMap(Protocol):
    """What ``extract_features`` gives."""

    @property
    def map(self) -> Volume | None:
        """(E, d, h, w) on the grid of patches."""


def map_of(features: ScanLike | HasMap) -> Volume:
    """The feature map (E, d, h, w) with its geometry: of what ``extract_features`` gives, or one by itself.

    Raises:
        VolumeError: features without a map, a map without a geometry, or something else.
    """
    if isinstance(features, Volume):
        return features
    held = getattr(features, "map", features)
    if isinstance(held, Volume):
        return held
    if held is None:
        raise VolumeError("the features have no map (map=None); expected those of extract_features(..., want_map=True)")
    if conversion.is_bare(features):
        raise VolumeError(
            f"the feature map is a {type(features).__name__} without a geometry; expected features.map, or "
            "medgmae.data.feature_map(tensor, scan), which puts a map of the scan's patches in its place"
        )
    return as_volume(cast(ScanLike, features))


def stack_channels(volumes: Sequence[ScanLike]) -> Volume:
    """Volumes on one grid, or what :func:`as_volume` takes, as the channels of one volume: the four contrasts of a
    brain study, say.

    Raises:
        VolumeError: no volumes, or grids that differ.
    """
    if len(volumes) == 0:
        raise VolumeError("no volumes to stack; expected at least one")
    first, *others = map(as_volume, volumes)
    if not others:
        return first
    for other in others:
        if other.size != first.size or np.abs(other.affine - first.affine).max() > 1e-2:
            raise VolumeError(f"{other} and {first} lie on different grids; resample one like the other first")
    return first.with_data(torch.cat([v.data for v in (first, *others)]))
