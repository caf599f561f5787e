"""``medgmae features merge``: the parts of a run, which --shard divided, as one file or folder of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from medgmae.cli.common import echo_json, reports_errors, shown
from medgmae.cli.features import shards
from medgmae.cli.features.earlier import read_results
from medgmae.cli.features.parquet import require_pyarrow
from medgmae.cli.features.results import Finished, Row
from medgmae.cli.features.writers import check_out, sidecar, write_features
from medgmae.cli.files import keep_inputs, refuse_existing
from medgmae.cli.options import json_option, overwrite_option

# What results say beside what the run was.
_OUTCOME = ("scans", "errors", "skipped", "tables", "rows", "names", "paths", "shard")


@click.command("features merge")
@click.argument("parts", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    callback=check_out,
    help="A .safetensors, .parquet, .csv or .npy file, or a folder of Parquet tables.",
)
@overwrite_option
@json_option
@reports_errors
def merge_command(parts: tuple[Path, ...], out: Path, overwrite: bool, as_json: bool) -> None:
    """Join PARTS, all N results of "medgmae features --shard 1/N" to "N/N", in any order and of any format but .csv.

    Rows are in the order of a run that was not divided. Parts of different runs or lists of scans, a part that is
    missing and one that is there twice are refused. Exit code 0: all scans are done; 1: some had failed; 2: wrong
    usage.
    """
    if not out.suffix or out.suffix.lower() == ".parquet":
        require_pyarrow()
    keep_inputs(parts, [out, sidecar(out)])
    for path in (out, sidecar(out)):
        if path is not None:
            refuse_existing(path, overwrite)
    read = [(part, _read(part)) for part in parts]
    facts = _facts_of_all(read)
    rows = [_whole(row) for row in sorted((row for _, one in read for row in one.rows), key=_place)]
    if not rows:
        raise click.ClickException("no part has a scan that was done; nothing was written")
    _check_content(rows, facts, out.suffix.lower())
    if out.suffix:
        write_features(out, rows, facts, overwrite)
    else:
        _write_folder(out, rows, facts)
    failed = len(facts["errors"])
    if as_json:
        echo_json({"out": shown(out), **facts, "scans": {row.name: row.said for row in rows}})
    else:
        click.echo(f"{len(rows)} of {len(rows) + failed} scans: {shown(out)}")
    if failed:
        raise click.exceptions.Exit(1)


def _read(part: Path) -> Finished:
    found = read_results(part)
    if found is None:
        raise click.UsageError(
            f"{shown(part)} does not say what it is part of; expected results of medgmae features --shard, as "
            ".safetensors, .parquet, .npy with its .json, or a folder of tables"
        )
    if not found.facts.get("shard"):
        raise click.UsageError(f"{shown(part)} is no part: it was made without --shard")
    return found


def _facts_of_all(read: Sequence[tuple[Path, Finished]]) -> dict[str, Any]:
    """What the parts say of the run in common, with the errors of all.

    Raises:
        click.UsageError: they are not all the parts of one run.
    """
    first, one = read[0]
    common = {name: value for name, value in one.facts.items() if name not in _OUTCOME}
    of = one.facts["shard"][1]
    place: dict[int, tuple[Path, Finished]] = {}
    for part, found in read:
        other = {name: value for name, value in found.facts.items() if name not in _OUTCOME}
        if different := [name for name in {**common, **other} if common.get(name) != other.get(name)]:
            raise click.UsageError(
                f"{shown(first)} and {shown(part)} are of different runs: {', '.join(sorted(different))} "
                "differ(s); expected parts of one run over one list of scans"
            )
        number, count = found.facts["shard"]
        if count != of:
            raise click.UsageError(f"{shown(first)} is one of {of} parts and {shown(part)} one of {count}")
        if number in place:
            raise click.UsageError(f"{shown(place[number][0])} and {shown(part)} are both part {number} of {of}")
        place[number] = part, found
    if missing := [f"{number}/{of}" for number in range(1, of + 1) if number not in place]:
        more = f" and {len(missing) - 5} more" if missing[5:] else ""
        raise click.UsageError(f"part(s) {', '.join(missing[:5])}{more} are missing; expected all {of}")
    parts = [place[number][1].facts for number in sorted(place)]
    lists = {name: [entry for facts in parts for entry in facts[name]] for name in ("errors", "skipped")}
    return {**common, "shard": None, **lists}


def _place(row: Row) -> int:
    return int(row.said["place"])


def _whole(row: Row) -> Row:
    """A row without its place, which is that in the list of all."""
    return Row(row.name, {name: value for name, value in row.said.items() if name != "place"}, row.tensors)


def _check_content(rows: Sequence[Row], facts: Mapping[str, Any], ending: str) -> None:
    if ending != ".safetensors" and (facts["map"] or not facts["pooled"]):
        raise click.UsageError("the parts hold maps; expected --out to end in .safetensors")
    if len({row.said["key"] for row in rows}) < len(rows):
        raise click.UsageError("a scan is in several parts; expected each once")


def _write_folder(out: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    about = {name: value for name, value in facts.items() if name not in ("errors", "skipped")}
    tables = shards.write_tables(out, rows, facts["errors"], about, rows[0].said["features"])
    shards.write_index(out, tables, facts)
