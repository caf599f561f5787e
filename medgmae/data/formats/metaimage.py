"""MetaImage (.mha, .mhd). The fields are those of https://itk.org/Wiki/MetaIO/Documentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medgmae.data.formats.headers import (
    LONGEST,
    MOST_FILES,
    data_file,
    fields_of,
    numbered_names,
    numbers,
    rank_of,
    slice_files,
    spatial_shape,
    whole_numbers,
)
from medgmae.data.formats.image import Image, Limits
from medgmae.data.formats.streams import Part, Stored, read_voxels
from medgmae.data.geometry import Floats, VolumeError

_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "long": "i4", "ulong": "u4",
    "long_long": "i8", "ulong_long": "u8", "float": "f4", "double": "f8",
}  # fmt: skip
_ORIGINS, _MATRICES = ("offset", "position", "origin"), ("transformmatrix", "rotation", "orientation")


def _split(start: bytes) -> tuple[list[bytes], int]:
    """The lines of the header, the last of which names the data, and the byte after them."""
    lines, at = [], 0
    while at < len(start):
        end = start.find(b"\n", at)
        if end < 0:
            break
        lines.append(start[at:end])
        at = end + 1
        if lines[-1].partition(b"=")[0].strip().lower() == b"elementdatafile":
            return lines, at
    raise VolumeError("the header has no ElementDataFile line: expected one; the file is truncated, or not a MetaImage")


def _one_of(fields: dict[str, str], names: tuple[str, ...]) -> str | None:
    """The value of a field that goes by several names."""
    values = {fields[name] for name in names if name in fields}
    if len(values) > 1:
        raise VolumeError(f"the header says {' and '.join(sorted(values))} of {names[0]}; expected one of them")
    return values.pop() if values else None


def _flag(fields: dict[str, str], *names: str) -> bool:
    text = _one_of(fields, names)
    if text is not None and text.lower() not in ("true", "false", "1", "0"):
        raise VolumeError(f"the header's {names[0]} is {text!r}; expected True or False")
    return text is not None and text.lower() in ("true", "1")


def _affine(fields: dict[str, str], rank: int) -> tuple[Floats, tuple[str, ...]]:
    notes = []
    spacing = fields.get("elementspacing", fields.get("elementsize"))
    matrix, origin = _one_of(fields, _MATRICES), _one_of(fields, _ORIGINS)
    if spacing is None:
        notes.append("the header has no ElementSpacing: voxels of 1 mm are assumed")
    if matrix is None:
        notes.append("the header has no TransformMatrix: axes along those of the body (LPS) are assumed")
    steps = numbers("spacing", spacing, rank, positive=True) if spacing is not None else [1.0] * rank
    rows = np.eye(rank) if matrix is None else np.reshape(numbers("TransformMatrix", matrix, rank * rank), (rank, rank))
    if rank > 3 and np.abs(rows[:3, 3:]).max() + np.abs(rows[3:, :3]).max() > 0:
        raise VolumeError(f"the TransformMatrix is {matrix!r}; expected a fourth axis that is not part of space")
    affine = np.eye(4)
    affine[:3, :3] = rows[:3, :3].T * steps[:3]  # a row of the file is the direction of an axis
    affine[:3, 3] = numbers("Offset", origin, rank)[:3] if origin is not None else 0.0
    return affine, tuple(notes)


def _check(fields: dict[str, str]) -> None:
    """Raises for fields that change what the voxels mean."""
    if fields.get("objecttype", "image").lower() != "image":
        raise VolumeError(f"the header's ObjectType is {fields['objecttype']!r}; expected Image")
    if fields.get("binarydata", "true").lower() not in ("true", "1"):
        raise VolumeError("the voxels are stored as text (BinaryData = False); expected binary ones: write them anew")
    for name, nothing in (("elementtointensityfunctionslope", 1.0), ("elementtointensityfunctionoffset", 0.0)):
        if name in fields and numbers(name, fields[name], 1) != [nothing]:
            raise VolumeError(f"the header's {name} is {fields[name]}; expected {nothing:g}, or none")
    unit = fields.get("distanceunits", "mm").lower()
    if unit not in ("mm", "millimeter", "millimeters", "?"):
        raise VolumeError(f"the header's DistanceUnits is {unit!r}; expected mm")


def _parts(path: Path, fields: dict[str, str], after: int, slices: int, limits: Limits) -> list[Part]:
    """Where the voxels lie."""
    name, compressed = fields["elementdatafile"], _flag(fields, "compresseddata")
    skip = numbers("HeaderSize", fields.get("headersize", "0"), 1, whole=True)[0]
    if skip < -1 or (skip and (compressed or name.lower() == "local")):
        raise VolumeError(f"the header's HeaderSize is {skip:g}; expected 0, or -1 or more for a raw data file")
    if name.lower() == "local":
        names, start = [path], after
    elif name.split()[:1] == ["LIST"]:
        if name.lower() not in ("list", "list 2d") or compressed:
            raise VolumeError(f"the header's data file is {name!r}; expected LIST, of raw files with a slice each")
        with path.open("rb") as file:
            file.seek(after)
            listed = file.read(min(MOST_FILES, slices + 1) * 256)
        lines = list(fields_of((b"%d=" % k + line for k, line in enumerate(listed.splitlines())), "=").values())
        names, start = slice_files(path, [line for line in lines if line], slices, limits), 0
    elif "%" in name:
        if compressed:
            raise VolumeError(f"the header's data files {name!r} are compressed; expected one compressed file")
        names, start = slice_files(path, numbered_names(name, slices), slices, limits), 0
    else:
        names, start = [data_file(path, name, limits)], 0
    if not compressed:
        return [Part(one, start=start, offset=int(skip)) for one in names]
    said = fields.get("compresseddatasize")
    packed = None if said is None else whole_numbers("CompressedDataSize", said, 1)[0]
    return [Part(one, "zlib", start=start, packed=packed) for one in names]


def read_metaimage(path: Path, limits: Limits) -> Image:
    """A ``.mha`` or ``.mhd`` file.

    Raises:
        VolumeError: the header or what it names is broken, incomplete, elsewhere, or not a volume.
    """
    with path.open("rb") as file:
        lines, after = _split(file.read(LONGEST))
    fields = fields_of(lines, "=")
    _check(fields)
    rank = rank_of("NDims", fields.get("ndims"))
    if "dimsize" not in fields or "elementtype" not in fields:
        raise VolumeError("the header has no DimSize or no ElementType; expected both")
    sizes = whole_numbers("size", fields["dimsize"], rank)
    kind = fields["elementtype"].lower().removeprefix("met_")
    channels = whole_numbers("number of channels", fields.get("elementnumberofchannels", "1"), 1)[0]
    if kind.removesuffix("_array") not in _TYPES:
        raise VolumeError(f"the header's ElementType is {fields['elementtype']!r}; expected integers or floats")
    frames, *spatial = spatial_shape(sizes)
    affine, notes = _affine(fields, rank)
    if frames > 1 and channels > 1:
        raise VolumeError(f"the image is 4-D, {fields['dimsize']}, with {channels} components; expected a 3-D volume")
    big = _flag(fields, "binarydatabyteordermsb", "elementbyteordermsb")
    dtype = np.dtype(_TYPES[kind.removesuffix("_array")]).newbyteorder(">" if big else "<")
    stored = Stored(dtype, (frames * channels, *spatial), interleaved=channels > 1)  # type: ignore[arg-type]
    parts = _parts(path, fields, after, sizes[rank - 1], limits)
    voxels, odd = read_voxels(parts, stored, limits)
    return Image(voxels, affine, frames if frames > 1 else 0, notes + odd)
