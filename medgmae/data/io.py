"""A scan from disk and back: voxels with the geometry that says where they lie in the patient."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from medgmae.data import conversion
from medgmae.data.conversion import grid_of
from medgmae.data.formats import dicom
from medgmae.data.formats.arrays import is_array, read_array
from medgmae.data.formats.headers import is_text_header
from medgmae.data.formats.image import Image, Limits
from medgmae.data.formats.metaimage import read_metaimage
from medgmae.data.formats.mgh import is_mgh, read_mgh
from medgmae.data.formats.nifti import header_of_pair, is_nifti, read_nifti
from medgmae.data.formats.nrrd import read_nrrd
from medgmae.data.formats.streams import first_bytes, is_gzip, regular
from medgmae.data.geometry import VolumeError
from medgmae.data.volume import ScanLike, Volume, as_volume, finite

_log = logging.getLogger("medgmae")
_READABLE = (
    "NIfTI (.nii, .nii.gz, or a pair .hdr and .img), MetaImage (.mha, .mhd), NRRD (.nrrd, .nhdr), FreeSurfer (.mgz), "
    "DICOM (a folder, or one multi-frame file) or arrays (.npy, .npz)"
)


def _guarded(path: Path, read: Callable[[], Image]) -> Image:
    """``read()`` with every failure as a VolumeError that names the path."""
    try:
        return read()
    except VolumeError as error:
        text = str(error)
        raise type(error)(text if text.startswith(str(path)) else f"{path}: {text}") from None
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RuntimeError, OverflowError) as error:  # nothing known raises these; if something does, say so
        raise VolumeError(f"{path}: cannot be read: {type(error).__name__}: {error}; expected {_READABLE}") from None
    except MemoryError:
        raise VolumeError(
            f"{path}: cannot be read: its voxels need more memory than this process gets; expected a smaller scan, or "
            "a machine with more"
        ) from None


def _expect_channels(stored: int, frames: int, shape: str, channels: int | None) -> None:
    """``frames`` is the length of a fourth axis of the file, 0 when there is none."""
    if channels is None and frames:
        raise VolumeError(
            f"the image is 4-D, {shape} with {frames} frames; expected a 3-D volume "
            f"(channels={frames} reads them as channels)"
        )
    if channels is not None and stored != channels:
        raise VolumeError(f"the image has {stored} channel(s), {shape}; expected {channels}")


def _read_file(path: Path, limits: Limits) -> Image:
    """A file by its first bytes, not by its name."""
    path = header_of_pair(path)
    regular(path)
    with path.open("rb") as file:
        start = file.read(4096)
    if not start:
        raise VolumeError(f"the file is empty; expected {_READABLE}")
    if is_gzip(start):
        start = first_bytes(path, 540)
        if not is_nifti(start) and not is_mgh(path, start):
            raise VolumeError(f"a gzip file of something that is not NIfTI; expected {_READABLE}")
    if is_nifti(start):
        return read_nifti(path, limits)
    if is_mgh(path, start):
        return read_mgh(path, limits)
    if is_array(start):
        return read_array(path, limits)
    if start[128:132] == b"DICM":
        return dicom.read_file(path, limits)
    if is_text_header(start):
        return read_nrrd(path, limits) if start[:4] == b"NRRD" else read_metaimage(path, limits)
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
    path: str | os.PathLike[str] | ScanLike,
    *,
    series: str | None = None,
    files: Sequence[Path] | None = None,
    channels: int | None = None,
    max_bytes: int | None = None,
    allow_outside: bool = False,
) -> Volume:
    """A scan from a file or a DICOM folder, in its stored voxel type (unsigned 16 and 32 bits widened) and orientation;
    or an image that another library has read, with the same checks.

    Voxels that the file scales are float32, whole numbers of DICOM int16 or int32. Several values per voxel (vector
    pixels, RGB) become channels. A 4-D image is an error unless ``channels`` is the length of its fourth axis: a time
    series is not a multi-channel scan. Arrays are (D, H, W), or (C, D, H, W) with ``channels``, of voxels of 1 mm.
    Choices that may surprise (a geometry that is assumed, bytes after the end of a gzip stream, lossy compression) are
    logged as warnings, with the file's name.

    Args:
        path: NIfTI, MetaImage, NRRD, FreeSurfer MGH or multi-frame DICOM file, or an array (.npy; the only one of an
            .npz, or its "volume"), recognised by its content; or a folder, searched with its subfolders for DICOM; or
            an image of SimpleITK, nibabel, MONAI (``MetaTensor``) or TorchIO. Compressed and multi-frame DICOM need the
            extra ``medgmae[dicom]``.
        series: SeriesInstanceUID, needed when a folder holds several.
        files: of a folder, look at these files alone, such as the slices that ``data.find_series`` found.
        channels: the number of channels expected; ``None`` accepts any number of a 3-D image.
        max_bytes: what the voxels that a header claims may take in memory, at four bytes each or more; by default a
            quarter of the memory that is free. Reading takes at most three times the float32 volume, and the file.
        allow_outside: whether a MetaImage or NRRD header may name data files that lie elsewhere than beside or below
            it; a header of somebody else could name any file.

    Raises:
        VolumeError: with the path, what is there and what was expected: a missing, empty, truncated, broken or unknown
            file, more voxels than ``max_bytes``, NaN or infinite voxels, a spacing that is not positive, another rank
            or channel count, several series, slices that are missing, doubled or of mixed geometry; an array in memory,
            which has no geometry (:func:`~medgmae.data.as_volume` takes it).
    """
    if not isinstance(path, str | os.PathLike):
        if series is not None or files is not None:
            what = "files=..." if series is None else f"series={series!r}"
            raise VolumeError(f"{what} is for DICOM folders, and this is a {type(path).__name__}")
        return _read_image(path, channels)
    path = Path(path)
    limits = Limits(allow_outside=allow_outside) if max_bytes is None else Limits(max_bytes, allow_outside)
    return _guarded_volume(path, read_image(path, limits, series, files), channels)


def read_image(path: Path, limits: Limits, series: str | None = None, files: Sequence[Path] | None = None) -> Image:
    """What a file or DICOM folder holds, for :func:`read_volume` and for what looks at files without a volume.

    Raises:
        VolumeError: with the path, as of :func:`read_volume`, but for what is wrong with the voxels' values.
    """
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null byte
        raise VolumeError(f"{str(path)!r}: not a path: {error}; expected {_READABLE}") from None
    if not exists:
        raise VolumeError(f"{path}: no such file or folder; expected {_READABLE}")
    if not is_folder and (series is not None or files is not None):
        what = "files=..." if series is None else f"series={series!r}"
        raise VolumeError(f"{path}: {what} is for DICOM folders, and this is a file")
    return _guarded(
        path, lambda: dicom.read_folder(path, series, limits, files) if is_folder else _read_file(path, limits)
    )


def _guarded_volume(path: Path, image: Image, channels: int | None) -> Volume:
    """The volume of what was read from ``path``, checked."""
    size = image.voxels.shape[1:]
    try:
        _expect_channels(len(image.voxels), image.frames, " x ".join(map(str, size[::-1])), channels)
        grid = grid_of(image.affine, size)
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}") from None
    volume = finite(Volume(torch.from_numpy(image.voxels), grid, str(path)))
    for note in image.notes:
        _log.warning("%s: %s", path, note)
    return volume


def write_volume(volume: ScanLike, path: str | os.PathLike[str]) -> None:
    """``volume.save(path)``, for any scan in memory that :func:`~medgmae.data.as_volume` takes.

    Raises:
        VolumeError: an unknown suffix, a folder that does not exist, or a file that cannot be written.
    """
    as_volume(volume).save(path)
