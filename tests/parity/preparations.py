"""Adapters for the preparation of scans for published encoders: one input block each, and its stages one by one."""

from __future__ import annotations

from typing import Any

import nibabel
import numpy as np
import torch
from torch import Tensor

from medgmae import create_transform
from medgmae.data import Grid, Volume, percentiles, standardize, window
from parity import adapter
from parity.case import Case, Options, Tolerance

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS to LPS and back
CROP_FIRST = ["window", "foreground", "resample", "center", "normalize"]


def _tolerance(case: Case, name: str) -> Tolerance:
    """The tight one, which cases of stages in different units state for each."""
    return float(case.spec["tolerance_per_tensor"][f"outputs/{name}"]), 0.0


def _offer(case: Case, name: str, actual: Tensor) -> None:
    if case.has(name):
        case.offer(name, actual, tolerance=_tolerance(case, name))


def _volume(array: Tensor, affine: Tensor) -> Volume:
    """Voxels (x, y, z) with their affine to RAS, which a NIfTI file would round to single precision."""
    data = array.permute(2, 1, 0)[None].contiguous()
    return Volume(data, Grid.from_affine((FLIP @ affine.numpy())[:, [2, 1, 0, 3]], data.shape[1:]))


@adapter("colipri/preprocess")
def colipri(case: Case) -> None:
    settings = Options(case.spec["config"])
    array = case.input("array")
    case.same("type of the voxels", str(array.dtype).removeprefix("torch."), settings("input_dtype"))
    settings.ignore("shape", "axcodes", "spacing", "tilt_degrees")  # of the input, which is given
    scan = _volume(array, case.input("affine"))
    oriented = {"orientation": settings("orientation"), "axes": "xyz"}
    resampled = {
        **oriented,
        "spacing": [settings("target_spacing")] * 3,
        "resample": {"to": "spacing", "rounding": "floor", "keep_dtype": "truncate"},
    }
    clamped = {**resampled, "window": settings("clamp"), "range": "same"}
    rescaled = {**clamped, "range": settings("out")}
    cut = {"size": [settings("size")] * 3, "crop": ["center"], "centering": "ceil", "pad": "minimum"}
    stages = {
        "reoriented": oriented,
        "resampled": resampled,
        "clamped": clamped,
        "rescaled": rescaled,
        "cropped_or_padded": {**rescaled, **cut},
    }
    settings.done()
    for name, block in stages.items():
        found = create_transform(block)(scan)
        _offer(case, name, found.data[0])
        _offer(case, f"{name}_affine", torch.from_numpy(FLIP @ found.affine))
    _offer(case, "volume", found.data)


@adapter("voxelfm/preprocess")
def voxelfm(case: Case) -> None:
    settings = Options(case.spec["config"])
    file = case.tmp / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(case.input("array").numpy(), case.input("affine").numpy()), file)
    settings.ignore("shape_xyz", "spacing_xyz")
    spacing = settings("spacing_zyx_read")
    loaded = {"window": settings("clip"), "range": "same", "order": CROP_FIRST}
    within, patches, patch = settings("crop_k"), settings("max_patches"), [settings("patch")] * 3
    cropped = {**loaded, "foreground": {"above": -800, "within": within or 1}, "crop": ["foreground"] if within else []}
    rule = {"to": "isotropic", "least": settings("min_spacing"), "equal": "keep", "origin": "edges"}
    budget = {**cropped, "multiple": patch, "resample": {**rule, "patches": patches}}
    cut: dict[str, Any] = {**budget, "crop": [*cropped["crop"], "multiple"], "centering": "floor"}
    stages = {
        "loaded": loaded,
        "cropped": cropped,
        "isotropic": {**cropped, "resample": rule},
        "budget": budget,
        "patch_crop": cut,
        "volume": {**cut, "normalize": {"mean": settings("mean"), "std": settings("std")}},
    }
    for name, block in stages.items():
        found = create_transform(block)(file)
        _offer(case, name, found.data[0])
        if name == "loaded":
            case.same("spacing", list(found.spacing), spacing)
            whole = found
        if name == "cropped" and within:
            start = np.round(whole.grid.index(found.origin)).astype(int)
            case.same("first voxel of the box", start.tolist(), settings("crop_box_start"))
            case.same("end of the box", (start + found.size).tolist(), settings("crop_box_stop"))
    settings.done()


@adapter("beyond/preprocess")
def beyond(case: Case) -> None:
    settings = Options(case.spec["config"])
    settings.ignore("published_size")
    stages = {"dino3d_preprocess": _dino3d, "m3d_preprocess": _m3d, "segvol_preprocess": _segvol}
    name = max((stem for stem in stages if case.spec["case"].startswith(stem)), default=None)
    assert name is not None, f"no preparation is known for {case.spec['case']!r}"
    stages[name](case, settings)
    settings.done()


def _offer_stages(case: Case, scan: Tensor, stages: dict[str, dict[str, Any]]) -> None:
    for name, block in stages.items():
        case.offer(name, create_transform({**block, "order": CROP_FIRST})(Volume(scan.contiguous())).data)


def _dino3d(case: Case, settings: Options) -> None:
    settings.require(clip=True, crop="foreground = scaled > -1", out_range=[-1, 1])
    settings.require(resize_mode="trilinear, align_corners False, no antialias")
    bounds = {"percentiles": settings("percentiles")}
    scaled = {"window": {**bounds, "per": "channel"}, "range": [-1, 1]}
    cropped = {**scaled, "crop": ["foreground"], "foreground": {"above": -1}}
    resized = {**cropped, "resample": {"to": "size"}, "size": list(settings("resize"))}
    notebook = {"window": bounds, "range": [-1, 1]}
    stages = {"scaled": scaled, "cropped": cropped, "resized": resized, "notebook": notebook}
    _offer_stages(case, case.input("image"), stages)


def _m3d(case: Case, settings: Options) -> None:
    scaled = {"window": {"percentiles": [0, 100]}}
    cropped = {**scaled, "crop": ["foreground"]}
    resized = {**cropped, "resample": {"to": "size"}, "size": list(settings("spatial_size"))}
    _offer_stages(case, case.input("image"), {"minmax": scaled, "cropped": cropped, "resized": resized})


def _segvol(case: Case, settings: Options) -> None:
    """The standard scores of the reference drop out when their least and largest become 0 and 1: the block has none.

    They are compared by themselves, with the functions that a block is carried out by.
    """
    settings.require(foreground="voxels above the volume mean")
    bounds, scan = settings("percentiles"), Volume(case.input("image"))
    foreground = scan.data[scan.data > scan.data.double().mean()].double()
    clipped = window(scan, percentiles(scan, bounds, of="above_mean"), None)
    scores = standardize(clipped, float(foreground.mean()), float(foreground.std(correction=0)))
    case.offer("normalised", scores.data)
    scaled = {"window": {"percentiles": bounds, "of": "above_mean"}}
    cropped = {**scaled, "crop": ["foreground"]}
    size = {"size": list(settings("spatial_size"))}
    resized = {**cropped, **size, "resample": {"to": "size", "interpolation": "nearest"}}
    _offer_stages(case, scan.data.transpose(1, 3), {"minmax": scaled, "cropped": cropped, "resized": resized})
