"""Scans: reading and writing with geometry, and the preparation that a checkpoint expects."""

from medgmae.data import slices
from medgmae.data.contrasts import find_contrasts
from medgmae.data.formats.beside import files_of
from medgmae.data.formats.dicom import find_series
from medgmae.data.formats.dicom_seg import write_dicom_seg
from medgmae.data.geometry import Grid, VolumeError, centred_start
from medgmae.data.io import read_volume, write_volume
from medgmae.data.labels import label_channels, patch_labels
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
    "Grid",
    "Volume",
    "VolumeError",
    "as_volume",
    "centred_start",
    "crop_foreground",
    "crop_or_pad",
    "feature_map",
    "files_of",
    "find_contrasts",
    "find_series",
    "label_channels",
    "patch_labels",
    "percentiles",
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
