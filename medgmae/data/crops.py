"""Random crops of prepared volumes, as a data set of torch: what a position gives depends on the seed alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from medgmae.data.augmentation import Augmentation, resized
from medgmae.data.draws import draws
from medgmae.data.geometry import VolumeError, centred_start
from medgmae.data.store import PreparedScan
from medgmae.data.transforms import zscore
from medgmae.data.volume import Volume

NORMALIZE = ("none", "zscore", "zscore_nonzero", "zscore_all")


class Crops(Dataset[dict[str, Any]]):
    """Random crops of prepared volumes.

    A position counts on over the epochs: ``epoch, index = divmod(position, len(crops))``. The order of an epoch is a
    permutation drawn from (seed, epoch), and all else of a sample is drawn from (seed, epoch, index): neither the
    worker, the process, the order of the calls nor a restart changes it.

    A sample is a dictionary: ``x`` (C, *size) float32; ``position``; ``scan``, its place in ``scans``; ``start``, the
    voxel (d, h, w) of the volume that the crop begins at, negative where it begins with padding.

    Args:
        scans: prepared volumes with one number of channels.
        size: voxels (d, h, w); or (h, w), for planes of the first axis: ``x`` is then (C, h, w).
        per_scan: samples of each volume in an epoch.
        foreground: share of crops whose centre is drawn from the foreground, the others' from the background, as
            MONAI's RandCropByPosNegLabel does with the image as its label; the crop is then moved into the volume.
            Centres are drawn by cells of 8 voxels (:class:`~medgmae.data.foreground.ForegroundTable`). None: all
            places alike. Of a volume that has only one of the two, all places alike too.
        pad: intensity around a volume that is smaller than the crop.
        normalize: of each crop, before the augmentation: ``"none"``, or ``"zscore"``, ``"zscore_nonzero"`` or
            ``"zscore_all"`` as in an input block.
        augmentation: changes of each crop.
        seed: of everything.

    Raises:
        VolumeError: no volumes, several numbers of channels, or options that are not of this form; on reading, a file
            that is missing or damaged.
    """

    def __init__(
        self,
        scans: Sequence[PreparedScan],
        size: Sequence[int],
        *,
        per_scan: int = 1,
        foreground: float | None = None,
        pad: float = 0.0,
        normalize: str = "none",
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.scans, self.size, self.per_scan = list(scans), tuple(map(int, size)), per_scan
        self.foreground, self.pad, self.normalize = foreground, pad, normalize
        self.augmentation, self.seed = augmentation or Augmentation(), seed
        self._check()

    def _check(self) -> None:
        if not self.scans:
            raise VolumeError("no prepared volumes to take crops of; expected at least one")
        channels = {scan.channels: scan.path for scan in self.scans}
        if len(channels) > 1:
            found = ", ".join(f"{count} in {path}" for count, path in channels.items())
            raise VolumeError(f"the volumes have several numbers of channels: {found}; expected one")
        if len(self.size) not in (2, 3) or min(self.size) < 1:
            raise VolumeError(f"size is {self.size}; expected voxels (d, h, w), or (h, w) of planes")
        if self.per_scan < 1:
            raise VolumeError(f"per_scan is {self.per_scan}; expected 1 or more samples of each volume")
        if self.foreground is not None and not 0 <= self.foreground <= 1:
            raise VolumeError(f"foreground is {self.foreground}; expected None or a share 0 to 1")
        if self.normalize not in NORMALIZE:
            raise VolumeError(f"normalize is {self.normalize!r}; expected one of {list(NORMALIZE)}")
        self.augmentation.check(self.size)

    def __len__(self) -> int:
        return len(self.scans) * self.per_scan

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The sample at a position, which may lie in any epoch."""
        if position < 0:
            raise IndexError(f"position {position}; expected 0 or more")
        epoch, index = divmod(position, len(self))
        place = int(epoch_order(self.seed, epoch, len(self))[index]) // self.per_scan
        scan, rng = self.scans[place], draws(self.seed, epoch, index)
        x, start = self._crop(scan, rng)
        x = self.augmentation(normalized(x, self.normalize), rng)
        return {"x": x, "position": position, "scan": place, "start": start}

    def _crop(self, scan: PreparedScan, rng: np.random.Generator) -> tuple[Tensor, tuple[int, ...]]:
        """A crop as it is stored, and where it begins."""
        flat = len(self.size) == 2
        size = (1, *self.size) if flat else self.size
        if self.augmentation.resized_crop is not None:
            (top, left), (height, width) = self.augmentation.rectangle(scan.size[1:], rng)
            plane = self._start(scan, (1, *scan.size[1:]), rng)[0]
            x = scan.read((plane, top, left), (1, height, width))
            return resized(x[:, 0], self.size), (plane, top, left)
        start = self._start(scan, size, rng)
        first = [max(0, s) for s in start]
        last = [min(m, s + n) for s, n, m in zip(start, size, scan.size, strict=True)]
        x = scan.read(first, [b - a for a, b in zip(first, last, strict=True)])
        before = [a - s for a, s in zip(first, start, strict=True)]
        after = [s + n - b for s, n, b in zip(start, size, last, strict=True)]
        if any(before) or any(after):
            around = [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]
            x = functional.pad(x, around, value=self.pad)
        return (x[:, 0] if flat else x), start

    def _start(self, scan: PreparedScan, size: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
        """Where a crop begins: any place within the volume, or one whose centre is of the kind that is drawn. Along an
        axis that is too short, in the middle."""
        centre = None
        if self.foreground is not None:
            inside = bool(rng.random() < self.foreground)
            if 0 < scan.foreground < 1:
                centre = scan.foreground_table().draw(rng, inside)
        starts = []
        for axis, (n, m) in enumerate(zip(scan.size, size, strict=True)):
            if n <= m:
                starts.append(centred_start([n], [m])[0])
            elif centre is None:
                starts.append(int(rng.integers(n - m + 1)))
            else:
                starts.append(min(max(centre[axis] - m // 2, 0), n - m))
        return tuple(starts)


def normalized(x: Tensor, how: str) -> Tensor:
    """A crop (C, D, H, W) or (C, H, W), normalised by itself; ``how`` is one of ``NORMALIZE``."""
    if how == "none":
        return x
    volume = Volume(x if x.ndim == 4 else x[:, None])
    nonzero, together = how == "zscore_nonzero", how == "zscore_all"
    return zscore(volume, nonzero=nonzero, together=together).data.view(x.shape)


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of an epoch."""
    return draws(seed, epoch).permutation(count)
