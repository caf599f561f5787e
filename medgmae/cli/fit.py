"""``medgmae fit``: a scan as a set of 3D Gaussians."""

from __future__ import annotations

import math
import time
from pathlib import Path

import click

import medgmae
from medgmae.cli.common import echo_result, reports_errors, shown
from medgmae.cli.files import keep_inputs, write_figure, write_gaussians, write_volume
from medgmae.cli.options import (
    DEFAULT_INPUT,
    VOLUMES,
    InputChoice,
    file_option,
    input_options,
    json_option,
    overwrite_option,
    preprocessing,
    seed_option,
    threads_option,
    use_threads,
)


@click.command("fit")
@click.argument("scan", type=click.Path(path_type=Path))
@click.option("--gaussians", "count", type=click.IntRange(1), default=10_000, help="How many Gaussians.")
@click.option("--steps", type=click.IntRange(0), default=500, help="Steps of Adam; more of them come closer.")
@click.option(
    "--support",
    type=click.FloatRange(0, min_open=True),
    default=3.0,
    help="Standard deviations at which a Gaussian ends.",
)
@seed_option("the first positions")
@file_option("--out", (".ply",), "The Gaussians: a .ply file in LPS millimetres.", required=True)
@file_option("--recon", VOLUMES, "Write the rendered Gaussians: .nii.gz, .mha, .nrrd.")
@file_option("--png", (".png",), "Write a picture: scan, rendered, centres, error.")
@overwrite_option
@input_options("the default")
@threads_option
@json_option
@reports_errors
def fit_command(
    scan: Path,
    count: int,
    steps: int,
    support: float,
    seed: int,
    out: Path,
    recon: Path | None,
    png: Path | None,
    overwrite: bool,
    inputs: InputChoice,
    threads: int | None,
    as_json: bool,
) -> None:
    """Fit 3D Gaussians to SCAN, a file or DICOM folder.

    By default the scan is taken as stored, its intensities between the 0.5th and 99.5th percentile mapped to 0..1; the
    densities are in these units. PSNR compares the rendered Gaussians with that scan, over all voxels; the range is
    that of the scan.
    """
    import torch

    keep_inputs([scan], [recon])
    use_threads(threads)
    block = medgmae.weight_card(inputs.tag).input if inputs.tag else None
    prepare = preprocessing(block or DEFAULT_INPUT, inputs.changes)
    volume = prepare(scan)
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    gaussians = medgmae.fit_gaussians(volume, count, steps, support=support, generator=generator)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        rendered = volume.with_data(medgmae.GaussianRenderer(support)(gaussians, volume.size)[0])
    psnr = medgmae.psnr(rendered.data, volume.data, data_range=float(volume.data.max() - volume.data.min()))
    in_patient = gaussians.to_world(volume)
    write_gaussians(in_patient, out, overwrite)
    if recon:
        write_volume(rendered, recon, overwrite)
    if png:
        title = f"{shown(scan.name)}: {count:,} Gaussians, {psnr:.2f} dB"
        write_figure(medgmae.fit_figure(volume, rendered, in_patient, title=title), png, overwrite)
    facts = {
        "scan": shown(scan),
        "size": list(volume.size),
        "gaussians": count,
        "steps": steps,
        "support": support,
        "seed": seed,
        "psnr": None if psnr == math.inf else psnr,
        "out": shown(out),
        "recon": shown(recon) if recon else None,
        "png": shown(png) if png else None,
        "seconds": round(seconds, 3),
        "input": prepare.input,
    }
    echo_result(facts, as_json, input=None, psnr=f"{psnr:.2f} dB")
