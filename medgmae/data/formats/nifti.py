"""NIfTI-1 and NIfTI-2, single files and pairs, read in one pass with every check that the format allows.

SimpleITK's reader fills a truncated file with zeros and replaces a broken spacing by 1 mm, both without an error, so
the format, which is a fixed header before plain voxels, is read here; SimpleITK writes it. The layout is that of
https://nifti.nimh.nih.gov/nifti-1 and nifti-2.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medgmae.data.formats.headers import data_file
from medgmae.data.formats.image import Image, Limits
from medgmae.data.formats.streams import Packing, Part, Stored, first_bytes, is_gzip, read_voxels
from medgmae.data.geometry import Floats, VolumeError

_V1: list[Any] = [
    ("sizeof_hdr", "i4"), ("unused", "S36"), ("dim", "i2", 8), ("intent", "f4", 3), ("intent_code", "i2"),
    ("datatype", "i2"), ("bitpix", "i2"), ("slice_start", "i2"), ("pixdim", "f4", 8), ("vox_offset", "f4"),
    ("scl_slope", "f4"), ("scl_inter", "f4"), ("slice_end", "i2"), ("slice_code", "u1"), ("xyzt_units", "u1"),
    ("times", "f4", 4), ("glmax", "i4", 2), ("text", "S104"), ("qform_code", "i2"), ("sform_code", "i2"),
    ("quatern", "f4", 3), ("qoffset", "f4", 3), ("srow", "f4", (3, 4)), ("intent_name", "S16"), ("magic", "S4"),
]  # fmt: skip
_V2: list[Any] = [
    ("sizeof_hdr", "i4"), ("magic", "S8"), ("datatype", "i2"), ("bitpix", "i2"), ("dim", "i8", 8),
    ("intent", "f8", 3), ("pixdim", "f8", 8), ("vox_offset", "i8"), ("scl_slope", "f8"), ("scl_inter", "f8"),
    ("times", "f8", 4), ("slices", "i8", 2), ("text", "S104"), ("qform_code", "i4"), ("sform_code", "i4"),
    ("quatern", "f8", 3), ("qoffset", "f8", 3), ("srow", "f8", (3, 4)), ("slice_code", "i4"), ("xyzt_units", "i4"),
    ("intent_code", "i4"), ("intent_name", "S16"), ("dim_info", "u1"), ("pad", "S15"),
]  # fmt: skip
_TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
    128: "u1", 2304: "u1",
}  # fmt: skip
_COLOURS = {128: 3, 2304: 4}  # RGB and RGBA: bytes per voxel, channel fastest
_UNITS = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, metre, millimetre, micrometre -> millimetres
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Header:
    """What the header of a file says, checked.

    Attributes:
        fields: all fields, as a numpy record.
        shape: of the voxels in file order (x, y, z), with the length of a fourth axis if there is one; colours as
            (x, y, z, 1, colours).
        dtype: of the voxels.
        offset: byte of the file, unzipped, at which the voxels start.
    """

    fields: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int


def is_nifti(start: bytes) -> bool:
    """Whether a file's first 12 bytes, unzipped, are those of a NIfTI-1 or NIfTI-2 header."""
    return start[:4] in (b"\x5c\x01\x00\x00", b"\x00\x00\x01\x5c", b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")


def _header(start: bytes) -> Header:
    """The header in the first 540 bytes of a file, unzipped."""
    fields = _fields(start)
    shape, code = _shape(fields), int(fields["datatype"])
    if code not in _TYPES:
        raise VolumeError(f"the header's data type is {code}; expected integers, floats or RGB ({sorted(_TYPES)})")
    if code in _COLOURS:
        if len(shape) > 3:
            raise VolumeError(f"the image is {len(shape)}-D with colours; expected a 3-D volume")
        shape = (*shape, 1, _COLOURS[code])
    single, offset = bytes(fields["magic"])[:3] in (b"n+1", b"n+2"), fields["vox_offset"]
    smallest = fields.dtype.itemsize + 4 if single else 0  # four bytes say whether extensions follow
    if not smallest <= offset <= 1 << 30 or offset % 1:
        raise VolumeError(f"the header puts the voxels at byte {offset:g}; expected {smallest} or somewhat more")
    little = fields.dtype["dim"].base.byteorder in "<="
    return Header(fields, shape, np.dtype(_TYPES[code]).newbyteorder("<" if little else ">"), int(offset))


def _fields(start: bytes) -> Any:
    little = start[:1] != b"\x00"
    version_two = start[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")
    layout = np.dtype(_V2 if version_two else _V1).newbyteorder("<" if little else ">")
    if len(start) < layout.itemsize:
        raise VolumeError(f"the file ends within its header, after {len(start)} bytes; expected {layout.itemsize}")
    fields = np.frombuffer(start, layout, count=1)[0]
    magic = bytes(fields["magic"]).partition(b"\0")[0]
    if magic not in ((b"n+2", b"ni2") if version_two else (b"n+1", b"ni1")):
        raise VolumeError(
            f"the header's magic is {bytes(fields['magic'])!r}; expected NIfTI ('n+1', 'ni1', 'n+2' or 'ni2'), not "
            "Analyze, which says nothing of left and right"
        )
    return fields


def _shape(fields: Any) -> tuple[int, ...]:
    dim = [int(n) for n in fields["dim"]]
    rank = dim[0]
    if not 1 <= rank <= 7 or min(dim[1 : rank + 1]) < 1:
        raise VolumeError(f"the header's dimensions are {dim}; expected 3 to 5 axes of at least one voxel")
    shape = dim[1 : rank + 1]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) < 3:
        raise VolumeError(f"the image is {len(shape)}-D, {' x '.join(map(str, shape))}; expected a 3-D volume")
    if len(shape) > 5 or (len(shape) == 5 and shape[3] != 1):
        raise VolumeError(
            f"the image is {len(shape)}-D, {' x '.join(map(str, shape))}; expected a 3-D volume, with channels at most"
        )
    return tuple(shape)


def _scale(fields: Any) -> tuple[float, float] | None:
    slope, inter = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0 or (slope, inter) == (1.0, 0.0):
        return None
    if not np.isfinite([slope, inter]).all():
        # nibabel writes NaN for "no scaling"
        if np.isnan([slope, inter]).all():
            return None
        raise VolumeError(f"the header scales voxels by {slope} and {inter}; expected finite numbers")
    return slope, inter


def _quaternion(fields: Any, pixdim: Floats) -> Floats:
    """Affine in RAS of the header's rotation (w, x, y, z of unit length, w >= 0), spacing and handedness."""
    b, c, d = (float(v) for v in fields["quatern"])
    square = b * b + c * c + d * d
    if not square <= 1 + 1e-4:
        raise VolumeError(f"the header's quaternion is {[b, c, d]}; expected a length of at most 1")
    a = float(np.sqrt(max(0.0, 1 - square)))
    rotation = np.array([
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ])  # fmt: skip
    rotation[:, 2] *= -1.0 if float(fields["pixdim"][0]) < 0 else 1.0
    affine = np.eye(4)
    affine[:3, :3] = rotation / np.linalg.norm(rotation, axis=0) * pixdim
    affine[:3, 3] = fields["qoffset"]
    return affine


def _is_rigid(affine: Floats) -> bool:
    columns = affine[:3, :3]
    norms = np.linalg.norm(columns, axis=0)
    return bool(
        np.isfinite(affine).all()
        and norms.min() > 0
        and np.abs((columns / norms).T @ (columns / norms) - np.eye(3)).max() < 1e-3
    )


def _affine(fields: Any) -> tuple[Floats, tuple[str, ...]]:
    """Index (x, y, z) to LPS millimetres: the sform when it is set and free of shear, else the qform, else spacing
    alone in LPS; and what is surprising about it."""
    pixdim = np.array(fields["pixdim"][1:4], dtype=np.float64)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise VolumeError(f"the spacing is {pixdim.tolist()} (x, y, z); expected three positive numbers")
    scale = np.diag([_UNITS.get(int(fields["xyzt_units"]) & 7, 1.0)] * 3 + [1.0])
    sform = np.vstack([np.array(fields["srow"], dtype=np.float64), [0, 0, 0, 1]])
    if fields["sform_code"] > 0 and _is_rigid(sform):
        return np.asarray(_LPS @ scale @ sform), ()
    if fields["qform_code"] > 0:
        notes = ("the sform is sheared or degenerate: the qform is taken",) if fields["sform_code"] > 0 else ()
        return np.asarray(_LPS @ scale @ _quaternion(fields, pixdim)), notes
    if fields["sform_code"] > 0:
        raise VolumeError(
            f"the sform {sform[:3].tolist()} is sheared or degenerate and there is no qform; "
            "expected perpendicular axes"
        )
    # no orientation is stored: SimpleITK's reading
    return np.asarray(scale @ np.diag([*pixdim, 1.0])), (
        "the header has neither sform nor qform: axes along those of the body (LPS) are assumed",
    )


def _data_of(path: Path, fields: Any, limits: Limits) -> Path:
    """The file with the voxels: the same, or the other one of a pair."""
    if bytes(fields["magic"])[:3] in (b"n+1", b"n+2"):
        return path
    name = path.name
    for header, voxels in ((".hdr", ".img"), (".HDR", ".IMG")):
        for packed in ("", ".gz"):
            if name.endswith(header + packed):
                stem = name.removesuffix(header + packed)
                both = [path.with_name(stem + voxels + other) for other in (packed, "", ".gz")]
                there = [one for one in dict.fromkeys(both) if one.exists()]
                if not there:
                    raise VolumeError(f"the header belongs to {both[0].name}, which does not exist; expected it beside")
                return data_file(path, there[0].name, limits)
    raise VolumeError(
        "the header is that of a pair of files; expected the name NAME.hdr (or .hdr.gz), with NAME.img beside it"
    )


def header_of_pair(path: Path) -> Path:
    """The header that belongs to a file with the voxels of a pair; any other path is given back."""
    for header, voxels in ((".hdr", ".img"), (".HDR", ".IMG")):
        for packed in ("", ".gz"):
            if path.name.endswith(voxels + packed):
                stem = path.name.removesuffix(voxels + packed)
                both = [path.with_name(stem + header + other) for other in (packed, "", ".gz")]
                return next((one for one in both if one.exists()), path)
    return path


def read_nifti(path: Path, limits: Limits) -> Image:
    """A ``.nii`` or ``.nii.gz`` file, or a pair of ``.hdr`` and ``.img``.

    Raises:
        VolumeError: the file is truncated, broken, not a volume by its type or shape, or without a usable geometry.
    """
    header = _header(first_bytes(path, 540))
    (affine, notes), data = _affine(header.fields), _data_of(path, header.fields, limits)
    with data.open("rb") as file:
        packing: Packing = "gzip" if is_gzip(file.read(3)) else "raw"
    colours = int(header.fields["datatype"]) in _COLOURS
    x, y, z, *more = header.shape
    stored = Stored(header.dtype, (more[-1] if more else 1, z, y, x), colours, _scale(header.fields))
    voxels, odd = read_voxels([Part(data, packing, offset=header.offset)], stored, limits)
    return Image(voxels, affine, header.shape[3] if len(header.shape) == 4 else 0, notes + odd)
