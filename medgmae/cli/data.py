"""``medgmae data``: a data set before it is used for training."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.batches import list_scans, report_skipped
from medgmae.cli.common import echo_json, echo_table, megabytes, reports_errors, shown
from medgmae.cli.files import write_figure
from medgmae.cli.options import file_option, json_option, overwrite_option, sizes

_MOST = 10  # names of a kind that are printed; --json has all


@click.group("data")
def data_group() -> None:
    """Look at the scans of a data set before they are used."""


@data_group.command("check")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@file_option("--png", [".png"], "A picture: how sizes, spacings and intensities are spread.")
@overwrite_option
@click.option("--headers", is_flag=True, help="Read headers only: faster, without intensities.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Processes that read at the same time; by default one for each core, where there are scans enough.",
)
@json_option
@reports_errors
def check_command(
    sources: tuple[Path, ...], png: Path | None, overwrite: bool, headers: bool, workers: int | None, as_json: bool
) -> None:
    """Read every scan of SOURCES and report sizes, spacings, orientations, types and intensities, what is there twice,
    what is worth a look, and each file that is broken.

    SOURCES are files; folders, which are searched to their ends for scan files, arrays (.npy, .npz) and DICOM; one .txt
    list with a path per line; or one CSV file with a column "path", or one for each contrast, path_t1, path_t2 ...

    Exit code 0: all can be read; 1: something is broken; 2: wrong usage.
    """
    listing = list_scans(sources, arrays=True)
    report_skipped(listing)
    report = medgmae.data.check_scans(listing, headers=headers, workers=workers or max(1, listing.processes))
    for one in report.errors[len(listing.errors) :]:
        click.echo(f"Error: {one['error']}", err=True)
    if png is not None and report.volumes:
        write_figure(medgmae.visualize.check_figure(report), png, overwrite)
    if as_json:
        echo_json(report.to_json())
    else:
        _print(report)
    if report.errors:
        sys.exit(1)


def _print(report: medgmae.data.CheckReport) -> None:
    volumes = report.volumes
    of = f" of {report.scans} cases" if len(volumes) > report.scans else ""
    size = megabytes(sum(one.bytes for one in volumes))
    click.echo(f"{len(volumes)} volumes{of} can be read, {size}; {len(report.errors)} broken")
    if not volumes:
        return
    spread = report.distribution
    rows = [("size, each of d, h, w", spread["size"]), ("spacing, mm", spread["spacing"])]
    rows += [(f"intensity, {name}", one) for name, one in (spread["intensities"] or {}).items()]
    click.echo()
    echo_table([["", "min", "median", "max"], *([name, *_cells(one)] for name, one in rows)])
    click.echo()
    for name, counts in (
        ("sizes", spread["size"]["counts"] or f"{spread['size']['distinct']} different ones"),
        ("spacings", spread["spacing"]["counts"] or f"{spread['spacing']['distinct']} different ones"),
        *((f"{name}s", spread[name]) for name in ("orientation", "dtype")),
        ("channels", spread["channels"]),
        ("notes", spread["notes"]),
    ):
        if counts:
            told = counts if isinstance(counts, str) else "; ".join(f"{value} ({n})" for value, n in counts.items())
            click.echo(f"{name}: {told}")
    same = {"files": "Same files", "voxels": "Same voxels in other files"}
    _some([f"{same[one.what]}: {', '.join(map(shown, one.names))}" for one in report.duplicates])
    _some([f"Worth a look: {one['path']}: {one['reason']}" for one in report.outliers])


def _cells(spread: Mapping[str, Any]) -> list[str]:
    return [" x ".join(f"{value:.6g}" for value in spread[name]) for name in ("min", "median", "max")]


def _some(lines: Sequence[str]) -> None:
    """Print lines after an empty one, or the first of many."""
    if lines:
        click.echo()
    for line in lines[:_MOST]:
        click.echo(line)
    if lines[_MOST:]:
        click.echo(f"and {len(lines) - _MOST} more; --json has all")


@data_group.command("prepare")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="The folder to write.")
@click.option("--recipe", metavar="NAME|FILE", help="Preprocessing and crops of this recipe of pre-training.")
@click.option("--tag", metavar="TAG", help="Preprocessing of this weight card instead.")
@click.option("--crop", callback=sizes(), help="Size of the crops to be read, such as 96. [the preprocessing's]")
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", help="Of the stored voxels.")
@click.option("--workers", type=click.IntRange(0), help="Processes. [one for each core, where there are scans enough]")
@click.option("--skip-broken", is_flag=True, help="Leave out scans that cannot be read, and count them.")
@json_option
@reports_errors
def prepare_command(
    sources: tuple[Path, ...],
    out: Path,
    recipe: str | None,
    tag: str | None,
    crop: Any,
    dtype: str,
    workers: int | None,
    skip_broken: bool,
    as_json: bool,
) -> None:
    """Prepare the scans of SOURCES once for pre-training: a compressed file of each in OUT, of which crops are read.

    "medgmae pretrain --data OUT" takes the folder. The same command goes on where a run ended. SOURCES are as for
    "medgmae data check".
    """
    if (recipe is None) == (tag is None):
        raise click.UsageError("expected --recipe or --tag, and one of them")
    block = medgmae.training.read_recipe(recipe).input_block if recipe else medgmae.weight_card(str(tag)).input or {}
    listing = list_scans(sources, block.get("contrasts"), arrays=True)
    report_skipped(listing)
    if not listing.scans or (listing.errors and not skip_broken):
        raise click.ClickException("nothing was prepared: --skip-broken leaves out what cannot be read")
    count = listing.processes if workers is None else workers
    folder = medgmae.data.prepare_scans(
        listing.scans, out, block, workers=count, skip_broken=skip_broken, dtype=dtype, crop=crop
    )
    size = sum(scan.bytes for scan in folder.scans)
    facts = {"folder": shown(out), "scans": len(folder.scans), "bytes": size, "broken": folder.broken}
    for path, error in folder.broken:
        click.echo(f"Error: {shown(path)}: {shown(error)}", err=True)
    if as_json:
        echo_json(facts)
    else:
        click.echo(f"{len(folder.scans)} scans, {megabytes(size)}: {shown(out)}")
    if folder.broken or listing.errors:
        sys.exit(1)
