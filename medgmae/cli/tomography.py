"""``medgmae project`` and ``medgmae reconstruct-ct``: X-ray projections of a volume, and a CT from projections."""

from __future__ import annotations

import functools
import re
import time
from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.common import echo_result, reports_errors, shown
from medgmae.cli.files import complete, keep_inputs, write_figure, write_gaussians, write_volume
from medgmae.cli.options import (
    VOLUMES,
    Machine,
    ModelChoice,
    file_option,
    json_option,
    open_model,
    overwrite_option,
    seed_option,
    threads_option,
    use_threads,
)

_MU = click.option(
    "--mu-water", type=click.FloatRange(0, min_open=True), default=0.02, help="Attenuation of water in 1/mm."
)
_GEOMETRY = click.option(
    "--geometry",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Where source and detector stood: our JSON, RTK's XML, ASTRA's vectors.",
)
_BEAM = click.option(
    "--beam", type=click.Choice(["cone", "parallel"]), default="cone", help="Of a geometry of ASTRA's vectors."
)


def _seconds(ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    """ "90", "90s", "2m"."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9.]+)\s*(s|m|min)?", text.strip())
    if not found or float(found[1]) <= 0:
        raise click.BadParameter(f"{text!r}; expected a time such as 90s or 2m")
    return float(found[1]) * (60 if found[2] in ("m", "min") else 1)


@click.command("project")
@click.argument("volume", type=click.Path(path_type=Path))
@_GEOMETRY
@file_option("--out", (".npy",), "The line integrals: a .npy file (views, rows, columns).", required=True)
@click.option("--photons", type=click.FloatRange(1), help="Add the noise of this many photons for each pixel.")
@seed_option("the noise")
@_MU
@click.option("--attenuation", is_flag=True, help="The volume holds attenuation in 1/mm, not Hounsfield units.")
@overwrite_option
@threads_option
@json_option
@reports_errors
def project_command(
    volume: Path,
    geometry: Path | None,
    out: Path,
    photons: float | None,
    seed: int,
    mu_water: float,
    attenuation: bool,
    overwrite: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """X-ray projections of VOLUME, a CT in Hounsfield units: line integrals of its attenuation, exact for voxels that
    are interpolated trilinearly."""
    import numpy as np
    import torch

    if geometry is None:
        raise click.UsageError("--geometry is missing: a file that says where source and detector stand")
    keep_inputs([volume, geometry], [out])
    use_threads(threads)
    tomography = medgmae.tomography
    views = tomography.read_geometry(geometry)
    scan = medgmae.read_volume(volume)
    values = scan.data.float() if attenuation else tomography.from_hounsfield(scan.data.float(), mu_water)
    begin = time.perf_counter()
    projections = tomography.project(scan.with_data(values), views)
    seconds = time.perf_counter() - begin
    if photons:
        projections = tomography.add_noise(projections, photons, torch.Generator().manual_seed(seed))
    with complete(out, overwrite) as partial, partial.open("wb") as file:
        np.save(file, projections.data.numpy())
    facts = {
        "volume": shown(volume),
        "views": len(views),
        "pixels": list(views.size),
        "largest": round(float(projections.data.max()), 4),
        "photons": photons,
        "out": shown(out),
        "seconds": round(seconds, 3),
    }
    echo_result(facts, as_json)


@click.command("reconstruct-ct")
@click.argument("projections", type=click.Path(path_type=Path))
@_GEOMETRY
@_BEAM
@click.option("--i0", type=float, help="The numbers are intensities; this is that of the beam that nothing attenuates.")
@click.option("--unit-mm", type=float, help="Millimetres of one unit of a scene of R2-Gaussian.")
@file_option("--out", VOLUMES, "The CT in Hounsfield units: .nii.gz, .mha, .nrrd.", required=True)
@click.option("--method", type=click.Choice(["gaussians", "fdk", "sart", "cg"]), default="gaussians", help="How.")
@click.option(
    "--start",
    default="sart",
    help="Of Gaussians: fdk or sart, from whose volume they are placed; gaussians:TAG or gaussians:RUN, a Gaussian "
    "masked autoencoder that predicts them from that of fdk; or a .ply file.",
)
@click.option("--gaussians", "count", type=click.IntRange(1), default=20_000, help="How many Gaussians.")
@click.option("--steps", type=click.IntRange(1), default=500, help="Steps of Adam; iterations of sart and cg.")
@click.option("--budget", callback=_seconds, help="End after this time, 90s or 2m, even if steps are left.")
@click.option("--rounds", type=click.IntRange(0), default=0, help="Times that Gaussians join where the residual is.")
@click.option("--tv", type=click.FloatRange(0), default=0.0, help="Weight of the total variation.")
@click.option("--spacing", type=click.FloatRange(0, min_open=True), help="Millimetres between voxels of the result.")
@click.option("--like", type=click.Path(path_type=Path, exists=True), help="A volume whose grid the result has.")
@click.option("--truth", type=click.Path(path_type=Path, exists=True), help="The CT to compare with; also the grid.")
@seed_option("views and places")
@file_option("--ply", (".ply",), "Write the Gaussians, in LPS millimetres.")
@file_option("--state", (".safetensors",), "Write every minute and at the end where the descent is, for --resume.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Go on from the --state of an earlier run of the same projections, whose steps and seconds count.",
)
@file_option("--png", (".png",), "Write a picture.")
@file_option("--curve", (".png",), "Write a picture of the PSNR over seconds and steps; needs --truth.")
@_MU
@overwrite_option
@threads_option
@json_option
@reports_errors
def reconstruct_ct_command(projections: Path, **options: Any) -> None:
    """A CT from PROJECTIONS: a stack or a folder of images with --geometry, a folder of R2-Gaussian, a pickle of NAF.

    3D Gaussians are moved until their exact projections come close; or filtered back-projection, SART, CG on voxels.
    """
    tomography = medgmae.tomography
    if options["curve"] and not options["truth"]:
        raise click.UsageError("--curve shows how the PSNR rose, which needs --truth")
    for name in ("ply", "state", "resume", "curve"):
        if options[name] and options["method"] != "gaussians":
            raise click.UsageError(f"--{name} needs --method gaussians, got {options['method']}")
    if options["start"] not in ("fdk", "sart") and not options["start"].startswith("gaussians:"):
        ply = Path(options["start"])
        if ply.suffix != ".ply" or not ply.is_file():
            raise click.UsageError(
                f"--start is {shown(ply)}; expected fdk, sart, gaussians:TAG or a .ply file that is there"
            )
    read = [path for path in (projections, options["geometry"], options["truth"]) if path is not None]
    keep_inputs(read, [options["out"], options["ply"], options["state"]])
    use_threads(options["threads"])
    data = tomography.read_projections(
        projections, options["geometry"], beam=options["beam"], i0=options["i0"], unit_mm=options["unit_mm"]
    )
    truth, grid = _grid_of(data, options)
    begin = time.perf_counter()
    first, gaussians, curve = _reconstructed(data, grid, truth, options)
    seconds = time.perf_counter() - begin
    found = curve.volume if curve is not None else first
    result = found.with_data(tomography.to_hounsfield(found.data, options["mu_water"]))
    write_volume(result, options["out"], options["overwrite"])
    if options["ply"] and gaussians is not None:
        write_gaussians(gaussians, options["ply"], options["overwrite"])
    if options["state"] and curve is not None:
        _write_state(curve.state, options["state"])
    facts: dict[str, Any] = {
        "projections": shown(projections),
        "views": len(data),
        "method": options["method"],
        "size": list(grid.size),
        "spacing": list(grid.spacing),
        "gaussians": None if gaussians is None else int(gaussians.means.shape[1]),
        "seconds": round(seconds, 2),
        "out": shown(options["out"]),
    }
    if truth is not None:
        peak = 3000 * options["mu_water"] / 1000
        facts["psnr"] = round(medgmae.psnr(found.data, truth.data, data_range=peak), 3)
    if options["png"]:
        _draw(result, first, truth, options, facts)
    if options["curve"] and curve is not None:
        figure = medgmae.visualize.descent_figure({"Gaussians": curve.curve})
        write_figure(figure, options["curve"], options["overwrite"])
    echo_result(facts, options["as_json"])


def _grid_of(data: Any, options: dict[str, Any]) -> tuple[medgmae.Volume | None, medgmae.Grid]:
    """The truth as attenuation, where it is given, and the grid of the result."""
    tomography = medgmae.tomography
    truth = None
    if options["truth"]:
        scan = medgmae.read_volume(options["truth"])
        truth = scan.with_data(tomography.from_hounsfield(scan.data.float(), options["mu_water"]))
        return truth, truth.grid
    if options["like"]:
        return None, medgmae.read_volume(options["like"]).grid
    return None, tomography.default_grid(data.geometry, options["spacing"])


def _reconstructed(
    data: Any, grid: medgmae.Grid, truth: medgmae.Volume | None, options: dict[str, Any]
) -> tuple[medgmae.Volume, medgmae.Gaussians | None, Any]:
    """The volume that was computed first, Gaussians and their descent."""
    import torch

    tomography = medgmae.tomography
    given = click.get_current_context().get_parameter_source("steps") is click.core.ParameterSource.COMMANDLINE
    method, start = options["method"], options["start"]
    if method in ("sart", "cg"):
        run = getattr(tomography, method)
        return run(data, grid, options["steps"] if given else {"sart": 3, "cg": 10}[method]), None, None
    first = tomography.sart(data, grid, 4) if _first(options) == "SART" else tomography.fdk(data, grid)
    if method == "fdk":
        return first, None, None
    resume = _state(options["resume"]) if options["resume"] else None
    if resume is not None:
        gaussians = None
    elif start.endswith(".ply"):
        gaussians = medgmae.Gaussians.load_ply(start, "world")
    elif start.startswith("gaussians:"):
        choice = ModelChoice(start.partition(":")[2], weights=None, random_weights=False)
        model, _ = open_model(choice, Machine("cpu", options["threads"]))
        gaussians = tomography.predict_gaussians(model, first, mu_water=options["mu_water"])
    else:
        generator = torch.Generator().manual_seed(options["seed"])
        gaussians = tomography.start_gaussians(first, options["count"], generator=generator)
    descent = tomography.Descent(rounds=options["rounds"], tv=options["tv"])
    result = tomography.reconstruct_ct(
        data,
        grid,
        gaussians,
        steps=options["steps"],
        budget_s=options["budget"],
        descent=descent,
        truth=truth,
        look_every=10,
        peak=3000 * options["mu_water"] / 1000,
        seed=options["seed"],
        resume=resume,
        keep=functools.partial(_write_state, path=options["state"]) if options["state"] else None,
    )
    return first, result.gaussians, result


def _write_state(state: dict[str, Any], path: Path) -> None:
    """Over the one before it; what was there before the command was refused at its beginning."""
    from safetensors.torch import save_file

    with complete(path, overwrite=True) as place:
        save_file(state, place)


def _first(options: dict[str, Any]) -> str:
    """What Gaussians are placed from; one that goes on needs no start, and FDK is quick to show."""
    needed = options["method"] == "gaussians" and options["start"] == "sart" and not options["resume"]
    return "SART" if needed else "FDK"


def _state(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise click.BadParameter(
            f"{shown(path)} holds no tensors ({error}); expected what --state wrote", param_hint="--resume"
        ) from error


def _draw(
    result: medgmae.Volume,
    first: medgmae.Volume,
    truth: medgmae.Volume | None,
    options: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    to_hu = medgmae.tomography.to_hounsfield
    volumes = {options["method"]: result}
    if options["method"] == "gaussians":
        volumes = {_first(options): first.with_data(to_hu(first.data, options["mu_water"])), **volumes}
    known = None if truth is None else truth.with_data(to_hu(truth.data, options["mu_water"]))
    title = f"{facts['projections']}, {facts['views']} views" + (f", {facts['psnr']:.2f} dB" if "psnr" in facts else "")
    write_figure(medgmae.visualize.ct_figure(volumes, known, title=title), options["png"], options["overwrite"])
