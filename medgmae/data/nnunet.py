"""Data sets as nnU-Net keeps them: imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, and dataset.json beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medgmae.data.geometry import VolumeError
from medgmae.data.listing import Listing, Scan
from medgmae.data.names import shown

MASK = "mask"
"""The column of a listing that has the file of a case's label map."""

_FILE = "dataset.json"


def is_nnunet(folder: Path) -> bool:
    """Whether a folder is such a data set."""
    return (folder / _FILE).is_file() and (folder / "imagesTr").is_dir()


def list_nnunet(folder: Path, contrasts: Sequence[str] | None = None) -> Listing:
    """The cases of imagesTr, each with the file of its label map in the column ``mask``, empty where it has none.

    Args:
        folder: with dataset.json, imagesTr and perhaps labelsTr.
        contrasts: names that the channels are wanted by; they must be among those of dataset.json, in upper or lower
            case. None: those of dataset.json.

    Raises:
        VolumeError: no such data set, or channels of other names.
    """
    facts = _read(folder)
    named = facts.get("channel_names") or facts.get("modality") or {"0": "0"}
    channels = [str(named[key]) for key in sorted(named, key=int)]
    ending = str(facts.get("file_ending") or ".nii.gz")
    order = _order(folder, channels, contrasts)
    listing, cases = Listing(), dict[str, dict[int, Path]]()
    for path in sorted((folder / "imagesTr").iterdir()):
        if not path.name.endswith(ending) or path.name.startswith("."):
            listing.skip(path, f"does not end in {ending}", expected=True)
            continue
        stem = path.name.removesuffix(ending)
        case, _, number = stem.rpartition("_")
        if len(number) != 4 or not number.isdigit():  # as the Medical Segmentation Decathlon names files of one channel
            case, number = stem, "0000"
        cases.setdefault(case, {})[int(number)] = path
    for case, files in cases.items():
        missing = [k for k in range(len(channels)) if k not in files]
        if missing:
            place = folder / "imagesTr" / f"{case}_{missing[0]:04d}{ending}"
            listing.fail(place, f"no such file; expected the channels {', '.join(channels)} of {case}")
            continue
        mask = folder / "labelsTr" / f"{case}{ending}"
        labels = {MASK: str(mask.resolve()) if mask.is_file() else ""}
        parts = None if len(channels) == 1 else {name: files[k] for name, k in order.items()}
        first = next(iter(parts.values())) if parts else files[0]
        listing.scans.append(Scan(first, name=case, labels=labels, contrasts=parts))
    return listing


def nnunet_regions(folder: Path) -> tuple[dict[str, list[int]], bool]:
    """Label numbers of every class by its name, without background, and whether they overlap, as its region-based
    training has them.

    Raises:
        VolumeError: no labels in dataset.json, or not of that form.
    """
    labels: Any = _read(folder).get("labels")
    try:
        if all(str(key).isdigit() for key in labels):  # of version 1: number to name
            labels = {name: int(number) for number, name in labels.items()}
        found = {
            str(name): [int(n) for n in numbers] if isinstance(numbers, list) else [int(numbers)]
            for name, numbers in labels.items()
        }
    except (TypeError, ValueError, AttributeError):
        raise VolumeError(
            f"{shown(folder / _FILE)}: labels are {labels!r}; expected names with their label numbers"
        ) from None
    regions = {name: numbers for name, numbers in found.items() if numbers != [0] and name != "ignore"}
    several = [n for numbers in regions.values() for n in numbers]
    return regions, len(set(several)) < len(several)


def _order(folder: Path, channels: list[str], contrasts: Sequence[str] | None) -> dict[str, int]:
    """Channel numbers by the names that are wanted, in their order."""
    if contrasts is None:
        return {name: k for k, name in enumerate(channels)}
    lower = [name.lower() for name in channels]
    unknown = [name for name in contrasts if name.lower() not in lower]
    if unknown and len(channels) > 1:
        raise VolumeError(
            f"{shown(folder / _FILE)}: the channels are {', '.join(channels)}, and the model takes "
            f"{', '.join(contrasts)}; name them so in channel_names"
        )
    return {name: lower.index(name.lower()) for name in contrasts if name.lower() in lower}


def _read(folder: Path) -> dict[str, Any]:
    path = folder / _FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VolumeError(f"{shown(path)} cannot be read: {error}") from None
    if not isinstance(facts, dict):
        raise VolumeError(f"{shown(path)} is not an object; expected channel_names, labels and file_ending")
    return facts
