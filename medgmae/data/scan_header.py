"""What the header of a scan says of it, without its voxels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from medgmae.data.contrasts import Scan, find_contrasts, open_scan
from medgmae.data.conversion import grid_of
from medgmae.data.formats.dicom import find_series
from medgmae.data.formats.elements import Dataset, has_prefix, read_elements
from medgmae.data.formats.image import Limits
from medgmae.data.geometry import Grid, VolumeError
from medgmae.data.io import read_image
from medgmae.data.volume import is_scan

_BRAIN = ("t1", "t2", "t1ce", "flair")
_ANY = 1 << 62  # bytes: voxels are not read
_MODALITY, _BODY_PART = 0x00080060, 0x00180015
_MODALITIES = {"PT": "PET"}  # DICOM's word for it
# Words of DICOM's BodyPartExamined, or parts of them, by the part of the body in the words of a weight card.
_PARTS = {
    "head": ("HEAD", "BRAIN", "SKULL"), "neck": ("NECK", "CSPINE"), "chest": ("CHEST", "THORAX", "LUNG", "HEART"),
    "abdomen": ("ABD", "LIVER", "KIDNEY", "PANCREAS"), "pelvis": ("PELV", "PROSTATE", "BLADDER"),
    "limbs": ("KNEE", "HIP", "ANKLE", "SHOULDER", "ELBOW", "LEG", "ARM"),
}  # fmt: skip


@dataclass(frozen=True)
class ScanHeader:
    """Facts of a scan, or of a case whose contrasts are files of their own.

    Attributes:
        source: the file, folder or name.
        grid: where the voxels lie, of the first contrast.
        channels: how many, or how many contrasts.
        modality: "CT", "MR", "PET", ...; None where the format does not say: only DICOM does.
        region: head, neck, chest, abdomen, pelvis or limbs; None where nothing says.
    """

    source: str
    grid: Grid
    channels: int
    modality: str | None = None
    region: str | None = None


def read_header(scan: Scan | Mapping[str, Scan], series: str | None = None) -> ScanHeader:
    """The facts of a scan: a file, a DICOM folder, an image in memory, a mapping of contrasts to these, or a folder
    with the contrasts t1, t2, t1ce and flair of a case as files. Formats that pack header and voxels together are read.

    Raises:
        VolumeError: what ``read_volume`` raises of a header; a mapping of nothing.
    """
    if isinstance(scan, Mapping) and not is_scan(scan):
        return _of_case(scan, ", ".join(map(str, scan)))
    if not isinstance(scan, str | os.PathLike):
        volume = open_scan(scan)
        return ScanHeader(volume.source, volume.grid, volume.channels)
    path = Path(scan)
    found = find_series(path) if path.is_dir() else []
    if path.is_dir() and not found:
        return _of_case(find_contrasts(path, _BRAIN), str(path))
    image = read_image(path, Limits(max_bytes=_ANY, voxels=False), series)
    try:
        grid = grid_of(image.affine, image.voxels.shape[1:])
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}") from None
    header = ScanHeader(str(path), grid, len(image.voxels))
    if not found and not has_prefix(path):
        return header
    chosen = [one for one in found if series in (None, one.uid)]
    return _of_dicom(header, chosen[0].slices[0].data if chosen else read_elements(path))


def _of_case(case: Mapping[str, Scan], source: str) -> ScanHeader:
    if not case:
        raise VolumeError("the case is a mapping of nothing; expected a scan for each contrast")
    first = read_header(next(iter(case.values())))
    return replace(first, source=source, channels=len(case))


def _of_dicom(header: ScanHeader, data: Dataset) -> ScanHeader:
    modality, part = data.text(_MODALITY), data.text(_BODY_PART).upper()
    regions = [region for region, words in _PARTS.items() if any(word in part for word in words)]
    region = regions[0] if len(regions) == 1 else None
    return replace(header, modality=_MODALITIES.get(modality, modality) or None, region=region)
