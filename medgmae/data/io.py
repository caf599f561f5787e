"""A scan from disk and back: voxels with the geometry that says where they lie in the patient."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from medgmae.data import conversion
from medgmae.data.conversion import from_sitk, grid_of, tensor_of
from medgmae.data.formats import dicom, nifti
from medgmae.data.formats.headers import check_text_header, is_text_header
from medgmae.data.formats.itk import named, quiet, reason, simpleitk
from medgmae.data.geometry import Grid, VolumeError
from medgmae.data.volume import ScanLike, Volume, as_volume, finite

_log = logging.getLogger("medgmae")
_READABLE = (
    "NIfTI (.nii, .nii.gz), MetaImage (.mha, .mhd), NRRD (.nrrd, .nhdr) or DICOM (a folder, or one multi-frame file)"
)


def _guarded(path: Path, read: Callable[[], tuple[Grid, Tensor]]) -> tuple[Grid, Tensor]:
    """``read()`` with every failure as a VolumeError that names the path."""
    try:
        return read()
    except VolumeError as error:
        text = str(error)
        raise VolumeError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (RuntimeError, MemoryError, zlib.error, ValueError, OverflowError) as error:
        raise VolumeError(f"{path}: cannot be read: {reason(error)}; expected {_READABLE}") from None


def _expect_channels(stored: int, frames: int, shape: str, channels: int | None) -> None:
    """``frames`` is the length of a fourth axis of the file, 0 when there is none."""
    if channels is None and frames:
        raise VolumeError(
            f"the image is 4-D, {shape} with {frames} frames; expected a 3-D volume "
            f"(channels={frames} reads the last axis as channels)"
        )
    if channels is not None and stored != channels:
        raise VolumeError(f"the image has {stored} channel(s), {shape}; expected {channels}")


def _read_nifti(path: Path, channels: int | None) -> tuple[Grid, Tensor]:
    image = nifti.read_nifti(path)
    size = image.voxels.shape[1:]
    _expect_channels(len(image.voxels), image.frames, " x ".join(map(str, size[::-1])), channels)
    return grid_of(image.affine, size), tensor_of(image.voxels)


def _read_itk(path: Path, channels: int | None, bytes_on_disk: int) -> tuple[Grid, Tensor]:
    """Anything that SimpleITK reads; the header is judged before memory is taken for the voxels."""
    sitk = simpleitk()

    reader = sitk.ImageFileReader()
    reader.SetFileName(named(path))
    with quiet():
        reader.ReadImageInformation()
    size, rank = reader.GetSize(), reader.GetDimension()
    shape = " x ".join(map(str, size))
    while rank > 3 and size[rank - 1] == 1:
        rank -= 1
    if rank not in (3, 4):
        raise VolumeError(f"the image is {rank}-D, {shape}; expected a 3-D volume")
    bytes_claimed = int(np.prod(size, dtype=object)) * reader.GetNumberOfComponents()
    if bytes_claimed > min(nifti.MAX_BYTES, nifti.MAX_INFLATION * bytes_on_disk):
        raise VolumeError(
            f"the header claims {shape} voxels, more than {bytes_on_disk} bytes can hold; expected a size that fits"
        )
    with quiet():
        image = reader.Execute()
    data, grid = from_sitk(image)
    _expect_channels(len(data), size[3] if rank == 4 else 0, " x ".join(map(str, size[:3])), channels)
    return grid, data


def _read_dicom_folder(path: Path, series: str | None, channels: int | None) -> tuple[Grid, Tensor]:
    with quiet():
        stack = dicom.read_folder(path, series)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = stack.direction * np.array(stack.spacing), stack.origin
    size = stack.voxels.shape[1:]
    _expect_channels(len(stack.voxels), 0, " x ".join(map(str, size[::-1])), channels)
    return grid_of(affine, size), tensor_of(stack.voxels)


def _read_file(path: Path, channels: int | None) -> tuple[Grid, Tensor]:
    """A file by its first bytes, not by its name."""
    with path.open("rb") as file:
        start = file.read(4096)
    if not start:
        raise VolumeError(f"the file is empty; expected {_READABLE}")
    if start[:2] == b"\x1f\x8b":
        start = zlib.decompressobj(wbits=31).decompress(start, 540)
        if not nifti.is_nifti(start):
            raise VolumeError(f"a gzip file of something that is not NIfTI; expected {_READABLE}")
    if nifti.is_nifti(start):
        return _read_nifti(path, channels)
    if start[128:132] == b"DICM":
        grid, data = _read_itk(path, channels, path.stat().st_size)
        if grid.size[0] == 1:
            raise VolumeError("one DICOM slice; expected a volume: give the folder of the series")
        return grid, data
    if is_text_header(start):
        return _read_itk(path, channels, check_text_header(path))
    raise VolumeError(f"unknown file type (it starts with {start[:8]!r}); expected {_READABLE}")


def _read_image(image: ScanLike, channels: int | None) -> Volume:
    """An image in memory, with the checks of a file."""
    if isinstance(image, Volume):
        volume, frames = image, 0
    elif conversion.is_bare(image):
        raise VolumeError(
            f"{type(image).__name__} is an array without a geometry; expected a path or an image with its geometry. "
            "For voxels of 1 mm: medgmae.as_volume(array); for others: Volume(tensor, Grid(size, spacing))"
        )
    else:
        data, grid, source, frames = conversion.read(image)
        volume = Volume(data, grid, source)
    try:
        _expect_channels(volume.channels, frames, " x ".join(map(str, volume.size[::-1])), channels)
    except VolumeError as error:
        raise VolumeError(f"{volume.source}: {error}") from None
    return finite(volume)


def read_volume(
    path: str | os.PathLike[str] | ScanLike, *, series: str | None = None, channels: int | None = None
) -> Volume:
    """A scan from a file or a DICOM folder, in its stored voxel type (unsigned 16 and 32 bits widened) and orientation;
    or an image that another library has read, with the same checks.

    Several values per voxel (vector pixels, RGB) become channels. A 4-D image is an error unless ``channels`` is the
    length of its last axis: a time series is not a multi-channel scan.

    Args:
        path: NIfTI, MetaImage, NRRD or multi-frame DICOM file, recognised by its content; or a folder, searched
            with its subfolders for DICOM; or an image of SimpleITK, nibabel, MONAI (``MetaTensor``) or TorchIO.
        series: SeriesInstanceUID, needed when a folder holds several.
        channels: the number of channels expected; ``None`` accepts any number of a 3-D image.

    Raises:
        VolumeError: with the path, what is there and what was expected: a missing, empty, truncated, broken or unknown
            file, NaN or infinite voxels, a spacing that is not positive, another rank or channel count,
            several series, slices that are missing, doubled or of mixed geometry; an array, which has no geometry
            (:func:`~medgmae.data.as_volume` takes it).
    """
    if not isinstance(path, str | os.PathLike):
        if series is not None:
            raise VolumeError(f"series={series!r} is for DICOM folders, and this is a {type(path).__name__}")
        return _read_image(path, channels)
    path = Path(path)
    if not path.exists():
        raise VolumeError(f"{path}: no such file or folder; expected {_READABLE}")
    if path.is_dir():
        grid, data = _guarded(path, lambda: _read_dicom_folder(path, series, channels))
    elif series is not None:
        raise VolumeError(f"{path}: series={series!r} is for DICOM folders, and this is a file")
    else:
        grid, data = _guarded(path, lambda: _read_file(path, channels))
    return finite(Volume(data, grid, str(path)))


def write_volume(volume: ScanLike, path: str | os.PathLike[str]) -> None:
    """``volume.save(path)``, for any scan in memory that :func:`~medgmae.data.as_volume` takes.

    Raises:
        VolumeError: an unknown suffix, a folder that does not exist, or a file that cannot be written.
    """
    as_volume(volume).save(path)
