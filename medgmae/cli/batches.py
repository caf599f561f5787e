"""What commands over many scans share: which scans they read, and one after the other, what comes of each."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.common import echo_json, echo_table, is_reported, shown
from medgmae.cli.options import gathered


@dataclass(frozen=True)
class Scope:
    """Which scans are read, and what becomes of files that are not."""

    only_list: bool
    series: tuple[str, ...]
    strict: bool


scope_options = gathered(
    "scope",
    Scope,
    click.option("--list", "only_list", is_flag=True, help="Print what would be read, and do nothing else."),
    click.option(
        "--series",
        multiple=True,
        metavar="UID|PATTERN",
        help="Of DICOM, read series with this id or description, such as '*lung*'; may be repeated.",
    ),
    click.option("--strict", is_flag=True, help="Exit code 1 also where a file was skipped that may be a scan."),
)


def list_scans(
    arguments: Sequence[Path],
    contrasts: Sequence[str] | None = None,
    series: Sequence[str] = (),
    arrays: bool = False,
) -> medgmae.data.Listing:
    """What the arguments name; what cannot be a list of scans is a wrong use of the command."""
    try:
        return medgmae.data.list_scans(arguments, contrasts, series, arrays)
    except medgmae.VolumeError as error:
        raise click.UsageError(str(error)) from None


def show_listing(listing: medgmae.data.Listing, scope: Scope, as_json: bool) -> None:
    """Print what would be read, and on stderr what would not."""
    rows = [{"name": scan.name, **scan.described} for scan in listing.scans]
    if as_json:
        echo_json({"scans": rows, "errors": listing.errors, "skipped": listing.skipped})
    else:
        report_skipped(listing)
        columns = ["name", "path", "series", "description"]
        echo_table([columns, *([row.get(name, "") for name in columns] for row in rows)])
    leave(listing, scope)


def report_skipped(listing: medgmae.data.Listing) -> None:
    """Print on stderr what is skipped and what should have been read."""
    for line in _by_reason(listing.skipped):
        click.echo(line, err=True)
    for one in listing.errors:
        click.echo(f"Error: {one['error']}", err=True)


def leave(listing: medgmae.data.Listing, scope: Scope) -> None:
    """End with exit code 1 where not all was done."""
    if listing.errors or (scope.strict and listing.unexpected):
        sys.exit(1)


def for_each(listing: medgmae.data.Listing, work: Callable[[medgmae.data.Scan], Any]) -> dict[str, Any]:
    """What ``work`` gives for every scan, by its name; scans that fail are reported and left out."""
    from tqdm.auto import tqdm

    done = {}
    for scan in tqdm(listing.scans, desc="scans", unit="scan", disable=None):
        try:
            done[scan.name] = work(scan)
        except Exception as error:
            if not is_reported(error):
                raise
            listing.errors.append(failure(scan, error))
    return done


def failure(scan: medgmae.data.Scan, error: Exception) -> dict[str, str]:
    """What the results say of a scan that has failed; it is said on stderr, too."""
    from tqdm.auto import tqdm

    told = any(str(path) in str(error) for path in scan.paths)
    text = shown(str(error) if told else f"{scan.path}: {error}", keep="\n")
    with tqdm.external_write_mode(file=sys.stderr):  # not into the bar
        click.echo(f"Error: {text}", err=True)
    return {"path": shown(scan.path), "error": text}


def refuse_within(scans: Sequence[Path], out: Path) -> None:
    """Refuse a folder of results that lies in one that is searched for scans."""
    for one in scans:
        if one.is_dir() and out.resolve().is_relative_to(one.resolve()):
            raise click.UsageError(
                f"{shown(out)} lies in {shown(one)}, where the next run would take results for scans; choose another "
                "--out"
            )


def file_names(scans: Sequence[medgmae.data.Scan], reserved: str) -> list[str]:
    """A name for the files of each scan: its own with what could lead elsewhere, or trouble a file system, as "_".

    ``reserved`` begins the names of other files in the folder.
    """
    names: list[str] = []
    taken: set[str] = set()  # without upper case, which some file systems do not tell apart
    for scan in scans:
        plain = re.sub(r"[^\w.+#-]", "_", scan.name)[:100].strip(".") or "scan"
        plain = f"_{plain}" if plain.startswith(("-", reserved)) else plain
        number, unique = 1, plain
        while unique.casefold() in taken:
            number += 1
            unique = f"{plain}#{number}"
        names.append(unique)
        taken.add(unique.casefold())
    return names


def _by_reason(skipped: Sequence[dict[str, str]]) -> Iterator[str]:
    """One line per reason, with a few names."""
    by_reason: dict[str, list[str]] = {}
    for one in skipped:
        by_reason.setdefault(one["reason"], []).append(one["path"])
    for reason, paths in by_reason.items():
        more = f" and {len(paths) - 3} more" if paths[3:] else ""
        yield f"Skipped, {reason}: {', '.join(paths[:3])}{more}"
