"""Scans: reading and writing with geometry, the preparation that a checkpoint expects, and crops to train on."""

from medgmae.data import slices
from medgmae.data.augmentation import Augmentation
from medgmae.data.checking import check_scans, find_copies
from medgmae.data.contrasts import find_contrasts
from medgmae.data.crops import Crops
from medgmae.data.draws import draws
from medgmae.data.findings import CheckReport, VolumeFacts
from medgmae.data.formats.beside import files_of
from medgmae.data.formats.dicom import find_series
from medgmae.data.formats.dicom_seg import write_dicom_seg
from medgmae.data.geometry import Grid, VolumeError, centred_start
from medgmae.data.io import read_volume, write_volume
from medgmae.data.labels import label_channels, patch_labels
from medgmae.data.listing import Listing, Scan
from medgmae.data.manifest import read_manifest, read_table
from medgmae.data.names import SCAN_ENDINGS, path_of, shown, unique_names
from medgmae.data.preparing import prepare_scans
from medgmae.data.scans import find_scans
from medgmae.data.sources import list_scans
from medgmae.data.store import PreparedFolder, PreparedScan, is_prepared, open_prepared
from medgmae.data.transforms import (
    crop_foreground,
    crop_or_pad,
    feature_map,
    percentiles,
    reorient,
    resample,
    resample_like,
    standardize,
    window,
    zscore,
)
from medgmae.data.views import View, ViewSampler
from medgmae.data.volume import Volume, as_volume, stack_channels

__all__ = [
    "SCAN_ENDINGS",
    "Augmentation",
    "CheckReport",
    "Crops",
    "Grid",
    "Listing",
    "PreparedFolder",
    "PreparedScan",
    "Scan",
    "View",
    "ViewSampler",
    "Volume",
    "VolumeError",
    "VolumeFacts",
    "as_volume",
    "centred_start",
    "check_scans",
    "crop_foreground",
    "crop_or_pad",
    "draws",
    "feature_map",
    "files_of",
    "find_contrasts",
    "find_copies",
    "find_scans",
    "find_series",
    "is_prepared",
    "label_channels",
    "list_scans",
    "open_prepared",
    "patch_labels",
    "path_of",
    "percentiles",
    "prepare_scans",
    "read_manifest",
    "read_table",
    "read_volume",
    "reorient",
    "resample",
    "resample_like",
    "shown",
    "slices",
    "stack_channels",
    "standardize",
    "unique_names",
    "window",
    "write_dicom_seg",
    "write_volume",
    "zscore",
]
