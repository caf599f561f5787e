"""``medgmae reconstruct``: hide most of a scan, let a masked autoencoder predict it, and say how close it came."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import click

from medgmae.cli.common import (
    VOLUMES,
    assignments,
    check_files,
    echo_fields,
    echo_json,
    json_option,
    open_model,
    preprocessing_of,
    put_on_device,
    reports_errors,
)


@click.command("reconstruct")
@click.argument("scan", type=click.Path(path_type=Path))
@click.option(
    "--model", "name", required=True, help="Architecture, architecture.tag, hf-hub:org/repo or local-dir:FOLDER."
)
@click.option(
    "--weights",
    help="Weights: a tag, file, folder or hf-hub:org/repo; with architecture.tag, the file that its card is about.",
)
@click.option("--random-weights", is_flag=True, help="Leave the model untrained.")
@click.option(
    "--mask-ratio", type=click.FloatRange(0, 1, max_open=True), help="Share of hidden patches; the model's otherwise."
)
@click.option(
    "--overlap",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.5,
    help="Share of a window that the next repeats.",
)
@click.option("--seed", type=int, default=0, help="Of the mask: the same seed gives the same files.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The prediction: .nii.gz, .mha, .nrrd.",
)
@click.option("--keep-visible", is_flag=True, help="Write the scan's own voxels where they were not hidden.")
@click.option("--ply", type=click.Path(path_type=Path, dir_okay=False), help="Write the Gaussians, in LPS millimetres.")
@click.option(
    "--png", type=click.Path(path_type=Path, dir_okay=False), help="Write a picture: scan, visible, predicted, centres."
)
@click.option("--input-of", metavar="TAG", help="Preprocess as this weight card says, in place of the model's own.")
@click.option(
    "--input", "changes", multiple=True, callback=assignments, metavar="KEY=VALUE",
    help="Change the preprocessing: window=[-1000,400], orientation=RAS, spacing=[2,2,2] ... as in a card's input.",
)  # fmt: skip
@click.option("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; torch's default otherwise.")
@json_option
@reports_errors
def reconstruct_command(scan: Path, as_json: bool, **options: Any) -> None:
    """Reconstruct SCAN, a file or DICOM folder, from the patches that a mask leaves visible.

    Windows of the model's size cover the preprocessed scan. The prediction is written on its grid, in its units. A
    model of Gaussians (gmae_...) gives those of every window, moved into the patient's frame and rendered at once.

    PSNR and SSIM compare the prediction with the preprocessed scan, over all voxels and, for PSNR, over the hidden ones
    alone; the range is that of the scan. "apart" is what windows give that are rendered one by one and averaged.
    """
    import torch

    import medgmae

    check_files(options, {"out": VOLUMES, "ply": (".ply",), "png": (".png",)})
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    model, weights = open_model(options["name"], options["weights"], options["random_weights"])
    _check_model(model, options)
    put_on_device(model, options["device"])
    prepare = preprocessing_of(model, options["input_of"], options["changes"])
    start = time.perf_counter()
    volume = prepare(scan)
    found = medgmae.reconstruct_scan(
        model,
        volume,
        mask_ratio=options["mask_ratio"],
        generator=torch.Generator().manual_seed(options["seed"]),
        overlap=options["overlap"],
        progress=sys.stderr.isatty(),
    )
    told = {
        "scan": str(scan),
        "architecture": model.config["architecture"],
        "weights": weights,
        "mask_ratio": model.mask_ratio if options["mask_ratio"] is None else options["mask_ratio"],
        "overlap": options["overlap"],
        "seed": options["seed"],
        **_scores(found, volume),
        **_write(found, volume, f"{scan.name}: {options['name']}", options),
        "seconds": round(time.perf_counter() - start, 3),
    }
    if as_json:
        echo_json({**told, "input": prepare.input})
    else:
        echo_fields({key: _in_words(key, value) for key, value in told.items() if value is not None})


def _check_model(model: Any, options: dict[str, Any]) -> None:
    if not hasattr(model, "reconstruct"):
        raise click.BadParameter(
            f"{options['name']} is an encoder alone, which predicts no voxels; expected a masked autoencoder, "
            "mae_... or gmae_...",
            param_hint="--model",
        )
    if options["ply"] and not hasattr(model, "gaussians"):
        raise click.UsageError(f"--ply needs a model of Gaussians (gmae_...); {options['name']} predicts voxels")


def _scores(found: Any, volume: Any) -> dict[str, Any]:
    """PSNR in dB (None: no difference, or nothing hidden) and SSIM of a prediction."""
    import medgmae

    true = volume.data.float()
    span = float(true.max() - true.min()) or 1.0
    hidden = found.visible.data.isnan()
    scores = {
        "data_range": span,
        "psnr": medgmae.psnr(found.predicted.data, true, data_range=span),
        "psnr_hidden": None,
        "ssim": float(medgmae.ssim3d(found.predicted.data[None], true[None], data_range=span)),
    }
    if hidden.any():
        scores["psnr_hidden"] = medgmae.psnr(found.predicted.data, true, data_range=span, where=hidden)
    if found.apart is not None:
        scores["psnr_apart"] = medgmae.psnr(found.apart.data, true, data_range=span)
        scores["ssim_apart"] = float(medgmae.ssim3d(found.apart.data[None], true[None], data_range=span))
    return {key: None if value == math.inf else value for key, value in scores.items()}


def _write(found: Any, volume: Any, title: str, options: dict[str, Any]) -> dict[str, Any]:
    """Write the files that are asked for; says which."""
    import medgmae

    medgmae.write_volume(found.filled if options["keep_visible"] else found.predicted, options["out"])
    if options["ply"]:
        found.gaussians.save_ply(options["ply"], "world")
    if options["png"]:
        medgmae.reconstruction_figure(volume, found, title=title).savefig(options["png"])
    count = None if found.gaussians is None else found.gaussians.means.shape[1]
    files = {key: None if options[key] is None else str(options[key]) for key in ("out", "ply", "png")}
    return {"gaussians": count, **files}


def _in_words(key: str, value: Any) -> Any:
    if key.startswith("psnr"):
        return f"{value:.2f} dB"
    return f"{value:.4f}" if key.startswith("ssim") else value
