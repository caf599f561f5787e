"""``medgmae slices``: scans as 2D images, and a table of where each of them comes from."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
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
from medgmae.cli.files import check_name, complete, refuse_existing
from medgmae.cli.journal import Journal, journal_of
from medgmae.cli.options import (
    DEFAULT_INPUT,
    InputChoice,
    gathered,
    input_options,
    json_option,
    overwrite_option,
    preprocessing,
)

MANIFEST = "slices.csv"
_CLAIMS = "folders"  # in the journal: the folders that this run has written or was about to
_INDICES = "all, middle, numbers such as 3,-1, or a range such as 10:50:2"


@dataclasses.dataclass(frozen=True)
class Cutting:
    """Which slices are written, and how."""

    plane: str
    index: str
    orientation: str
    kind: str
    bits: str
    labels: bool
    recipe: str | None


_DEFAULT = Cutting("axial", "all", "RAS", "png", "8", False, None)


def _index(ctx: click.Context, param: click.Parameter, text: str) -> str:
    if text not in ("all", "middle") and not re.fullmatch(r"-?\d+(,-?\d+)*|-?\d*:(-?\d*)(:-?[1-9]\d*)?", text):
        raise click.BadParameter(f"{text!r} is none of: {_INDICES}")
    return text


cutting_options = gathered(
    "how",
    Cutting,
    click.option(
        "--plane",
        type=click.Choice(["axial", "coronal", "sagittal", "stored"]),
        default="axial",
        help="'stored' is the first axis of the file as it is.",
    ),
    click.option("--index", callback=_index, default="all", metavar="WHICH", help=f"Which slices: {_INDICES}."),
    click.option(
        "--orientation",
        default="RAS",
        help="Sides towards which columns, rows and slices grow; LPI is as radiologists look at pictures.",
    ),
    click.option("--format", "kind", type=click.Choice(["png", "nii.gz"]), default="png", help="Of the slices' files."),
    click.option("--bits", type=click.Choice(["8", "16"]), default="8", help="Of a grey value in a PNG file."),
    click.option("--labels", is_flag=True, help="SCANS are label maps: their values are written as they are."),
    click.option(
        "--recipe",
        type=click.Choice(["selfmedmae_uva"]),
        help="As published: the middle of the first stored axis, stretched by itself to 8 bits, cut not rounded.",
    ),
)


@click.command("slices")
@click.argument("scans", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="The folder to write; it is made where missing."
)
@cutting_options
@overwrite_option
@scope_options
@input_options("the default")
@json_option
@reports_errors
def slices_command(
    scans: tuple[Path, ...],
    out: Path | None,
    how: Cutting,
    overwrite: bool,
    scope: Scope,
    inputs: InputChoice,
    as_json: bool,
) -> None:
    """Write slices of SCANS as images: files; folders, which are searched to their ends; one .txt list with a path per
    line; or one CSV file with a column "path", perhaps "id" and "series", and others that are carried into the results.

    By default intensities between the 0.5th and 99.5th percentile of each channel are mapped to 0..1, which a PNG file
    spreads over its grey values; --input window=[-175,250] says other bounds. Several channels (--input channels=4) get
    a PNG file each, and one NIfTI file.

    OUT/slices.csv has a row per file: the scan, plane, index, channel, and the geometry, by which
    medgmae.data.slices.to_volume puts predictions back into the volume.

    What is not a scan is skipped and said. A scan that cannot be read is reported and left out. What is done is kept
    after every scan: the same command goes on from there. Exit code 0: all are done; 1: some are not; 2: wrong usage.
    """
    prepare = _preprocessing(how, inputs)
    if scope.only_list:
        show_listing(list_scans(scans, prepare.input["contrasts"], scope.series), scope, as_json)
        return
    if out is None:
        raise click.UsageError("missing option '--out'")
    manifest = _checked_folder(scans, out, overwrite) / MANIFEST
    with journal_of(manifest) as journal:
        listing = list_scans(scans, prepare.input["contrasts"], scope.series)
        _check_columns(listing)
        report_skipped(listing)
        run = _Run(how, prepare, journal, overwrite)
        journal.begin(run.about(), overwrite)
        run.cut_all(listing)
        if run.done:
            _write_manifest(manifest, [row for rows in run.done.values() for row in rows], overwrite)
    if as_json:
        done = {name: {"slices": len(rows)} for name, rows in run.done.items()}
        where = shown(manifest) if run.done else None
        echo_json({"out": where, **run.about(), "scans": done, "errors": listing.errors, "skipped": listing.skipped})
    else:
        total, files = len(run.done) + len(listing.errors), sum(map(len, run.done.values()))
        told = f"{len(run.done)} of {total} scans, {files} files: {shown(manifest)}"
        click.echo(told if files else "nothing was written")
    leave(listing, scope)


def _preprocessing(how: Cutting, inputs: InputChoice) -> Any:
    """The preprocessing by a card or the default; label maps and the published recipe have none to change."""
    as_stored = "--labels" if how.labels else "--recipe" if how.recipe else ""
    if as_stored and (inputs.tag or inputs.changes):
        raise click.UsageError(f"{as_stored} reads scans as they are; leave out --input and --input-of")
    if how.labels and how.recipe:
        raise click.UsageError("--recipe is about intensities; leave out --labels")
    if how.recipe and dataclasses.replace(how, recipe=None) != _DEFAULT:
        raise click.UsageError("--recipe says which slice is written and how; leave out the other options about that")
    bounds: Any = DEFAULT_INPUT["window"]
    default = {**DEFAULT_INPUT, "window": {**bounds, "per": "channel"}}
    block = medgmae.weight_card(inputs.tag).input if inputs.tag else None
    return preprocessing(block or default, inputs.changes)


def _checked_folder(scans: Sequence[Path], out: Path, overwrite: bool) -> Path:
    """The folder to write, made where it is missing, after a check that its files are not searched for scans."""
    check_name(out)
    refuse_within(scans, out)
    refuse_existing(out / MANIFEST, overwrite)
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"{shown(out)} cannot be made: {error.strerror or error}") from error
    return out


def _check_columns(listing: medgmae.data.Listing) -> None:
    taken = {"name", *medgmae.data.slices.COLUMNS}
    for scan in listing.scans[:1]:
        if wrong := sorted(taken & set(scan.labels)):
            raise click.UsageError(f"{wrong[0]!r} is a column of the results; rename it in the table of scans")


class _Run:
    """Slices of one scan after the other. ``done``: the rows of the manifest by the scan's name."""

    def __init__(self, how: Cutting, prepare: Any, journal: Journal, overwrite: bool) -> None:
        self.how, self.prepare, self.journal, self.overwrite = how, prepare, journal, overwrite
        self.out = journal.out.parent
        self.done: dict[str, list[dict[str, str]]] = {}

    def about(self) -> dict[str, Any]:
        """What tells one run from another."""
        as_stored = self.how.labels or self.how.recipe
        block = None if as_stored else self.prepare.input
        return {"medgmae": medgmae.__version__, **dataclasses.asdict(self.how), "input": block}

    def cut_all(self, listing: medgmae.data.Listing) -> None:
        """Slices of every scan; scans that fail are reported and left out."""
        claims = self.journal.folder / _CLAIMS
        claimed = set(claims.read_text("utf-8").splitlines()) if claims.exists() else set()
        folders = dict(zip((scan.name for scan in listing.scans), file_names(listing.scans, MANIFEST), strict=True))

        def work(scan: medgmae.data.Scan) -> list[dict[str, str]]:
            folder, facts = folders[scan.name], self.journal.facts(scan)
            if facts is None or not all((self.out / row["file"]).exists() for row in facts["rows"]):
                self._refuse(folder, claimed)
                with claims.open("a", encoding="utf-8") as file:
                    file.write(f"{folder}\n")
                facts = self.journal.keep(scan, partial(self._cut, scan, folder))
            rows: list[dict[str, str]] = facts["rows"]
            return rows

        self.done = for_each(listing, work)

    def _refuse(self, folder: str, claimed: set[str]) -> None:
        """Raise FileExistsError for a folder that is not this run's, unless it may be replaced."""
        if os.path.lexists(self.out / folder) and folder not in claimed and not self.overwrite:
            raise FileExistsError(f"{shown(self.out / folder)} exists; --overwrite replaces it")

    def _cut(self, scan: medgmae.data.Scan, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write the slices of a scan to a folder, all of them or none; the rows of the manifest, and no tensors."""
        said = scan.described
        about = {"name": scan.name, "path": said["path"], "series": said.get("series", ""), **scan.labels}
        rows = []
        with tempfile.TemporaryDirectory(dir=self.out, prefix=".medgmae-") as name:
            place = Path(name) / folder
            place.mkdir()
            for index, one, plane in self._slices(scan):
                for channel, part in _files_of(one, self.how.kind):
                    number = "" if channel is None else f"_c{channel}"
                    file = f"{plane}_{index:04}{number}.{self.how.kind}"
                    self._write(part, place / file)
                    rows.append(
                        about | medgmae.data.slices.manifest_row(part, f"{folder}/{file}", plane, index, channel)
                    )
            target = self.out / folder
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            elif os.path.lexists(target):
                target.unlink()
            place.rename(target)
        return {"rows": rows}, {}

    def _slices(self, scan: medgmae.data.Scan) -> Iterator[tuple[int, medgmae.Volume, str]]:
        """Index, slice and plane of what is written of a scan."""
        if self.how.recipe:
            volume = scan.read(channels=1)
            yield volume.size[0] // 2, medgmae.data.slices.selfmedmae_uva(volume), "stored"
            return
        plane: Any = self.how.plane
        every = medgmae.data.slices.take(self._read(scan), plane, orientation=self.how.orientation)
        for index in _chosen(self.how.index, len(every), f"{scan.path}: {self.how.plane}"):
            yield index, every[index], plane

    def _read(self, scan: medgmae.data.Scan) -> medgmae.Volume:
        if self.how.labels:
            return _whole_numbers(scan.read(channels=1))
        channels = self.prepare.input["channels"]
        given: Any = scan.source if scan.series is None else scan.read(channels)
        volume: medgmae.Volume = self.prepare(given)
        return volume

    def _write(self, one: medgmae.Volume, file: Path) -> None:
        if self.how.kind == "png":
            medgmae.data.slices.write_png(one, file, bits=16 if self.how.bits == "16" else 8)
        else:
            medgmae.write_volume(one, file)
            read = medgmae.read_volume(file, channels=one.channels).data
            if read.shape != one.shape or not bool((read == one.data).all()):
                raise OSError("what was written reads back as something else")
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _whole_numbers(volume: medgmae.Volume) -> medgmae.Volume:
    """Labels as integers, also of a file that holds them as floats."""
    if not volume.data.is_floating_point():
        return volume
    whole = volume.data.int()
    if not bool((whole == volume.data).all()):
        raise medgmae.VolumeError(f"{volume.source}: the labels are not whole numbers; leave out --labels")
    return volume.with_data(whole)


def _files_of(one: medgmae.Volume, kind: str) -> list[tuple[int | None, medgmae.Volume]]:
    """What goes into a file each: of several channels one PNG per channel."""
    if kind != "png" or one.channels == 1:
        return [(None, one)]
    return [(k, one.with_data(one.data[k : k + 1])) for k in range(one.channels)]


def _chosen(text: str, count: int, what: str) -> list[int]:
    """The indices that an option names, of ``count`` slices."""
    if text == "middle":
        return [count // 2]
    if text == "all" or ":" in text:
        bounds = [None] if text == "all" else [int(part) if part else None for part in text.split(":")]
        found = list(range(count))[slice(*bounds)]
        if not found:
            raise ValueError(f"{what}: --index {text} is none of the {count} slices")
        return found
    numbers = [int(part) for part in text.split(",")]
    for number in numbers:
        if not -count <= number < count:
            raise ValueError(f"{what}: there is no slice {number}; expected {-count} to {count - 1}")
    return list(dict.fromkeys(number % count for number in numbers))


def _write_manifest(manifest: Path, rows: Sequence[dict[str, str]], overwrite: bool) -> None:
    """The table, which reads back as the same rows."""
    with complete(manifest, overwrite) as place:
        with place.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        with place.open(encoding="utf-8", newline="") as file:
            if list(csv.DictReader(file)) != list(rows):
                raise OSError("what was written reads back as something else")
