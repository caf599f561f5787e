"""Cases of fine-tuning: what the model sees of a prepared scan, and the samples of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgmae.data import Augmentation, PreparedScan, Volume, centred_start, crop_or_pad, draws, zscore
from medgmae.data.input_block import ORDER, ends_normalized, padding, uncut
from medgmae.data.preparation import Preparation
from medgmae.training.batches import CaseBatch, Samples, stacked
from medgmae.training.settings import ViewSettings
from medgmae.training.tables import expect

_WINDOWS = 1  # of the counters of a draw


@dataclass(frozen=True)
class View:
    """What the model sees of a scan.

    settings: see :class:`~medgmae.training.ViewSettings`.
    size: voxels (d, h, w).
    input: the ``input`` block of the model that comes out: with it ``create_transform`` makes this view, or of
        "windows" the whole scan that they lie in.
    """

    settings: ViewSettings
    size: tuple[int, int, int]
    input: dict[str, Any]

    @classmethod
    def of(cls, settings: ViewSettings, block: dict[str, Any], model_size: Sequence[int], patch: Sequence[int]) -> View:
        """The view on scans that come in as an ``input`` block says.

        Raises:
            TrainingError: a size that is not made of whole patches.
        """
        size = tuple(map(int, settings.size or block.get("size") or model_size))
        if settings.kind == "windows":
            size = tuple(map(int, settings.size or model_size))
        whole = len(size) == len(patch) == 3 and all(n > 0 and n % p == 0 for n, p in zip(size, patch, strict=True))
        expect(whole, f"view.size is {list(size)}; expected three multiples of the patch {list(patch)}")
        changed = dict(block)
        crop = uncut(block)
        resized = (block.get("resample") or {}).get("to") == "size"
        if settings.kind == "resize":
            changed["resample"] = {**(block.get("resample") or {}), "to": "size"}
            changed |= {"size": list(size), "spacing": None, "crop": crop}
            if "foreground" in crop:  # what is resized is not cut any more
                order = [step for step in block.get("order") or ORDER if step != "resample"]
                order.insert(order.index("foreground") + 1, "resample")
                changed["order"] = order
        elif settings.kind == "center":
            expect(
                not resized or list(size) == list(block["size"]),
                f"view.kind = 'center' of scans that are resampled to {block.get('size')}; expected 'resize', or an "
                "input with a spacing",
            )
            changed |= {"size": list(size), "crop": crop if resized else [*crop, "center"]}
        else:
            changed |= {"crop": crop} | ({} if resized else {"size": list(size)})
        return cls(settings, (size[0], size[1], size[2]), changed)

    @property
    def prepared(self) -> dict[str, Any]:
        """The block by which scans are prepared; what depends on the part that is seen is done when it is cut."""
        return {**self.input, "crop": uncut(self.input)} | ({"normalize": "none"} if self.cut_first else {})

    @property
    def cut_first(self) -> bool:
        """Whether a scan is cut before it is normalised."""
        return self._cut and ends_normalized(self.input)

    @property
    def _cut(self) -> bool:
        return "center" in (self.input.get("crop") or ())

    @property
    def pad(self) -> float:
        """Intensity beyond a scan."""
        return padding(self.input)

    def whole(self, scan: PreparedScan) -> Volume:
        """All that is seen of a scan without a choice of windows, as ``create_transform`` gives it."""
        if not self._cut:
            return scan.volume()
        size = [min(n, m) for n, m in zip(scan.size, self.size, strict=True)]
        start = centred_start(scan.size, self.size, self.input.get("centering") or "middle")
        first, beyond = [max(0, at) for at in start], [min(0, at) for at in start]
        volume = Volume(scan.read(first, size), scan.grid.part(first, size))
        normalize = self.input.get("normalize") or "none"
        if not self.cut_first or normalize == "none":
            return crop_or_pad(volume, self.size, self.pad, start=beyond)
        if normalize == "zscore_all":  # padding is a part of what it standardises
            return zscore(crop_or_pad(volume, self.size, self.pad, start=beyond), together=True)
        volume = Preparation({"channels": volume.channels, "normalize": normalize})(volume)
        return crop_or_pad(volume, self.size, self.pad, start=beyond)

    def sample(self, scan: PreparedScan, rng: np.random.Generator) -> Tensor:
        """(K, C, *size) of a scan for a step of training; windows are drawn."""
        if self.settings.kind != "windows":
            return self.whole(scan).data[None].clone()
        volume = scan.volume()
        windows = []
        for _ in range(self.settings.windows):
            start = [
                int(rng.integers(n - m + 1)) if n > m else (n - m) // 2
                for n, m in zip(volume.size, self.size, strict=True)
            ]
            windows.append(crop_or_pad(volume, self.size, self.pad, start=start).data)
        return torch.stack(windows)


class LabelledScans(Samples[CaseBatch]):
    """Cases with their targets, in an order drawn for each epoch.

    Args:
        scans: of the cases.
        targets: (n, T).
        view: what is seen of them.
        augmentation: changes of each window.
        seed: of order, windows and augmentation.
        classes: (n,), where all classes are to be drawn equally often, with replacement.
    """

    def __init__(
        self,
        scans: Sequence[PreparedScan],
        targets: Tensor,
        view: View,
        augmentation: Augmentation,
        seed: int,
        classes: Tensor | None = None,
    ) -> None:
        augmentation.check(view.size)
        self.scans, self.targets, self.view = list(scans), targets, view
        self.augmentation, self.seed = augmentation, seed
        self.chances = None if classes is None else _chances(classes)

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, str]:
        """Position counts on over the epochs: (x, targets, what it is)."""
        epoch, index = divmod(position, len(self))
        case = int(self._order(epoch)[index])
        scan, rng = self.scans[case], draws(self.seed, epoch, index, _WINDOWS)
        x = torch.stack([self.augmentation(window, rng) for window in self.view.sample(scan, rng)])
        return x, self.targets[case], scan.source

    def stack(self, samples: Sequence[tuple[Tensor, Tensor, str]]) -> CaseBatch:
        """One batch of cases."""
        x, targets, of = zip(*samples, strict=True)
        return CaseBatch(stacked(x), torch.stack(targets), list(of))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        rng = draws(self.seed, epoch)
        if self.chances is None:
            return rng.permutation(len(self))
        return rng.choice(len(self), len(self), p=self.chances)


def _chances(classes: Tensor) -> NDArray[np.float64]:
    """Of every case to be drawn, such that classes are alike."""
    each = 1 / np.bincount(classes.numpy())[classes.numpy()]
    return each / each.sum()  # type: ignore[no-any-return]
