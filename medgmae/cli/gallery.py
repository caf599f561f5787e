"""``medgmae gallery``: what encoders make of scans, side by side as colours."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.common import echo_result, reports_errors, shown
from medgmae.cli.files import keep_inputs, write_figure
from medgmae.cli.options import (
    DEFAULT_INPUT,
    InputChoice,
    Machine,
    ModelChoice,
    complete_name,
    file_option,
    json_option,
    machine_options,
    open_model,
    overlap_option,
    overwrite_option,
    preprocessing_of,
)

# The grid that all pictures of a scan lie on, whatever an encoder's own is.
SHOWN_ON = {**DEFAULT_INPUT, "orientation": "RAS", "resample": {"to": "spacing"}, "spacing": [2.0, 2.0, 2.0]}


@click.command("gallery")
@click.argument("models", metavar="[TAG]...", nargs=-1, shell_complete=complete_name)
@click.option(
    "--scan",
    "scans",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path, exists=True),
    help="A file or DICOM folder, repeatable.",
)
@file_option("--out", (".png",), "The picture.", required=True)
@overwrite_option
@click.option("--random-weights", is_flag=True, help="Leave the models untrained, to see what their grids alone do.")
@overlap_option
@machine_options
@json_option
@reports_errors
def gallery_command(
    models: tuple[str, ...],
    scans: tuple[Path, ...],
    out: Path,
    overwrite: bool,
    random_weights: bool,
    overlap: float,
    machine: Machine,
    as_json: bool,
) -> None:
    """Show the patch features of scans by several encoders: principal components as red, green and blue.

    A TAG is anything that --model of other commands takes: architecture.tag, the folder of a model or run,
    hf-hub:org/repo. Without one the encoders are those whose weights ship with the package. Each model gets the scan
    as its card prepares it, one at a time; all pictures lie on the scan at 2 mm.
    """
    keep_inputs(scans, [out])
    start = time.perf_counter()
    names = list(dict.fromkeys(models)) or _shipped()
    prepare = medgmae.create_transform(SHOWN_ON, whole=True)
    volumes = {_name(scan, scans): prepare(scan) for scan in scans}
    colours: dict[str, list[medgmae.Volume]] = {}
    for name in names:
        model, _ = open_model(ModelChoice(name, None, random_weights), machine)
        colours[name] = [
            medgmae.feature_colours(_features(model, scan, overlap), volume)
            for scan, volume in zip(scans, volumes.values(), strict=True)
        ]
    write_figure(medgmae.gallery_figure(volumes, colours), out, overwrite)
    facts = {
        "models": names,
        "scans": [shown(scan) for scan in scans],
        "out": shown(out),
        "seconds": round(time.perf_counter() - start, 3),
    }
    echo_result(facts, as_json, models=", ".join(names), scans=", ".join(map(shown, scans)))


def _shipped() -> list[str]:
    """Encoders whose weights are in the package."""
    tags = medgmae.list_weights("vit_*")
    return [tag for tag in tags if medgmae.weight_card(tag).availability == "package"]


def _name(scan: Path, scans: tuple[Path, ...]) -> str:
    """The file's name, or its path where another file has the same name."""
    alone = [one.name for one in scans].count(scan.name) == 1
    return shown(scan.name if alone else scan)


def _features(model: Any, scan: Path, overlap: float) -> Any:
    volume = preprocessing_of(model, InputChoice(None, {}))(scan)
    return medgmae.extract_features(model, volume, overlap=overlap, progress=None)
