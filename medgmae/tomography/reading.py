"""Projections from files: image stacks with a geometry beside them, and the data sets of published methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgmae.data import VolumeError, read_volume
from medgmae.data.formats.itk import named, quiet, reason, simpleitk
from medgmae.tomography.geometry import Beam, ProjectionGeometry
from medgmae.tomography.geometry_files import Detector, natural, read_geometry
from medgmae.tomography.projections import Projections, check_stack, line_integrals
from medgmae.tomography.scenes import is_scene, read_naf, read_scene

_IMAGES = (".npy", ".tif", ".tiff")
_PICKLES = (".pickle", ".pkl")


def read_projections(
    source: str | Path,
    geometry: str | Path | ProjectionGeometry | None = None,
    *,
    beam: Beam = "cone",
    i0: float | None = None,
    unit_mm: float | None = None,
) -> Projections:
    """Projections with their geometry.

    - a stack in one file: MetaImage, NRRD or NIfTI of (columns, rows, views), as RTK writes it, or ``.npy`` (V, H, W);
    - a folder of ``.npy`` or TIFF images, a view each, in the order of the numbers in their names;
    - a folder of R2-Gaussian, with ``meta_data.json``; needs ``unit_mm``;
    - a pickle of NAF or SAX-NeRF, of which nothing but numbers, text and arrays is read.

    The first two need ``geometry``, a file of :func:`~medgmae.tomography.read_geometry`; the others have their own.

    Args:
        source: file or folder.
        geometry: of the views.
        beam: of a geometry of ASTRA's vectors.
        i0: of intensities, the counts where nothing attenuates; None: the numbers are line integrals.
        unit_mm: millimetres of one unit of R2-Gaussian's scene.

    Raises:
        VolumeError: files that are missing or of other forms, a geometry for other images, intensities without ``i0``,
            see :class:`~medgmae.tomography.Projections`.
    """
    path = Path(source)
    if not path.exists():
        raise VolumeError(f"{path}: there is no such file or folder")
    try:
        if path.is_dir() and is_scene(path):
            if unit_mm is None:
                raise VolumeError("a scene of R2-Gaussian has no unit of length; pass unit_mm= (--unit-mm)")
            data, found = read_scene(path, unit_mm)
        elif path.suffix.lower() in _PICKLES:
            data, found = read_naf(path)
        else:
            data, detector = _images(path) if path.is_dir() else _stack(path)
            if geometry is None:
                raise VolumeError("says nothing of where source and detector stood; pass geometry= (--geometry)")
            given = isinstance(geometry, ProjectionGeometry)
            found = geometry if given else read_geometry(geometry, detector, beam)  # type: ignore[assignment,arg-type]
        check_stack(data, found)
        if i0 is None and not data.is_floating_point():
            raise VolumeError(
                f"whole numbers from {int(data.min())} to {int(data.max())}, whose scale nothing says; pass i0= (--i0) "
                "if they are counts, or store line integrals as floating point numbers"
            )
        return Projections(data if i0 is None else line_integrals(data, i0), found)
    except VolumeError as error:
        raise VolumeError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _stack(path: Path) -> tuple[Tensor, Detector]:
    """A file of all views."""
    if path.suffix.lower() == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise VolumeError(f"no array can be read: {str(error)[:200]}") from error
        if array.ndim != 3 or array.dtype.kind not in "fiu":
            raise VolumeError(f"an array {array.shape} of {array.dtype}; expected numbers (views, rows, columns)")
        return _numbers(array), Detector((array.shape[1], array.shape[2]))
    volume = read_volume(path)
    if volume.channels != 1:
        raise VolumeError(f"{volume.channels} channels; expected one number for each pixel")
    data, (_, row_mm, column_mm) = volume.data[0], volume.spacing
    # 1 x 1 mm is what headers say where nobody set them.
    pixel = None if (row_mm, column_mm) == (1.0, 1.0) else (row_mm, column_mm)
    return data, Detector((data.shape[1], data.shape[2]), pixel, (volume.origin[0], volume.origin[1]))


def _images(folder: Path) -> tuple[Tensor, Detector]:
    """A folder of one image for each view."""
    files = sorted(
        (one for one in folder.iterdir() if one.suffix.lower() in _IMAGES), key=lambda one: natural(one.name)
    )
    kinds = {one.suffix.lower() for one in files}
    if len(kinds) != 1:
        shown = ", ".join(sorted(kinds)) or "none"
        raise VolumeError(f"images of these kinds lie in it: {shown}; expected .npy or TIFF, of one kind")
    images = [_image(one) for one in files]
    shapes = {image.shape for image in images}
    if len(shapes) != 1 or len(images[0].shape) != 2:
        raise VolumeError(f"images have shapes {sorted(map(str, shapes))[:4]}; expected one shape (rows, columns)")
    data = _numbers(np.stack(images))
    return data, Detector((data.shape[1], data.shape[2]))


def _image(path: Path) -> NDArray[Any]:
    try:
        if path.suffix.lower() == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        itk = simpleitk()
        with quiet():
            return np.asarray(itk.GetArrayFromImage(itk.ReadImage(named(path))))
    except (OSError, ValueError, RuntimeError) as error:
        raise VolumeError(f"{path.name}: no image can be read ({reason(error)[:200]})") from error


def _numbers(array: NDArray[Any]) -> Tensor:
    """Whole numbers stay so: nothing says by how much they are scaled."""
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(array.astype(np.float32))
