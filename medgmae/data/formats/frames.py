"""An enhanced multi-frame DICOM image as one volume, by highdicom, which knows where each frame lies and how it is
rescaled; what it takes on trust is checked before."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgmae.data.formats.decoding import REMEDY, Decoder
from medgmae.data.formats.elements import EXPLICIT, Dataset
from medgmae.data.formats.image import Image, Limits
from medgmae.data.formats.slices import NATIVE, Pixels, check_length, notes_of, pixels_of
from medgmae.data.geometry import Floats, VolumeError

_GROUPS = {  # and the attributes of theirs that a single image has
    "PlanePositionSequence": ["ImagePositionPatient"],
    "PlaneOrientationSequence": ["ImageOrientationPatient"],
    "PixelMeasuresSequence": ["PixelSpacing"],
    "PixelValueTransformationSequence": ["RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"],
}


def frames_of(data: Dataset) -> int:
    """The number of frames; 1 where nothing is said.

    Raises:
        VolumeError: not a positive whole number.
    """
    text = data.text(0x00280008)
    if text and not (text.isascii() and text.isdecimal() and int(text[:12]) > 0):
        raise VolumeError(f"{data.path}: NumberOfFrames is {text!r}; expected a positive whole number")
    return int(text or 1)


def _check_groups(image: Any, frames: int) -> None:
    """Raises unless each attribute is given once, for all frames together or for each of them: what is said twice, or
    of some frames only, is read in one way by highdicom and in another by others."""
    shared = image.SharedFunctionalGroupsSequence
    each = image.PerFrameFunctionalGroupsSequence
    if len(shared) != 1 or len(each) != frames:
        raise VolumeError(
            f"{len(shared)} shared groups of attributes, and {len(each)} for {frames} frames; expected 1, and one for "
            "each frame"
        )
    for name in _GROUPS:
        holders = [*shared, *each]
        count = [len(item[name].value) for item in holders if name in item]
        places = [name in item for item in holders]
        if any(n != 1 for n in count) or places[1:] != [places[1]] * frames or (places[0] and places[1]):
            raise VolumeError(
                f"{name} is given {places[0] + 0} time(s) for all frames and for {sum(places[1:])} of {frames} frames; "
                "expected either"
            )
        above = [keyword for keyword in _GROUPS[name] if keyword in image]
        if above and any(places):
            raise VolumeError(f"{above[0]} is given for the file and in {name}; expected one of them")


def _check_bits(image: Any, pixels: Pixels, frames: int) -> None:
    """Raises where bits beyond those that are used are set, which highdicom takes for a part of the number."""
    low, high = pixels.bounds
    for number in range(1, frames + 1):
        frame = image.get_stored_frame(number)
        if frame.min() < low or frame.max() > high:
            raise VolumeError(
                f"frame {number} has numbers from {frame.min()} to {frame.max()}; expected {low} to {high}, of "
                f"{pixels.stored} bits (an overlay in the other bits?)"
            )


def _kind(pixels: Pixels) -> np.dtype[Any]:
    """The type of the volume: float32 holds whole numbers up to 24 bits."""
    return np.dtype(np.float64 if pixels.allocated > 16 else np.float32)


def _decompress(dataset: Any, data: Dataset, pixels: Pixels, frames: int) -> None:
    """Puts decoded pixels in place of the compressed ones."""
    with Decoder() as decoder:
        stored = decoder.decode(data.path, (frames, pixels.rows, pixels.columns), pixels.dtype)
    dataset.PixelData = stored.astype(stored.dtype.newbyteorder("<"), copy=False).tobytes()
    dataset["PixelData"].VR = "OB" if pixels.allocated == 8 else "OW"
    dataset["PixelData"].is_undefined_length = False
    dataset.file_meta.TransferSyntaxUID = EXPLICIT


def _volume(data: Dataset, pixels: Pixels, frames: int) -> tuple[NDArray[Any], Floats]:
    """The volume of highdicom (D, H, W) and its affine from index (d, h, w), whatever it raises."""
    import highdicom
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(data.path)
        if data.syntax not in NATIVE:
            _decompress(dataset, data, pixels, frames)
        image = highdicom.Image.from_dataset(dataset, copy=False)
        _check_groups(image, frames)
        if pixels.stored < pixels.allocated:
            _check_bits(image, pixels, frames)
        volume = image.get_volume(
            dtype=_kind(pixels),
            apply_real_world_transform=False,
            apply_voi_transform=False,
            apply_presentation_lut=False,
        )
        return volume.array, np.array(volume.affine, dtype=np.float64)


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
    limits.check((1, frames, pixels.rows, pixels.columns), _kind(pixels))
    check_length(data, pixels, frames)
    try:
        array, affine = _volume(data, pixels, frames)
    except ImportError:
        raise VolumeError(f"{data.path}: an enhanced multi-frame image; to read it: {REMEDY}") from None
    except VolumeError as error:
        raise VolumeError(f"{data.path}: {error}") from None
    except Exception as error:  # whatever highdicom and the decoders raise of broken data
        raise VolumeError(
            f"{data.path}: the frames cannot be made one volume: {error or type(error).__name__}; expected one regular "
            "stack of frames with a position and an orientation each"
        ) from None
    voxels = np.ascontiguousarray(array)[None]
    del array
    if voxels.shape != (1, frames, pixels.rows, pixels.columns):
        raise VolumeError(f"{data.path}: {frames} frames became {voxels.shape[1:]} voxels; expected one slice for each")
    affine = affine[:, [2, 1, 0, 3]]
    if np.linalg.det(affine[:3, :3]) < 0:  # along the normal of the slices, as those of a series are stacked
        affine[:3, 3] += (frames - 1) * affine[:3, 2]
        affine[:3, 2] *= -1
        for k in range(frames // 2):  # without a second volume
            voxels[0, [k, -1 - k]] = voxels[0, [-1 - k, k]]
    return Image(voxels, affine, notes=tuple(notes_of(data, pixels.kind)))
