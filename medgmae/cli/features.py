"""``medgmae features``: scans on disk to a file of features."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from medgmae.cli.common import (
    assignments,
    echo_json,
    is_expected,
    json_option,
    open_model,
    preprocessing_of,
    put_on_device,
    reports_errors,
    sizes,
)
from medgmae.cli.writers import SUFFIXES, TensorWriter, VectorWriter, unique_names

SCANS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr")


@click.command("features")
@click.argument("scans", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--model", "name", required=True, help="Architecture, architecture.tag, hf-hub:org/repo or local-dir:FOLDER."
)
@click.option(
    "--weights",
    help="Weights: a tag, file, folder or hf-hub:org/repo; with architecture.tag, the file that its card is about.",
)
@click.option("--random-weights", is_flag=True, help="Leave the model untrained.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="A .safetensors, .csv or .npy file."
)
@click.option("--map/--no-map", "want_map", default=None, help="Write feature maps: the default for .safetensors.")
@click.option("--pooled/--no-pooled", default=True, help="Write pooled vectors: the default.")
@click.option(
    "--window",
    callback=sizes("model", "whole"),
    metavar="N|D,H,W",
    default="model",
    help="Voxels that the model sees at once: 'model' for the size it was built for, 'whole' for the scan in one pass.",
)
@click.option(
    "--overlap",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.5,
    help="Share of a window that the next repeats.",
)
@click.option("--resize", is_flag=True, help="Resample each scan to the window's size instead of sliding over it.")
@click.option("--input-of", metavar="TAG", help="Preprocess as this weight card says, in place of the model's own.")
@click.option(
    "--input", "changes", multiple=True, callback=assignments, metavar="KEY=VALUE",
    help="Change the preprocessing: window=[-1000,400], orientation=RAS, spacing=[2,2,2] ... as in a card's input.",
)  # fmt: skip
@click.option("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; torch's default otherwise.")
@click.option("--batch-size", type=click.IntRange(1), default=1, help="Windows per pass.")
@click.option("--bf16", is_flag=True, help="Run the model under bfloat16 autocast.")
@json_option
@reports_errors
def features_command(scans: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Compute features of SCANS: files, DICOM folders, or folders of scans. For a model of several contrasts: 4-D
    files, or folders with a file for each, such as a_t1.nii.gz, a_t2.nii.gz, a_t1ce.nii.gz and a_flair.nii.gz.

    .safetensors: NAME/pooled (F,) and NAME/map (E, d, h, w) per scan, with geometry, model and preprocessing as JSON in
    the metadata entry "medgmae". .csv and .npy: pooled vectors, one row per scan.

    A scan that cannot be read is reported and left out. Exit code 0: all are done; 1: some are not; 2: wrong usage.
    """
    want_map = _wanted(options)
    run = _Run(options, want_map)
    paths = expand(scans, run.preprocessing.input["contrasts"])
    writer = TensorWriter(run.out) if run.out.suffix == ".safetensors" else VectorWriter(run.out)
    names = unique_names(paths)
    try:
        run.extract_all(paths, names, writer)
    finally:  # an interrupted run keeps what it has
        writer.finish(run.facts())
    if as_json:
        echo_json({"out": str(run.out) if run.done else None, **run.facts(), "errors": run.errors})
    else:
        click.echo(f"{len(run.done)} of {len(paths)} scans: {run.out}" if run.done else "nothing was written")
    if run.errors:
        sys.exit(1)


def _wanted(options: dict[str, Any]) -> bool:
    """Whether maps are written, after a check that the options go together."""
    out, want_map = options["out"], options["want_map"]
    if out.suffix not in SUFFIXES:
        raise click.BadParameter(f"{out} must end in one of {', '.join(SUFFIXES)}", param_hint="--out")
    if not out.parent.is_dir():
        raise click.BadParameter(f"the folder {out.parent} does not exist", param_hint="--out")
    vectors_only = out.suffix != ".safetensors"
    if vectors_only and (want_map or not options["pooled"]):
        raise click.UsageError(f"{out.suffix} holds pooled vectors only; write maps to a .safetensors file")
    want_map = not vectors_only if want_map is None else want_map
    if not want_map and not options["pooled"]:
        raise click.UsageError("--no-map and --no-pooled leave nothing to write")
    if options["resize"] and options["window"] == "whole":
        raise click.UsageError("--resize needs a window to resize to; leave out --window whole")
    return want_map


def expand(scans: Sequence[Path], contrasts: Sequence[str] | None = None) -> list[Path]:
    """Scans in the order given, each once. Of a folder: itself if it holds files of several ``contrasts``, or else its
    scan files, or itself if it holds other files (DICOM), or else the same of its subfolders."""
    found: dict[Path, None] = {}
    for path in scans:
        found.update(dict.fromkeys(_scans_in(path, contrasts) if path.is_dir() else [path]))
    return list(found)


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
    import medgmae

    found = 0
    for name in contrasts:
        with contextlib.suppress(medgmae.VolumeError):
            found += len(medgmae.data.find_contrasts(folder, [name]))
    return found >= min(2, len(contrasts))


class _Run:
    """The model, its preprocessing, and what came of each scan."""

    def __init__(self, options: dict[str, Any], want_map: bool) -> None:
        import torch

        self.options, self.want_map, self.out = options, want_map, options["out"]
        if options["threads"]:
            torch.set_num_threads(options["threads"])
        self.model, self.weights = open_model(options["name"], options["weights"], options["random_weights"])
        put_on_device(self.model, options["device"])
        self.preprocessing = preprocessing_of(self.model, options["input_of"], options["changes"])
        self.done: dict[str, dict[str, Any]] = {}
        self.errors: list[dict[str, str]] = []

    def extract_all(self, paths: list[Path], names: list[str], writer: TensorWriter | VectorWriter) -> None:
        """Features of every scan into ``writer``; scans that fail are reported and left out."""
        from tqdm.auto import tqdm

        with tqdm(total=len(paths), desc="scans", unit="scan", disable=None) as bar:
            for path, name in zip(paths, names, strict=True):
                try:
                    self._extract(path, name, writer)
                except Exception as error:
                    if click.get_current_context().find_root().params.get("debug") or not is_expected(error):
                        raise
                    message = str(error) if str(path) in str(error) else f"{path}: {error}"
                    self.errors.append({"path": str(path), "error": message})
                    with tqdm.external_write_mode(file=sys.stderr):  # not into the bar
                        click.echo(f"Error: {message}", err=True)
                bar.update()

    def _extract(self, path: Path, name: str, writer: TensorWriter | VectorWriter) -> None:
        import torch

        import medgmae

        start = time.perf_counter()
        volume = self.preprocessing(path)
        window = None if self.options["window"] == "whole" else self.options["window"]
        pooled, features = medgmae.extract_features(
            self.model,
            volume,
            window=window,
            overlap=self.options["overlap"],
            resize=self.options["resize"],
            outside=self.preprocessing.input["pad"],
            want_map=self.want_map,
            batch_size=self.options["batch_size"],
            autocast=torch.bfloat16 if self.options["bf16"] else None,
            progress=sys.stderr.isatty(),
        )
        maps = None if features is None else features.data
        writer.add(name, path, pooled=pooled if self.options["pooled"] else None, map=maps)
        self.done[name] = {
            "path": str(path),
            "features": len(pooled),
            "map": None if features is None else geometry(features),
            "seconds": round(time.perf_counter() - start, 3),
        }

    def facts(self) -> dict[str, Any]:
        """What a reader of the features needs to know."""
        import medgmae

        options = self.options
        return {
            "medgmae": medgmae.__version__,
            "architecture": self.model.config["architecture"],
            "model_args": self.model.config["model_args"],
            "weights": self.weights,
            "input": self.preprocessing.input,
            "window": options["window"],
            "overlap": options["overlap"],
            "resize": options["resize"],
            "geometry": "LPS world in mm = origin + direction @ (spacing * index), index along the map's axes",
            "scans": self.done,
        }


def geometry(volume: Any) -> dict[str, Any]:
    """Size, spacing, origin and direction of a volume; direction as rows."""
    return {
        "shape": list(volume.data.shape),
        "spacing": list(volume.spacing),
        "origin": list(volume.origin),
        "direction": [[float(value) for value in row] for row in volume.direction],
    }
