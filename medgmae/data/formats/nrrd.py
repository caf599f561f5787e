"""NRRD (.nrrd, .nhdr). The fields are those of https://teem.sourceforge.net/nrrd/format.html."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medgmae.data.formats.headers import (
    LONGEST,
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
from medgmae.data.formats.streams import Packing, Part, Stored, read_voxels
from medgmae.data.geometry import Floats, VolumeError

_NAMES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_TYPES = {name: kind for kind, names in _NAMES.items() for name in names}
_PACKINGS: dict[str, Packing] = {"raw": "raw", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}
_TO_LPS = {
    "left-posterior-superior": (1, 1, 1), "lps": (1, 1, 1), "left-anterior-superior": (1, -1, 1), "las": (1, -1, 1),
    "right-anterior-superior": (-1, -1, 1), "ras": (-1, -1, 1),
}  # fmt: skip
_FRAMES = ("domain", "space", "time", "none", "???")  # kinds of an axis along which images follow each other
_SPATIAL = ("domain", "space", "none", "???")  # kinds of an axis that may have a direction
_UNSIDED = (
    "",
    "scanner-xyz",
    "3d-right-handed",
    "3d-left-handed",
)  # spaces that do not say where the patient's left is
_VECTOR = re.compile(r"none|\([^()]*\)")


class _Axes(NamedTuple):
    """What the axes of a file are: the spatial ones lie together."""

    sizes: list[int]
    other: int | None  # the axis that is not spatial: the first or the last
    channels: bool  # whether that axis holds the components of a voxel
    spatial: list[int]


def _axes(fields: dict[str, str], vectors: list[str]) -> _Axes:
    """The spatial axes are those with a direction, or a kind that says so."""
    rank = rank_of("dimension", fields.get("dimension"))
    sizes = whole_numbers("size", fields.get("sizes", ""), rank)
    kinds = fields.get("kinds", " ".join(["domain"] * rank)).lower().split()
    if len(kinds) != rank or (vectors and len(vectors) != rank):
        raise VolumeError(f"the header has {len(kinds)} kinds and {len(vectors)} space directions; expected {rank}")
    if vectors:
        other = [axis for axis in range(rank) if vectors[axis] == "none"]
    else:
        other = [axis for axis in range(rank) if kinds[axis] not in ("domain", "space")]
        other = other or list(range(3, rank))
    shape = " x ".join(map(str, sizes))
    if rank - len(other) != 3 or len(other) > 1 or other not in ([], [0], [rank - 1]):
        raise VolumeError(f"the image is {rank}-D, {shape}, with {rank - len(other)} axes in space; expected a volume")
    contradiction = next((kinds[axis] for axis in range(rank) if vectors and vectors[axis] != "none"
                          and kinds[axis] not in _SPATIAL), None)  # fmt: skip
    if contradiction:
        raise VolumeError(
            f"an axis has a direction in space and is of the kind {contradiction!r}; expected one of them"
        )
    kind = kinds[other[0]] if other else "list"
    if kind.startswith("complex") or "matrix" in kind or "quaternion" in kind:
        raise VolumeError(f"the voxels are of the kind {kind!r}; expected numbers, vectors or colours")
    spatial = [axis for axis in range(rank) if axis not in other]
    return _Axes(sizes, other[0] if other else None, kind not in _FRAMES, spatial)


def _affine(fields: dict[str, str], axes: _Axes, vectors: list[str]) -> tuple[Floats, tuple[str, ...]]:
    space, notes = fields.get("space", "").lower().removesuffix("-time"), []
    signs = _TO_LPS.get(space.removesuffix("t") if len(space) == 4 else space)
    if signs is None and space not in _UNSIDED:
        raise VolumeError(f"the header's space is {space!r}; expected one that the format knows, such as LPS or RAS")
    if signs is None:
        notes.append(f"the header's space is {space or 'not said'}: axes along those of the body (LPS) are assumed")
    rank, columns = len(axes.sizes), np.eye(3)
    if fields.get("space dimension", "3") != "3":
        raise VolumeError(f"the header's space dimension is {fields['space dimension']!r}; expected 3")
    if vectors:
        for k, axis in enumerate(axes.spatial):
            columns[:, k] = numbers("space direction", vectors[axis].strip("()").replace(",", " "), 3)
    elif "spacings" in fields:
        steps = numbers("spacing", fields["spacings"], rank, positive=True, blank=True)
        steps = [steps[axis] for axis in axes.spatial]
        if np.isnan(steps).any():
            raise VolumeError(f"the spacing is {fields['spacings']!r}; expected three positive numbers")
        columns = np.diag(steps)
    else:
        notes.append("the header has no space directions and no spacings: voxels of 1 mm are assumed")
    for name in ("space units", "units"):
        text = fields.get(name, "")
        for unit in re.findall(r'"([^"]*)"', text) or text.split():
            if unit.lower() not in ("", "mm", "millimeter", "millimeters", "s", "ms", "sec"):
                raise VolumeError(f"the header's {name} are {fields[name]}; expected millimetres")
    if "space origin" not in fields and any(name in fields for name in ("axis mins", "axismins")):
        notes.append("the header has axis mins and no space origin: the first voxel is assumed to lie at 0")
    origin = fields.get("space origin", "(0,0,0)")
    affine = np.eye(4)
    affine[:3, :3] = columns
    affine[:3, 3] = numbers("space origin", origin.strip("()").replace(",", " "), 3)
    return np.diag([*(signs or (1, 1, 1)), 1]) @ affine, tuple(notes)


def _parts(path: Path, fields: dict[str, str], tail: bytes, after: int | None, last: int, limits: Limits) -> list[Part]:
    """Where the voxels lie; ``after`` is the byte after the header, if there is something."""
    encoding = fields.get("encoding", "").lower()
    if encoding not in _PACKINGS:
        raise VolumeError(f"the header's encoding is {encoding!r}; expected raw, gzip or bzip2")
    packing = _PACKINGS[encoding]
    lines = numbers("line skip", fields.get("line skip", fields.get("lineskip", "0")), 1, whole=True)[0]
    skip = numbers("byte skip", fields.get("byte skip", fields.get("byteskip", "0")), 1, whole=True)[0]
    if lines or not -1 <= skip <= 1 << 30 or (skip < 0 and packing != "raw"):
        raise VolumeError(
            f"the header skips {lines:g} lines and {skip:g} bytes; expected no lines, and -1 only for raw voxels"
        )
    name = _one_of(fields, "data file", "datafile")
    if name is None:
        if after is None:
            raise VolumeError("the header has no end: expected an empty line, then voxels; the file is truncated")
        return [Part(path, packing, start=after, offset=int(skip))]
    if name.split()[:1] == ["LIST"]:
        rank = len(fields["sizes"].split())
        if name not in ("LIST", f"LIST {rank - 1}"):
            raise VolumeError(f"the header's data file is {name!r}; expected LIST, of files with a slice each")
        lines_of = fields_of((b"%d=" % k + line for k, line in enumerate(tail.splitlines())), "=")
        names = slice_files(path, [line for line in lines_of.values() if line], last, limits)
    elif "%" in name:
        names = slice_files(path, numbered_names(name, last), last, limits)
    else:
        names = [data_file(path, name, limits)]
    return [Part(one, packing, offset=int(skip)) for one in names]


def _one_of(fields: dict[str, str], *names: str) -> str | None:
    values = [fields[name] for name in names if name in fields]
    if len(values) > 1:
        raise VolumeError(f"the header has {' and '.join(names)}; expected one of them")
    return values[0] if values else None


def _split(path: Path) -> tuple[dict[str, str], bytes, int | None]:
    """The fields of the header, what stands after a LIST, and the byte after the header's empty line."""
    with path.open("rb") as file:
        start = file.read(LONGEST)
    lines: list[bytes] = []
    at, listed = start.find(b"\n") + 1, False
    if not at or not re.fullmatch(rb"NRRD000[1-5]\r?\n", start[:at]):
        raise VolumeError(f"the file starts with {start[:8]!r}; expected NRRD0001 to NRRD0005 and a line end")
    while at < len(start):
        end = start.find(b"\n", at)
        end = len(start) if end < 0 else end
        line, at = start[at:end].removesuffix(b"\r"), end + 1
        if not line:
            return fields_of(lines, ":"), b"", at
        if re.match(rb"[^:]*:=", line):  # a remark as key and value
            continue
        lines.append(line)
        if re.match(rb"data ?file: *LIST", line):
            listed = True
            break
    return fields_of(lines, ":"), start[at:] if listed else b"", None


def read_nrrd(path: Path, limits: Limits) -> Image:
    """A ``.nrrd`` or ``.nhdr`` file.

    Raises:
        VolumeError: the header or what it names is broken, incomplete, elsewhere, or not a volume.
    """
    fields, tail, after = _split(path)
    directions = "".join(fields.get("space directions", "").split())
    vectors = _VECTOR.findall(directions)
    if "".join(vectors) != directions:
        raise VolumeError(f"the space directions are {fields['space directions']!r}; expected (x,y,z) or none per axis")
    axes = _axes(fields, vectors)
    affine, notes = _affine(fields, axes, vectors)
    kind = fields.get("type", "").lower()
    if kind not in _TYPES:
        raise VolumeError(f"the header's type is {kind!r}; expected integers or floats")
    dtype = np.dtype(_TYPES[kind])
    order = fields.get("endian", "").lower()
    if dtype.itemsize > 1 and order not in ("little", "big"):
        raise VolumeError(f"the header's endian is {order!r}; expected little or big")
    frames, *spatial = spatial_shape(
        [axes.sizes[axis] for axis in axes.spatial] + ([] if axes.other is None else [axes.sizes[axes.other]])
    )
    interleaved = axes.other == 0 and len(axes.sizes) > 3
    stored = Stored(dtype.newbyteorder(">" if order == "big" else "<"), (frames, *spatial), interleaved)  # type: ignore[arg-type]
    voxels, odd = read_voxels(_parts(path, fields, tail, after, axes.sizes[-1], limits), stored, limits)
    return Image(voxels, affine, frames if frames > 1 and not axes.channels else 0, notes + odd)
