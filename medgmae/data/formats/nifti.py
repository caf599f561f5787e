"""NIfTI-1 and NIfTI-2 single files, read in one pass with every check that the format allows.

SimpleITK's reader fills a truncated file with zeros and replaces a broken spacing by 1 mm, both without an error, so
the format, which is a fixed header before plain voxels, is read here; SimpleITK writes it. The layout is that of
https://nifti.nimh.nih.gov/nifti-1 and nifti-2.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgmae.data.geometry import Floats, VolumeError

MAX_BYTES = 16 << 30
"""No volume of more voxel bytes than this is read: a header that claims more is treated as broken."""
MAX_INFLATION = 1032
"""Deflate cannot shrink data more than this."""

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

    @property
    def end(self) -> int:
        """Byte of the file, unzipped, at which the voxels end."""
        return self.offset + int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.shape))} voxels"


@dataclass(frozen=True)
class Nifti:
    """What a file holds.

    Attributes:
        voxels: (C, D, H, W), in the stored type, scaled when the header says so.
        affine: 4x4, from index (x, y, z) to LPS millimetres.
        frames: length of the file's fourth axis when C stands for it (a 4-D image), else 0.
    """

    voxels: NDArray[Any]
    affine: Floats
    frames: int


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
    little, smallest, offset = fields.dtype["dim"].base.byteorder in "<=", fields.dtype.itemsize, fields["vox_offset"]
    if not smallest <= offset <= 1 << 30 or offset % 1:
        raise VolumeError(f"the header puts the voxels at byte {offset:g}; expected {smallest} or somewhat more")
    header = Header(fields, shape, np.dtype(_TYPES[code]).newbyteorder("<" if little else ">"), int(offset))
    if header.end - header.offset > MAX_BYTES:
        raise VolumeError(
            f"the header claims {header} ({header.end - header.offset:.3g} bytes); expected at most "
            f"{MAX_BYTES:.3g} bytes"
        )
    return header


def _fields(start: bytes) -> Any:
    little = start[:1] != b"\x00"
    version_two = start[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")
    layout = np.dtype(_V2 if version_two else _V1).newbyteorder("<" if little else ">")
    if len(start) < layout.itemsize:
        raise VolumeError(f"the file ends within its header, after {len(start)} bytes; expected {layout.itemsize}")
    fields = np.frombuffer(start, layout, count=1)[0]
    if bytes(fields["magic"])[:3] not in (b"n+1", b"n+2"):
        raise VolumeError(
            f"the header's magic is {bytes(fields['magic'])!r}; expected a single-file NIfTI "
            "('n+1' or 'n+2'), not a pair or Analyze"
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


def _inflate(packed: bytes, limit: int) -> tuple[bytes, bool]:
    """At most ``limit`` bytes of the gzip members in ``packed``, and whether the last one's checksum was seen, and
    held."""
    pieces: list[bytes] = []
    total, sealed = 0, True
    try:
        while packed and total < limit:
            member = zlib.decompressobj(wbits=31)
            pieces.append(member.decompress(packed, limit - total))
            total += len(pieces[-1])
            sealed = member.eof
            packed = member.unused_data.lstrip(b"\x00")
    except zlib.error as error:
        raise VolumeError(f"the gzip stream is broken after {total} bytes ({error}); expected an intact file") from None
    return (pieces[0] if len(pieces) == 1 else b"".join(pieces)), sealed


def _inflate_whole(packed: bytes, needed: int) -> bytes:
    content, sealed = _inflate(packed, needed + (1 << 20))  # extra bytes at the end are legal, a megabyte of them
    if len(content) < needed or not sealed:
        raise VolumeError(
            f"the file is truncated: {len(content)} bytes after unzipping, expected {needed} and a checksum"
        )
    return content


def _read(path: Path) -> tuple[Header, bytes]:
    """The header of a file and all its bytes, unzipped, with no voxel missing."""
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        header, content = _header(raw[:540]), raw
    else:
        header = _header(_inflate(raw[: 1 << 14], 540)[0])
        if header.end > MAX_INFLATION * len(raw) + 1024:
            raise VolumeError(
                f"the header claims {header}, more than {len(raw)} zipped bytes can hold; "
                "expected a size that fits the file"
            )
        content = _inflate_whole(raw, header.end)
    if len(content) < header.end:
        raise VolumeError(f"the file is truncated: {len(content)} bytes, expected {header.end}")
    return header, content


def _scaled(voxels: NDArray[Any], fields: Any) -> NDArray[Any]:
    slope, inter = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0 or (slope, inter) == (1.0, 0.0):
        return voxels
    if not np.isfinite([slope, inter]).all():
        # nibabel writes NaN for "no scaling"
        if np.isnan([slope, inter]).all():
            return voxels
        raise VolumeError(f"the header scales voxels by {slope} and {inter}; expected finite numbers")
    return (voxels.astype(np.float64) * slope + inter).astype(np.float32)


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


def _affine(fields: Any) -> Floats:
    """Index (x, y, z) to LPS millimetres: the sform when it is set and free of shear, else the qform, else spacing
    alone in LPS."""
    pixdim = np.array(fields["pixdim"][1:4], dtype=np.float64)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise VolumeError(f"the spacing is {pixdim.tolist()} (x, y, z); expected three positive numbers")
    scale = np.diag([_UNITS.get(int(fields["xyzt_units"]) & 7, 1.0)] * 3 + [1.0])
    sform = np.vstack([np.array(fields["srow"], dtype=np.float64), [0, 0, 0, 1]])
    if fields["sform_code"] > 0 and _is_rigid(sform):
        return np.asarray(_LPS @ scale @ sform)
    if fields["qform_code"] > 0:
        return np.asarray(_LPS @ scale @ _quaternion(fields, pixdim))
    if fields["sform_code"] > 0:
        raise VolumeError(
            f"the sform {sform[:3].tolist()} is sheared or degenerate and there is no qform; "
            "expected perpendicular axes"
        )
    return np.asarray(scale @ np.diag([*pixdim, 1.0]))  # no orientation is stored: SimpleITK's reading


def read_nifti(path: Path) -> Nifti:
    """A ``.nii`` or ``.nii.gz`` file.

    Raises:
        VolumeError: the file is truncated, broken, not a volume by its type or shape, or without a usable geometry.
    """
    header, content = _read(path)
    shape, affine = header.shape, _affine(header.fields)
    flat = np.frombuffer(content, header.dtype, count=int(np.prod(shape)), offset=header.offset)
    if int(header.fields["datatype"]) in _COLOURS:
        voxels = np.moveaxis(flat.reshape(shape[2], shape[1], shape[0], shape[4]), -1, 0)
    else:
        voxels = flat.reshape(-1, shape[2], shape[1], shape[0])  # x is fastest in the file, channels slowest
    frames = shape[3] if len(shape) == 4 else 0
    return Nifti(_scaled(voxels, header.fields), affine, frames)
