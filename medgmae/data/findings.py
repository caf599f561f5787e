"""What a look at every scan of a data set found: facts of each volume, how they are spread, duplicates and outliers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

PERCENTILES = {"min": 0.0, "p0.5": 0.5, "p50": 50.0, "p99.5": 99.5, "max": 100.0}
"""The intensities that are kept of each volume, by their names."""

_FEW = 8  # distinct values that are counted one by one
_FAR = 3.0  # times the median at which a spacing is worth a look
_RARE = 0.05  # share of the volumes below which an orientation is worth a look


@dataclass(frozen=True)
class VolumeFacts:
    """One volume: a scan, or one contrast of a case.

    Attributes:
        name: of the scan; with the contrast behind it in a case of several.
        path: as in the results of the commands; ``series`` is the DICOM series in it, where there are several.
        size: voxels (d, h, w), of ``channels`` numbers of the type ``dtype`` each.
        frames: the length of a fourth axis, which is read as channels only where that is asked for; else 0.
        spacing: millimetres (d, h, w).
        files: how many there are, of ``bytes`` in all.
        intensities: of all channels, by the names in ``PERCENTILES``; None where only headers were read.
        digest: of the voxels, their type and shape; None where only headers were read.
        notes: what had to be assumed of the geometry, or is odd about the file.
    """

    name: str
    path: str
    series: str | None
    size: tuple[int, int, int]
    channels: int
    frames: int
    dtype: str
    spacing: tuple[float, float, float]
    orientation: str
    files: int
    bytes: int
    intensities: dict[str, float] | None
    digest: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Duplicates:
    """Volumes that are the same: in every byte of their files, or in their voxels alone."""

    what: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class CheckReport:
    """What :func:`~medgmae.data.check_scans` found. ``scans`` counts cases of several contrasts once; ``errors`` are
    the scans that cannot be read, and ``skipped`` the files that are none."""

    scans: int
    volumes: tuple[VolumeFacts, ...]
    duplicates: tuple[Duplicates, ...]
    errors: tuple[dict[str, str], ...]
    skipped: tuple[dict[str, str], ...]

    @property
    def distribution(self) -> dict[str, Any]:
        """Least, median and largest value of each fact, per axis, and how often each value comes where they are few;
        of the intensities, per percentile."""
        volumes = self.volumes
        read = [one.intensities for one in volumes if one.intensities is not None]
        return {
            "size": _spread([one.size for one in volumes]),
            "spacing": _spread([one.spacing for one in volumes]),
            "orientation": _counts(one.orientation for one in volumes),
            "dtype": _counts(one.dtype for one in volumes),
            "channels": _counts(str(one.channels) for one in volumes),
            "intensities": {name: _spread([(one[name],) for one in read]) for name in PERCENTILES} if read else None,
            "notes": _counts(note for one in volumes for note in one.notes),
        }

    @property
    def outliers(self) -> list[dict[str, str]]:
        """Volumes that are worth a look, each with the reason: a spacing far from that of the others, a single slice, a
        constant volume, a fourth axis, an orientation that hardly any other has."""
        usual = [median(axis) for axis in zip(*(sorted(one.spacing) for one in self.volumes), strict=True)]
        oriented = Counter(one.orientation for one in self.volumes)
        found = []
        for one in self.volumes:
            reasons = []
            if any(s > _FAR * m for s, m in zip(sorted(one.spacing), usual, strict=True)):
                reasons.append(
                    f"a spacing of {by_times(one.spacing)} mm, where the median is {by_times(usual)} mm (sorted)"
                )
            if 1 in one.size:
                reasons.append(f"a single slice: {by_times(one.size)} voxels")
            if one.frames:
                reasons.append(f"a fourth axis of {one.frames}, which are channels where that many are asked for")
            if one.intensities is not None and one.intensities["min"] == one.intensities["max"]:
                reasons.append(f"every voxel is {one.intensities['min']:g}")
            if oriented[one.orientation] < _RARE * len(self.volumes):
                reasons.append(f"the orientation {one.orientation}, that of {oriented[one.orientation]} volume(s)")
            found += [{"name": one.name, "path": one.path, "reason": reason} for reason in reasons]
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it, as values that JSON has."""
        return {
            "scans": self.scans,
            "distribution": self.distribution,
            "outliers": self.outliers,
            "duplicates": [asdict(one) for one in self.duplicates],
            "errors": list(self.errors),
            "skipped": list(self.skipped),
            "volumes": [asdict(one) for one in self.volumes],
        }


def by_times(numbers: Iterable[float]) -> str:
    """``(5.0, 0.7, 0.7)`` as "5 x 0.7 x 0.7"."""
    return " x ".join(f"{number:.6g}" for number in numbers)


def _spread(rows: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    """Least, median and largest of every column, and how often each row comes where they are few."""
    columns = list(zip(*rows, strict=True))
    counts = _counts(map(by_times, rows))
    return {
        **{name: [of(column) for column in columns] for name, of in (("min", min), ("median", median), ("max", max))},
        "distinct": len(counts),
        "counts": counts if len(counts) <= _FEW else None,
    }


def _counts(values: Iterable[str]) -> dict[str, int]:
    """How often each value comes, the most frequent first."""
    return dict(Counter(values).most_common())
