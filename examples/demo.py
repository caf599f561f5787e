"""From scans to features and pictures, offline, with the weights that the project ships: what `make demo` runs.

python examples/demo.py                     # the three scans of examples/data, into build/demo
python examples/demo.py scan.nii.gz --out DIR
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import safe_open

from medgmae import Volume, create_model, create_transform
from medgmae.cli import main as medgmae_command
from medgmae.visualize import dense_features, feature_colours, reconstruct_scan, reconstruction_figure

ROOT = Path(__file__).parent.parent
SCANS = [ROOT / "examples/data" / f"{name}.nii.gz" for name in ("ct_abdomen", "ct_thorax", "mr_brain_t1")]
WEIGHTS = "mae_vit_tiny_patch8_64.demo"


def features_command(scans: list[Path], out: Path) -> None:
    """Run `medgmae features` as a user would type it."""
    arguments = ["features", *map(str, scans), "--model", WEIGHTS.removeprefix("mae_"), "--out", str(out)]
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
            volume = Volume(data, tuple(place["spacing"]), tuple(place["origin"]), place["direction"], scan["path"])
            found[name] = file.get_tensor(f"{name}/pooled"), volume
    return found


def picture(path: Path, out: Path, model: torch.nn.Module, seed: int = 0) -> None:
    """Draw a scan, three quarters of it hidden, what the model makes of that, and its features as colours."""
    scan = create_transform(WEIGHTS, whole=True)(path)
    reconstruction = reconstruct_scan(model, scan, generator=torch.Generator().manual_seed(seed))
    colours = feature_colours(dense_features(model, scan), scan)
    title = f"{path.name}: {WEIGHTS} (a demonstration, trained on this scan)"
    reconstruction_figure(scan, reconstruction, colours, title=title).savefig(out)


@click.command()
@click.argument("scans", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "build/demo", help="Folder of the results.")
def main(scans: tuple[Path, ...], out: Path) -> None:
    """Features and pictures of SCANS."""
    begin = time.perf_counter()
    paths = list(scans) or SCANS
    out.mkdir(parents=True, exist_ok=True)
    features_command(paths, out / "features.safetensors")
    for name, (pooled, found) in read_features(out / "features.safetensors").items():
        spacing = " x ".join(f"{mm:g}" for mm in found.spacing)
        click.echo(f"{name}: vector of {len(pooled)}, map {tuple(found.data.shape)} with a place every {spacing} mm")
    model = create_model(WEIGHTS).eval()
    for path in paths:
        image = out / f"{path.name.partition('.')[0]}.png"
        picture(path, image, model)
        click.echo(f"{path.name}: pictures in {image}")
    click.echo(f"done in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
