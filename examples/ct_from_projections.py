"""CT from few X-ray projections: 3D Gaussians by the way they begin, against filtered back-projection, SART and CG.

    python examples/ct_from_projections.py [--views 20] [--photons 1e5] [--budget 20] [--seeds 3] [--rtk]

The chest CT of examples/data is projected at its own 1.5 mm by the projector of volumes, not by that of Gaussians, with
the noise of ``--photons`` (0 for none), and reconstructed on a grid of 3 mm; truth is the CT resampled to that grid.
All starts have the same number of Gaussians and the same descent, without growth; their seconds count what it took to
make them, the first reconstruction included. PSNR has a peak of 3000 HU. Rates were chosen on this scan with 20 views.

Thresholds, fixed beforehand: filtered back-projection + 1 dB and + 2 dB.
"""

from __future__ import annotations

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

DATA = Path(__file__).parent / "data/ct_thorax.nii.gz"
PEAK = 0.06  # 3000 HU, 1/mm
# (name, first reconstruction, rule, factor on the rates)
STARTS = [
    ("fitted to SART", "sart", "fit", 1.0),
    ("fitted to FDK", "fdk", "fit", 1.0),
    ("gradient of FDK", "fdk", "gradient", 5.0),
    ("R2's rule on FDK", "fdk", "r2", 5.0),
    ("random", "fdk", "random", 5.0),
]


def measured(views: int, photons: float) -> tuple[tomography.Projections, medgmae.Volume]:
    """Projections of the fine volume, and the truth on the grid of the reconstruction."""
    fine = medgmae.read_volume(DATA)
    mu = fine.with_data(tomography.from_hounsfield(fine.data.float().clamp(-1000, 2000)))
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
    found: dict[str, Any] = {"FDK": {"psnr": psnr(volumes["FDK"], truth), "seconds": time.perf_counter() - begin}}
    for name, run, count in (("SART", tomography.sart, iterations[0]), ("CG", tomography.cg, iterations[1])):
        best = Best(truth)
        run(data, truth.grid, count, watch=best, progress=False)
        found[name], volumes[name] = {**best.row, "of": count}, best.volume
    return found, volumes


class Best:
    """The best iteration so far."""

    def __init__(self, truth: medgmae.Volume) -> None:
        self.truth, self.volume, self.row = truth, truth, {"psnr": -math.inf}

    def __call__(self, number: int, volume: medgmae.Volume, seconds: float) -> None:
        """Look at one."""
        value = psnr(volume, self.truth)
        if value > self.row["psnr"]:
            self.volume, self.row = volume, {"psnr": value, "seconds": seconds, "iteration": number}


def psnr(volume: medgmae.Volume, truth: medgmae.Volume) -> float:
    """In dB."""
    return medgmae.psnr(volume.data, truth.data, data_range=PEAK)


def descend(
    data: tomography.Projections, truth: medgmae.Volume, start: tuple[str, str, Any, float], options: Any, seed: int
) -> tuple[dict[str, Any], Any]:
    """One run: what it began with, when it passed the thresholds, where it ended."""
    _, first, rule, factor = start
    begin = time.perf_counter()
    volume = (
        tomography.sart(data, truth.grid, 4, progress=False) if first == "sart" else tomography.fdk(data, truth.grid)
    )
    generator = torch.Generator().manual_seed(seed)
    gaussians = tomography.start_gaussians(volume, options.gaussians, rule, generator=generator, progress=False)
    made = time.perf_counter() - begin
    plain = tomography.Descent()
    descent = tomography.Descent(
        means=factor * plain.means,
        scales=factor * plain.scales,
        quats=factor * plain.quats,
        densities=factor * plain.densities,
    )
    result = tomography.reconstruct_ct(
        data,
        truth.grid,
        gaussians,
        steps=options.steps,
        budget_s=options.budget,
        descent=descent,
        truth=truth,
        peak=PEAK,
        look_every=10,
        seed=seed,
        progress=False,
    )
    looks = [look for look in result.curve if look.psnr is not None]
    row: dict[str, Any] = {
        "start_psnr": psnr(tomography.render_attenuation(gaussians, truth.grid), truth),
        "start_seconds": made,
        "steps": result.curve[-1].step,
        "seconds": made + result.curve[-1].seconds,
        "psnr": looks[-1].psnr,
    }
    for more in (1, 2):
        passed = [look for look in looks if look.psnr >= options.level + more]
        row[f"fdk_plus_{more}"] = {"step": passed[0].step, "seconds": made + passed[0].seconds} if passed else None
    return row, result


@click.command(context_settings={"show_default": True})
@click.option("--views", type=int, default=20)
@click.option("--photons", type=float, default=1e5, help="Of a pixel; 0 for no noise.")
@click.option("--gaussians", type=int, default=20_000)
@click.option("--steps", type=int, default=400)
@click.option("--budget", type=float, default=20.0, help="Seconds of each descent.")
@click.option("--seeds", type=int, default=3)
@click.option("--iterations", type=int, nargs=2, default=(10, 16), help="Of SART and CG.")
@click.option("--rtk", is_flag=True, help="SART and CG of RTK too; needs medgmae[rtk].")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/ct"))
def main(**given: Any) -> None:
    """Print a table; write results.json and pictures."""
    options = SimpleNamespace(**given)
    options.out.mkdir(parents=True, exist_ok=True)
    data, truth = measured(options.views, options.photons)
    voxels, volumes = on_voxels(data, truth, options.iterations)
    if options.rtk:
        from rtk_methods import at_their_best

        voxels |= at_their_best(data, truth.grid, options.iterations, lambda: Best(truth))
    options.level = voxels["FDK"]["psnr"]
    for name, row in voxels.items():
        click.echo(f"{name:18} {row['psnr']:6.2f} dB {row['seconds']:6.1f} s")
    rows: dict[str, list[dict[str, Any]]] = {}
    curves, drawn = {}, None
    for start in STARTS:
        for seed in range(options.seeds):
            row, result = descend(data, truth, start, options, seed)
            rows.setdefault(start[0], []).append(row)
            if seed == 0:
                made = row["start_seconds"]
                curves[start[0]] = [look._replace(seconds=made + look.seconds) for look in result.curve]
                drawn = result if drawn is None else drawn
        ends = [row["psnr"] for row in rows[start[0]]]
        first, seconds = rows[start[0]][0]["start_psnr"], statistics.median(row["seconds"] for row in rows[start[0]])
        click.echo(
            f"{start[0]:18} {statistics.mean(ends):6.2f} dB ({min(ends):.2f} to {max(ends):.2f}) {seconds:6.1f} s, "
            f"began with {first:.2f} dB"
        )
    report = {"options": {**vars(options), "out": str(options.out)}, "voxels": voxels, "gaussians": rows}
    report["machine"] = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    (options.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    assert drawn is not None
    shown = {"FDK": volumes["FDK"], "SART": volumes["SART"], "Gaussians": drawn.volume}
    in_hu = {name: volume.with_data(tomography.to_hounsfield(volume.data)) for name, volume in shown.items()}
    known = truth.with_data(tomography.to_hounsfield(truth.data))
    title = f"{options.views} views, {options.photons:g} photons"
    ct_figure(in_hu, known, title=title).savefig(options.out / "planes.png", dpi=70, bbox_inches="tight")
    levels = {name: row["psnr"] for name, row in voxels.items()}
    descent_figure(curves, levels).savefig(options.out / "curves.png", dpi=80, bbox_inches="tight")


if __name__ == "__main__":
    main()
