"""What a checkpoint expects of its input, written as data and carried out."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, cast

from medgmae.data.contrasts import Scan, find_contrasts, open_scan, read_contrasts, same_place
from medgmae.data.conversion import is_bare
from medgmae.data.geometry import Grid, VolumeError, centred_start
from medgmae.data.input_block import DEFAULTS, merged_block, padding, steps
from medgmae.data.sampling import onto, sample
from medgmae.data.transforms import crop_foreground, crop_or_pad, percentiles, standardize, window, zscore
from medgmae.data.volume import Volume, is_scan, stack_channels

_log = logging.getLogger("medgmae")


def _is_case(scan: Scan | Mapping[str, Scan]) -> TypeGuard[Mapping[str, Scan]]:
    """Whether this maps contrasts to scans; an image of TorchIO is one scan, though it is a dict."""
    return isinstance(scan, Mapping) and not is_scan(scan)


class Preparation:
    """A scan on disk, or a volume, to what a model takes: (C, D, H, W) float32 with its geometry; ``.tensor`` adds
    the batch axis.

    First come, with the keys of the ``input`` block that control them (optional unless a step needs them):

    - reading: ``channels`` (default 1) must be there; ``modality`` ("CT", "MR", ...) is for people. ``contrasts`` names
      the channels in order, as in ["t1", "t2", "t1ce", "flair"]: a case may then be a mapping from these names to
      files or volumes, or a folder with a file each (see ``find_contrasts``); contrasts on other grids are brought
      onto that of the first, 0 where they have no voxels
    - ``orientation`` ("RAS", "LPS", letters for x, y, z; null: as stored), then the array is laid out as ``axes``:
      "zyx", as SimpleITK gives it (default), or "xyz", as nibabel and MONAI do

    Then the steps that are asked for, in ``order``, by default this one:

    - "resample": ``resample`` {"to": "spacing" | "size" | "isotropic", "interpolation": "linear" | "bspline" |
      "nearest", "origin": "centered" | "edges" | "first_voxel", "rounding": "round" | "floor", "outside": intensity
      beyond the edge or null to repeat it, "keep_dtype": true rounds to the stored integers, "truncate" cuts towards
      zero} with ``spacing`` [d, h, w] in millimetres or ``size`` [d, h, w] in voxels, along the axes of the model's
      input. "isotropic" goes to the smallest of the scan's own spacings, or "least" millimetres if that is more, and
      leaves scans of three spacings that are the same number with "equal": "keep". "patches" then shrinks what has more
      patches of ``multiple`` voxels than that
    - "window": ``window`` [low, high] or {"percentiles": [low, high], "of": "all" | "nonzero" | "above_mean"} of the
      volume, clipped and mapped to ``range`` [a, b] (default 0 to 1), or clipped only with "same". {"percentiles":
      [0, 100]} is min-max scaling; percentiles are of all channels together, or of each with "per": "channel"
    - "foreground", if ``crop`` has it: the box of voxels above ``foreground`` {"above": 0, or null for all that are not
      0}; with "within": n where they are the most of n x n x n voxels, widened by n // 2
    - "center", if ``crop`` has it: ``size`` voxels, padded with ``pad`` after "normalize"; or "multiple": as many whole
      ``multiple`` as there are; both in the middle as ``centering`` says, and left out when ``whole``
    - "normalize": ``normalize`` "zscore" or "zscore_nonzero" per channel; {"of": ...}: per channel, by the statistics
      of these voxels; {"mean": m, "std": s}; "zscore_all": one mean and one unbiased deviation of all channels and
      voxels, background and padding included; or "none"

    With "zscore_all" the share of background decides the result. So ``pad`` is an intensity before it, and when
    ``whole``, the statistics are still those of the centre crop, and an axis shorter than ``size`` is padded.
    ``pad`` "minimum" is that of the volume before its centre is cut.

    Args:
        block: the ``input`` block of a weight card.
        whole: keep the whole field of view for a sliding window, instead of the centre crop.

    Raises:
        VolumeError: a block that is not valid; on call, what ``read_volume`` raises, a scan in memory with NaN or
            infinite voxels, a volume of another channel count, or a contrast that is missing, unknown, given twice or
            mixed up with another.
    """

    def __init__(self, block: Mapping[str, Any], whole: bool = False) -> None:
        self.input = merged_block(block)
        self.whole = whole
        self._steps = steps(self.input, whole)

    def __repr__(self) -> str:
        changed = {key: value for key, value in self.input.items() if value != DEFAULTS[key]}
        return f"Preparation({changed}, whole={self.whole})"

    @property
    def pad(self) -> float:
        """The intensity beyond a scan, as the model takes it."""
        return padding(self.input)

    def grids(self, grid: Grid) -> tuple[Grid, Grid]:
        """The grid of a scan along the axes of the model's input, as stored and as it is resampled: of the whole field
        of view, for what else a scan loses depends on its voxels."""
        oriented = self._oriented(grid)
        return oriented, self._regridded(oriented) if "resample" in self._steps else oriented

    def __call__(self, scan: Scan | Mapping[str, Scan]) -> Volume:
        """(C, D, H, W) float32 of a scan: a file, a DICOM folder, or in memory what :func:`~medgmae.data.as_volume`
        takes; of a case in several contrasts also a mapping from their names to scans, or its folder."""
        self._warn_of_arrays(scan)
        volumes = self._read(scan)
        first = self._steps[:1] == ["resample"]
        target = self._target(volumes[0].grid, first)
        volume = stack_channels([self._placed(each, volumes[0].grid, target, first) for each in volumes])
        for step in self._steps:
            if step == "resample":
                volume = self._resampled(volume, placed=first)
            elif step == "window":
                volume = self._windowed(volume)
            elif step == "foreground":
                volume = self._foreground(volume)
            elif step == "center":
                volume = self._centred(volume)
            else:
                volume = self._normalized(volume)
        return volume.with_data(volume.tensor[0])

    def _warn_of_arrays(self, scan: Scan | Mapping[str, Scan]) -> None:
        """Bare arrays say nothing of the spacing and orientation that steps of this preparation go by."""
        bare = any(map(is_bare, scan.values() if _is_case(scan) else [scan]))
        if bare and (self.input["spacing"] is not None or self.input["orientation"] is not None):
            _log.warning(
                "the array has no geometry: 1 mm voxels (z, y, x) in LPS are assumed; give "
                "Volume(tensor, Grid(size, spacing)), or an image with its geometry"
            )

    def _read(self, scan: Scan | Mapping[str, Scan]) -> list[Volume]:
        """One volume with all channels, or one per contrast."""
        expected, contrasts = self.input["channels"], self.input["contrasts"]
        if _is_case(scan):
            if contrasts is None:
                raise VolumeError(f"the case is a mapping of {list(scan)}; expected one scan: input.contrasts is null")
            return read_contrasts(scan, contrasts)
        if contrasts is not None and isinstance(scan, str | os.PathLike) and os.path.isdir(scan):
            return read_contrasts(find_contrasts(scan, contrasts), contrasts)
        volume = open_scan(cast(Scan, scan), channels=expected)
        if volume.channels != expected:
            named = f"; or give a mapping with {', '.join(contrasts)}" if contrasts else ""
            raise VolumeError(
                f"{volume.source}: the volume has {volume.channels} channel(s); "
                f"expected {expected} ({self.input['modality']}){named}"
            )
        return [volume]

    def _crop_commutes(self) -> bool:
        """Whether voxels outside the centre crop have no say in those inside: the crop can then come before the
        resampling. It comes again in its turn, and finds nothing to cut."""
        before = self._steps[: self._steps.index("center")] if "center" in self._steps else ["none"]
        budget = self.input["resample"] and self.input["resample"]["patches"]
        fixed = self.input["pad"] != "minimum" and not isinstance(self.input["window"], Mapping) and not budget
        return (
            fixed
            and "center" in self.input["crop"]
            and before in (["resample"], ["resample", "window"], ["window"], [])
        )

    def _oriented(self, grid: Grid) -> Grid:
        if self.input["orientation"] is not None:
            grid = grid.reoriented(self.input["orientation"])
        return grid.reoriented(grid.orientation[::-1]) if self.input["axes"] == "xyz" else grid

    def _target(self, grid: Grid, resampled: bool) -> Grid:
        """The grid after reorientation and, where they come first, resampling and the centre crop."""
        grid = self._regridded(self._oriented(grid)) if resampled else self._oriented(grid)
        if self._crop_commutes():
            size = self._fitting(grid.size)
            grid = grid.part(self._start(grid.size, size), size)
        return grid

    def _regridded(self, grid: Grid) -> Grid:
        rule = self.input["resample"]
        if rule["to"] == "size":
            return grid.with_size(self.input["size"], rule["origin"])
        if rule["to"] == "spacing":
            return grid.with_spacing(self.input["spacing"], rule["origin"], rule["rounding"])
        if rule["equal"] == "keep" and len(set(grid.spacing)) == 1:
            return grid
        return grid.with_spacing(max(min(grid.spacing), rule["least"]), rule["origin"], rule["rounding"])

    def _placed(self, volume: Volume, like: Grid, target: Grid, resampled: bool) -> Volume:
        """On the target, in one pass over the voxels; ``like`` is the grid of the case's first contrast."""
        rule = self.input["resample"] if resampled else None
        if not same_place(volume.grid, like):
            return sample(volume, target, rule["interpolation"] if rule else "linear", 0.0)
        rule = rule or {"interpolation": "nearest", "outside": None, "keep_dtype": False}
        volume = Volume(volume.data, like, volume.source)
        return onto(volume, target, rule["interpolation"], rule["outside"], rule["keep_dtype"])

    def _resampled(self, volume: Volume, placed: bool) -> Volume:
        """On its new grid, unless it was ``placed`` there, and within the number of patches."""
        rule = self.input["resample"]
        grids = [] if placed else [self._regridded(volume.grid)]
        grids += [self._within_patches(grids[0] if grids else volume.grid)] if rule["patches"] else []
        for grid in grids:  # both, as published: a second interpolation of what the first one gave
            if grid != volume.grid:
                volume = onto(volume, grid, rule["interpolation"], rule["outside"], rule["keep_dtype"])
        return volume

    def _within_patches(self, grid: Grid) -> Grid:
        """The grid itself, or one of fewer voxels whose whole patches are at most as many as ``patches``: of five
        factors around the cube root of what is too much, the first with the most patches (VoxelFM)."""
        most, patch = self.input["resample"]["patches"], self.input["multiple"]
        count = math.prod(n // p for n, p in zip(grid.size, patch, strict=True))
        if count <= most:
            return grid
        factor = (most / count) ** (1 / 3)
        found: dict[int, list[int]] = {}
        for nudge in (0.98, 0.99, 1.0, 1.01, 1.02):
            size = [int(n * factor * nudge) for n in grid.size]
            patches = math.prod(n // p for n, p in zip(size, patch, strict=True))
            if patches <= most:
                found.setdefault(patches, size)
        size = found[max(found)] if found else [int(n * factor * 0.95) for n in grid.size]
        return grid.with_size([max(1, n) for n in size])

    def _windowed(self, volume: Volume) -> Volume:
        bounds, out = self.input["window"], self.input["range"]
        out = None if out == "same" else tuple(out)
        if not isinstance(bounds, Mapping):
            return window(volume, tuple(bounds), out)
        per_channel, of = bounds.get("per") == "channel", bounds.get("of", "all")
        parts = [volume.with_data(channel[None]) for channel in volume.data] if per_channel else [volume]
        return stack_channels([window(part, percentiles(part, bounds["percentiles"], of), out) for part in parts])

    def _foreground(self, volume: Volume) -> Volume:
        above, within = self.input["foreground"]["above"], self.input["foreground"]["within"]
        return crop_foreground(volume, above or 0.0, within // 2, nonzero=above is None, within=within)

    def _fitting(self, size: Sequence[int]) -> list[int]:
        """Voxels of the centre that there are."""
        if "center" in self.input["crop"]:
            return [min(n, m) for n, m in zip(size, self.input["size"], strict=True)]
        whole = [n - n % m for n, m in zip(size, self.input["multiple"], strict=True)]
        if not all(whole):
            raise VolumeError(
                f"the prepared volume has {tuple(size)} voxels; expected {self.input['multiple']} or more"
            )
        return whole

    def _start(self, size: Sequence[int], wanted: Sequence[int]) -> list[int]:
        return centred_start(size, wanted, self.input["centering"])

    def _centred(self, volume: Volume) -> Volume:
        """Cut; and padded, unless the statistics come after it: these are of the scan alone."""
        fitting = self._fitting(volume.size)
        cut = crop_or_pad(volume, fitting, start=self._start(volume.size, fitting))
        later = self._steps[self._steps.index("center") :]
        if "multiple" in self.input["crop"] or "normalize" in later:
            return cut
        value = volume.data.min().item() if self.input["pad"] == "minimum" else self.input["pad"]
        return self._padded(cut, value)

    def _padded(self, volume: Volume, value: float) -> Volume:
        size = self.input["size"]
        return crop_or_pad(volume, size, value, start=self._start(volume.size, size))

    def _normalized(self, volume: Volume) -> Volume:
        rule = self.input["normalize"]
        before = self._steps[: self._steps.index("normalize")]
        if rule == "zscore_all" and "center" in self.input["crop"]:
            return self._standardized(volume, "center" in before)
        if rule == "zscore_all":
            volume = zscore(volume, together=True)
        elif not isinstance(rule, Mapping):
            volume = zscore(volume, nonzero=rule == "zscore_nonzero")
        elif "of" in rule:
            volume = zscore(volume, of=rule["of"])
        else:
            volume = standardize(volume, rule["mean"], rule["std"])
        return (
            self._padded(volume, self.input["pad"]) if "center" in before and "center" in self.input["crop"] else volume
        )

    def _standardized(self, volume: Volume, centred: bool) -> Volume:
        """Normalised by the statistics of what the model sees, the centre crop with its padding."""
        size, pad = self.input["size"], self.input["pad"]
        volume = volume.with_data(volume.data.float())
        seen = crop_or_pad(volume, size, pad, start=self._start(volume.size, size))
        if centred:
            return zscore(seen, together=True)
        large = list(map(max, volume.size, size))
        volume = crop_or_pad(volume, large, pad, start=self._start(volume.size, large))
        return zscore(volume, together=True, like=seen)
