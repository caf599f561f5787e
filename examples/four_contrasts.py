"""A brain in four contrasts through a Vim: files by name, one volume, features, and where in the brain they are strong.

python examples/four_contrasts.py                     # the brain of examples/data, into build/contrasts
python examples/four_contrasts.py a_t1.nii.gz --weights checkpoint-999.pth --out DIR

Only T1 is a real scan. T2, T1ce and FLAIR are made from it, voxel by voxel, by tables that say how bright fluid, grey
and white matter are in each contrast: a real anatomy and the right look, but nothing that T1 does not show. FLAIR
is given slices twice as thick, as in many studies. Weights are random unless some are named: the map then shows the way
from files to a picture, and nothing about the brain.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import medgmae
from medgmae.data import resample, resample_like

ROOT = Path(__file__).parent.parent
BRAIN = ROOT / "examples/data/mr_brain_t1.nii.gz"
CARD = "vim_small_patch16_160.mamba_mae"  # its input block: four contrasts, 160 x 160 x 160 voxels of 1 mm

# Brightness from T1's, in shares of its range: air, fluid from .. to, grey matter, white matter, the brightest voxel.
TISSUES = (0.0, 0.1, 0.4, 0.65, 0.85, 1.0)
LOOKS = {
    "t2": (0.0, 0.95, 1.0, 0.6, 0.35, 0.3),
    "t1ce": (0.0, 0.05, 0.3, 0.6, 0.85, 1.0),  # as T1 but for darker fluid: nothing here takes up contrast agent
    "flair": (0.0, 0.05, 0.1, 0.9, 0.7, 0.6),
}


def make_case(path: Path, folder: Path) -> dict[str, Path]:
    """Files of four contrasts by name, in ``folder``: the T1 at ``path`` and what is made of it."""
    t1 = medgmae.read_volume(path, channels=1)
    shares = t1.data.double().clamp(min=0) / t1.data.max()
    case = {"t1": t1}
    for name, looks in LOOKS.items():
        values = torch.from_numpy(np.interp(shares.numpy(), TISSUES, looks) * 1000)
        case[name] = t1.with_data(values.short())
    d, h, w = t1.spacing
    case["flair"] = resample(case["flair"], spacing=(2 * d, h, w), keep_dtype=True)
    files = {name: folder / f"brain_{name}.nii.gz" for name in case}
    for name, volume in case.items():
        medgmae.write_volume(volume, files[name])
    return files


@click.command()
@click.argument("path", default=BRAIN, type=click.Path(exists=True, path_type=Path))
@click.option("--model", "name", default=CARD, help="A model for four channels, its options as its card says.")
@click.option("--weights", help="File or folder with its weights; random otherwise.")
@click.option("--seed", default=0, help="Of random weights.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "build/contrasts", help="Folder of the results.")
def main(path: Path, name: str, weights: str | None, seed: int, out: Path) -> None:
    """Four contrasts made of PATH, a T1 of a brain without the skull, to features and a latent-to-spatial map."""
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    case = make_case(path, out)
    scan = medgmae.create_transform(CARD)(case)
    click.echo(f"{', '.join(case)}: {scan}")

    torch.manual_seed(seed)
    model: Any = medgmae.create_model(name, pretrained=False).eval()
    if weights:
        click.echo(medgmae.load_pretrained(model, weights))
    what = f"{model.config['architecture']}, {weights or 'random weights'}"
    features = medgmae.extract_features(model, scan)
    assert features.map is not None  # asked for by default
    click.echo(f"{what}: vector of {len(features.pooled)}, map {features.map.data.shape}")
    medgmae.write_volume(features.map, out / "features.nrrd")

    latent = medgmae.latent_to_spatial(model, scan)
    on_t1 = resample_like(latent, medgmae.read_volume(case["t1"]), interpolation="nearest")
    medgmae.write_volume(on_t1, out / "latent_map.nii.gz")
    title = f"{path.name} in four contrasts: {what}"
    medgmae.latent_map_figure(scan, latent, title=title).savefig(out / "latent_map.png")
    click.echo(f"{out}/latent_map.nii.gz lies on {case['t1'].name}; latent_map.png: the T1, and the map on it")
    click.echo(f"done in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
