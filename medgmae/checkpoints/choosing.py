"""Which published weights there are for whom, and for which scans: by what their cards say, nothing is learned."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medgmae.checkpoints.cards import REGIONS, WeightCard, WeightsError, list_weights, weight_card

# Licences by their SPDX names, in small letters, that allow any use and ask for no more than a mention.
PERMISSIVE = frozenset(
    ("0bsd", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-3.0", "cc-by-4.0", "cc0-1.0", "isc", "mit", "mit-0",
     "unlicense", "zlib")
)  # fmt: skip
_FEW = 100  # scans of training, below which weights are for trying out
_COARSE = 2.0  # so much coarser is a scan than a model's voxels before it is said
_FINE = 1 / 3  # and so much finer
_PADDED = 0.5  # of an input is scan, or of a scan in one input, before it is said


def choose_weights(
    pattern: str | Sequence[str] = "*",
    *,
    licence: str | None = None,
    modality: str | None = None,
    region: str | None = None,
) -> list[str]:
    """Tags of weights whose cards say all of this.

    Args:
        pattern: as for :func:`~medgmae.list_weights`.
        licence: an SPDX name, or ``"permissive"``, those that allow any use and ask for no more than a mention.
        modality: that they were trained on: ``"CT"``, ``"MR"``, ``"PET"``.
        region: of the body that they were trained on: head, neck, chest, abdomen, pelvis or limbs.

    Raises:
        WeightsError: another region.
    """
    _check_region(region)
    return [tag for tag in list_weights(pattern) if _is_of(weight_card(tag), licence, modality, region)]


def _is_of(card: WeightCard, licence: str | None, modality: str | None, region: str | None) -> bool:
    held = (card.license or "").lower()
    allowed = licence is None or held in (PERMISSIVE if licence == "permissive" else {licence.lower()})
    known = modality is None or modality.upper() in modalities(card)
    return allowed and known and (region is None or region in regions(card))


def _check_region(region: str | None) -> None:
    if region is not None and region not in REGIONS:
        raise WeightsError(f"the region is {region!r}; expected one of {list(REGIONS)}")


def modalities(card: WeightCard) -> list[str]:
    """What a card says that the weights were trained on, or else what its input block says."""
    if card.trained_on is not None:
        return list(card.trained_on["modalities"])
    return re.findall(r"\b[A-Z]{2,3}\b", str((card.input or {}).get("modality") or ""))


def regions(card: WeightCard) -> list[str]:
    """Of the body, as far as the card says."""
    return list(card.trained_on["regions"]) if card.trained_on is not None else []


@dataclass(frozen=True)
class ScanFacts:
    """What a header says, or who asks.

    Attributes:
        channels: how many, or how many contrasts of a case.
        spacing: millimetres (d, h, w), as stored.
        size: voxels (d, h, w), as stored.
        modality: "CT", "MR", ...; None where nothing says.
        region: of the body; None where nothing says.
    """

    channels: int
    spacing: tuple[float, float, float]
    size: tuple[int, int, int]
    modality: str | None
    region: str | None


@dataclass(frozen=True)
class Seen:
    """What a model would see of the scan, along the axes of its input.

    Attributes:
        stored: spacing of the scan.
        spacing: of the prepared scan.
        size: voxels of the prepared scan.
    """

    stored: tuple[float, float, float]
    spacing: tuple[float, float, float]
    size: tuple[int, int, int]


@dataclass(frozen=True)
class Recommendation:
    """What speaks for and against weights for a scan.

    Attributes:
        tag: for :func:`~medgmae.create_model`.
        suits: "yes": trained on such scans; "perhaps": something is unknown, or speaks against it; "no": trained on
            something else.
        reasons_for: in words.
        reasons_against: in words.
        unknown: what neither the header nor the card says.
        licence: of the weights.
        availability: see :class:`~medgmae.WeightCard`.
        scans: how many the weights were trained on.
    """

    tag: str
    suits: str
    reasons_for: list[str]
    reasons_against: list[str]
    unknown: list[str]
    licence: str | None
    availability: str
    scans: int | None

    @property
    def rank(self) -> tuple[Any, ...]:
        """What sorts the best to the front."""
        grade = ("yes", "perhaps", "no").index(self.suits)
        return grade, len(self.reasons_against) - len(self.reasons_for), -(self.scans or 0), self.tag


def judged(card: WeightCard, scan: ScanFacts, seen: Seen) -> Recommendation:
    """One set of weights for one scan."""
    _check_region(scan.region)
    good: list[str] = []
    bad: list[str] = []
    unknown: list[str] = []
    wrong = _compare_kind(card, scan, good, bad, unknown)
    _compare_spacing(seen, good, bad)
    scans = (card.trained_on or {}).get("scans")
    if scans is not None and scans < _FEW:
        bad.append(f"trained on {scans} scans only, to try things out")
    elif scans is not None:
        good.append(f"trained on {scans:,} scans")
    suits = "no" if wrong else "perhaps" if unknown or bad else "yes"
    _compare_field(card, seen, good, bad)  # from here on it is about the effort, not about the kind of scan
    if card.availability == "page":
        bad.append(f"the file has to be fetched by hand from {card.page}")
    if (card.license or "unknown") == "unknown":
        bad.append("no licence is stated: ask the authors")
    elif "-nc" in str(card.license):
        bad.append(f"not for commercial use ({card.license})")
    return Recommendation(card.tag, suits, good, bad, unknown, card.license, card.availability, scans)


def _compare_kind(card: WeightCard, scan: ScanFacts, good: list[str], bad: list[str], unknown: list[str]) -> bool:
    """Modality, channels and region; returns whether the scan is of another kind altogether."""
    wrong = False
    names = modalities(card)
    listed = ", ".join(names)
    if scan.modality is None or not names:
        unknown.append(f"modality: the weights saw {listed or 'what their card does not say'}; give the scan's")
    elif scan.modality.upper() in names:
        good.append(f"trained on {scan.modality.upper()}")
    else:
        wrong = True
        bad.append(f"trained on {listed}, and the scan is {scan.modality.upper()}")
    block = card.input or {}
    channels, contrasts = block.get("channels") or 1, block.get("contrasts")
    if channels != scan.channels:
        wrong = True
        bad.append(
            f"takes {channels} channel(s){' (' + ', '.join(contrasts) + ')' if contrasts else ''}, and the scan has "
            f"{scan.channels}"
        )
    elif channels > 1:
        good.append(f"takes {channels} contrasts")
    held = regions(card)
    if scan.region is None or not held:
        unknown.append(f"region: the weights saw {', '.join(held) or 'what their card does not say'}; give the scan's")
    elif scan.region in held:
        good.append(f"trained on the {scan.region}")
    else:
        bad.append(f"trained on {', '.join(held)}, and the scan is of the {scan.region}")
    return wrong


def _compare_spacing(seen: Seen, good: list[str], bad: list[str]) -> None:
    """The scan's own voxels against those that it is resampled to."""
    text = " x ".join(f"{mm:.3g}" for mm in seen.spacing)
    ratios = [stored / mm for stored, mm in zip(seen.stored, seen.spacing, strict=True)]
    if max(ratios) > _COARSE:
        bad.append(f"sees voxels of {text} mm, interpolated from up to {max(ratios):.1f} times as thick ones")
    if min(ratios) < _FINE:
        bad.append(f"sees voxels of {text} mm; those of the scan are up to {1 / min(ratios):.1f} times as fine")
    if max(ratios) <= _COARSE and min(ratios) >= _FINE:
        good.append(f"sees voxels of {text} mm, near those of the scan")


def _compare_field(card: WeightCard, seen: Seen, good: list[str], bad: list[str]) -> None:
    """How much of the prepared scan one input holds."""
    block = card.input or {}
    size = block.get("size")
    if size is None or "multiple" in (block.get("crop") or ()):
        good.append("takes the whole scan, whatever its size")
        return
    share = math.prod(min(1.0, m / n) for n, m in zip(seen.size, size, strict=True))
    filled = min(n / m for n, m in zip(seen.size, size, strict=True))
    if filled < _PADDED:
        bad.append(f"the scan fills {100 * filled:.0f} % of its input along an axis; the rest is padding")
    elif share > _PADDED:
        good.append("one input holds the scan" if share == 1 else f"one input holds {100 * share:.0f} % of the scan")
    else:
        bad.append(f"one input holds {100 * share:.0f} % of the scan: several windows, or its middle")
