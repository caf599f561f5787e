"""``medgmae score``: label maps against reference label maps of the same name, case by case."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.common import echo_json, echo_table, is_reported, reports_errors, shown
from medgmae.cli.files import complete
from medgmae.cli.options import file_option, json_option, overwrite_option

FIELDS = ("dice", "hd95", "surface_dice", "label_voxels", "predicted_voxels")


@click.command("score")
@click.argument("predictions", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("labels", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--classes", type=click.IntRange(2), required=True, help="Labels there are, with the background.")
@click.option("--names", help="Names of the classes, separated by commas, without or with the background.")
@click.option("--masks", is_flag=True, help="Files have a mask per channel instead of labels: --classes channels.")
@click.option("--tolerance", type=click.FloatRange(0), default=1.0, help="Of the surface Dice, in mm.")
@click.option("--voxels", is_flag=True, help="Distances in voxels instead of mm.")
@file_option("--out", (".csv",), "A row per case and class.", required=True)
@overwrite_option
@json_option
@reports_errors
def score_command(
    predictions: Path,
    labels: Path,
    classes: int,
    names: str | None,
    masks: bool,
    tolerance: float,
    voxels: bool,
    out: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Score the label maps in PREDICTIONS, such as "medgmae segment" writes them, by those of the same name in LABELS:
    Dice, 95th percentile of the Hausdorff distance and surface Dice of every class.

    Classes that a reference lacks have no score and are left out of means. A pair that cannot be scored is reported
    and left out. Exit code 0: all references were scored; 1: some were not; 2: wrong usage.
    """
    evaluation = medgmae.evaluation
    found, wanted = _files(predictions), _files(labels)
    if not wanted:
        raise click.UsageError(f"{shown(labels)} holds no label maps; expected files such as case1.nii.gz")
    called = _names(names, classes, masks)
    channels = classes if masks else None
    scores: dict[str, Any] = {}
    errors = []
    for name, label in wanted.items():
        try:
            if name not in found:
                raise ValueError(f"{shown(predictions)} has no prediction named {name}")
            scores[name] = evaluation.segmentation_metrics(
                medgmae.read_volume(found[name], channels=channels),
                medgmae.read_volume(label, channels=channels),
                classes=None if masks else classes,
                spacing="voxels" if voxels else None,
                tolerance=tolerance,
            )
        except Exception as error:
            if not is_reported(error):
                raise
            errors.append({"case": shown(name), "error": shown(f"{name}: {error}", keep="\n")})
            click.echo(f"Error: {errors[-1]['error']}", err=True)
    if not scores:
        raise click.ClickException("no case could be scored; nothing was written")
    rows = [{"case": shown(n), "class": c, **row} for n, one in scores.items() for c, row in _rows(one, called).items()]
    with complete(out, overwrite) as place, place.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["case", "class", *FIELDS])
        writer.writeheader()
        writer.writerows(rows)
    means = evaluation.mean_metrics(list(scores.values()))
    if as_json:
        finite = {name: value if math.isfinite(value) else None for name, value in means.items()}
        echo_json({"out": shown(out), "cases": len(scores), "mean": finite, "errors": errors})
    else:
        unit = "voxels" if voxels else "mm"
        echo_table(
            [["cases", "dice", f"hd95 ({unit})", "surface dice"], [f"{len(scores)}", *map(_number, means.values())]]
        )
    if errors:
        sys.exit(1)


def _files(folder: Path) -> dict[str, Path]:
    """Label maps in a folder, by their names without the ending."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = next((one for one in medgmae.data.SCAN_ENDINGS if path.name.lower().endswith(one)), None)
        if ending and not path.name.startswith("."):
            name = path.name[: -len(ending)]
            if name in files:
                raise click.UsageError(f"{shown(files[name])} and {shown(path)} have the same name; keep one of them")
            files[name] = path
    return files


def _names(text: str | None, classes: int, masks: bool) -> list[str]:
    """A name for each class that is scored."""
    first = 0 if masks else 1
    if text is None:
        return [f"class {k}" for k in range(first, classes)]
    names = [name.strip() for name in text.split(",")]
    if len(names) not in (classes, classes - first):
        raise click.BadParameter(f"{len(names)} names for {classes} classes", param_hint="--names")
    return names[len(names) - (classes - first) :]


def _rows(scores: Any, names: list[str]) -> Mapping[str, dict[str, Any]]:
    """The row of each class; empty where there is no score."""
    table = {field: getattr(scores, field).tolist() for field in FIELDS}
    return {name: {field: _cell(table[field][k]) for field in FIELDS} for k, name in enumerate(names)}


def _cell(value: float) -> float | str:
    return "" if math.isnan(value) else round(value, 6) if isinstance(value, float) else value


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
