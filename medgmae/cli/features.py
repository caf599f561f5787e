"""``medgmae features``: scans on disk to a file of features."""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.batches import Scope, for_each, leave, list_scans, report_skipped, scope_options, show_listing
from medgmae.cli.common import echo_json, reports_errors, shown
from medgmae.cli.files import keep_inputs, refuse_existing
from medgmae.cli.journal import Journal, journal_of, weights_digest
from medgmae.cli.options import (
    InputChoice,
    Machine,
    ModelChoice,
    contrasts_of,
    file_option,
    gathered,
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
from medgmae.cli.writers import SUFFIXES, sidecar, write_features


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
@model_options(required=False)
@file_option("--out", SUFFIXES, "A .safetensors, .csv or .npy file.")
@overwrite_option
@scope_options
@extraction_options
@input_options("the model's own")
@machine_options
@json_option
@reports_errors
def features_command(
    scans: tuple[Path, ...],
    choice: ModelChoice,
    out: Path | None,
    overwrite: bool,
    scope: Scope,
    how: Extraction,
    inputs: InputChoice,
    machine: Machine,
    as_json: bool,
) -> None:
    """Compute features of SCANS: files; folders, which are searched to their ends for scan files and DICOM, where every
    series is a scan; one .txt list with a path per line; or one CSV file with a column "path", perhaps "id" and
    "series", and others that are carried into the results. For a model of several contrasts: 4-D files; folders with a
    file for each, such as a_t1.nii.gz, a_t2.nii.gz, a_t1ce.nii.gz and a_flair.nii.gz; or a CSV file with a column for
    each, path_t1, path_t2 and so on, instead of "path".

    .safetensors: NAME/pooled (F,) and NAME/map (E, d, h, w) per scan, with geometry, model and preprocessing as JSON in
    the metadata entry "medgmae". .csv and .npy: pooled vectors, one row per scan. Bytes of a name that are not UTF-8
    are written as \\xNN.

    What is not a scan is skipped and said. A scan that cannot be read is reported and left out. What is done is kept in
    OUT.partial after every scan: the same command goes on from there. Exit code 0: all are done; 1: some are not; 2:
    wrong usage.
    """
    if scope.only_list:
        show_listing(list_scans(scans, contrasts_of(choice, inputs, machine), scope.series), scope, as_json)
        return
    if choice.name is None or out is None:
        raise click.UsageError(f"missing option '{'--out' if choice.name else '--model'}'")
    how = _checked(how, out.suffix.lower())
    keep_inputs(scans, [out, sidecar(out)])
    if beside := sidecar(out):
        refuse_existing(beside, overwrite)
    with journal_of(out) as journal:
        model, weights = open_model(choice, machine)
        run = _Run(model, preprocessing_of(model, inputs), how, weights)
        listing = list_scans(scans, run.preprocessing.input["contrasts"], scope.series)
        report_skipped(listing)
        parts = {"pooled": how.pooled, "map": how.want_map, "digest": weights_digest(model)}
        journal.begin({**run.about(), **parts}, overwrite)
        run.extract_all(listing, journal)
        facts = {**run.about(), "scans": run.done, "errors": listing.errors, "skipped": listing.skipped}
        if run.done:
            write_features(journal, [scan for scan in listing.scans if scan.name in run.done], facts, overwrite)
    if as_json:
        echo_json({"out": shown(out) if run.done else None, **facts})
    else:
        total = len(run.done) + len(listing.errors)
        click.echo(f"{len(run.done)} of {total} scans: {shown(out)}" if run.done else "nothing was written")
    leave(listing, scope)


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


class _Run:
    """Features of one scan after the other, and what came of each."""

    def __init__(self, model: Any, preprocessing: Any, how: Extraction, weights: str) -> None:
        self.model, self.preprocessing, self.how, self.weights = model, preprocessing, how, weights
        self.done: dict[str, dict[str, Any]] = {}

    def extract_all(self, listing: medgmae.data.Listing, journal: Journal) -> None:
        """Features of every scan into the journal; scans that fail are reported and left out."""
        before = {scan.name: facts for scan in listing.scans if (facts := journal.facts(scan)) is not None}
        if before:
            click.echo(f"{len(before)} of {len(listing.scans)} scans were done by an earlier run", err=True)

        def work(scan: medgmae.data.Scan) -> dict[str, Any]:
            facts = before.get(scan.name) or journal.keep(scan, partial(self._extract, scan))
            return {**scan.described, **facts}

        self.done = for_each(listing, work)

    def _extract(self, scan: medgmae.data.Scan) -> tuple[dict[str, Any], dict[str, Any]]:
        """Facts and tensors of a scan."""
        import torch

        start = time.perf_counter()
        block = self.preprocessing.input
        given: Any = scan.source if scan.series is None else scan.read(block["channels"])
        features = medgmae.extract_features(
            self.model,
            self.preprocessing(given),
            window=None if self.how.window == "whole" else self.how.window,
            overlap=self.how.overlap,
            resize=self.how.resize,
            outside=block["pad"],
            want_map=bool(self.how.want_map),
            batch_size=self.how.batch_size,
            autocast=torch.bfloat16 if self.how.bf16 else None,
        )
        tensors = {"pooled": features.pooled} if self.how.pooled else {}
        facts: dict[str, Any] = {"features": len(features.pooled), "map": None}
        if features.map is not None:
            tensors["map"], facts["map"] = features.map.data, geometry(features.map)
        return {**facts, "seconds": round(time.perf_counter() - start, 3)}, tensors

    def about(self) -> dict[str, Any]:
        """What a reader of the features needs to know, and what tells one run from another."""
        return {
            "medgmae": medgmae.__version__,
            "architecture": self.model.config["architecture"],
            "model_args": self.model.config["model_args"],
            "weights": shown(self.weights),
            "input": self.preprocessing.input,
            "window": self.how.window,
            "overlap": self.how.overlap,
            "resize": self.how.resize,
            "bf16": self.how.bf16,
            "geometry": "LPS world in mm = origin + direction @ (spacing * index), index along the map's axes",
        }


def geometry(volume: medgmae.Volume) -> dict[str, Any]:
    """Size, spacing, origin and direction of a volume; direction as rows."""
    return {
        "shape": list(volume.data.shape),
        "spacing": list(volume.spacing),
        "origin": list(volume.origin),
        "direction": [[float(value) for value in row] for row in volume.direction],
    }
