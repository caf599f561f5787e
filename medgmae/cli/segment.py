"""``medgmae segment``: scans on disk to label maps, volumes of the classes and pictures."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
from medgmae.cli.files import check_name, complete, keep_inputs, refuse_existing, write_figure, write_volume
from medgmae.cli.journal import Journal, journal_of, weights_digest
from medgmae.cli.options import (
    InputChoice,
    Machine,
    ModelChoice,
    contrasts_of,
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

# What --format says, and how the files end.
FORMATS = {"nii.gz": ".nii.gz", "nrrd": ".nrrd", "mha": ".mha", "dicom-seg": ".seg.dcm"}


@dataclass(frozen=True)
class Reading:
    """How scans go through the model."""

    window: Any
    overlap: float
    mirror: bool
    multilabel: bool
    batch_size: int
    bf16: bool


reading_options = gathered(
    "how",
    Reading,
    click.option(
        "--window",
        callback=sizes("model"),
        metavar="N|D,H,W",
        default="model",
        help="Voxels that the model sees at once: 'model' for the size it was built for.",
    ),
    overlap_option,
    click.option("--mirror", is_flag=True, help="Average over flips along all axes: eight times the work."),
    click.option(
        "--multilabel", is_flag=True, help="Each output is a mask of its own, which may overlap others (sigmoid)."
    ),
    click.option("--batch-size", type=click.IntRange(1), default=1, help="Windows per pass."),
    click.option("--bf16", is_flag=True, help="Run the model under bfloat16 autocast."),
)


@click.command("segment")
@click.argument("scans", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_options()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="A folder; it is made if need be.")
@click.option("--format", "kind", type=click.Choice(list(FORMATS)), default="nii.gz", help="Of the label maps.")
@click.option("--png", is_flag=True, help="Write a picture of each scan: classes on three planes.")
@overwrite_option
@scope_options
@reading_options
@input_options("the model's own")
@machine_options
@json_option
@reports_errors
def segment_command(
    scans: tuple[Path, ...],
    choice: ModelChoice,
    out: Path | None,
    kind: str,
    png: bool,
    overwrite: bool,
    scope: Scope,
    how: Reading,
    inputs: InputChoice,
    machine: Machine,
    as_json: bool,
) -> None:
    """Segment SCANS: files; folders, which are searched to their ends for scan files and DICOM, where every series is a
    scan; one .txt list with a path per line; or one CSV file with a column "path", as for "medgmae features".

    OUT/NAME.nii.gz is the label map of a scan on the scan's own grid, 0 for the first class; with --multilabel one
    channel per class. Labels come from the prepared scan by the nearest voxel. OUT/volumes.csv and OUT/volumes.json
    hold the volume of every class in ml. "dicom-seg" is for DICOM series and needs medgmae[dicom].

    What is done is kept after every scan: the same command goes on where a run ended. A scan that cannot be read is
    reported and left out. Exit code 0: all are done; 1: some are not; 2: wrong usage.
    """
    if scope.only_list:
        show_listing(list_scans(scans, contrasts_of(choice, inputs, machine), scope.series), scope, as_json)
        return
    if out is None:
        raise click.UsageError("missing option '--out'")
    check_name(out)
    refuse_within(scans, out)
    out.mkdir(parents=True, exist_ok=True)
    table = out / "volumes.json"
    for path in (table, table.with_suffix(".csv")):
        refuse_existing(path, overwrite)
    with journal_of(table) as journal:
        model, weights = open_model(choice, machine)
        _check_model(model, choice.name)
        run = _Run(model, preprocessing_of(model, inputs), how, weights, out, kind, png)
        listing = list_scans(scans, run.preprocessing.input["contrasts"], scope.series)
        report_skipped(listing)
        journal.begin({**run.about(), "digest": weights_digest(model)}, overwrite)
        run.segment_all(listing, journal, overwrite)
        facts = {**run.about(), "scans": run.done, "errors": listing.errors, "skipped": listing.skipped}
        if run.done:
            _write_tables(table, facts, overwrite)
    if as_json:
        echo_json({"out": shown(out) if run.done else None, **facts})
    else:
        total = len(run.done) + len(listing.errors)
        click.echo(f"{len(run.done)} of {total} scans: {shown(out)}" if run.done else "nothing was written")
    leave(listing, scope)


def _check_model(model: Any, name: str) -> None:
    if getattr(model, "TASK", "") != "image-segmentation":
        raise click.BadParameter(
            f"{name} is a {type(model).__name__}, which says nothing of single voxels; expected a model that "
            "segments, unetr_...",
            param_hint="--model",
        )
    if len(model.img_size) != 3 or getattr(model, "slice_axis", None) is not None:
        raise click.BadParameter(f"{name} segments single slices; expected a model of volumes", param_hint="--model")


class _Run:
    """Label maps of one scan after the other, and what came of each."""

    def __init__(
        self, model: Any, preprocessing: Any, how: Reading, weights: str, out: Path, kind: str, png: bool
    ) -> None:
        self.model, self.preprocessing, self.how, self.weights = model, preprocessing, how, weights
        self.out, self.kind, self.png = out, kind, png
        self.names = class_names(model)
        self.done: dict[str, dict[str, Any]] = {}

    def segment_all(self, listing: medgmae.data.Listing, journal: Journal, overwrite: bool) -> None:
        """Label maps of all scans; scans that fail are reported and left out."""
        files = self._files(listing.scans)
        before = {scan.name: facts for scan in listing.scans if (facts := journal.facts(scan)) is not None}
        before = {name: facts for name, facts in before.items() if all(path.exists() for path in files[name])}
        keep_inputs(
            [path for scan in listing.scans for path in scan.paths],
            [path for paths in files.values() for path in paths],
        )
        for path in (path for name, paths in files.items() if name not in before for path in paths):
            refuse_existing(path, overwrite)
        if before:
            click.echo(f"{len(before)} of {len(listing.scans)} scans were done by an earlier run", err=True)

        def work(scan: medgmae.data.Scan) -> dict[str, Any]:
            facts = before.get(scan.name) or journal.keep(
                scan, partial(self._segment, scan, files[scan.name], overwrite)
            )
            return {**scan.described, **facts}

        self.done = for_each(listing, work)

    def _files(self, scans: Sequence[medgmae.data.Scan]) -> dict[str, list[Path]]:
        """What is written of each scan, by its name: the label map and the picture."""
        endings = [FORMATS[self.kind], *([".png"] * self.png)]
        names = zip(scans, file_names(scans, "volumes"), strict=True)
        return {scan.name: [self.out / f"{name}{ending}" for ending in endings] for scan, name in names}

    def _segment(
        self, scan: medgmae.data.Scan, files: Sequence[Path], overwrite: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write the files of a scan; returns the facts about it, and no tensors."""
        import torch

        start = time.perf_counter()
        block = self.preprocessing.input
        if self.kind == "dicom-seg" and scan.series is None:
            raise ValueError(f"{scan.path}: is not a DICOM series, of which dicom-seg is made; choose another --format")
        given, source = self._read(scan, block)
        result = medgmae.segment_scan(
            self.model,
            self.preprocessing(given),
            multilabel=self.how.multilabel,
            like=source.grid,
            window=self.how.window,
            overlap=self.how.overlap,
            mirror=self.how.mirror,
            outside=block["pad"],
            batch_size=self.how.batch_size,
            autocast=torch.bfloat16 if self.how.bf16 else None,
        )
        if self.kind == "dicom-seg":
            with complete(files[0], overwrite) as place:
                medgmae.data.write_dicom_seg(result.labels, scan.path, place, self._segments(), series=scan.series)
        else:
            write_volume(result.labels, files[0], overwrite)
        if self.png:
            figure = medgmae.segmentation_figure(source, result.labels, names=self.names, title=shown(scan.name))
            write_figure(figure, files[1], overwrite)
        seconds = round(time.perf_counter() - start, 3)
        return {
            "file": shown(files[0].name),
            "classes": self._volumes(result.labels),
            "seconds": seconds,
        }, {}

    def _read(self, scan: medgmae.data.Scan, block: Mapping[str, Any]) -> tuple[Any, medgmae.Volume]:
        """What the preprocessing takes, in memory, and the volume on whose grid the labels are written."""
        if scan.contrasts is not None:  # paths, of which the preprocessing looks at the names
            first = next(iter(block["contrasts"] or scan.contrasts))
            return scan.contrasts, medgmae.read_volume(scan.contrasts.get(first, scan.path), channels=1)
        if block["contrasts"] and scan.series is None and scan.path.is_dir():
            files = medgmae.data.find_contrasts(scan.path, block["contrasts"])
            case = {name: medgmae.read_volume(files[name], channels=1) for name in block["contrasts"]}
            return case, case[block["contrasts"][0]]
        volume = scan.read(block["channels"])
        return volume, volume

    def _segments(self) -> list[str]:
        """Names of what a label map holds beside background."""
        return self.names if self.how.multilabel else self.names[1:]

    def _volumes(self, labels: medgmae.Volume) -> list[dict[str, Any]]:
        """Of each class: its label or channel, name, voxels and millilitres."""
        import torch

        ml = labels.spacing[0] * labels.spacing[1] * labels.spacing[2] / 1000
        if self.how.multilabel:
            counts = [int(mask.sum()) for mask in labels.data]
        else:
            counts = torch.bincount(labels.data.flatten(), minlength=len(self.names)).tolist()
        rows = zip(range(len(self.names)), self.names, counts, strict=True)
        first = 0 if self.how.multilabel else 1  # background is no organ
        return [{"label": k, "name": name, "voxels": n, "ml": round(n * ml, 4)} for k, name, n in rows if k >= first]

    def about(self) -> dict[str, Any]:
        """What a reader of the label maps needs to know, and what tells one run from another."""
        return {
            "medgmae": medgmae.__version__,
            "architecture": self.model.config["architecture"],
            "model_args": self.model.config["model_args"],
            "weights": shown(self.weights),
            "input": self.preprocessing.input,
            "window": self.how.window,
            "overlap": self.how.overlap,
            "mirror": self.how.mirror,
            "multilabel": self.how.multilabel,
            "bf16": self.how.bf16,
            "format": self.kind,
            "png": self.png,
            "names": self.names,
        }


def class_names(model: Any) -> list[str]:
    """Names of the model's classes; "class 1" and so on where it has none."""
    return list(model.label_names or (f"class {k}" for k in range(model.num_classes)))


def _write_tables(table: Path, facts: Mapping[str, Any], overwrite: bool) -> None:
    """volumes.json with everything, volumes.csv with a row per scan and class."""
    with complete(table, overwrite) as place:
        with place.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["name", "path", "series", "file", "label", "class", "voxels", "ml"])
            for name, one in facts["scans"].items():
                for k in one["classes"]:
                    place_of = [name, one["path"], one.get("series", ""), one["file"]]
                    rows.writerow([*place_of, k["label"], k["name"], k["voxels"], k["ml"]])
        place.write_text(json.dumps(facts, indent=2, allow_nan=False), encoding="utf-8")
