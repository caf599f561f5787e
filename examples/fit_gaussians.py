"""A chest CT as 3D Gaussians: fitted, written as .ply, rendered back, and shown. Offline, minutes on two cores.

python examples/fit_gaussians.py                      # 20,000 Gaussians, 400 steps, into build/fit
python examples/fit_gaussians.py --gaussians 5000 --steps 200 scan.nii.gz --out DIR
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch

import medgmae

ROOT = Path(__file__).parent.parent
THORAX = ROOT / "examples/data/ct_thorax.nii.gz"
WINDOW = {"window": [-1000, 400], "range": [0.0, 1.0]}  # air is 0, where no Gaussian is needed
SUPPORT = 3.0


@click.command()
@click.argument("path", default=THORAX, type=click.Path(exists=True, path_type=Path))
@click.option("--gaussians", "count", type=click.IntRange(1), default=20_000)
@click.option("--steps", type=click.IntRange(1), default=400)
@click.option("--seed", default=0)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "build/fit", help="Folder of the results.")
def main(path: Path, count: int, steps: int, seed: int, out: Path) -> None:
    """Fit Gaussians to PATH, a CT."""
    out.mkdir(parents=True, exist_ok=True)
    scan = medgmae.create_transform(WINDOW, whole=True)(path)
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    gaussians = medgmae.fit_gaussians(scan, count, steps, support=SUPPORT, generator=generator)
    seconds = time.perf_counter() - begin
    rendered = scan.with_data(medgmae.GaussianRenderer(SUPPORT)(gaussians, scan.size)[0])
    psnr = medgmae.psnr(rendered.data, scan.data)
    fewer = scan.data.numel() / (11 * count)  # per Gaussian: 3 centre, 3 scales, 4 rotation, 1 density
    click.echo(f"{psnr:.2f} dB with {count:,} Gaussians after {steps} steps in {seconds:.0f} s")
    click.echo(f"{scan.data.numel():,} voxels; {fewer:.1f} times as many as the Gaussians have numbers")
    in_patient = gaussians.to_world(scan)
    in_patient.save_ply(out / "gaussians.ply", "world")
    medgmae.write_volume(rendered, out / "rendered.nii.gz")
    title = f"{path.name}: {count:,} Gaussians, {psnr:.1f} dB"
    medgmae.fit_figure(scan, rendered, in_patient, title=title).savefig(out / "fit.png")
    click.echo(f"{out}/gaussians.ply, rendered.nii.gz, fit.png: scan, rendering, centres and error")


if __name__ == "__main__":
    main()
