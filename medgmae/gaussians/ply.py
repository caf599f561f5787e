"""PLY files of Gaussians, in the layout that viewers of 3D Gaussian splatting read.

One vertex per Gaussian: the centre ``x y z``, a normal that nobody uses, the colour as the first coefficient of
spherical harmonics ``f_dc_0..2``, the logarithms of the scales ``scale_0..2``, the quaternion ``rot_0..3`` (w, x, y, z)
and the logit of the opacity (Kerbl et al. 2023, "3D Gaussian Splatting for Real-Time Radiance Field Rendering", and the
files of its code). Those cannot hold what a volume needs: densities may be negative or above 1, and a logarithm does
not come back bit for bit. So four properties follow, which viewers skip: ``density`` and ``std_0..2``.

What a viewer shows: opacity is the size of the density, held between 1e-6 and 1 - 1e-6; white adds, blue takes away.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Frame = Literal["axes", "world"]
Array = NDArray[np.float32]

_PROPERTIES = (
    *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
    *("density", "std_0", "std_1", "std_2"),
)
_NEEDED = ("x", "y", "z", "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3")
_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip
_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": "<"}
_MEANING = {
    "axes": "x y z are the axes (w, h, d) of a volume, in units of the axis: 0 first voxel, 1 last voxel",
    "world": "x y z are LPS millimetres in the patient",
}
_WHITE, _BLUE = (1.0, 1.0, 1.0), (0.2, 0.4, 1.0)
_SH0 = 0.28209479177387814  # the constant spherical harmonic, ½ sqrt(1 / π): colour = ½ + _SH0 · f_dc
_FAINTEST = 1e-6
_THINNEST = 1e-30
_SAME = 1e-5  # log scale and logit: two roundings to float32 apart is the same, an editor's change is not


class Splats(NamedTuple):
    """K Gaussians, float32, with axes in the order (x, y, z).

    means: (K, 3). scales: (K, 3), along the Gaussian's own axes. quats: (K, 4), (w, x, y, z). densities: (K,).
    frame: what x, y and z are, see ``_MEANING``; None where a file does not say.
    """

    means: Array
    scales: Array
    quats: Array
    densities: Array
    frame: Frame | None


def reversed_axes(splats: Splats) -> Splats:
    """The same Gaussians with axes in reverse order, (d, h, w) to (w, h, d) and back; exact.

    The reversal P is a mirror. P R P is a rotation again, about the mirrored axis by the opposite angle, and takes
    P diag(s²) P to the mirrored covariance.
    """
    flipped = np.concatenate([splats.quats[:, :1], -splats.quats[:, :0:-1]], axis=1)
    return splats._replace(means=splats.means[:, ::-1], scales=splats.scales[:, ::-1], quats=flipped)


def _logit(densities: NDArray[Any]) -> NDArray[np.float64]:
    """Logit of the opacity that stands for a density."""
    shown = np.abs(densities.astype(np.float64)).clip(_FAINTEST, 1 - _FAINTEST)
    return np.asarray(np.log(shown) - np.log1p(-shown))


def _log(scales: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(np.log(np.abs(scales.astype(np.float64)).clip(min=_THINNEST)))


def write_ply(path: str | os.PathLike[str], splats: Splats) -> None:
    """Write Gaussians; what comes back from :func:`read_ply` has the same bits.

    Raises:
        ValueError: a parameter is NaN or infinite, which viewers cannot read.
    """
    _check_finite(f"{path} is not written", splats)
    colours = (np.where(splats.densities[:, None] < 0, _BLUE, _WHITE) - 0.5) / _SH0
    columns: list[NDArray[Any]] = [
        *(splats.means, np.zeros_like(splats.means), colours, _logit(splats.densities)[:, None]),
        *(_log(splats.scales), splats.quats, splats.densities[:, None], splats.scales),
    ]
    header = ["ply", "format binary_little_endian 1.0", "comment value at distance d: density * exp(-1/2 d' C^-1 d)"]
    if splats.frame is not None:
        header += [f"comment medgmae frame {splats.frame}", f"comment {_MEANING[splats.frame]}"]
    header += [f"element vertex {len(splats.means)}", *(f"property float {name}" for name in _PROPERTIES), "end_header"]
    body = np.concatenate(columns, axis=1).astype("<f4").tobytes()
    Path(path).write_bytes("\n".join([*header, ""]).encode("ascii") + body)


def read_ply(path: str | os.PathLike[str]) -> Splats:
    """Gaussians of a PLY file, binary or text, of this library or of another tool for 3D Gaussian splatting.

    Without the property ``density`` the density is the opacity, sigmoid(opacity). Where an editor has changed opacity
    or scales and carried ``density`` and ``std_*`` along, its change counts.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a PLY file, holds no Gaussians, is cut off or longer than its header says, or holds NaN or
            infinite values.
    """
    table = _table(Path(path))
    names = table.table.dtype.names or ()

    def columns(*wanted: str) -> NDArray[np.float64]:
        return np.stack([table.table[name].astype(np.float64) for name in wanted], axis=1)

    with np.errstate(over="ignore"):  # becomes infinite, which is refused below
        opacity, logs = columns("opacity"), columns("scale_0", "scale_1", "scale_2")
        densities, scales = 1 / (1 + np.exp(-opacity)), np.exp(logs)
        if "density" in names:
            kept = columns("density")
            densities = np.where(_same(_logit(kept), opacity), kept, densities)
        if {"std_0", "std_1", "std_2"} <= set(names):
            kept = columns("std_0", "std_1", "std_2")
            scales = np.where(_same(_log(kept), logs), kept, scales)
        splats = Splats(
            columns("x", "y", "z").astype(np.float32),
            scales.astype(np.float32),
            columns("rot_0", "rot_1", "rot_2", "rot_3").astype(np.float32),
            densities[:, 0].astype(np.float32),
            table.frame,
        )
    _check_finite(str(path), splats)
    return splats


def _same(expected: NDArray[np.float64], stored: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray(np.abs(expected - stored) <= _SAME * np.maximum(1, np.abs(expected)))


def _check_finite(where: str, splats: Splats) -> None:
    for name, values in zip(splats._fields[:4], splats[:4], strict=True):
        broken = np.flatnonzero(~np.isfinite(values if values.ndim == 2 else values[:, None]).all(axis=1))
        if len(broken):
            raise ValueError(
                f"{where}: {name} of Gaussian {broken[0]} is NaN or infinite, and {len(broken) - 1} more; "
                "expected finite values"
            )


class _Table(NamedTuple):
    """The vertices as a structured array, and the frame that the header names."""

    table: NDArray[Any]
    frame: Frame | None


def _table(path: Path) -> _Table:
    content = path.read_bytes()
    end = re.search(rb"(?:^|\n)end_header[ \t]*\r?\n", content[: 1 << 20])
    if not content.startswith(b"ply") or end is None:
        raise ValueError(f"{path} starts with {content[:8]!r}; expected a PLY file: 'ply', a header, 'end_header'")
    lines = [line.split() for line in content[: end.start()].decode("latin-1").splitlines() if line.strip()]
    kind = next((words[1] for words in lines if words[0] == "format" and len(words) == 3), None)
    if kind not in _ORDERS:
        raise ValueError(f"{path}: the header's format is {kind!r}; expected one of {', '.join(_ORDERS)}")
    count, dtype, more = _layout(path, lines, _ORDERS[kind])
    body = memoryview(content)[end.end() :]
    values = _text(path, bytes(body), count, dtype) if kind == "ascii" else _bytes(path, body, count, dtype, more)
    return _Table(values, _frame(path, lines))


def _frame(path: Path, lines: list[list[str]]) -> Frame | None:
    """What the header says about the frame."""
    for words in lines:
        if words[:3] == ["comment", "medgmae", "frame"]:
            if words[3:] == ["axes"]:
                return "axes"
            if words[3:] == ["world"]:
                return "world"
            raise ValueError(f"{path}: the frame is {' '.join(words[3:])!r}; expected one of {', '.join(_MEANING)}")
    return None


def _layout(path: Path, lines: list[list[str]], order: str) -> tuple[int, np.dtype[Any], bool]:
    """Number of vertices, their layout, and whether other elements follow them."""
    starts = [i for i, words in enumerate(lines) if words[0] == "element"]
    first = lines[starts[0]] if starts else []
    if len(first) != 3 or first[1] != "vertex" or not first[2].isdigit():
        raise ValueError(
            f"{path}: the first element is {' '.join(first[1:]) or 'absent'!r}; expected 'vertex' and a count"
        )
    own = lines[starts[0] + 1 : starts[1] if len(starts) > 1 else None]
    properties = [words[1:] for words in own if words[0] == "property"]
    odd = next((words for words in properties if len(words) != 2 or words[0] not in _TYPES), None)
    if odd is not None:
        raise ValueError(
            f"{path}: the vertex property {' '.join(odd)!r} is not a number; expected properties such as 'float x'"
        )
    names = [name for _, name in properties]
    missing = [name for name in _NEEDED if name not in names]
    if missing or len(set(names)) < len(names):
        raise ValueError(
            f"{path}: the vertices have the properties {', '.join(names) or 'none'}; expected Gaussians, with "
            f"{', '.join(missing) or 'each name once'}"
        )
    return int(first[2]), np.dtype([(name, order + _TYPES[kind]) for kind, name in properties]), len(starts) > 1


def _bytes(path: Path, body: memoryview, count: int, dtype: np.dtype[Any], more: bool) -> NDArray[Any]:
    due = count * dtype.itemsize
    if len(body) < due or (len(body) > due and not more):
        what = "is cut off" if len(body) < due else "is too long"
        raise ValueError(f"{path} {what}: {len(body)} bytes after the header, expected {due} for {count} Gaussians")
    return np.frombuffer(body[:due], dtype)


def _text(path: Path, body: bytes, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    words, width = body.split(), len(dtype.names or ())
    if len(words) < count * width:
        raise ValueError(f"{path} is cut off: {len(words)} numbers, expected {count * width} for {count} Gaussians")
    try:
        numbers = np.array(words[: count * width]).astype(np.float64).reshape(count, width)
    except ValueError as error:
        raise ValueError(f"{path}: a value is not a number: {error}") from None
    values = np.empty(count, dtype)
    for name, column in zip(dtype.names or (), numbers.T, strict=True):
        values[name] = column
    return values
