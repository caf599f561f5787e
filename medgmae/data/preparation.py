"""What a checkpoint expects of its input, written as data and carried out."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard, cast

from medgmae.data.contrasts import Scan, find_contrasts, open_scan, read_contrasts, same_place
from medgmae.data.conversion import is_bare
from medgmae.data.geometry import Grid, VolumeError, centred_start
from medgmae.data.sampling import onto, sample
from medgmae.data.transforms import crop_foreground, crop_or_pad, percentiles, window, zscore
from medgmae.data.volume import Volume, is_scan, stack_channels

_log = logging.getLogger("medgmae")
_RESAMPLE: dict[str, Any] = {
    "to": "spacing",
    "interpolation": "linear",
    "origin": "centered",
    "outside": None,
    "keep_dtype": False,
}
_DEFAULTS: dict[str, Any] = {
    "modality": "any", "channels": 1, "contrasts": None, "orientation": None, "axes": "zyx", "spacing": None,
    "size": None, "resample": None, "window": None, "range": (0.0, 1.0), "crop": (), "normalize": "none", "pad": 0.0,
}  # fmt: skip
_CHOICES = {"axes": ("zyx", "xyz"), "normalize": ("none", "zscore", "zscore_nonzero", "zscore_all")}
_RESAMPLE_CHOICES = {
    "to": ("spacing", "size"), "interpolation": ("linear", "bspline", "nearest"), "origin": ("centered", "first_voxel"),
    "keep_dtype": (False, True),
}  # fmt: skip


def _merged(
    name: str, given: Mapping[str, Any], defaults: dict[str, Any], choices: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise VolumeError(f"{name} has unknown keys {unknown}; expected some of {sorted(defaults)}")
    merged = {key: default if given.get(key) is None else given[key] for key, default in defaults.items()}
    for key, allowed in choices.items():
        if merged[key] not in allowed:
            raise VolumeError(f"{name}.{key} is {merged[key]!r}; expected one of {list(allowed)}")
    return merged


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(value: Any, count: int, least: float = -math.inf) -> bool:
    sequence = isinstance(value, (list, tuple)) and len(value) == count
    return sequence and all(_number(v) and v > least for v in value)


def _window(value: Any) -> bool:
    pair: Any = value
    if isinstance(value, Mapping):
        valid = set(value) <= {"percentiles", "per"} and value.get("per", "scan") in ("scan", "channel")
        pair = value.get("percentiles") if valid else None
    return value is None or (_numbers(pair, 2) and pair[0] < pair[1])


def _contrasts(value: Any) -> bool:
    names = isinstance(value, (list, tuple)) and all(isinstance(v, str) and v for v in value)
    return value is None or (names and len(set(value)) == len(value) > 0)


def _whole_numbers(value: Any) -> bool:
    return _numbers(value, 3, 0) and all(isinstance(v, int) for v in value)


# What the value of a key must be, and how an error says so.
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "channels": (lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0, "a number of channels"),
    "contrasts": (_contrasts, "null or a list of different names, one per channel"),
    "orientation": (lambda v: v is None or isinstance(v, str), "null or three letters such as 'RAS'"),
    "spacing": (lambda v: v is None or _numbers(v, 3, 0), "null or three positive numbers (d, h, w) in mm"),
    "size": (lambda v: v is None or _whole_numbers(v), "null or three positive whole numbers (d, h, w)"),
    "resample": (lambda v: v is None or isinstance(v, Mapping), "null or an object with 'to' and so on"),
    "window": (_window, "null, [low, high] or {'percentiles': [low, high], 'per': 'scan' or 'channel'}"),
    "range": (lambda v: _numbers(v, 2), "two numbers [a, b]"),
    "crop": (
        lambda v: isinstance(v, (list, tuple)) and all(c in ("foreground", "center") for c in v),
        "a list of 'foreground' and 'center'",
    ),
    "pad": (_number, "a number"),
}


def _check_forms(block: Mapping[str, Any]) -> None:
    for key, (valid, expected) in _FORMS.items():
        if not valid(block[key]):
            raise VolumeError(f"input.{key} is {block[key]!r}; expected {expected}")


def _check_needs(block: Mapping[str, Any]) -> None:
    """What one key needs of another."""
    contrasts = block["contrasts"]
    if contrasts is not None and len(contrasts) != block["channels"]:
        raise VolumeError(f"input.contrasts names {list(contrasts)}, and input.channels is {block['channels']}")
    resample = block["resample"]
    if resample and resample["outside"] is not None and not _number(resample["outside"]):
        raise VolumeError(f"input.resample.outside is {resample['outside']!r}; expected null or a number")
    needed = [resample["to"]] if resample else []
    needed += ["size"] if "center" in block["crop"] else []
    missing = [key for key in needed if block[key] is None]
    if missing:
        raise VolumeError(f"input.{missing[0]} is null, and resample or crop need it")


def _fitting(size: Sequence[int], wanted: Sequence[int]) -> list[int]:
    return [min(n, m) for n, m in zip(size, wanted, strict=True)]


def _first(size: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """First voxel of the centre crop; 0 along axes that are too short for one."""
    return [max(0, start) for start in centred_start(size, wanted)]


def _is_case(scan: Scan | Mapping[str, Scan]) -> TypeGuard[Mapping[str, Scan]]:
    """Whether this maps contrasts to scans; an image of TorchIO is one scan, though it is a dict."""
    return isinstance(scan, Mapping) and not is_scan(scan)


class Preparation:
    """A scan on disk, or a volume, to what a model takes: (C, D, H, W) float32 with its geometry; ``.tensor`` adds
    the batch axis.

    The steps, in order, with the keys of the ``input`` block that control them (optional unless a step needs them):

    1. read: ``channels`` (default 1) must be there; ``modality`` ("CT", "MR", ...) is for people. ``contrasts`` names
       the channels in order, as in ["t1", "t2", "t1ce", "flair"]: a case may then be a mapping from these names to
       files or volumes, or a folder with a file each (see ``find_contrasts``); contrasts on other grids are brought
       onto that of the first, 0 where they have no voxels
    2. reorient to ``orientation`` ("RAS", "LPS", letters for x, y, z; null: as stored), then lay the array out as
       ``axes``: "zyx", as SimpleITK gives it (default), or "xyz", as nibabel and MONAI do
    3. ``resample`` {"to": "spacing" | "size", "interpolation": "linear" | "bspline" | "nearest", "origin": "centered"
       | "first_voxel", "outside": intensity beyond the edge or null to repeat it, "keep_dtype": round to the stored
       integers} with ``spacing`` [d, h, w] in millimetres or ``size`` [d, h, w] in voxels, both along the axes of the
       model's input; null: no resampling
    4. ``window`` [low, high] or {"percentiles": [low, high]} of the volume, clipped and mapped to ``range`` [a, b]
       (default 0 to 1). {"percentiles": [0, 100]} is min-max scaling; percentiles are of all channels together, or
       of each with "per": "channel"
    5. ``crop``: "foreground" (the box of voxels above 0), then "center" (``size``, padded with ``pad`` after step 6;
       left out when ``whole``)
    6. ``normalize``: "zscore" or "zscore_nonzero" per channel; "zscore_all": one mean and one unbiased deviation of
       all channels and voxels, background and padding included; or "none"

    With "zscore_all" the share of background decides the result. So ``pad`` is an intensity before it, and when
    ``whole``, the statistics are still those of the centre crop, and an axis shorter than ``size`` is padded.

    Args:
        block: the ``input`` block of a weight card.
        whole: keep the whole field of view for a sliding window, instead of the centre crop.

    Raises:
        VolumeError: a block that is not valid; on call, what ``read_volume`` raises, a scan in memory with NaN or
            infinite voxels, a volume of another channel count, or a contrast that is missing, unknown, given twice or
            mixed up with another.
    """

    def __init__(self, block: Mapping[str, Any], whole: bool = False) -> None:
        self.input = _merged("input", block, _DEFAULTS, _CHOICES)
        _check_forms(self.input)
        if self.input["resample"] is not None:
            self.input["resample"] = _merged("input.resample", self.input["resample"], _RESAMPLE, _RESAMPLE_CHOICES)
        _check_needs(self.input)
        self.whole = whole

    def __repr__(self) -> str:
        changed = {key: value for key, value in self.input.items() if value != _DEFAULTS[key]}
        return f"Preparation({changed}, whole={self.whole})"

    def __call__(self, scan: Scan | Mapping[str, Scan]) -> Volume:
        """(C, D, H, W) float32 of a scan: a file, a DICOM folder, or in memory what :func:`~medgmae.data.as_volume`
        takes; of a case in several contrasts also a mapping from their names to scans, or its folder."""
        self._warn_of_arrays(scan)
        volumes = self._read(scan)
        centred = "center" in self.input["crop"] and not self.whole
        early_crop = centred and self._crop_commutes()
        volume = stack_channels([self._placed(each, volumes[0].grid, early_crop) for each in volumes])
        volume = self._windowed(volume)
        if "foreground" in self.input["crop"]:
            volume = crop_foreground(volume)
        if self.input["normalize"] == "zscore_all":
            volume = self._standardized(volume, centred)
            return volume.with_data(volume.tensor[0])
        size = self.input["size"]
        if centred:  # cut before the statistics, pad after them
            volume = crop_or_pad(volume, _fitting(volume.size, size), start=_first(volume.size, size))
        if self.input["normalize"] != "none":
            volume = zscore(volume, nonzero=self.input["normalize"] == "zscore_nonzero")
        if centred and tuple(size) != volume.size:
            volume = crop_or_pad(volume, size, self.input["pad"])
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
        resampling."""
        return "foreground" not in self.input["crop"] and not isinstance(self.input["window"], Mapping)

    def _target(self, grid: Grid) -> Grid:
        if self.input["orientation"] is not None:
            grid = grid.reoriented(self.input["orientation"])
        if self.input["axes"] == "xyz":
            grid = grid.reoriented(grid.orientation[::-1])
        rule = self.input["resample"]
        if rule is None:
            return grid
        if rule["to"] == "size":
            return grid.with_size(self.input["size"], rule["origin"])
        return grid.with_spacing(self.input["spacing"], rule["origin"])

    def _placed(self, volume: Volume, like: Grid, early_crop: bool) -> Volume:
        """Reorientation, resampling and, where it commutes, the centre crop, in one pass over the voxels; ``like`` is
        the grid of the case's first contrast."""
        target = self._target(like)
        if early_crop:
            size = self.input["size"]
            target = target.part(_first(target.size, size), _fitting(target.size, size))
        rule = self.input["resample"]
        if not same_place(volume.grid, like):
            return sample(volume, target, rule["interpolation"] if rule else "linear", 0.0)
        rule = rule or {"interpolation": "nearest", "outside": None, "keep_dtype": False}
        volume = Volume(volume.data, like, volume.source)
        return onto(volume, target, rule["interpolation"], rule["outside"], rule["keep_dtype"])

    def _windowed(self, volume: Volume) -> Volume:
        bounds = self.input["window"]
        if bounds is None:
            return volume
        low, high = self.input["range"]
        if not isinstance(bounds, Mapping):
            return window(volume, tuple(bounds), (low, high))
        per_channel = bounds.get("per") == "channel"
        parts = [volume.with_data(channel[None]) for channel in volume.data] if per_channel else [volume]
        scaled = [window(part, percentiles(part, bounds["percentiles"]), (low, high)) for part in parts]
        return stack_channels(scaled)

    def _standardized(self, volume: Volume, centred: bool) -> Volume:
        """Normalised by the statistics of what the model sees: the centre crop with its padding, if there is one."""
        if "center" not in self.input["crop"]:
            return zscore(volume, together=True)
        size, pad = self.input["size"], self.input["pad"]
        volume = volume.with_data(volume.data.float())
        seen = crop_or_pad(volume, size, pad)
        if centred:
            return zscore(seen, together=True)
        volume = crop_or_pad(volume, list(map(max, volume.size, size)), pad)
        return zscore(volume, together=True, like=seen)
