"""An enhanced multi-frame DICOM image as one volume, by highdicom, which knows where each frame lies and how it is
rescaled; what it takes on trust is checked before."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from medgmae.data.formats.elements import Dataset
from medgmae.data.formats.image import Image, Limits
from medgmae.data.formats.slices import NATIVE, REMEDY, check_fragments, check_length, notes_of, pixels_of
from medgmae.data.geometry import VolumeError


def frames_of(data: Dataset) -> int:
    """The number of frames; 1 where nothing is said.

    Raises:
        VolumeError: not a positive whole number.
    """
    text = data.text(0x00280008)
    if text and not (text.isascii() and text.isdecimal() and int(text[:12]) > 0):
        raise VolumeError(f"{data.path}: NumberOfFrames is {text!r}; expected a positive whole number")
    return int(text or 1)


def _volume(data: Dataset, frames: int, wide: bool) -> Any:
    """The volume of highdicom, whatever it raises."""
    import highdicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = highdicom.imread(data.path)
        if data.syntax not in NATIVE:
            check_fragments(image, frames)
        groups = len(image.PerFrameFunctionalGroupsSequence)
        if groups != frames:
            raise VolumeError(f"{groups} groups of attributes for {frames} frames; expected one for each")
        return image.get_volume(
            dtype=np.float64 if wide else np.float32,
            apply_real_world_transform=False,
            apply_voi_transform=False,
            apply_presentation_lut=False,
        )


def read_frames(data: Dataset, limits: Limits) -> Image:
    """The volume of one enhanced multi-frame image, float32, or float64 where pixels have 32 bits.

    Raises:
        VolumeError: highdicom is missing; frames that do not form one regular stack; broken or missing pixels.
    """
    frames, pixels = frames_of(data), pixels_of(data)
    if not data.framed:
        raise VolumeError(
            f"{data.path}: {frames} frames without functional groups, which would say where each lies; expected an "
            "enhanced multi-frame image, or the folder of a series"
        )
    if pixels.samples != 1:
        raise VolumeError(f"{data.path}: frames of colours; expected one number per pixel")
    wide = pixels.allocated > 16
    limits.check((1, frames, pixels.rows, pixels.columns), np.dtype(np.float64 if wide else np.float32))
    check_length(data, pixels, frames)
    try:
        volume = _volume(data, frames, wide)
    except ImportError:
        raise VolumeError(f"{data.path}: an enhanced multi-frame image; to read it: {REMEDY}") from None
    except VolumeError as error:
        raise VolumeError(f"{data.path}: {error}") from None
    except Exception as error:  # whatever highdicom and the decoders raise of broken data
        raise VolumeError(
            f"{data.path}: the frames cannot be made one volume: {error or type(error).__name__}; expected one regular "
            "stack of frames with a position and an orientation each"
        ) from None
    voxels = np.ascontiguousarray(volume.array)[None]
    if voxels.shape != (1, frames, pixels.rows, pixels.columns):
        raise VolumeError(f"{data.path}: {frames} frames became {voxels.shape[1:]} voxels; expected one slice for each")
    affine = np.asarray(volume.affine, dtype=np.float64)[:, [2, 1, 0, 3]]
    return Image(voxels, affine, notes=tuple(notes_of(data, pixels.kind)))
