"""``medgmae latent-map``: where in a scan a model's tokens are strong, as a volume and as a picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
@click.option(
    "--model", "name", required=True, help="Architecture, architecture.tag, hf-hub:org/repo or local-dir:FOLDER."
)
@click.option(
    "--weights",
    help="Weights: a tag, file, folder or hf-hub:org/repo; with architecture.tag, the file that its card is about.",
)
@click.option("--random-weights", is_flag=True, help="Leave the model untrained.")
@click.option(
    "--mode",
    type=click.Choice(["pretrained", "finetuned"]),
    help="See above; otherwise 'pretrained' for an autoencoder (mae_..., gmae_...), 'finetuned' for an encoder.",
)
@click.option(
    "--reduction",
    type=click.Choice(["max", "pca", "norm"]),
    help="A token to one number: largest feature, first principal component, length. Otherwise as published: pca for "
    "the last block of a ViT, max for all else.",
)
@click.option(
    "--upsampling",
    type=click.Choice(["block", "linear"]),
    default="block",
    help="From patches to voxels: one value per patch, or smooth.",
)
@click.option(
    "--mask-ratio",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of hidden patches, in mode 'pretrained'; the autoencoder's own otherwise, 0.75 for an encoder.",
)
@click.option("--seed", type=int, default=0, help="Of the mask: the same seed gives the same files.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The map: .nii.gz, .mha, .nrrd."
)
@click.option("--png", type=click.Path(path_type=Path, dir_okay=False), help="Write a picture: map on scan.")
@click.option(
    "--at", callback=_point, metavar="X,Y,Z", help="Where the picture's planes meet, LPS mm; the map's peak otherwise."
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
def latent_map_command(scans: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Map SCANS, one subject, to one number per patch of what a model makes of it.

    One SCAN is a file, a DICOM folder, or a folder with a file per contrast. Several SCANs are the contrasts of the
    subject, in the order of the model's channels: T1.nii.gz T2.nii.gz T1CE.nii.gz FLAIR.nii.gz, say. Run the command
    once per subject.

    Mode "pretrained": the model sees the patches that a random mask leaves visible; each gets its token after the last
    norm as one number, a hidden one 0. Mode "finetuned": the model sees the whole scan; a patch gets what the last
    block returns. The map lies on the grid of the preprocessed scan, which goes through the model in one pass.
    """
    import torch

    import medgmae

    check_files(options, {"out": VOLUMES, "png": (".png",)})
    if options["at"] and not options["png"]:
        raise click.UsageError("--at is about the picture; name one with --png")
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    model, weights = open_model(options["name"], options["weights"], options["random_weights"])
    latent_to_spatial = medgmae.latent_to_spatial  # its first use imports medgmae.inference.latents
    mode, reduction = medgmae.latent_map_defaults(model, options["mode"], options["reduction"])
    masked: dict[str, Any] = {}
    if mode == "pretrained":
        generator = torch.Generator().manual_seed(options["seed"])
        masked = {"mask_ratio": options["mask_ratio"], "generator": generator}
    elif options["mask_ratio"] is not None:
        raise click.UsageError("--mask-ratio is for --mode pretrained; mode 'finetuned' hides no patches")
    put_on_device(model, options["device"])
    prepare = preprocessing_of(model, options["input_of"], options["changes"])
    start = time.perf_counter()
    volume = prepare(_case(scans, prepare.input))
    found = latent_to_spatial(model, volume, mode=mode, reduction=reduction, upsampling=options["upsampling"], **masked)
    figure = None
    if options["png"]:
        title = f"{scans[0].name}: {options['name']}"
        figure = medgmae.latent_map_figure(volume, found, at=options["at"], title=title)
    medgmae.write_volume(found, options["out"])
    if figure is not None:
        figure.savefig(options["png"])
    told = {
        "scans": [str(scan) for scan in scans],
        "architecture": model.config["architecture"],
        "weights": weights,
        "mode": mode,
        "reduction": reduction,
        "upsampling": options["upsampling"],
        **_mask_facts(model, mode, options),
        "least": float(found.data.min()),
        "largest": float(found.data.max()),
        **{key: None if options[key] is None else str(options[key]) for key in ("out", "png")},
        "seconds": round(time.perf_counter() - start, 3),
    }
    if as_json:
        echo_json({**told, "input": prepare.input})
    else:
        fields = {key: value for key, value in told.items() if value is not None}
        echo_fields({**fields, "scans": ", ".join(told["scans"])})


def _case(scans: Sequence[Path], block: dict[str, Any]) -> Any:
    """What the preprocessing takes: one scan, its contrasts by name, or a volume of several channels."""
    import medgmae

    channels, contrasts = block["channels"], block["contrasts"]
    if len(scans) == 1:
        return scans[0]
    if len(scans) != channels:
        wanted = "one scan" if channels == 1 else f"one with all channels, or {channels} in the order of the channels"
        named = f" ({', '.join(contrasts)})" if contrasts else ""
        raise click.UsageError(
            f"{len(scans)} SCANS, and the model takes {channels} channel(s); expected {wanted}{named}. Of several "
            "subjects each has a run of its own"
        )
    if contrasts:
        return dict(zip(contrasts, scans, strict=True))
    return medgmae.data.stack_channels([medgmae.read_volume(scan, channels=1) for scan in scans])


def _mask_facts(model: Any, mode: str, options: dict[str, Any]) -> dict[str, Any]:
    if mode == "finetuned":
        return {"mask_ratio": None, "seed": None}
    given = options["mask_ratio"]
    return {"mask_ratio": getattr(model, "mask_ratio", 0.75) if given is None else given, "seed": options["seed"]}
