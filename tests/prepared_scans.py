"""Scans on disk to prepare, and what is listed of them, for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medgmae.data import Grid, Volume
from medgmae.data.preparing import prepare_scans
from medgmae.data.store import PreparedFolder

INPUT: dict[str, Any] = {
    "modality": "CT",
    "orientation": "RAS",
    "axes": "xyz",
    "spacing": [1.5, 1.5, 1.5],
    "resample": {"to": "spacing", "origin": "first_voxel"},
    "window": [-175, 250],
    "size": [16, 16, 16],
}
PLAIN: dict[str, Any] = {"size": [8, 8, 8]}  # voxels as they are


@dataclass(frozen=True)
class Listed:
    """A scan as listings have it."""

    path: Path
    name: str = ""
    series: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] | None = None


def ball(size: tuple[int, int, int], seed: int = 0) -> Volume:
    """Noise around 40 HU in a ball, air around it."""
    rng = np.random.default_rng(seed)
    axes = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in size)]
    inside = sum(axis**2 for axis in axes) < 0.6
    voxels = np.where(inside, rng.normal(40, 30, size), -1000).round().astype(np.int16)
    return Volume(torch.from_numpy(voxels)[None], Grid(size, (2.0, 1.0, 1.0), (5.0, -7.0, 11.0)))


def saved(folder: Path, count: int, size: tuple[int, int, int] = (20, 36, 32)) -> list[Listed]:
    """Balls on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        ball(size, number).save(folder / f"{number}.nii.gz")
    return [Listed(folder / f"{number}.nii.gz", f"scan {number}") for number in range(count)]


def prepared_arrays(folder: Path, arrays: list[np.ndarray], **options: Any) -> PreparedFolder:
    """Arrays (D, H, W) or (C, D, H, W), prepared as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, array in enumerate(arrays):
        tensor = torch.from_numpy(array)
        volume = Volume(tensor if tensor.ndim == 4 else tensor[None])
        volume.save(folder / f"{number}.nii")
        listed.append(Listed(folder / f"{number}.nii", str(number)))
    channels = arrays[0].shape[0] if arrays[0].ndim == 4 else 1
    return prepare_scans(listed, folder / "prepared", {**PLAIN, "channels": channels}, progress=False, **options)
