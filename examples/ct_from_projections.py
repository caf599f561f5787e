"""CT from few X-ray projections: 3D Gaussians by the way they begin, against filtered back-projection, SART and CG.

    python examples/ct_from_projections.py [--views 20] [--photons 1e5] [--seeds 3] [--rtk] [--out build/ct]
    medgmae pretrain --recipe examples/gaussians_ct.toml --data examples/data/ct_abdomen.nii.gz --out build/predictor
    python examples/ct_from_projections.py --predictor build/predictor      # one more start: Gaussians of that model

The chest CT of examples/data is projected at its own 1.5 mm by the projector of volumes, not by that of Gaussians, with
the noise of ``--photons`` (0 for none), and reconstructed on a grid of 3 mm; truth is the CT resampled to that grid.
All starts have the same number of Gaussians and the same descent; their seconds count what it took to make them, the
first reconstruction included. PSNR has a peak of 3000 HU and is of the whole grid, air included; the mean absolute
error is of tissue, the voxels above -500 HU. Rates were chosen on this scan with 20 views.

Thresholds, fixed beforehand: filtered back-projection + 1 dB and + 2 dB, and the best of SART and CG.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch

import medgmae
from medgmae import tomography
from medgmae.visualize import ct_figure, descent_figure

DATA = Path(__file__).parent / "data"
PEAK = 0.06  # 3000 HU, 1/mm


@dataclasses.dataclass(frozen=True)
class Start:
    """How Gaussians begin and go on."""

    name: str
    first: str  # reconstruction
    rule: str
    rates: float  # times those of a Descent
    fit: int = 100  # steps
    steps: int | None = None  # of the descent, if not those of all


STARTS = [
    Start("fitted to SART", "sart", "fit", 1.0),
    Start("fitted to SART, shorter", "sart", "fit", 1.0, fit=50, steps=40),
    Start("fitted to FDK", "fdk", "fit", 1.0),
    Start("gradient of FDK", "fdk", "gradient", 5.0),
    Start("R2's rule on FDK", "fdk", "r2", 5.0),
    Start("random", "fdk", "random", 5.0),
]
PREDICTED = Start("predicted from FDK", "fdk", "predicted", 5.0)


def measured(scan: str, views: int, photons: float) -> tuple[tomography.Projections, medgmae.Volume]:
    """Projections of the fine volume, and the truth on the grid of the reconstruction."""
    fine = medgmae.read_volume(DATA / f"{scan}.nii.gz")
    if scan.startswith("ct_"):
        mu = fine.with_data(tomography.from_hounsfield(fine.data.float().clamp(-1000, 2000)))
    else:  # nothing that X-rays would see, but an image that no CT is like
        mu = medgmae.data.window(fine, (0.0, float(fine.data.double().quantile(0.999))), (0.0, 0.04))
    truth = medgmae.data.resample(mu, spacing=3.0)
    centre = truth.grid.world((np.array(truth.size) - 1) / 2)
    angles = [2 * math.pi * k / views for k in range(views)]
    geometry = tomography.circular_geometry(angles, (160, 200), 3.2, sid=1000, sdd=1500, centre_mm=centre)
    projections = tomography.project(mu, geometry)
    return (tomography.add_noise(projections, photons) if photons else projections), truth


def on_voxels(
    data: tomography.Projections, truth: medgmae.Volume, iterations: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, medgmae.Volume]]:
    """FDK, and the best iterations of SART and CG, which only the truth tells."""
    begin = time.perf_counter()
    volumes = {"FDK": tomography.fdk(data, truth.grid)}
    seconds = time.perf_counter() - begin
    found: dict[str, Any] = {"FDK": {**scores(volumes["FDK"], truth), "seconds": seconds}}
    for name, run, count in (("SART", tomography.sart, iterations[0]), ("CG", tomography.cg, iterations[1])):
        watch = Best(truth)
        run(data, truth.grid, count, watch=watch, progress=False)
        found[name], volumes[name] = {**watch.row, "curve": watch.curve}, watch.volume
    return found, volumes


class Best:
    """The best iteration so far, and the PSNR of all."""

    def __init__(self, truth: medgmae.Volume) -> None:
        self.truth, self.volume, self.row = truth, truth, {"psnr": -math.inf}
        self.curve: list[dict[str, float]] = []

    def __call__(self, number: int, volume: medgmae.Volume, seconds: float) -> None:
        """Look at one."""
        found = scores(volume, self.truth)
        self.curve.append({"step": number, "seconds": seconds, "psnr": found["psnr"]})
        if found["psnr"] > self.row["psnr"]:
            self.volume, self.row = volume, {**found, "seconds": seconds, "iteration": number}


def scores(volume: medgmae.Volume, truth: medgmae.Volume) -> dict[str, float]:
    """PSNR of the whole grid in dB, and the mean absolute error of tissue in Hounsfield units."""
    tissue = truth.data > tomography.from_hounsfield(torch.tensor(-500.0))
    error = (tomography.to_hounsfield(volume.data) - tomography.to_hounsfield(truth.data))[tissue]
    return {"psnr": psnr(volume, truth), "tissue_error_hu": float(error.abs().mean())}


def psnr(volume: medgmae.Volume, truth: medgmae.Volume) -> float:
    """In dB."""
    return medgmae.psnr(volume.data, truth.data, data_range=PEAK)


def begin_with(
    data: tomography.Projections, grid: medgmae.Grid, start: Start, options: Any, seed: int
) -> medgmae.Gaussians:
    """The Gaussians of a start."""
    volume = tomography.sart(data, grid, 4, progress=False) if start.first == "sart" else tomography.fdk(data, grid)
    if start.rule == "predicted":
        return tomography.predict_gaussians(options.model, volume, progress=False)
    generator = torch.Generator().manual_seed(seed)
    rule: Any = start.rule
    return tomography.start_gaussians(
        volume, options.gaussians, rule, steps=start.fit, generator=generator, progress=False
    )


def descend(
    data: tomography.Projections, truth: medgmae.Volume, start: Start, options: Any, seed: int
) -> tuple[dict[str, Any], Any]:
    """One run: what it began with, when it passed the thresholds, where it ended."""
    begin = time.perf_counter()
    gaussians = begin_with(data, truth.grid, start, options, seed)
    made = time.perf_counter() - begin
    plain = tomography.Descent(rounds=options.rounds)
    rates = {name: start.rates * getattr(plain, name) for name in ("means", "scales", "quats", "densities")}
    result = tomography.reconstruct_ct(
        data,
        truth.grid,
        gaussians,
        steps=start.steps or options.steps,
        budget_s=options.budget,
        descent=dataclasses.replace(plain, **rates),
        truth=truth,
        peak=PEAK,
        look_every=10,
        seed=seed,
        progress=False,
    )
    first_psnr = psnr(tomography.render_attenuation(gaussians, truth.grid), truth)
    seen = [look for look in result.curve if look.psnr is not None]
    looks = [{"step": 0, "seconds": made, "psnr": first_psnr}]
    looks += [{"step": look.step, "seconds": made + look.seconds, "psnr": look.psnr} for look in seen]
    row: dict[str, Any] = {
        "gaussians": [gaussians.means.shape[1], result.gaussians.means.shape[1]],
        "start_psnr": first_psnr,
        "start_seconds": made,
        "steps": result.curve[-1].step,
        "seconds": made + result.curve[-1].seconds,
        **scores(result.volume, truth),
        "curve": looks,
    }
    for name, level in options.levels.items():
        passed = next((look for look in looks if look["psnr"] >= level), None)
        row[name] = passed and {"step": passed["step"], "seconds": passed["seconds"]}
    return row, result


def experiment(data: tomography.Projections, truth: medgmae.Volume, options: Any) -> tuple[dict[str, Any], Any]:
    """All methods on one set of projections: their numbers, and volumes to draw."""
    voxels, volumes = on_voxels(data, truth, options.iterations)
    if options.rtk:
        from rtk_methods import at_their_best

        voxels |= at_their_best(data, truth.grid, options.iterations, lambda: Best(truth))
    for name, row in voxels.items():
        click.echo(f"{name:24} {row['psnr']:6.2f} dB {row['tissue_error_hu']:6.1f} HU {row['seconds']:6.1f} s")
    best = max(voxels["SART"]["psnr"], voxels["CG"]["psnr"])
    fdk = voxels["FDK"]["psnr"]
    options.levels = {"fdk_plus_1": fdk + 1, "fdk_plus_2": fdk + 2, "best_voxels": best}
    options.model, starts = None, list(STARTS)
    if options.predictor is not None:
        options.model = medgmae.create_model(f"local-dir:{options.predictor}").eval()
        starts.append(PREDICTED)
        begun = begin_with(data, truth.grid, PREDICTED, options, 0)
        options.gaussians = begun.means.shape[1]  # the same number for all
    rows: dict[str, list[dict[str, Any]]] = {}
    for start in starts:
        for seed in range(options.seeds):
            row, result = descend(data, truth, start, options, seed)
            rows.setdefault(start.name, []).append(row)
            volumes.setdefault("Gaussians", result.volume)
        runs = rows[start.name]
        ends, seconds = [row["psnr"] for row in runs], statistics.median(row["seconds"] for row in runs)
        click.echo(
            f"{start.name:24} {statistics.mean(ends):6.2f} dB ({min(ends):.2f} to {max(ends):.2f}) {seconds:6.1f} s, "
            f"began with {runs[0]['start_psnr']:.2f} dB"
        )
    return {"voxels": voxels, "gaussians": rows}, volumes


@click.command(context_settings={"show_default": True})
@click.option("--scan", default="ct_thorax", help="Of examples/data; an MR is taken for attenuation up to 0.04 1/mm.")
@click.option("--views", type=int, default=20)
@click.option("--photons", type=float, default=1e5, help="Of a pixel; 0 for no noise.")
@click.option("--gaussians", type=int, default=20_000)
@click.option("--steps", type=int, default=400)
@click.option("--budget", type=float, help="Seconds after which a descent ends early.")
@click.option("--rounds", type=int, default=0, help="Times that Gaussians join.")
@click.option("--predictor", type=click.Path(path_type=Path, exists=True), help="A run of medgmae pretrain.")
@click.option("--seeds", type=int, default=3)
@click.option("--iterations", type=int, nargs=2, default=(10, 16), help="Of SART and CG.")
@click.option("--rtk", is_flag=True, help="SART and CG of RTK too; needs medgmae[rtk].")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/ct"))
def main(**given: Any) -> None:
    """Print a table; write results.json and pictures."""
    options = SimpleNamespace(**given)
    options.out.mkdir(parents=True, exist_ok=True)
    data, truth = measured(options.scan, options.views, options.photons)
    report, volumes = experiment(data, truth, options)
    report["machine"] = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    (options.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, volumes, truth, options.out, f"{options.scan}, {options.views} views, {options.photons:g} photons")


def draw(report: dict[str, Any], volumes: Any, truth: medgmae.Volume, out: Path, title: str) -> None:
    """Planes of the volumes, and PSNR over seconds and steps of the first seed."""
    shown = {name: volumes[name] for name in ("FDK", "SART", "Gaussians")}
    in_hu = {name: volume.with_data(tomography.to_hounsfield(volume.data)) for name, volume in shown.items()}
    known = truth.with_data(tomography.to_hounsfield(truth.data))
    ct_figure(in_hu, known, title=title).savefig(out / "planes.png", dpi=70, bbox_inches="tight")
    curves = {name: report["voxels"][name]["curve"] for name in ("SART", "CG")}
    curves |= {name: rows[0]["curve"] for name, rows in report["gaussians"].items()}
    looks = {name: [SimpleNamespace(**look) for look in curve] for name, curve in curves.items()}
    levels = {"FDK": report["voxels"]["FDK"]["psnr"]}
    descent_figure(looks, levels).savefig(out / "curves.png", dpi=80, bbox_inches="tight")


if __name__ == "__main__":
    main()
