"""``medgmae fit``: a scan as a set of 3D Gaussians."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import click

from medgmae.cli.common import (
    DEFAULT_INPUT,
    VOLUMES,
    assignments,
    changed_preprocessing,
    check_files,
    echo_fields,
    echo_json,
    json_option,
    reports_errors,
)


@click.command("fit")
@click.argument("scan", type=click.Path(path_type=Path))
@click.option("--gaussians", "count", type=click.IntRange(1), default=10_000, help="How many.")
@click.option("--steps", type=click.IntRange(0), default=500, help="Steps of Adam; more of them come closer.")
@click.option(
    "--support",
    type=click.FloatRange(0, min_open=True),
    default=3.0,
    help="Standard deviations at which a Gaussian ends.",
)
@click.option("--seed", type=int, default=0, help="Of the places: the same seed gives the same files.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The Gaussians: a .ply file in LPS millimetres.",
)
@click.option(
    "--recon",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the rendered Gaussians: .nii.gz, .mha, .nrrd.",
)
@click.option(
    "--png", type=click.Path(path_type=Path, dir_okay=False), help="Write a picture: scan, rendered, centres, error."
)
@click.option("--input-of", metavar="TAG", help="Preprocess as this weight card says.")
@click.option(
    "--input", "changes", multiple=True, callback=assignments, metavar="KEY=VALUE",
    help="Preprocess: window=[-1000,400], orientation=RAS, spacing=[2,2,2] ... as in a card's input.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="CPU threads; torch's default otherwise.")
@json_option
@reports_errors
def fit_command(scan: Path, as_json: bool, **options: Any) -> None:
    """Fit 3D Gaussians to SCAN, a file or DICOM folder.

    Without other words the scan is taken as stored, its intensities between the 0.5th and 99.5th percentile mapped to
    0..1; the densities are in these units. PSNR compares the rendered Gaussians with that scan, over all voxels; the
    range is that of the scan.
    """
    import torch

    import medgmae

    check_files(options, {"out": (".ply",), "recon": VOLUMES, "png": (".png",)})
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    tag = options["input_of"]
    block = medgmae.weight_card(tag).input if tag else None
    prepare = changed_preprocessing(block or DEFAULT_INPUT, options["changes"])
    volume = prepare(scan)
    start = time.perf_counter()
    gaussians = _fit(volume, options)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        renderer = medgmae.GaussianRenderer(options["support"])
        rendered = volume.with_data(renderer(gaussians, volume.size)[0])
    psnr = medgmae.psnr(rendered.data, volume.data, data_range=float(volume.data.max() - volume.data.min()))
    title = f"{scan.name}: {options['count']:,} Gaussians, {psnr:.2f} dB"
    _write(volume, rendered, gaussians.to_world(volume), title, options)
    told = {
        "scan": str(scan),
        "size": list(volume.size),
        "gaussians": options["count"],
        "steps": options["steps"],
        "support": options["support"],
        "seed": options["seed"],
        "psnr": None if psnr == math.inf else psnr,
        **{key: None if options[key] is None else str(options[key]) for key in ("out", "recon", "png")},
        "seconds": round(seconds, 3),
    }
    if as_json:
        echo_json({**told, "input": prepare.input})
    else:
        told["psnr"] = f"{psnr:.2f} dB"
        echo_fields({key: value for key, value in told.items() if value is not None})


def _fit(volume: Any, options: dict[str, Any]) -> Any:
    """Fit, with a bar that shows the PSNR."""
    import torch
    from tqdm.auto import tqdm

    import medgmae

    with tqdm(total=options["steps"], desc="fit", unit="step", disable=None, file=sys.stderr) as bar:

        def show(done: int, psnr: float) -> None:
            bar.set_postfix_str(f"PSNR {psnr:.2f} dB", refresh=False)
            bar.update()

        return medgmae.fit_gaussians(
            volume,
            options["count"],
            options["steps"],
            support=options["support"],
            generator=torch.Generator().manual_seed(options["seed"]),
            callback=show,
        )


def _write(volume: Any, rendered: Any, gaussians: Any, title: str, options: dict[str, Any]) -> None:
    """Write the files that are asked for; ``gaussians`` are in LPS millimetres."""
    import medgmae

    gaussians.save_ply(options["out"], "world")
    if options["recon"]:
        medgmae.write_volume(rendered, options["recon"])
    if options["png"]:
        medgmae.fit_figure(volume, rendered, gaussians, title=title).savefig(options["png"])
