"""Scans that are the same by content must not lie on both sides of a division."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

from medgmae.data import PreparedScan
from medgmae.training.division import Part
from medgmae.training.tables import TrainingError

_SHOWN = 3


def refuse_copies(scans: Sequence[PreparedScan], parts: Sequence[Part]) -> None:
    """Refuse scans that hold the same voxels as one that another part learns from.

    Raises:
        TrainingError: there are some; it names them.
    """
    copies = _copies(scans)
    for training, held_out in parts:
        learned, measured = set(training), set(held_out)
        leaking = [group for group in copies if learned & set(group) and measured & set(group)]
        if leaking:
            shown = "; ".join(" and ".join(scans[i].name for i in group[:3]) for group in leaking[:_SHOWN])
            more = f" and {len(leaking) - _SHOWN} more" if len(leaking) > _SHOWN else ""
            raise TrainingError(
                f"the same scan is learned from and held out: {shown}{more}. Leave the copies out, or give the column "
                "of the patient as group, so that they stay together"
            )


def _copies(scans: Sequence[PreparedScan]) -> list[list[int]]:
    """Numbers of scans that hold the same voxels. Only those of one size and one share of foreground are read."""
    alike = _same((scan.size, scan.channels, scan.foreground) for scan in scans)
    found: list[list[int]] = []
    for group in alike:
        contents = [hashlib.blake2b(scans[i].volume().data.numpy().tobytes(), digest_size=16).digest() for i in group]
        found += [[group[k] for k in same] for same in _same(contents)]
    return found


def _same(keys: Iterable[Hashable]) -> list[list[int]]:
    """Places of keys that there are several times."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    return [group for group in places.values() if len(group) > 1]
