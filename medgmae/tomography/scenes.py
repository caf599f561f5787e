"""Data sets of published methods: folders of R2-Gaussian, pickles of NAF and SAX-NeRF."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medgmae.data import VolumeError
from medgmae.tomography.geometry import ProjectionGeometry, circular_geometry

MAX_BYTES = 8 << 30
_META = "meta_data.json"
# What numpy's arrays and numbers are made of in a pickle, under the old name of its module and the new one.
_ALLOWED = {
    (f"{module}.{part}", name)
    for module in ("numpy.core", "numpy._core")
    for part, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
} | {("numpy", "ndarray"), ("numpy", "dtype")}


def is_scene(folder: Path) -> bool:
    """Whether a folder is one of R2-Gaussian's."""
    return (folder / _META).is_file()


def read_scene(folder: Path, unit_mm: float) -> tuple[Tensor, ProjectionGeometry]:
    """Projections (V, H, W) as stored, and geometry, of a folder of R2-Gaussian: its views to train on.

    Args:
        folder: with ``meta_data.json`` and the images it names.
        unit_mm: millimetres of one unit of the scene, which the file does not say. The projections are pure numbers
            whatever it is; what is reconstructed of them, in 1/mm, times ``unit_mm`` are the numbers of its ``vol``.

    Raises:
        VolumeError: files that are missing, or another form.
    """
    path = folder / _META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        scanner, views = meta["scanner"], meta["proj_train"]
        angles = [float(view["angle"]) for view in views]
        images = [np.load(folder / view["file_path"], allow_pickle=False) for view in views]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VolumeError(f"{path}: not a scene of R2-Gaussian ({type(error).__name__}: {str(error)[:200]})") from error
    offset = scanner.get("offDetector", [0, 0])
    if any(float(value) for value in offset):
        raise VolumeError(
            f"{path}: offDetector is {offset}; R2-Gaussian's own code ignores it, so its meaning is open: write the "
            "geometry as our JSON, with offset_mm"
        )
    rows, columns = (int(n) for n in scanner["nDetector"])  # [v, u]
    mode = scanner.get("mode", "cone")
    extent = [float(value) * unit_mm for value in scanner["sDetector"]]  # of the whole detector
    if mode == "parallel":  # whose detector spans the volume, whatever sDetector says
        extent = [max(float(value) for value in scanner["sVoxel"]) * unit_mm] * 2
    elif mode != "cone":
        raise VolumeError(f"{path}: mode is {mode!r}; expected 'cone' or 'parallel'")
    return _stack(images, path), circular_geometry(
        angles,
        (rows, columns),
        (extent[0] / rows, extent[1] / columns),
        **({} if mode == "parallel" else {"sid": scanner["DSO"] * unit_mm, "sdd": scanner["DSD"] * unit_mm}),
    )


def read_naf(path: Path) -> tuple[Tensor, ProjectionGeometry]:
    """Projections (V, H, W), as pure numbers, and geometry, of a pickle of NAF or SAX-NeRF: its views to train on.

    Nothing in the pickle is called but what makes numpy's arrays. Distances in it are millimetres, its projections were
    made with metres: what is reconstructed of them, in 1/mm, is a thousandth of the numbers of its ``image``.

    Raises:
        VolumeError: it names other objects, or has another form.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise VolumeError(f"{path}: {size} bytes; expected at most {MAX_BYTES}")
        content = _Arrays(io.BytesIO(path.read_bytes())).load()
        train = content["train"]
        angles, images = np.asarray(train["angles"], dtype=np.float64), np.asarray(train["projections"])
        columns, rows = (int(n) for n in content["nDetector"])
        column_mm, row_mm = (float(value) for value in content["dDetector"])
        offset = tuple(float(value) for value in content.get("offDetector", (0.0, 0.0)))
        sid, sdd, mode = float(content["DSO"]), float(content["DSD"]), content.get("mode", "cone")
    except VolumeError:
        raise
    except Exception as error:  # a stranger's pickle may end in any exception
        raise VolumeError(
            f"{path}: not a pickle of NAF ({type(error).__name__}: {str(error)[:200]}); expected a dictionary "
            "with DSD, DSO, nDetector, dDetector and train"
        ) from error
    if mode not in ("cone", "parallel"):
        raise VolumeError(f"{path}: mode is {mode!r}; expected 'cone' or 'parallel'")
    distances = (None, None) if mode == "parallel" else (sid, sdd)
    geometry = circular_geometry(
        angles.tolist(), (rows, columns), (row_mm, column_mm), sid=distances[0], sdd=distances[1], offset_mm=offset
    )
    return _stack(list(images), path), geometry


class _Arrays(pickle.Unpickler):
    """Reads dictionaries, lists, text, numbers and numpy's arrays, and refuses everything else by name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # bytes in a pickle that Python 2 can read
            return _latin1
        if (module, name) not in _ALLOWED:
            raise VolumeError(
                f"the pickle names {module}.{name}; expected numbers, text, lists, dictionaries and arrays"
            )
        return super().find_class(module, name)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise VolumeError(f"the pickle has text in {encoding!r}; expected 'latin1'")
    return text.encode("latin1")


def _stack(images: Sequence[Any], path: Path) -> Tensor:
    shapes = {np.shape(image) for image in images}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise VolumeError(
            f"{path}: images have shapes {sorted(map(str, shapes))[:4]}; expected one shape (rows, columns)"
        )
    return torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in images]))
