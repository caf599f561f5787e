"""Scans: reading and writing with geometry, the preparation that a checkpoint expects, and crops to train on."""

from medgmae.data import slices
from medgmae.data.augmentation import Augmentation
from medgmae.data.contrasts import find_contrasts
from medgmae.data.crops import Crops
from medgmae.data.draws import draws
from medgmae.data.formats.beside import files_of
from medgmae.data.formats.dicom import find_series
from medgmae.data.formats.dicom_seg import write_dicom_seg
from medgmae.data.geometry import Grid, VolumeError, centred_start
from medgmae.data.io import read_volume, write_volume
from medgmae.data.labels import label_channels, patch_labels
from medgmae.data.preparing import prepare_scans
from medgmae.data.store import PreparedFolder, PreparedScan, is_prepared, open_prepared
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
    "Augmentation",
    "Crops",
    "Grid",
    "PreparedFolder",
    "PreparedScan",
    "Volume",
    "VolumeError",
    "as_volume",
    "centred_start",
    "crop_foreground",
    "crop_or_pad",
    "draws",
    "feature_map",
    "files_of",
    "find_contrasts",
    "find_series",
    "is_prepared",
    "label_channels",
    "open_prepared",
    "patch_labels",
    "percentiles",
    "prepare_scans",
    "read_volume",
    "reorient",
    "resample",
    "resample_like",
    "slices",
    "stack_channels",
    "window",
    "write_dicom_seg",
    "write_volume",
    "zscore",
]
