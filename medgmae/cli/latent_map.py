"""``medgmae latent-map``: where in a scan a model's tokens are strong, as a volume and as a picture."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import click

import medgmae
from medgmae.cli.common import echo_result, reports_errors, shown
from medgmae.cli.files import keep_inputs, write_figure, write_volume
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
    overwrite_option,
    preprocessing_of,
    seed_option,
)


def _point(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        x, y, z = map(float, text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a point such as -12.5,30,4 (x, y, z in LPS mm)") from None
    return x, y, z


@click.command("latent-map")
@click.argument("scans", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_options()
@click.option(
    "--mode",
    type=click.Choice(["pretrained", "finetuned"]),
    help="See above; by default 'pretrained' for an autoencoder (mae_..., gmae_...), 'finetuned' for an encoder.",
)
@click.option(
    "--reduction",
    type=click.Choice(["max", "pca", "norm"]),
    help="A token to one number: largest feature, first principal component, length. By default as published: pca for "
    "the last block of a ViT, max for all else.",
)
@click.option(
    "--upsampling",
    type=click.Choice(["block", "linear"]),
    default="block",
    help="From patches to voxels: one value per patch, or smooth.",
)
@mask_ratio_option
@seed_option("the mask")
@file_option("--out", VOLUMES, "The map: .nii.gz, .mha, .nrrd.", required=True)
@file_option("--png", (".png",), "Write a picture: map on scan.")
@overwrite_option
@click.option(
    "--at",
    callback=_point,
    metavar="X,Y,Z",
    help="Where the picture's planes meet, in LPS mm; by default at the map's peak.",
)
@input_options("the model's own")
@machine_options
@json_option
@reports_errors
def latent_map_command(
    scans: tuple[Path, ...],
    choice: ModelChoice,
    mode: Literal["pretrained", "finetuned"] | None,
    reduction: Literal["max", "pca", "norm"] | None,
    upsampling: Literal["block", "linear"],
    mask_ratio: float | None,
    seed: int,
    out: Path,
    png: Path | None,
    overwrite: bool,
    at: tuple[float, ...] | None,
    inputs: InputChoice,
    machine: Machine,
    as_json: bool,
) -> None:
    """Map SCANS, one subject, to one number per patch, from the tokens of a model.

    One SCAN is a file, a DICOM folder, or a folder with a file per contrast. Several SCANs are the contrasts of the
    subject, in the order of the model's channels, for example T1.nii.gz T2.nii.gz T1CE.nii.gz FLAIR.nii.gz. Run the
    command once per subject.

    Mode "pretrained": the model sees the patches that a random mask leaves visible; each gets its token after the last
    norm as one number, a hidden one 0. An encoder alone has 0.75 of them hidden by default. Mode "finetuned": the model
    sees the whole scan; a patch gets what the last block returns.

    The map lies on the grid of the preprocessed scan, which goes through the model in one pass.
    """
    if at and not png:
        raise click.UsageError("--at is about the picture; name one with --png")
    keep_inputs(scans, [out])
    model, weights = open_model(choice, machine)
    mode, reduction = medgmae.latent_map_defaults(model, mode, reduction)
    masked = _mask(model, mode, mask_ratio, seed)
    prepare = preprocessing_of(model, inputs)
    start = time.perf_counter()
    volume = prepare(_case(scans, prepare.input))
    latent = medgmae.latent_to_spatial(model, volume, mode=mode, reduction=reduction, upsampling=upsampling, **masked)
    if png:  # before the map is written: a point outside the scan is an error
        title = f"{shown(scans[0].name)}: {choice.name}"
        write_figure(medgmae.latent_map_figure(volume, latent, at=at, title=title), png, overwrite)
    write_volume(latent, out, overwrite)
    facts = {
        "scans": [shown(scan) for scan in scans],
        "architecture": model.config["architecture"],
        "weights": weights,
        "mode": mode,
        "reduction": reduction,
        "upsampling": upsampling,
        "mask_ratio": masked.get("mask_ratio"),
        "seed": seed if masked else None,
        "least": float(latent.data.min()),
        "largest": float(latent.data.max()),
        "out": shown(out),
        "png": shown(png) if png else None,
        "seconds": round(time.perf_counter() - start, 3),
        "input": prepare.input,
    }
    echo_result(facts, as_json, input=None, scans=", ".join(map(shown, scans)))


def _mask(model: Any, mode: str, ratio: float | None, seed: int) -> dict[str, Any]:
    """How patches are hidden, as ``latent_to_spatial`` takes it; nothing in mode "finetuned"."""
    import torch

    if mode == "pretrained":
        ratio = getattr(model, "mask_ratio", 0.75) if ratio is None else ratio
        return {"mask_ratio": ratio, "generator": torch.Generator().manual_seed(seed)}
    if ratio is not None:
        raise click.UsageError("--mask-ratio is for --mode pretrained; mode 'finetuned' hides no patches")
    return {}


def _case(scans: Sequence[Path], block: Mapping[str, Any]) -> Any:
    """What the preprocessing takes: one scan, its contrasts by name, or a volume of several channels."""
    channels, contrasts = block["channels"], block["contrasts"]
    if len(scans) == 1:
        return scans[0]
    if len(scans) != channels:
        wanted = "one scan" if channels == 1 else f"one with all channels, or {channels} in the order of the channels"
        named = f" ({', '.join(contrasts)})" if contrasts else ""
        raise click.UsageError(
            f"got {len(scans)} SCANS for a model of {channels} channel(s); expected {wanted}{named}. Run the command "
            "once per subject"
        )
    if contrasts:
        return dict(zip(contrasts, scans, strict=True))
    return medgmae.data.stack_channels([medgmae.read_volume(scan, channels=1) for scan in scans])
