"""Label maps as DICOM Segmentation objects that belong to the series that was segmented, by highdicom."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medgmae._version import __version__
from medgmae.data.formats.decoding import REMEDY
from medgmae.data.formats.dicom import find_series
from medgmae.data.geometry import VolumeError
from medgmae.data.volume import ScanLike, Volume, as_volume


def write_dicom_seg(
    labels: ScanLike,
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    names: Sequence[str],
    *,
    series: str | None = None,
) -> None:
    """Write a label map as one DICOM Segmentation object, binary, with a segment per name.

    Patient, study and frame of reference are those of the series. Nothing is known about what the segments are beside
    their names: all are coded as tissue, found by an automatic algorithm.

    Args:
        labels: (1, D, H, W), 0 for background and k for ``names[k - 1]``; or masks (K, D, H, W) of 0 and 1, one per
            name. Any grid in the series' patient space, best that of the series.
        folder: where the series lies.
        path: file to write.
        names: of the segments.
        series: id of the series, where the folder holds several.

    Raises:
        VolumeError: highdicom is missing; no such series, or several; labels that are more than the names, or none at
            all; a file that cannot be written.
    """
    volume = as_volume(labels)
    array = _segments(volume, names)
    slices = [_header(one.path, volume.spacing[0]) for one in _chosen(Path(folder), series).slices]
    try:
        import highdicom
        from highdicom.seg import Segmentation
    except ImportError:
        raise VolumeError(f"{path}: DICOM Segmentation objects need highdicom: {REMEDY}") from None
    channels: dict[str, Any] = (
        {"channels": {"SegmentNumber": list(range(1, len(names) + 1))}} if array.ndim == 4 else {}
    )
    lying = highdicom.Volume(array, affine=volume.affine, coordinate_system="PATIENT", **channels)
    try:
        made = Segmentation(
            source_images=slices,
            pixel_array=lying,
            segmentation_type="BINARY",
            segment_descriptions=[_description(number, name) for number, name in enumerate(names, 1)],
            series_instance_uid=highdicom.UID(),
            series_number=1000,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="medgmae",
            manufacturer_model_name="medgmae",
            software_versions=__version__,
            device_serial_number="0",
            series_description="Segmentation by medgmae",
        )
        made.save_as(path)
    except (ValueError, TypeError, AttributeError, OSError) as error:  # of headers that lack what a reference needs
        raise VolumeError(f"{path}: no DICOM Segmentation of the series in {folder}: {error}") from error


def _chosen(folder: Path, series: str | None) -> Any:
    found = [one for one in find_series(folder) if series in (None, one.uid)]
    if len(found) != 1:
        listing = ", ".join(str(one) for one in found) or "none"
        raise VolumeError(f"{folder}: expected one DICOM series{f' {series}' if series else ''}, found {listing}")
    return found[0]


def _header(path: Path, thickness: float) -> Any:
    """Without pixels, with a thickness, which highdicom asks for and writers leave out; it says nothing of positions.

    What it says of the spacing between slices goes: highdicom believes it against the positions, which are right.
    """
    from pydicom import dcmread

    header = dcmread(path, stop_before_pixels=True)
    if header.get("SliceThickness") is None:
        header.SliceThickness = thickness
    if "SpacingBetweenSlices" in header:
        del header.SpacingBetweenSlices
    return header


def _segments(volume: Volume, names: Sequence[str]) -> np.ndarray[Any, Any]:
    """(D, H, W) labels, or (D, H, W, K) masks, uint8 or uint16."""
    array: np.ndarray[Any, Any] = np.asarray(volume)
    low, high = array.min(), array.max()
    most = len(names) if volume.channels == 1 else 1
    if not (low >= 0 and high <= most) or volume.channels not in (1, len(names)) or not names:
        raise VolumeError(
            f"{volume.source}: {volume.channels} channel(s) of labels from {low} to {high} and {len(names)} names; "
            "expected one name for each label above 0, or for each mask"
        )
    if not high:
        raise VolumeError(f"{volume.source}: nothing is labelled; a DICOM Segmentation needs at least one voxel")
    array = array.astype(np.uint8 if most < 256 else np.uint16)
    return array[0] if volume.channels == 1 else np.ascontiguousarray(array.transpose(1, 2, 3, 0))


def _description(number: int, name: str) -> Any:
    import highdicom
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes

    family = codes.cid7162.ArtificialIntelligence
    return SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=codes.SCT.Tissue,
        segmented_property_type=codes.SCT.Tissue,
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence("medgmae", family, __version__),
    )
