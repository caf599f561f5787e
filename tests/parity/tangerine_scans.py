"""Adapters for TANGERINE's way from a file to a prediction."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

import medgmae
from medgmae.factory import create_transform
from parity import adapter
from parity.case import Case, Options
from parity.models import load
from parity.official import write_file
from parity.tangerine import embeddings, offer_embeddings, vit

CARD = "vit_large_patch16_256.tangerine"


def _write_scan(path: Path, voxels: Tensor, geometry: Options | None = None) -> Path:
    """A scan on disk, written by SimpleITK, not by us."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.numpy()))
    if geometry is not None:
        image.SetSpacing([float(v) for v in geometry("spacing_xyz")])
        image.SetOrigin([float(v) for v in geometry("origin")])
        image.SetDirection([float(v) for v in geometry("direction")])
    sitk.WriteImage(image, str(path))
    return path


def _block(**changes: Any) -> dict[str, Any]:
    """The input of TANGERINE's weight card, with some entries changed."""
    return {**medgmae.weight_card(CARD).input, **changes}


def _resampled_tolerance(case: Case, voxels: Tensor) -> float:
    """How far a resampled voxel may be off: stated in words for integers and for floats."""
    text = case.spec["tolerance"]["resampled"]
    found = re.search(r"atol ([\d.e-]+)" if voxels.is_floating_point() else r"exact up to (\d+)", text)
    assert found, f"no tolerance understood in {text!r}"
    return float(found[1])


@adapter("tangerine/preprocess")
def preprocess(case: Case) -> None:
    settings = Options(case.spec["config"])
    geometry, window = Options(settings("input")), settings("hu_clip")
    voxels = case.input("voxels")
    case.same("type of the voxels", str(voxels.dtype).removeprefix("torch."), geometry("dtype"))
    case.same("window of the card", list(_block()["window"]), list(window))
    file = _write_scan(case.tmp / "scan.nii.gz", voxels, geometry)
    geometry.done()
    volume = medgmae.read_volume(file)
    case.offer("read_native", volume.data[0])
    _check_scaled(case, "native", volume)
    after = settings("geometry_after")
    _check_geometry(case, "native", volume, after)
    for size in settings("new_sizes_xyz"):
        name = "x{}_y{}_z{}".format(*size)
        found = create_transform(_block(size=size[::-1], window=None))(file)
        within = _resampled_tolerance(case, voxels)
        case.offer(f"resampled_{name}", found.data[0], tolerance=(within, 0.0))
        _check_geometry(case, name, found, after)
        # What the models see is compared twice: from the reference's voxels, and from the file with our own.
        volume = found.with_data(case.outputs[f"resampled_{name}"][None])
        _check_scaled(case, name, volume)
        ours = create_transform(_block(size=size[::-1]))(file).data
        off = (case.tolerance("model_input")[0] + within / (window[1] - window[0]), 0.0)
        case.equal(f"model_input_{name}, from the file", ours, case.outputs[f"model_input_{name}"], off)
    settings.ignore("scale")  # the window again, in words
    settings.done()
    # The embedding script's switches, on the last of these volumes: the array as [W, H, D], and no scaling.
    turned = create_transform(_block(resample=None, axes="xyz"))(volume)
    case.offer("extract_orientation_mod_last", turned.data, "model_input")
    plain = create_transform(_block(resample=None, window=None))(volume)
    case.offer("extract_no_hu_last", plain.data, "model_input")


def _check_scaled(case: Case, name: str, volume: medgmae.Volume) -> None:
    ours = create_transform(_block(resample=None))(volume)
    case.offer(f"model_input_{name}", ours.data, "model_input")


def _check_geometry(case: Case, name: str, volume: medgmae.Volume, after: dict[str, Any]) -> None:
    expected = Options(after[name])
    case.same(f"{name}: size", list(volume.size[::-1]), expected("size_xyz"))
    for what, ours in (("spacing_xyz", volume.spacing[::-1]), ("origin", volume.origin)):
        # NIfTI keeps single precision, so that no more can be asked for.
        case.equal(f"{name}: {what}", torch.tensor(ours).double(), torch.tensor(expected(what)).double(), (1e-5, 1e-6))
    expected.ignore("pixel")
    expected.done()


@adapter("tangerine/predict_and_extract")
def predict_and_extract(case: Case) -> None:
    """Scans on disk to probabilities and embeddings; the reference's tables around them are not our business."""
    settings = dict(case.spec["config"])
    activation = settings.pop("activation")
    activations = {"sigmoid": torch.sigmoid, "softmax": lambda logits: logits.softmax(-1)}
    assert activation in activations, f"activation={activation!r} is not one of {', '.join(activations)}"
    model = load(vit(settings), write_file(case, case.weights))
    transform = create_transform(_block(resample=None, size=list(model.img_size)))
    files = [_write_scan(case.tmp / f"{i}.nii.gz", row) for i, row in enumerate(case.input("voxels"))]
    x = torch.stack([transform(file).data for file in files])
    case.offer("predictions", activations[activation](model(x)))
    offer_embeddings(case, embeddings(model, x))
