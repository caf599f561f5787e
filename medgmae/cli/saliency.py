"""``medgmae saliency``: what in scans a model goes by, as volumes and as pictures."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click

import medgmae
from medgmae.cli.batches import (
    Scope,
    file_names,
    for_each,
    leave,
    list_scans,
    refuse_within,
    report_skipped,
    scope_options,
    show_listing,
)
from medgmae.cli.common import echo_json, reports_errors, shown
from medgmae.cli.files import check_name, keep_inputs, refuse_existing, write_figure, write_volume
from medgmae.cli.options import (
    InputChoice,
    Machine,
    ModelChoice,
    contrasts_of,
    input_options,
    json_option,
    machine_options,
    model_options,
    open_model,
    overlap_option,
    overwrite_option,
    preprocessing_of,
    sizes,
)


@click.command("saliency")
@click.argument("scans", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_options()
@click.option(
    "--method",
    type=click.Choice(["rollout", "gradient", "latent"]),
    required=True,
    help="Attention rollout, of ViTs; Grad-CAM on tokens, of models with a head; the latent map.",
)
@click.option("--output", metavar="NAME|NUMBER", help="Which output --method gradient explains. [each scan's largest]")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="A folder; it is made if need be.")
@click.option("--png", is_flag=True, help="Write a picture of each scan: the map on three planes.")
@overwrite_option
@scope_options
@click.option(
    "--window",
    callback=sizes("model", "whole"),
    metavar="N|D,H,W|model|whole",
    help="Voxels that the model sees at once. [of a classifier its input's size, else the size it was built for]",
)
@overlap_option
@click.option(
    "--upsampling",
    type=click.Choice(["block", "linear"]),
    default="block",
    help="From patches to voxels: one value per patch, or smooth.",
)
@input_options("the model's own")
@machine_options
@json_option
@reports_errors
def saliency_command(
    scans: tuple[Path, ...],
    choice: ModelChoice,
    method: Literal["rollout", "gradient", "latent"],
    output: str | None,
    out: Path | None,
    png: bool,
    overwrite: bool,
    scope: Scope,
    window: Any,
    overlap: float,
    upsampling: Literal["block", "linear"],
    inputs: InputChoice,
    machine: Machine,
    as_json: bool,
) -> None:
    """Map each of SCANS to one number per patch: how much it counts for a model, or for one of its outputs.

    SCANS are files; folders, which are searched to their ends; one .txt list with a path per line; or one CSV file with
    a column "path", as for "medgmae features". OUT/NAME.nii.gz is the map of a scan, on the grid of the prepared scan:
    of a classifier the part that it sees, of an encoder all of it.
    """
    if scope.only_list:
        show_listing(list_scans(scans, contrasts_of(choice, inputs, machine), scope.series), scope, as_json)
        return
    if out is None:
        raise click.UsageError("missing option '--out'")
    if png and importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("--png needs matplotlib, which is not installed: pip install medgmae[viz]")
    check_name(out)
    refuse_within(scans, out)
    model, weights = open_model(choice, machine)
    classifies = bool(getattr(model, "num_classes", 0))
    prepare = preprocessing_of(model, inputs, whole=not classifies)
    size = prepare.input["size"] if classifies else None
    window = {None: tuple(size) if size else "model", "whole": None}.get(window, window)
    listing = list_scans(scans, prepare.input["contrasts"], scope.series)
    report_skipped(listing)
    names = file_names(listing.scans, "-")
    files = {scan.name: out / f"{name}.nii.gz" for scan, name in zip(listing.scans, names, strict=True)}
    _check_files(listing, list(files.values()), overwrite)
    out.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "method": method,
        "output": _output(model, output),
        "window": window,
        "overlap": overlap,
        "outside": prepare.pad,
        "upsampling": upsampling,
    }

    def work(scan: medgmae.data.Scan) -> dict[str, Any]:
        start = time.perf_counter()
        given: Any = scan.source if scan.series is None else scan.read(prepare.input["channels"])
        volume = prepare(given)
        found = medgmae.saliency_map(model, volume, **options, progress=False)
        if png:
            figure = medgmae.latent_map_figure(volume, found, title=shown(scan.name), name=method)
            write_figure(figure, files[scan.name].with_name(files[scan.name].name[:-7] + ".png"), overwrite)
        write_volume(found, files[scan.name], overwrite)
        return {
            "file": shown(files[scan.name].name),
            "least": float(found.data.min()),
            "largest": float(found.data.max()),
            "seconds": round(time.perf_counter() - start, 3),
        }

    done = for_each(listing, work)
    facts = {"out": shown(out), "architecture": model.config["architecture"], "weights": weights, **options}
    facts |= {"input": prepare.input, "scans": done, "errors": listing.errors, "skipped": listing.skipped}
    if as_json:
        echo_json(facts)
    else:
        click.echo(f"{len(done)} of {len(done) + len(listing.errors)} scans: {shown(out)}")
    leave(listing, scope)


def _output(model: Any, text: str | None) -> int | str | None:
    """An output by its name, which may look like a number, or else by its number."""
    if text is None or text in (getattr(model, "label_names", None) or ()) or not text.isdecimal():
        return text
    return int(text)


def _check_files(listing: medgmae.data.Listing, maps: Sequence[Path], overwrite: bool) -> None:
    pictures = [path.with_name(path.name[:-7] + ".png") for path in maps]
    keep_inputs([path for scan in listing.scans for path in scan.paths], [*maps, *pictures])
    for path in (*maps, *pictures):
        refuse_existing(path, overwrite)
