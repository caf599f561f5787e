"""Scans: reading and writing with geometry, and the preparation that a checkpoint expects."""

from .contrasts import find_contrasts
from .geometry import Grid, VolumeError
from .io import Volume, read_volume, stack_channels, write_volume
from .transforms import (
    create_transform,
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

__all__ = [
    "Grid",
    "Volume",
    "VolumeError",
    "create_transform",
    "crop_foreground",
    "crop_or_pad",
    "feature_map",
    "find_contrasts",
    "percentiles",
    "read_volume",
    "reorient",
    "resample",
    "resample_like",
    "stack_channels",
    "window",
    "write_volume",
    "zscore",
]
