"""A scan as a notebook shows it: a table, and a slice through the middle in each plane."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medgmae.data.geometry import Grid, axis_maps

_PIXELS = 160  # of the longest side of the body part, in all three pictures
# Planes through an array (z, y, x) in RAS: name, axis that is sliced, and what is at the left of the picture.
_PLANES = (("axial", 0, "right"), ("coronal", 1, "right"), ("sagittal", 2, "front"))


def volume_html(data: Tensor, grid: Grid, source: str) -> str:
    """A table of facts, and grey pictures of the first channel (C, D, H, W), the patient's right on the left."""
    millimetres = [n * mm for n, mm in zip(grid.size, grid.spacing, strict=True)]
    facts = {
        "shape": f"{tuple(data.shape)} (C, D, H, W)",
        "type": str(data.dtype).removeprefix("torch."),
        "spacing": f"{_numbers(grid.spacing)} mm",
        "size": f"{_numbers(millimetres)} mm",
        "orientation": grid.orientation,
        "range": _range(data),
        "source": source,
    }
    rows = "".join(
        f'<tr><th style="text-align:left">{name}</th><td style="text-align:left">{html.escape(fact)}</td></tr>'
        for name, fact in facts.items()
    )
    return f"<div><table>{rows}</table>{_pictures(data, grid, _PIXELS / max(millimetres))}</div>"


def _numbers(values: Any) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def _range(data: Tensor) -> str:
    if not data.is_floating_point():
        return f"{data.min().item():g} to {data.max().item():g}"
    finite = data[data.isfinite()]
    missing = data.numel() - finite.numel()
    span = f"{finite.min().item():.4g} to {finite.max().item():.4g}" if finite.numel() else "no finite voxel"
    return f"{span}, {missing} voxels NaN or infinite" if missing else span


def _pictures(data: Tensor, grid: Grid, pixels_per_mm: float) -> str:
    upright = grid.reoriented("RAS")
    maps = axis_maps(grid, upright)
    assert maps is not None  # the same axes in another order
    voxels = data[0].detach().cpu().float().numpy().transpose([axis.source for axis in maps])
    voxels = voxels[tuple(slice(None, None, -1 if axis.positions[0] > 0 else 1) for axis in maps)]
    planes = [voxels.take(upright.size[axis] // 2, axis)[::-1, ::-1] for _, axis, _ in _PLANES]
    low, high = _contrast(np.concatenate([plane.ravel() for plane in planes]))
    figures = []
    for (name, axis, left), plane in zip(_PLANES, planes, strict=True):
        steps = [-(-n // _PIXELS) for n in plane.shape]
        grey = _grey(plane[:: steps[0], :: steps[1]], low, high)
        sides = [n * mm for k, (n, mm) in enumerate(zip(upright.size, upright.spacing, strict=True)) if k != axis]
        height, width = (max(1, round(side * pixels_per_mm)) for side in sides)
        figures.append(
            '<figure style="display:inline-block;margin:4px;text-align:center">'
            f'<img src="data:image/png;base64,{base64.b64encode(_png(grey)).decode()}" width="{width}" '
            f'height="{height}" style="image-rendering:pixelated" alt="{name}, {left} on the left"/>'
            f"<figcaption>{name}</figcaption></figure>"
        )
    return "".join(figures)


def _contrast(pixels: NDArray[np.float32]) -> tuple[float, float]:
    """Intensities that are shown black and white."""
    finite = pixels[np.isfinite(pixels)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.percentile(finite, [0.5, 99.5])
    if low == high:  # next to nothing but background
        low, high = finite.min(), finite.max()
    return (float(low), float(high)) if high > low else (float(low) - 1.0, float(low) + 1.0)


def _grey(plane: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    share = (np.clip(plane.astype(np.float64), low, high) - low) / (high - low)
    return np.asarray(np.nan_to_num(share * 255).round().astype(np.uint8))


def _png(grey: NDArray[np.uint8]) -> bytes:
    """An 8-bit grey picture as the bytes of a PNG file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = grey.shape
    rows = np.pad(grey, ((0, 0), (1, 0))).tobytes()  # each row begins with its filter, 0: none
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
