"""Scans whose bytes are fine and whose meaning is not: MetaImage and NRRD headers, and gzip layouts of NIfTI files."""

from __future__ import annotations

import bz2
import gzip
import os
import random
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

KINDS = {"i1": "CHAR", "u1": "UCHAR", "i2": "SHORT", "u2": "USHORT", "i4": "INT", "f4": "FLOAT", "f8": "DOUBLE"}
NRRD_KINDS = {"i1": "int8", "u1": "uchar", "i2": "short", "u2": "ushort", "i4": "int", "f4": "float", "f8": "double"}
HOSTILE = (
    "%n", "%s", "%s%s%s%s%s", "%*d", "%999999999d", "%0999999d", "%-9d", "%+d", "% d", "%ld", "%hhn", "%1$d", "%d%d",
    "%%d%n", "%x", "%f", "%c", "%p", "s%d%n.raw", "%00d", "%010d", "%", "%%", "%d",
)  # fmt: skip
RANGES = (
    "",
    " 1",
    " 1 4",
    " 1 4 1",
    " 1 4 0",
    " 4 1 -1",
    " 1 999999999 1",
    " -5 -2 1",
    " 1 4 1 2",
    " 1 4 1 3",
    " 1 x 1",
)
WORDS = (
    "0",
    "-1",
    "nan",
    "inf",
    "1e400",
    "1_0",
    "0x10",
    "",
    "1 1 1 1 1 1 1",
    "1,1,1",
    "99999999999",
    "1e9",
    "2.5",
    "%n",
)


class Case(NamedTuple):
    """A path to read, what reading must give if it gives anything, and whether it must be refused.

    alone: whether other readers are not to be asked.
    """

    path: Path
    voxels: np.ndarray | None  # (C, D, H, W)
    affine: np.ndarray | None  # index (x, y, z) to LPS
    refuse: bool
    what: str
    alone: bool = False


def _affine(rng: random.Random) -> np.ndarray:
    rotation = np.linalg.qr(np.random.default_rng(rng.randrange(1 << 30)).normal(size=(3, 3)))[0]
    affine = np.eye(4)
    affine[:3, :3] = rotation * [0.7, 0.8, 2.5] if rng.random() < 0.7 else np.diag([0.7, 0.8, 2.5])
    affine[:3, 3] = [10.0, -20.0, 5.0]
    return affine


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{v:.17g}" for v in np.ravel(values))


def _mutated(lines: list[str], rng: random.Random, data_key: str) -> str:
    """Changes a field of the header in place; what was done."""
    number = rng.randrange(len(lines))
    mark = " = " if " = " in lines[number] else ": "
    key = lines[number].partition(mark)[0]
    what = rng.choice(("value", "value", "drop", "twice", "control", "long", "other"))
    if key == data_key:
        what = "value" if what in ("drop", "twice", "other") else what
    if what == "value":
        lines[number] = key + mark + rng.choice(WORDS)
    elif what == "drop":
        del lines[number]
    elif what == "twice":
        lines.insert(number, key + mark + rng.choice(WORDS))
    elif what == "control":
        lines[number] += rng.choice("\0\x01\x07\x1b\x7f")
    elif what == "long":
        lines[number] += " 1" * 40_000
    else:
        lines[number] = key + mark + lines[rng.randrange(len(lines))].partition(mark)[2]
    return f"{what} of {key}"


def _damaged(packed: bytes, rng: random.Random) -> bytes:
    how = rng.choice(("cut", "flip", "empty", "tail"))
    if how == "cut":
        return packed[: rng.randrange(len(packed))]
    if how == "flip":
        at = rng.randrange(len(packed) // 2, len(packed))
        return packed[:at] + bytes([packed[at] ^ (1 << rng.randrange(8))]) + packed[at + 1 :]
    return b"" if how == "empty" else packed[: -rng.choice((1, 4, 8))]


def _foreign_name(folder: Path, rng: random.Random, header: str, raw: bytes) -> str:
    """The name of a data file that must not be read."""
    outside = folder.parent / f"outside{rng.randrange(1 << 30)}"
    how = rng.choice(("absolute", "up", "self", "device", "pipe", "link", "folder", "missing", "proc", "chain"))
    if how in ("absolute", "up", "link", "chain"):
        outside.write_bytes(raw)
    if how == "link":
        (folder / "link.raw").symlink_to(outside)
    if how == "chain":
        (folder / "deep").mkdir()
        (folder / "deep/link").symlink_to("..")
        return f"deep/link/../{outside.name}"
    if how == "pipe":
        os.mkfifo(folder / "pipe")
    if how == "folder":
        (folder / "sub").mkdir()
    return {
        "absolute": str(outside), "up": f"../{outside.name}", "self": header, "device": "/dev/zero", "pipe": "pipe",
        "link": "link.raw", "folder": "sub", "missing": "gone.raw", "proc": "/proc/self/environ",
    }[how]  # fmt: skip


def _nrrd_vectors(columns: np.ndarray) -> str:
    return " ".join(f"({','.join(f'{v:.17g}' for v in columns[:, k])})" for k in range(3))


def text_case(rng: random.Random, folder: Path) -> Case:
    """A MetaImage or NRRD in one of the ways in which their voxels may be stored, most with one thing wrong."""
    nrrd, kind = rng.random() < 0.5, rng.choice(list(KINDS))
    big, channels = rng.random() < 0.3, rng.choice((1, 1, 1, 3))
    d, h, w = rng.randint(2, 5), rng.randint(2, 6), rng.randint(2, 7)
    values = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 100, (d, h, w, channels))
    raw = values.astype(np.dtype(kind).newbyteorder(">" if big else "<")).tobytes()
    affine = _affine(rng)
    packing = rng.choice(("raw", "raw", "zip", "bz2" if nrrd else "zip"))
    place = rng.choice(("local", "file", "files", "list") if packing == "raw" else ("local", "file"))
    attack = rng.choice(("none", "none", "name", "pattern", "count", "damage", "size", "field", "field", "field"))
    pack = {"raw": bytes, "zip": gzip.compress if nrrd else zlib.compress, "bz2": bz2.compress}[packing]
    body, refuse, what = pack(raw), False, attack
    if attack == "damage":
        body, refuse = _damaged(pack(raw), rng) if packing != "raw" else raw[: rng.randrange(len(raw))], False
    if attack == "pattern" or (attack == "count" and place not in ("files", "list")):
        place = "files" if attack == "pattern" else rng.choice(("files", "list"))
        packing, body = "raw", raw
    header, step = ("v.nhdr" if nrrd else "v.mhd"), len(raw) // d
    names = [f"s{k + 1}.raw" for k in range(d)]
    for k, name in enumerate(names if place in ("files", "list") else []):
        (folder / name).write_bytes(body[k * step : (k + 1) * step])
    listed = names
    if attack == "count":
        listed = rng.choice((names[:-1], [*names, names[0]], [names[0]] * d, [], names[:1]))
        refuse = True
    target = {"local": "LOCAL", "file": "v.bin", "files": f"s%d.raw 1 {len(listed)} 1", "list": "LIST"}[place]
    if attack == "count" and place == "files":
        refuse = len(listed) != d
    if attack == "pattern":
        target = rng.choice(HOSTILE) + rng.choice((".raw", "")) + rng.choice(RANGES)
        refuse = True
    if attack == "name":
        target, refuse = _foreign_name(folder, rng, header, raw), True
        packing = "raw"
        place = "file"
    if place == "file" and attack != "name":
        (folder / "v.bin").write_bytes(body)
    sizes = [w, h, d]
    if attack == "size":
        sizes[rng.randrange(3)] += rng.choice((1, 2, 1000, 10**6, 10**9))
        refuse = True
    lines = (
        _nrrd_lines(kind, sizes, channels, big, affine, packing, target)
        if nrrd
        else _meta_lines(
            kind,
            sizes,
            channels,
            big,
            affine,
            packing,
            target,
            len(body) if target == "LOCAL" or rng.random() < 0.5 else None,
        )
    )
    either = attack == "field"
    if either:
        what = _mutated(lines, rng, "ElementDataFile" if not nrrd else "data file")
    alone = what == "drop of CompressedDataSize"  # nothing is lost, but ITK may give memory that it has not filled
    either = either and not alone
    text = "\n".join([*lines, *(listed if target == "LIST" else [])]) + "\n"
    text += "\n" if nrrd and target == "LOCAL" else ""
    (folder / header).write_bytes(text.encode() + (body if target == "LOCAL" else b""))
    voxels = None if either else np.moveaxis(values, -1, 0)
    return Case(
        folder / header, voxels, None if either else affine, refuse, f"{header} {place} {packing} {what}", alone
    )


def _meta_lines(
    kind: str, sizes: list[int], channels: int, big: bool, affine: np.ndarray, packing: str, target: str,
    packed: int | None,
) -> list[str]:  # fmt: skip
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    lines = [
        "ObjectType = Image", "NDims = 3", "BinaryData = True", f"BinaryDataByteOrderMSB = {big}",
        f"CompressedData = {packing != 'raw'}", f"TransformMatrix = {_numbers((affine[:3, :3] / spacing).T)}",
        f"Offset = {_numbers(affine[:3, 3])}", "CenterOfRotation = 0 0 0", "AnatomicalOrientation = RAI",
        f"ElementSpacing = {_numbers(spacing)}", f"DimSize = {' '.join(map(str, sizes))}",
    ]  # fmt: skip
    if packing != "raw" and packed is not None:
        lines.append(f"CompressedDataSize = {packed}")
    if channels > 1:
        lines.append(f"ElementNumberOfChannels = {channels}")
    return [*lines, f"ElementType = MET_{KINDS[kind]}", f"ElementDataFile = {target}"]


def _nrrd_lines(
    kind: str, sizes: list[int], channels: int, big: bool, affine: np.ndarray, packing: str, target: str
) -> list[str]:
    vector = channels > 1
    lines = [
        "NRRD0005", f"type: {NRRD_KINDS[kind]}", f"dimension: {3 + vector}", "space: left-posterior-superior",
        f"sizes: {f'{channels} ' * vector}{' '.join(map(str, sizes))}",
        f"space directions: {'none ' * vector}{_nrrd_vectors(affine[:3, :3])}",
        f"kinds: {'vector ' * vector}domain domain domain", f"endian: {'big' if big else 'little'}",
        f"encoding: { {'raw': 'raw', 'zip': 'gzip', 'bz2': 'bzip2'}[packing]}",
        f"space origin: ({','.join(f'{v:.17g}' for v in affine[:3, 3])})",
    ]  # fmt: skip
    return lines if target == "LOCAL" else [*lines, f"data file: {target}"]


def gzip_case(rng: random.Random, folder: Path) -> Case:
    """A NIfTI file in gzip members of many kinds, some of them damaged, some with a header that lies."""
    import nibabel

    kind = rng.choice(("u1", "i2", "u2", "i4", "f4", "f8"))
    shape = [rng.randint(2, 6) for _ in range(3)]
    values = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 100, shape).astype(kind)
    what = rng.choice(
        ("plain", "members", "tail", "cut", "crc", "beyond", "scale", "dims", "bomb", "mgz", "pair", "offset")
    )
    if what == "beyond":
        values = np.full(shape, rng.choice((1e39, 1e300, -1e308, 3e38)))
    affine = _affine(rng)
    ras = np.diag([-1.0, -1, 1, 1]) @ affine
    mgz = what == "mgz" and kind in ("u1", "i2", "i4", "f4")
    image = nibabel.MGHImage(values, ras) if mgz else nibabel.Nifti1Image(values, ras, dtype=values.dtype)
    scaled = what in ("beyond", "scale") and rng.random() < 0.7 and hasattr(image.header, "set_slope_inter")
    if scaled:
        image.header.set_slope_inter(rng.choice((0.5, 2.0, -1.0, 1e-3)), rng.choice((0.0, -1024.0, 7.0)))
    plain = image.to_bytes() if what != "pair" else b""
    name, refuse = ("v.mgz" if isinstance(image, nibabel.MGHImage) else "v.nii.gz"), False
    packed = gzip.compress(plain)
    cuts = sorted(rng.randrange(len(plain) + 1) for _ in range(rng.randint(1, 4)))
    pieces = [plain[a:b] for a, b in zip([0, *cuts], [*cuts, len(plain)], strict=True)]
    if what == "members":
        packed = gzip.compress(b"") * rng.randint(0, 3) + b"".join(map(gzip.compress, pieces)) + gzip.compress(b"")
    elif what == "tail":
        packed += rng.choice(
            (b"\0" * 512, b"junk", rng.randbytes(100), b"\x1f\x8b", b"\0\0junk", b"\x1f\x8b\x08broken")
        )
    elif what == "cut":
        packed, refuse = packed[: rng.randrange(3, len(packed))], True
    elif what == "crc":
        at = len(packed) - rng.randint(1, 8)
        packed, refuse = packed[:at] + bytes([packed[at] ^ 0x10]) + packed[at + 1 :], True
    elif what == "dims":
        axis, size = rng.randint(1, 3), rng.choice((100, 3000, 32767, -1, 0))
        packed, refuse = (
            gzip.compress(plain[: 40 + 2 * axis] + size.to_bytes(2, "little", signed=True) + plain[42 + 2 * axis :]),
            True,
        )
    elif what == "offset":  # before the first byte that may be a voxel
        place = np.float32(rng.randint(348, 351)).tobytes()
        packed, refuse = gzip.compress(plain[:108] + place + plain[112:]), True
    elif what == "bomb":
        packed, refuse = gzip.compress(plain + bytes(8 << 20)), True
    path = folder / name
    if what == "pair":
        path = folder / "v.hdr"
        nibabel.save(nibabel.Nifti1Pair(values, image.affine, dtype=values.dtype), path)
    else:
        path.write_bytes(packed)
    return Case(path, None, None, refuse, f"{name} {what}")
