"""``medgmae reconstruct``: hide most of a scan, let a masked autoencoder predict it, and report how close it came."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.common import echo_result, reports_errors, shown
from medgmae.cli.files import keep_inputs, write_figure, write_gaussians, write_volume
from medgmae.cli.options import (
    VOLUMES,
    InputChoice,
    Machine,
    ModelChoice,
    file_option,
    input_options,
    json_option,
    machine_options,
    mask_ratio_option,
    model_options,
    open_model,
    overlap_option,
    overwrite_option,
    preprocessing_of,
    seed_option,
)


@click.command("reconstruct")
@click.argument("scan", type=click.Path(path_type=Path))
@model_options()
@mask_ratio_option
@overlap_option
@seed_option("the mask")
@file_option("--out", VOLUMES, "The prediction: .nii.gz, .mha, .nrrd.", required=True)
@click.option("--keep-visible", is_flag=True, help="Write the scan's own voxels where they were not hidden.")
@file_option("--ply", (".ply",), "Write the Gaussians, in LPS millimetres.")
@file_option("--png", (".png",), "Write a picture: scan, visible, predicted, centres.")
@overwrite_option
@input_options("the model's own")
@machine_options
@json_option
@reports_errors
def reconstruct_command(
    scan: Path,
    choice: ModelChoice,
    mask_ratio: float | None,
    overlap: float,
    seed: int,
    out: Path,
    keep_visible: bool,
    ply: Path | None,
    png: Path | None,
    overwrite: bool,
    inputs: InputChoice,
    machine: Machine,
    as_json: bool,
) -> None:
    """Reconstruct SCAN, a file or DICOM folder, from the patches that a mask leaves visible.

    Windows of the model's size cover the preprocessed scan. The prediction is written on its grid, in its units. A
    model of Gaussians (gmae_...) gives those of every window, moved into the patient's frame and rendered at once.

    PSNR and SSIM compare the prediction with the preprocessed scan, over all voxels and, for PSNR, over the hidden ones
    alone; the range is that of the scan. "apart" is measured on windows that are rendered one by one and averaged.
    """
    import torch

    keep_inputs([scan], [out])
    model, weights = open_model(choice, machine)
    _check_model(model, choice.name, ply)
    prepare = preprocessing_of(model, inputs)
    start = time.perf_counter()
    volume = prepare(scan)
    result = medgmae.reconstruct_scan(
        model,
        volume,
        mask_ratio=mask_ratio,
        generator=torch.Generator().manual_seed(seed),
        overlap=overlap,
    )
    scores = _scores(result, volume)
    write_volume(result.filled if keep_visible else result.predicted, out, overwrite)
    if ply and result.gaussians is not None:
        write_gaussians(result.gaussians, ply, overwrite)
    if png:
        title = f"{shown(scan.name)}: {choice.name}"
        write_figure(medgmae.reconstruction_figure(volume, result, title=title), png, overwrite)
    facts = {
        "scan": shown(scan),
        "architecture": model.config["architecture"],
        "weights": weights,
        "mask_ratio": model.mask_ratio if mask_ratio is None else mask_ratio,
        "overlap": overlap,
        "seed": seed,
        **scores,
        "gaussians": None if result.gaussians is None else result.gaussians.means.shape[1],
        "out": shown(out),
        "ply": shown(ply) if ply else None,
        "png": shown(png) if png else None,
        "seconds": round(time.perf_counter() - start, 3),
        "input": prepare.input,
    }
    echo_result(facts, as_json, input=None, **{name: _in_words(name, value) for name, value in scores.items()})


def _check_model(model: Any, name: str, ply: Path | None) -> None:
    if not hasattr(model, "reconstruct"):
        raise click.BadParameter(
            f"{name} is an encoder alone, which predicts no voxels; expected a masked autoencoder, mae_... or gmae_...",
            param_hint="--model",
        )
    if ply and not hasattr(model, "gaussians"):
        raise click.UsageError(f"--ply needs a model of Gaussians (gmae_...); {name} predicts voxels")


def _scores(result: medgmae.Reconstruction, volume: medgmae.Volume) -> dict[str, float | None]:
    """PSNR in dB (None: no difference, or nothing hidden) and SSIM of a prediction."""
    true = volume.data.float()
    span = float(true.max() - true.min()) or 1.0
    hidden = result.visible.data.isnan()
    scores: dict[str, float | None] = {
        "data_range": span,
        "psnr": medgmae.psnr(result.predicted.data, true, data_range=span),
        "psnr_hidden": None,
        "ssim": float(medgmae.ssim3d(result.predicted.data[None], true[None], data_range=span)),
    }
    if hidden.any():
        scores["psnr_hidden"] = medgmae.psnr(result.predicted.data, true, data_range=span, where=hidden)
    if result.apart is not None:
        scores["psnr_apart"] = medgmae.psnr(result.apart.data, true, data_range=span)
        scores["ssim_apart"] = float(medgmae.ssim3d(result.apart.data[None], true[None], data_range=span))
    return {name: None if value == math.inf else value for name, value in scores.items()}


def _in_words(name: str, value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.2f} dB" if name.startswith("psnr") else f"{value:.4f}" if name.startswith("ssim") else f"{value}"
