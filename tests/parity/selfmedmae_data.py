"""Adapters for what SelfMedMAE and its UVA adaptation do to scans: slices, pseudo-3D volumes, validation transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

import medgmae
from medgmae.data import (
    Grid,
    Volume,
    crop_foreground,
    crop_or_pad,
    label_channels,
    reorient,
    resample_like,
    window,
)
from medgmae.data.geometry import axis_maps
from medgmae.data.slices import pseudo_3d, selfmedmae_uva, selfmedmae_uva_input
from parity import adapter
from parity.case import Case, Options

CT_WINDOW = (-175.0, 250.0)  # of the inference scripts
PSEUDO_DEPTH = 4  # copies of the inference scripts' pseudo-3D volumes, the first axis of the outputs
REGIONS = [(2, 3), (1, 2, 3), 2]  # TC, WT, ET


def xyz(volume: Volume) -> Tensor:
    """(C, x, y, z), as the reference has its arrays."""
    return volume.data.transpose(1, 3)


def plane_of(array: Tensor, index: int | None) -> Volume:
    """A slice (1, 1, H, W) of a stored array (z, y, x), or the array itself where it is one (y, x)."""
    return Volume((array if index is None else array[index])[None, None])


@adapter("selfmedmae/slice2d")
def slice2d(case: Case) -> None:
    settings = Options(case.spec["config"])
    size, shorter = settings("center_crop"), settings("resize_shorter_side_to")
    mean, std = settings("normalize_mean"), settings("normalize_std")
    settings.require(input_size=size)
    settings.done()
    for name, facts in case.spec["files"].items():
        array = case.inputs[f"{name}/array"]
        file = case.path.parent / "data" / name
        volume = medgmae.read_volume(file) if file.exists() and array.dim() == 3 else None
        if volume is not None:
            case.equal(f"{name}: voxels", volume.data[0].float(), array)
        volume = volume or Volume(array.reshape(1, -1, *array.shape[-2:]))
        if facts["slice_index"] is not None:
            case.same(f"{name}: middle", volume.size[0] // 2, facts["slice_index"])
        one = selfmedmae_uva(volume)
        case.offer(f"{name}/slice_u8", one.data[0, 0])
        case.offer(f"{name}/val_tensor", selfmedmae_uva_input(one, size, shorter, mean=mean, std=std)[0], "val_tensor")
        for output in [key for key in case.outputs if key.startswith(f"{name}/infer")]:
            word, side = output.rpartition("/")[2].rsplit("_", 1)
            # The scripts for inference take the first slice, not the middle one.
            first = plane_of(array, None if array.dim() == 2 else 0)
            case.offer(output, _inferred(first, word, int(side)), word)


def _inferred(first: Volume, word: str, side: int) -> Tensor:
    """What the inference scripts make of a slice."""
    if word == "infer2d":
        return _centred(window(first, CT_WINDOW), side).data[0, 0]
    assert word == "infer_pseudo3d", word
    volume = pseudo_3d(_centred(first, side), PSEUDO_DEPTH)
    values = volume.data.float()
    return ((values - values.min()) / (values.max() - values.min() + 1e-8))[0]


def _centred(one: Volume, side: int) -> Volume:
    """The scripts begin a crop, and a pad, at half the difference, rounded down."""
    start = [(n - side) // 2 if n >= side else -((side - n) // 2) for n in one.size[1:]]
    return crop_or_pad(one, (1, side, side), start=(0, *start))


def stored(file: Path) -> Volume:
    """A file of the case, of two dimensions too: those become a plane whose normal is z, 1 mm thick."""
    image: Any = sitk.ReadImage(str(file))
    if image.GetDimension() == 3:
        return medgmae.read_volume(file)
    plane = torch.from_numpy(sitk.GetArrayFromImage(image)).unsqueeze(0)
    affine = np.eye(4)
    affine[:2, :2] = np.reshape(image.GetDirection(), (2, 2)) * image.GetSpacing()
    affine[:2, 3] = image.GetOrigin()
    return Volume(plane[None], Grid.from_affine(affine[:, [2, 1, 0, 3]], plane.shape), str(file))


@adapter("selfmedmae/pseudo3d")
def pseudo3d(case: Case) -> None:
    settings = Options(case.spec["config"])
    settings.require(dataset="btcv")
    depth, bounds = settings("patch_size"), (settings("a_min"), settings("a_max"))
    out = (settings("b_min"), settings("b_max"))
    spacing = (1.0, settings("space_y"), settings("space_x"))  # (d, h, w); space_z has no say
    for name in ("space_z", "roi_x", "roi_y", "roi_z", "num_samples"):
        settings.ignore(name)
    settings.require(**{f"{name}_prob": 0.0 for name in ("RandFlipd", "RandRotate90d")})
    settings.require(**{f"{name}_prob": 0.0 for name in ("RandScaleIntensityd", "RandShiftIntensityd")})
    settings.done()
    kept = "survives" in case.spec["dialect"]
    assert kept or "the affine is lost" in case.spec["dialect"], case.spec["dialect"]
    for name in sorted({key.rsplit("/", 1)[0] for key in case.outputs}):
        given = stored(case.path.parent / "data" / name)
        array, label = case.inputs[f"{name}/array"], case.inputs[f"{name}/label"]
        case.equal(f"{name}: voxels", given.data.float().reshape(array.shape), array)
        scan, mask = (
            pseudo_3d(given.with_data(data.reshape(given.shape)), depth, keep_geometry=kept) for data in (array, label)
        )
        case.offer(f"{name}/Lambdad", xyz(scan), "Lambdad")
        placed = reorient(scan, "RAS")
        case.offer(f"{name}/Orientationd", xyz(placed), "Orientationd")
        placed = medgmae.data.resample(placed, spacing=spacing, origin="first_voxel")
        case.offer(f"{name}/Spacingd", xyz(placed), "Spacingd")
        cropped = crop_foreground(window(placed, bounds, out))
        case.offer(f"{name}/CropForegroundd", xyz(cropped), "CropForegroundd")
        if case.has(final := f"{name}/label_final"):
            case.offer(final, _nearest(mask, cropped.grid, case.outputs[final]), tolerance=(0.0, 0.0))


def _nearest(labels: Volume, grid: Grid, expected: Tensor) -> Tensor:
    """Labels on a grid, (1, x, y, z).

    For a plane that lies half way between two, the reference's rounding errors choose one for all of the plane. The one
    that fits what is expected is taken, judged where the other axes leave no choice, or no longer.
    """
    labels = reorient(labels, "RAS")
    maps = axis_maps(labels.grid, grid)
    assert maps is not None, "the grids are not parallel"
    assert [each.source for each in maps] == [0, 1, 2]
    array, wanted = labels.data[0].numpy(), expected[0].numpy().T
    places = [each.positions.clip(0, n - 1) for each, n in zip(maps, array.shape, strict=True)]
    lower = [np.ceil(place - 0.5 - 1e-4).astype(int) for place in places]
    index = [np.floor(place + 0.5 + 1e-4).astype(int) for place in places]
    settled = [one == other for one, other in zip(lower, index, strict=True)]
    for axis in (0, 1, 2) * 3:
        for i in np.flatnonzero(~settled[axis]):
            differing: dict[int, int] = {}
            for choice in (lower[axis][i], index[axis][i]):
                index[axis][i] = choice
                open_axes = np.ix_(*(np.ones(len(s), bool) if k == axis else s for k, s in enumerate(settled)))
                differs = (array[np.ix_(*index)] != wanted)[open_axes]
                differing[int(choice)] = int(np.take(differs, i, axis).sum())
            if len(set(differing.values())) > 1:
                index[axis][i] = min(differing, key=lambda choice: differing[choice])
                settled[axis][i] = True
    return torch.from_numpy(array[np.ix_(*index)].T[None].astype(np.float32))


def _files(case: Case, config: dict[str, Any]) -> dict[str, Volume]:
    """Image and label of both kinds, from arrays (x, y, z[, channel]) and their affines to RAS."""
    found = {}
    for name, affine in (("ct", "ct_affine"), ("mr", "mr_affine")):
        ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.array(config[affine])
        for word in (name, f"{name}_label"):
            array = case.inputs[word]
            array = array[..., None] if array.dim() == 3 else array
            data = array.permute(3, 2, 1, 0).contiguous()
            found[word] = Volume(data, Grid.from_affine(ras[:, [2, 1, 0, 3]], data.shape[1:]))
    return found


@adapter("selfmedmae/val_transforms")
def val_transforms(case: Case) -> None:
    config = case.spec["config"]
    files = _files(case, config)
    btcv, brats = Options(config["btcv"]), Options(config["msd_brats"])
    btcv.require(dataset="btcv")
    brats.require(dataset="msd_brats")
    block = {
        "orientation": "RAS",
        "axes": "xyz",
        "spacing": [btcv(f"space_{axis}") for axis in "xyz"],
        "resample": {"to": "spacing", "origin": "first_voxel"},
        "window": [btcv("a_min"), btcv("a_max")],
        "range": [btcv("b_min"), btcv("b_max")],
        "crop": ["foreground"],
    }
    _offer(case, "btcv", files["ct"], files["ct_label"], block, [btcv(f"roi_{axis}") for axis in "xyz"])
    btcv.done()
    block = {
        "channels": files["mr"].channels,
        "orientation": "RAS",
        "axes": "xyz",
        "spacing": [1.0, 1.0, 1.0],
        "resample": {"to": "spacing", "origin": "first_voxel"},
        "normalize": "zscore_nonzero",
    }
    regions = label_channels(files["mr_label"], REGIONS)
    whole = medgmae.create_transform(block)(files["mr"]).size
    roi = [min(brats(f"roi_{axis}"), n) for axis, n in zip("xyz", whole, strict=True)]  # crops never pad there
    brats.done()
    _offer(case, "brats_val", files["mr"], regions, {**block, "crop": ["foreground"]})
    _offer(case, "brats_vis", files["mr"], regions, {**block, "crop": ["center"], "size": roi})


def _offer(
    case: Case, name: str, scan: Volume, labels: Volume, block: dict[str, Any], roi: list[int] | None = None
) -> None:
    """Compare a prepared scan and its labels; with ``roi``, those of validation, and their middle."""
    image = medgmae.create_transform(block)(scan)
    mask = resample_like(labels, image, interpolation="nearest")
    case.offer(f"{name}_val_image" if roi else f"{name}_image", image.data, "image")
    case.offer(f"{name}_val_label" if roi else f"{name}_label", mask.data.float(), "label")
    if roi:
        roi = list(map(min, roi, image.size))
        case.offer(f"{name}_vis_image", crop_or_pad(image, roi).data, "image")
        case.offer(f"{name}_vis_label", crop_or_pad(mask, roi).data.float(), "label")
