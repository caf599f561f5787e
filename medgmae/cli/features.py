"""``medgmae features``: scans on disk to a file of features."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.common import echo_json, is_reported, reports_errors
from medgmae.cli.options import (
    InputChoice,
    Machine,
    ModelChoice,
    file_option,
    gathered,
    input_options,
    json_option,
    machine_options,
    model_options,
    open_model,
    overlap_option,
    preprocessing_of,
    sizes,
)
from medgmae.cli.writers import SUFFIXES, TensorWriter, VectorWriter, unique_names

SCANS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")


@dataclasses.dataclass(frozen=True)
class Extraction:
    """How scans go through the model, and which features are written."""

    want_map: bool | None
    pooled: bool
    window: Any
    overlap: float
    resize: bool
    batch_size: int
    bf16: bool


extraction_options = gathered(
    "how",
    Extraction,
    click.option("--map/--no-map", "want_map", default=None, help="Write feature maps: the default for .safetensors."),
    click.option("--pooled/--no-pooled", default=True, help="Write pooled vectors: the default."),
    click.option(
        "--window",
        callback=sizes("model", "whole"),
        metavar="N|D,H,W",
        default="model",
        help="Voxels that the model sees at once: 'model' for the size it was built for, 'whole' for the scan in one "
        "pass.",
    ),
    overlap_option,
    click.option("--resize", is_flag=True, help="Resample each scan to the window's size instead of sliding over it."),
    click.option("--batch-size", type=click.IntRange(1), default=1, help="Windows per pass."),
    click.option("--bf16", is_flag=True, help="Run the model under bfloat16 autocast."),
)


@click.command("features")
@click.argument("scans", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_options
@file_option("--out", SUFFIXES, "A .safetensors, .csv or .npy file.", required=True)
@extraction_options
@input_options("the model's own")
@machine_options
@json_option
@reports_errors
def features_command(
    scans: tuple[Path, ...],
    choice: ModelChoice,
    out: Path,
    how: Extraction,
    inputs: InputChoice,
    machine: Machine,
    as_json: bool,
) -> None:
    """Compute features of SCANS: files, DICOM folders, or folders of scans. For a model of several contrasts: 4-D
    files, or folders with a file for each, such as a_t1.nii.gz, a_t2.nii.gz, a_t1ce.nii.gz and a_flair.nii.gz.

    .safetensors: NAME/pooled (F,) and NAME/map (E, d, h, w) per scan, with geometry, model and preprocessing as JSON in
    the metadata entry "medgmae". .csv and .npy: pooled vectors, one row per scan.

    A scan that cannot be read is reported and left out. Exit code 0: all are done; 1: some are not; 2: wrong usage.
    """
    how = _checked(how, out.suffix.lower())
    model, weights = open_model(choice, machine)
    run = _Run(model, preprocessing_of(model, inputs), how)
    paths = expand(scans, run.preprocessing.input["contrasts"])
    writer = TensorWriter(out) if out.suffix.lower() == ".safetensors" else VectorWriter(out)
    try:
        run.extract_all(paths, writer)
    finally:  # an interrupted run keeps what it has
        facts = run.facts(weights)
        writer.finish(facts)
    if as_json:
        echo_json({"out": str(out) if run.done else None, **facts, "errors": run.errors})
    else:
        click.echo(f"{len(run.done)} of {len(paths)} scans: {out}" if run.done else "nothing was written")
    if run.errors:
        sys.exit(1)


def _checked(how: Extraction, suffix: str) -> Extraction:
    """The options with a decision about maps, after a check that they go together."""
    vectors_only = suffix != ".safetensors"
    if vectors_only and (how.want_map or not how.pooled):
        raise click.UsageError(f"{suffix} holds pooled vectors only; write maps to a .safetensors file")
    want_map = not vectors_only if how.want_map is None else how.want_map
    if not want_map and not how.pooled:
        raise click.UsageError("--no-map and --no-pooled leave nothing to write")
    if how.resize and how.window == "whole":
        raise click.UsageError("--resize needs a window to resize to; leave out --window whole")
    return dataclasses.replace(how, want_map=want_map)


def expand(scans: Sequence[Path], contrasts: Sequence[str] | None = None) -> list[Path]:
    """Scans in the order given, each once. Of a folder: itself if it holds files of several ``contrasts``, or else its
    scan files, or itself if it holds other files (DICOM), or else the same of its subfolders."""
    paths: dict[Path, None] = {}
    for path in scans:
        paths.update(dict.fromkeys(_scans_in(path, contrasts) if path.is_dir() else [path]))
    return list(paths)


def _scans_in(folder: Path, contrasts: Sequence[str] | None) -> list[Path]:
    if contrasts and _is_case(folder, contrasts):
        return [folder]
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file()]
    volumes = [file for file in files if file.name.lower().endswith(SCANS)]
    subfolders = [entry for entry in entries if entry.is_dir()]
    if volumes or files or not subfolders:
        return volumes or [folder]
    return [scan for subfolder in subfolders for scan in _scans_in(subfolder, contrasts)]


def _is_case(folder: Path, contrasts: Sequence[str]) -> bool:
    """Whether a folder holds one case, perhaps with a contrast missing or doubled: reading it then says which."""
    files = 0
    for name in contrasts:
        with contextlib.suppress(medgmae.VolumeError):
            files += len(medgmae.data.find_contrasts(folder, [name]))
    return files >= min(2, len(contrasts))


class _Run:
    """Features of one scan after the other, and what came of each."""

    def __init__(self, model: Any, preprocessing: Any, how: Extraction) -> None:
        self.model, self.preprocessing, self.how = model, preprocessing, how
        self.done: dict[str, dict[str, Any]] = {}
        self.errors: list[dict[str, str]] = []

    def extract_all(self, paths: list[Path], writer: TensorWriter | VectorWriter) -> None:
        """Features of every scan into ``writer``; scans that fail are reported and left out."""
        from tqdm.auto import tqdm

        with tqdm(total=len(paths), desc="scans", unit="scan", disable=None) as bar:
            for path, name in zip(paths, unique_names(paths), strict=True):
                try:
                    self._extract(path, name, writer)
                except Exception as error:
                    if not is_reported(error):
                        raise
                    message = str(error) if str(path) in str(error) else f"{path}: {error}"
                    self.errors.append({"path": str(path), "error": message})
                    with tqdm.external_write_mode(file=sys.stderr):  # not into the bar
                        click.echo(f"Error: {message}", err=True)
                bar.update()

    def _extract(self, path: Path, name: str, writer: TensorWriter | VectorWriter) -> None:
        import torch

        start = time.perf_counter()
        features = medgmae.extract_features(
            self.model,
            self.preprocessing(path),
            window=None if self.how.window == "whole" else self.how.window,
            overlap=self.how.overlap,
            resize=self.how.resize,
            outside=self.preprocessing.input["pad"],
            want_map=bool(self.how.want_map),
            batch_size=self.how.batch_size,
            autocast=torch.bfloat16 if self.how.bf16 else None,
        )
        maps = None if features.map is None else features.map.data
        writer.add(name, path, pooled=features.pooled if self.how.pooled else None, map=maps)
        self.done[name] = {
            "path": str(path),
            "features": len(features.pooled),
            "map": None if features.map is None else geometry(features.map),
            "seconds": round(time.perf_counter() - start, 3),
        }

    def facts(self, weights: str) -> dict[str, Any]:
        """What a reader of the features needs to know; ``weights`` says where the model's come from."""
        return {
            "medgmae": medgmae.__version__,
            "architecture": self.model.config["architecture"],
            "model_args": self.model.config["model_args"],
            "weights": weights,
            "input": self.preprocessing.input,
            "window": self.how.window,
            "overlap": self.how.overlap,
            "resize": self.how.resize,
            "geometry": "LPS world in mm = origin + direction @ (spacing * index), index along the map's axes",
            "scans": self.done,
        }


def geometry(volume: medgmae.Volume) -> dict[str, Any]:
    """Size, spacing, origin and direction of a volume; direction as rows."""
    return {
        "shape": list(volume.data.shape),
        "spacing": list(volume.spacing),
        "origin": list(volume.origin),
        "direction": [[float(value) for value in row] for row in volume.direction],
    }
