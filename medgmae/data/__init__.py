"""Scans: reading and writing with geometry, and the preparation that a checkpoint expects."""

from medgmae.data import slices
from medgmae.data.checking import check_scans
from medgmae.data.contrasts import find_contrasts
from medgmae.data.findings import CheckReport, VolumeFacts
from medgmae.data.formats.beside import files_of
from medgmae.data.formats.dicom import find_series
from medgmae.data.formats.dicom_seg import write_dicom_seg
from medgmae.data.geometry import Grid, VolumeError, centred_start
from medgmae.data.io import read_volume, write_volume
from medgmae.data.labels import label_channels, patch_labels
from medgmae.data.listing import Listing, Scan
from medgmae.data.manifest import read_manifest
from medgmae.data.names import SCAN_ENDINGS, path_of, shown, unique_names
from medgmae.data.scans import find_scans
from medgmae.data.sources import list_scans
from medgmae.data.transforms import (
    crop_foreground,
    crop_or_pad,
    feature_map,
    percentiles,
    reorient,
    resample,
    resample_like,
    window,
    zscore,
)
from medgmae.data.volume import Volume, as_volume, stack_channels

__all__ = [
    "SCAN_ENDINGS",
    "CheckReport",
    "Grid",
    "Listing",
    "Scan",
    "Volume",
    "VolumeError",
    "VolumeFacts",
    "as_volume",
    "centred_start",
    "check_scans",
    "crop_foreground",
    "crop_or_pad",
    "feature_map",
    "files_of",
    "find_contrasts",
    "find_scans",
    "find_series",
    "label_channels",
    "list_scans",
    "patch_labels",
    "path_of",
    "percentiles",
    "read_manifest",
    "read_volume",
    "reorient",
    "resample",
    "resample_like",
    "shown",
    "slices",
    "stack_channels",
    "unique_names",
    "window",
    "write_dicom_seg",
    "write_volume",
    "zscore",
]
