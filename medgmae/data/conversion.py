"""Scans between this library and others, in memory: SimpleITK, nibabel, MONAI and TorchIO, each with its order of axes.

| library | array | world |
|---|---|---|
| medgmae | (C, z, y, x) of a file | LPS |
| SimpleITK | the same, channels last | LPS |
| nibabel | (x, y, z), channels last | RAS |
| MONAI | (C, x, y, z) | RAS, or what ``meta["space"]`` says |

TorchIO's images come by way of their own ``as_sitk()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgmae.data.formats.itk import simpleitk
from medgmae.data.geometry import Floats, Grid, VolumeError

if TYPE_CHECKING:
    from monai.data.meta_tensor import MetaTensor
    from nibabel.nifti1 import Nifti1Image
    from SimpleITK import Image

_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # LPS to RAS, and back
_XYZ = [2, 1, 0, 3]  # the columns of an affine for an index (d, h, w), taken in the order (x, y, z), and back
# torch lacks arithmetic on unsigned types above 8 bits
_WIDER = {"u2": "i4", "u4": "i8", "u8": "i8"}
_KINDS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_MILLIMETRES = {"meter": 1000.0, "micron": 0.001}


class Converted(NamedTuple):
    """What an image of another library holds: voxels (C, D, H, W), where they lie, and where they come from.

    ``frames`` is the length of a fourth axis, which may be time; 0 where the channels are known to be channels.
    """

    data: Tensor
    grid: Grid | None
    source: str
    frames: int = 0


def library_of(image: object) -> str:
    """The library that an object comes from, by the modules of its class, so that none of them is imported."""
    modules = {parent.__module__.split(".")[0] for parent in type(image).__mro__}
    return next((name for name in ("monai", "nibabel", "SimpleITK", "torch", "numpy") if name in modules), "")


def is_image(image: object) -> bool:
    """Whether this is an image of another library, which has a geometry of its own, or an array."""
    return _reader(image) is not None


def is_bare(image: object) -> bool:
    """Whether this is an array or a plain tensor, which has no geometry."""
    return _reader(image) is _from_array


def read(image: Any) -> Converted:
    """The voxels and the geometry of an image of another library, or of an array, which has no geometry.

    Raises:
        VolumeError: an object of another type, another rank, or a geometry that is sheared.
    """
    reader = _reader(image)
    if reader is None:
        raise VolumeError(
            f"{type(image).__name__} is not a scan; expected a Volume, an array (D, H, W) or (C, D, H, W), or an image "
            "of SimpleITK, nibabel, MONAI or TorchIO. For a file: read_volume(path)"
        )
    return reader(image)


def _reader(image: object) -> Callable[[Any], Converted] | None:
    """What reads an image of this type."""
    library = library_of(image)
    if library == "monai" and isinstance(image, Tensor):
        return _from_metatensor
    if library == "nibabel" and hasattr(image, "dataobj"):
        return _from_nibabel
    if library == "SimpleITK" and hasattr(image, "GetDirection"):
        return _from_sitk
    if hasattr(image, "as_sitk"):
        return _from_torchio
    return _from_array if isinstance(image, (Tensor, np.ndarray)) else None


def tensor_of(voxels: NDArray[Any]) -> Tensor:
    """The array as a tensor that owns its memory, of a type that torch calculates with.

    Raises:
        VolumeError: numbers that torch has no type for.
    """
    kind = voxels.dtype.newbyteorder("=").str[1:]
    if kind not in _KINDS:
        raise VolumeError(f"the voxels are of type {voxels.dtype}; expected integers, floats or bool")
    if kind == "u8" and voxels.size and voxels.max() > np.iinfo(np.int64).max:
        raise VolumeError("the voxels are unsigned 64-bit integers beyond the signed range; expected smaller numbers")
    return torch.from_numpy(np.array(voxels, dtype=np.dtype(_WIDER.get(kind, kind)), order="C"))


def _channels_first(voxels: Tensor | NDArray[Any], name: str) -> Tensor:
    if voxels.ndim not in (3, 4) or 0 in voxels.shape:
        one = voxels.ndim == 5 and voxels.shape[0] == 1
        raise VolumeError(
            f"the {name} has shape {tuple(voxels.shape)}; expected (D, H, W) or (C, D, H, W)"
            f"{': for this batch of one pass the Volume itself, or scan[0]' if one else ''}"
        )
    unsigned = str(voxels.dtype) in ("torch.uint16", "torch.uint32", "torch.uint64")
    if isinstance(voxels, Tensor):
        voxels = voxels.detach().cpu()
    if isinstance(voxels, np.ndarray) or unsigned:
        voxels = tensor_of(np.asarray(voxels))
    return voxels if voxels.ndim == 4 else voxels[None]


def grid_of(affine_xyz: Floats, size: Sequence[int]) -> Grid:
    """A grid of ``size`` (d, h, w) from a 4x4 that takes the index (x, y, z) to LPS millimetres."""
    return Grid.from_affine(affine_xyz[:, _XYZ], size)


def from_sitk(image: Any) -> tuple[Tensor, Grid]:
    """Voxels and geometry of a ``SimpleITK.Image`` of three dimensions, or of four: the last one becomes channels, as
    the components of a vector image do.

    Raises:
        VolumeError: two dimensions, five, four with vectors, or complex numbers.
    """
    size, components = image.GetSize(), image.GetNumberOfComponentsPerPixel()
    rank = max(3, 1 + max((axis for axis, n in enumerate(size) if n > 1), default=0))
    shape = " x ".join(map(str, size))
    if len(size) < 3 or rank > 4:
        raise VolumeError(f"the image is {len(size)}-D, {shape}; expected a 3-D volume")
    voxels = simpleitk().GetArrayFromImage(image)
    if voxels.dtype.kind not in "iuf":
        raise VolumeError(f"the voxels are {image.GetPixelIDTypeAsString()}; expected integers or floats")
    if components > 1 and rank == 4:
        raise VolumeError(f"the image is 4-D, {shape}, with {components} components per voxel; expected a 3-D volume")
    spatial = size[2::-1]
    if components > 1:
        voxels = np.moveaxis(voxels.reshape(*spatial, components), -1, 0)
    affine = np.eye(4)
    direction = np.array(image.GetDirection()).reshape(len(size), len(size))[:3, :3]
    affine[:3, :3] = direction * np.array(image.GetSpacing()[:3])
    affine[:3, 3] = image.GetOrigin()[:3]
    return tensor_of(voxels.reshape(-1, *spatial)), grid_of(affine, spatial)


def to_sitk(data: Tensor, grid: Grid) -> Image:
    """Voxels (C, D, H, W) as a ``SimpleITK.Image``; several channels become vector pixels."""
    sitk = simpleitk()

    array = _array(data)
    vector = len(array) > 1
    image = sitk.GetImageFromArray(
        np.ascontiguousarray(np.moveaxis(array, 0, -1) if vector else array[0]), isVector=vector
    )
    image.SetSpacing(grid.spacing[::-1])
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction[:, ::-1].ravel().tolist())
    return image  # type: ignore[no-any-return]


def _from_array(array: Tensor | NDArray[Any]) -> Converted:
    return Converted(_channels_first(array, f"{library_of(array)} array"), None, "array")


def _from_sitk(image: Any, source: str = "SimpleITK image") -> Converted:
    size = image.GetSize()
    return Converted(*from_sitk(image), source, size[3] if len(size) > 3 and size[3] > 1 else 0)


def _from_torchio(image: Any) -> Converted:
    return _from_sitk(image.as_sitk(), str(getattr(image, "path", None) or f"TorchIO {type(image).__name__}"))


def _from_nibabel(image: Any) -> Converted:
    source = image.get_filename() or "nibabel image"
    voxels = np.asanyarray(image.dataobj)
    if voxels.dtype.names:  # colours
        voxels = np.stack([voxels[name] for name in voxels.dtype.names], axis=-1)
    slope, inter = (getattr(image.dataobj, name, default) for name, default in (("slope", 1.0), ("inter", 0.0)))
    if voxels.dtype == np.float64 and (slope, inter) != (1.0, 0.0):
        voxels = voxels.astype(np.float32)  # stored integers times a factor, which read_volume gives in float32 too
    while voxels.ndim > 3 and voxels.shape[3] == 1:
        voxels = voxels[:, :, :, 0]
    if voxels.ndim not in (3, 4):
        raise VolumeError(f"{source}: the image has shape {image.shape}; expected (x, y, z) or (x, y, z, channels)")
    if image.affine is None:
        raise VolumeError(f"{source}: the image has no affine; expected a 4x4 from (x, y, z) to RAS millimetres")
    units = getattr(image.header, "get_xyzt_units", lambda: ("unknown",))()[0]
    affine = _RAS @ np.diag([*[_MILLIMETRES.get(units, 1.0)] * 3, 1.0]) @ np.asarray(image.affine, dtype=np.float64)
    data = tensor_of(voxels.T if voxels.ndim == 4 else voxels.T[None])
    frames = image.shape[3] if len(image.shape) == 4 and image.shape[3] > 1 else 0
    return Converted(data, grid_of(affine, data.shape[1:]), str(source), frames)


def to_nibabel(data: Tensor, grid: Grid) -> Nifti1Image:
    """Voxels (C, D, H, W) as a ``nibabel.Nifti1Image`` (x, y, z), or (x, y, z, C) of several channels."""
    try:
        import nibabel
    except ImportError as error:
        raise ImportError("to_nibabel needs nibabel, which is not installed: pip install nibabel") from error

    array = _array(data).T
    array = array if array.shape[3] > 1 else array[..., 0]
    affine = (_RAS @ grid.affine)[:, _XYZ]
    nifti: Any = nibabel.nifti1.Nifti1Image  # typed in part
    image = nifti(np.ascontiguousarray(array), affine, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1, update_affine=False)  # the header rounds to single precision
    image.set_qform(affine, 1, update_affine=False)
    return image  # type: ignore[no-any-return]


def _from_metatensor(image: Any) -> Converted:
    source = str(image.meta.get("filename_or_obj", "MetaTensor"))
    voxels, affine = image.as_tensor(), np.asarray(image.affine, dtype=np.float64)
    stored, last = tuple(map(int, image.meta.get("spatial_shape", ()))), image.meta.get("original_channel_dim") != 0
    if voxels.ndim == 4 and last and stored == tuple(voxels.shape[:3]) != tuple(voxels.shape[1:]):
        raise VolumeError(
            f"{source}: the MetaTensor has shape {tuple(voxels.shape)}, channels last; expected (C, x, y, z): "
            "LoadImage(ensure_channel_first=True)"
        )
    if voxels.ndim not in (3, 4) or affine.shape != (4, 4):
        raise VolumeError(
            f"{source}: the MetaTensor has shape {tuple(voxels.shape)} and an affine of {affine.shape}; expected one "
            "scan (C, x, y, z) and 4x4 (of a batch: decollate_batch)"
        )
    space = str(getattr(image.meta.get("space", "RAS"), "value", image.meta.get("space", "RAS")))
    if space not in ("RAS", "LPS"):
        raise VolumeError(f"{source}: the MetaTensor's space is {space!r}; expected 'RAS' or 'LPS'")
    data = _channels_first(voxels, "MetaTensor").transpose(1, 3).contiguous()
    return Converted(data, grid_of(_RAS @ affine if space == "RAS" else affine, data.shape[1:]), source)


def to_metatensor(data: Tensor, grid: Grid, source: str) -> MetaTensor:
    """Voxels (C, D, H, W) as a ``monai.data.MetaTensor`` (C, x, y, z) in RAS, on the CPU or wherever they are."""
    try:
        from monai.data.meta_tensor import MetaTensor
    except ImportError as error:
        raise ImportError("to_metatensor needs MONAI, which is not installed: pip install monai") from error

    affine = torch.from_numpy((_RAS @ grid.affine)[:, _XYZ])
    meta = {"space": "RAS", "original_channel_dim": 0, "spatial_shape": grid.size[::-1], "filename_or_obj": source}
    return MetaTensor(data.transpose(1, 3).contiguous(), affine=affine, meta=meta)


def _array(data: Tensor) -> NDArray[Any]:
    """(C, D, H, W) of a type that files can hold: bool as bytes, half precision as float32."""
    data = data.detach().cpu()
    if data.dtype in (torch.float16, torch.bfloat16):
        data = data.float()
    array: NDArray[Any] = (data.to(torch.uint8) if data.dtype == torch.bool else data).numpy()
    return array
