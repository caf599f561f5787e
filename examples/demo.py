"""From scans to features and pictures, offline, with the weights that the project ships: what `make demo` runs.

python examples/demo.py                     # the three scans of examples/data, into build/demo
python examples/demo.py scan.nii.gz --out DIR
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import safe_open

from medgmae import (
    Grid,
    Reconstruction,
    Volume,
    create_model,
    create_transform,
    dense_features,
    feature_colours,
    reconstruct_scan,
)
from medgmae.cli import main as medgmae_command
from medgmae.visualize import reconstruction_figure

ROOT = Path(__file__).parent.parent
SCANS = [ROOT / "examples/data" / f"{name}.nii.gz" for name in ("ct_abdomen", "ct_thorax", "mr_brain_t1")]
WEIGHTS = "mae_vit_tiny_patch8_64.demo"


def features_command(scans: list[Path], out: Path) -> None:
    """Run `medgmae features` as a user would type it."""
    arguments = [
        "features",
        *map(str, scans),
        "--model",
        WEIGHTS.removeprefix("mae_"),
        "--out",
        str(out),
        "--overwrite",
    ]
    click.echo(f"$ medgmae {' '.join(arguments)}")
    medgmae_command(arguments, standalone_mode=False)


def read_features(path: Path) -> dict[str, tuple[torch.Tensor, Volume]]:
    """Pooled vector (F,) and feature map (E, d, h, w) of every scan in a file that `medgmae features` wrote."""
    found: dict[str, tuple[torch.Tensor, Volume]] = {}
    with safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["medgmae"])
        for name, scan in facts["scans"].items():
            place = scan["map"]
            data = file.get_tensor(f"{name}/map")
            grid = Grid(data.shape[1:], place["spacing"], place["origin"], place["direction"])
            volume = Volume(data, grid, scan["path"])
            found[name] = file.get_tensor(f"{name}/pooled"), volume
    return found


def views(path: Path, model: torch.nn.Module, seed: int = 0) -> tuple[Volume, Reconstruction, Volume]:
    """A scan, what the model makes of it when three quarters are hidden, and its features as colours."""
    scan = create_transform(WEIGHTS, whole=True)(path)
    reconstruction = reconstruct_scan(model, scan, generator=torch.Generator().manual_seed(seed))
    return scan, reconstruction, feature_colours(dense_features(model, scan), scan)


def draw(paths: list[Path], out: Path) -> Iterator[Path]:
    """Write a picture of every scan, several scans at a time; gives the pictures' paths as they are done."""
    model = create_model(WEIGHTS).eval()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = {pool.submit(views, path, model): path for path in paths}
        for done in as_completed(waiting):
            path = waiting[done]
            picture = out / f"{path.name.partition('.')[0]}.png"
            title = f"{path.name}: {WEIGHTS} (a demonstration, trained on three scans)"
            reconstruction_figure(*done.result(), title=title).savefig(picture)
            yield picture


@click.command()
@click.argument("scans", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "build/demo", help="Folder of the results.")
def main(scans: tuple[Path, ...], out: Path) -> None:
    """Features and pictures of SCANS."""
    begin = time.perf_counter()
    torch.set_num_threads(1)  # a thread per scan: matrices of this size gain little from more
    paths = list(scans) or SCANS
    out.mkdir(parents=True, exist_ok=True)
    features_command(paths, out / "features.safetensors")
    for name, (pooled, found) in read_features(out / "features.safetensors").items():
        spacing = " x ".join(f"{mm:g}" for mm in found.spacing)
        click.echo(f"{name}: vector of {len(pooled)}, map {tuple(found.data.shape)} with a place every {spacing} mm")
    for image in draw(paths, out):
        click.echo(f"{image}: slices, mask, reconstruction, and features at half-patch steps as colours")
    click.echo(f"done in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
