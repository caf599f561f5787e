"""Label maps of cases that are segmented: brought onto the grids of the prepared scans, once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medgmae.data import PreparedScan, Volume, VolumeError, read_volume, resample_like
from medgmae.data.foreground import ForegroundTable
from medgmae.data.store import SUFFIX, read_facts, write_prepared
from medgmae.ops.progress import progress_bar
from medgmae.training.settings import TaskSettings
from medgmae.training.tables import TrainingError, expect

_MOST = 256  # labels that classes are made of by themselves


@dataclass(frozen=True)
class Masks:
    """Label maps on the grids of prepared scans.

    maps: (1, D, H, W) label numbers, one of each scan, as prepared volumes.
    regions: label numbers of every class by its name.
    overlap: whether regions share voxels, each being an output of its own.
    """

    maps: list[PreparedScan]
    regions: dict[str, list[int]]
    overlap: bool

    @property
    def names(self) -> list[str]:
        """Of the outputs."""
        return list(self.regions) if self.overlap else ["background", *self.regions]

    def target(self, labels: Tensor) -> Tensor:
        """Label numbers (1, *size) as what the loss takes: classes (1, *size) int64, or masks (K, *size) float32."""
        numbers = list(self.regions.values())
        if self.overlap:
            return torch.cat([torch.isin(labels, torch.tensor(one, dtype=labels.dtype)) for one in numbers]).float()
        classes = torch.zeros(labels.shape, dtype=torch.int64)
        for k, one in enumerate(numbers, 1):
            classes[torch.isin(labels, torch.tensor(one, dtype=labels.dtype))] = k
        return classes

    def volume(self, case: int) -> Volume:
        """The reference of a case for ``segmentation_metrics``: classes (1, D, H, W), or masks (K, D, H, W)."""
        labels = self.maps[case].volume()
        return labels.with_data(self.target(labels.data).to(torch.uint8))


def masks_of(task: TaskSettings, scans: Sequence[PreparedScan], folder: Path, sources: Sequence[Path]) -> Masks:
    """The label maps of scans, brought onto their grids by the nearest voxel; what is in ``folder`` is kept.

    Args:
        task: what is segmented.
        scans: prepared.
        folder: where the maps on their grids are kept.
        sources: the file of every scan's label map.

    Raises:
        TrainingError: a map that cannot be read, that is not beside its scan, or that has no label of any class.
    """
    folder.mkdir(parents=True, exist_ok=True)
    maps = []
    with progress_bar(len(scans), "label maps", None, unit="scan") as bar:
        for scan, source in zip(scans, sources, strict=True):
            maps.append(_map_of(scan, source, folder))
            bar.update()
    regions = {name: list(numbers) for name, numbers in task.regions.items()} or _found(maps)
    shared = [n for numbers in regions.values() for n in numbers]
    expect(
        task.multilabel or len(set(shared)) == len(shared),
        "task.regions share labels; give task.multilabel = true, which makes each an output of its own",
    )
    return Masks(maps, regions, task.multilabel)


def _map_of(scan: PreparedScan, source: Path, folder: Path) -> PreparedScan:
    path = folder / f"{scan.path.stem}{SUFFIX}"
    try:
        state = source.stat()
        origin = {"state": [state.st_size, state.st_mtime_ns], "grid": [*scan.size, *scan.spacing, *scan.grid.origin]}
        if path.exists():
            try:
                facts = read_facts(path)
                if facts.origin == origin:
                    return facts.scan
            except VolumeError:  # damaged: it is made again
                pass
        labels = read_volume(source)
        expect(labels.channels == 1, f"{source}: a label map has one channel, this one {labels.channels}")
        placed = resample_like(labels, scan.grid, interpolation="nearest")
    except (OSError, VolumeError) as error:
        raise TrainingError(f"the label map of {scan.name} cannot be used: {error}") from error
    data = placed.data.float()
    whole = bool((data == data.round()).all()) and float(data.min()) >= 0 and float(data.max()) <= 2048
    expect(whole, f"{source}: a label map has whole numbers from 0 to 2048, this one {data.min():g} to {data.max():g}")
    expect(
        bool((data > 0).any()),
        f"{source}: no labelled voxel lies in the scan {scan.source}; expected a map of that scan, on any grid",
    )
    table = ForegroundTable.of((data[0] > 0).numpy())
    about: dict[str, Any] = {"name": scan.name, "labels": {}, "source": str(source), "origin": origin}
    crop = [min(96, n) for n in scan.size]
    return write_prepared(path, placed.with_data(data), table, about, dtype="float16", crop=crop, threads=1)


def _found(maps: Sequence[PreparedScan]) -> dict[str, list[int]]:
    """A class for each label that the maps have."""
    numbers: set[int] = set()
    for one in maps:
        numbers |= set(map(int, np.unique(one.volume().data.numpy()).tolist())) - {0}
    expect(
        len(numbers) < _MOST,
        f"the label maps have {len(numbers)} different labels; name those that are classes in task.regions",
    )
    return {str(number): [number] for number in sorted(numbers)}


def mean_and_interval(values: Sequence[float], resamples: int = 1000, seed: int = 0) -> dict[str, float] | None:
    """The mean over cases with its bootstrap interval, NaN left out; None where nothing is left."""
    from medgmae.evaluation import bootstrap_interval

    known = torch.tensor([value for value in values if math.isfinite(value)], dtype=torch.float64)
    if not len(known):
        return None
    found = bootstrap_interval(lambda drawn: float(drawn.mean()), known, resamples=resamples, seed=seed)
    return found._asdict()
