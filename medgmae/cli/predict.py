"""``medgmae predict``: what a fine-tuned run says of scans, as columns beside those of their table."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.batches import Scope, for_each, leave, list_scans, report_skipped
from medgmae.cli.common import reports_errors, shown
from medgmae.cli.files import check_name, complete, refuse_existing
from medgmae.cli.journal import Journal, journal_of, weights_digest
from medgmae.cli.options import Machine, machine_options, overwrite_option, use_threads


@click.command("predict")
@click.option(
    "--run",
    "runs",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder of medgmae finetune; repeated, or with folds, their predictions are averaged.",
)
@click.option(
    "--data", "data", multiple=True, required=True, type=click.Path(path_type=Path), help="A table, scans or folders."
)
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="A .csv file.")
@click.option("--batch-size", type=click.IntRange(1), default=1, help="Windows per pass.")
@click.option("--bf16", is_flag=True, help="Run the model under bfloat16 autocast.")
@click.option("--strict", is_flag=True, help="Exit code 1 also where a file was skipped that may be a scan.")
@overwrite_option
@machine_options
@reports_errors
def predict_command(
    runs: tuple[Path, ...],
    data: tuple[Path, ...],
    out: Path,
    batch_size: int,
    bf16: bool,
    strict: bool,
    overwrite: bool,
    machine: Machine,
) -> None:
    """Predict with a fine-tuned run for scans: files, folders, or one CSV table with a column "path".

    OUT has the rows and columns of the table in their order and, for every class or number, a column with its
    probability or value; "prediction" is the class with the largest probability. A row whose scan cannot be read keeps
    its place, with the reason in the column "error".

    What is done is kept after every scan: the same command goes on where a run ended. Exit code 0: all are done; 1:
    some are not; 2: wrong usage.
    """
    check_name(out)
    if out.suffix.lower() != ".csv":
        raise click.UsageError(f"--out {shown(out)} is not a .csv file; expected a name that ends in .csv")
    refuse_existing(out, overwrite)
    use_threads(machine.threads)
    predictor = medgmae.training.Predictor(runs, machine.device)
    listing = list_scans(data, predictor.input.get("contrasts"), arrays=True)
    report_skipped(listing)
    run = _Run(predictor, batch_size, bf16)
    with journal_of(out) as journal:
        journal.begin(run.about(), overwrite)
        done = for_each(listing, partial(run.predict, journal))
        table = data[0] if len(data) == 1 and data[0].suffix.lower() == ".csv" and data[0].is_file() else None
        text = run.table(table, listing, done)
        with complete(out, overwrite) as partial_file:
            partial_file.write_bytes(text.encode("utf-8"))
    total = len(done) + len(listing.errors)
    click.echo(f"{len(done)} of {total} scans: {shown(out)}")
    leave(listing, Scope(False, (), strict))


class _Run:
    """A predictor, and how scans go through it."""

    def __init__(self, predictor: Any, batch_size: int, bf16: bool) -> None:
        self.predictor, self.batch_size, self.bf16 = predictor, batch_size, bf16

    def about(self) -> dict[str, Any]:
        """What tells these predictions from others."""
        digests = [weights_digest(model) for model in self.predictor.models]
        return {
            "medgmae": medgmae.__version__,
            "weights": hashlib.sha256(json.dumps(digests).encode()).hexdigest(),
            "columns": self.predictor.columns,
            "input": self.predictor.input,
            "bf16": self.bf16,
        }

    def predict(self, journal: Journal, scan: medgmae.data.Scan) -> list[float]:
        """The predictions for a scan, from an earlier run or now."""
        facts = journal.facts(scan) or journal.keep(scan, partial(self._make, scan))
        values: list[float] = facts["values"]
        return values

    def _make(self, scan: medgmae.data.Scan) -> tuple[dict[str, Any], dict[str, Any]]:
        import torch

        given: Any = scan.source if scan.series is None else scan.read(self.predictor.input.get("channels"))
        autocast = torch.bfloat16 if self.bf16 else None
        values = self.predictor(given, batch_size=self.batch_size, autocast=autocast)
        return {"values": values.tolist()}, {"values": values}

    def table(self, source: Path | None, listing: medgmae.data.Listing, done: dict[str, Any]) -> str:
        """The rows of the source, or one for each scan, with the predictions beside them."""
        columns, rows = ["name", "path"], [[scan.name, shown(scan.path)] for scan in listing.scans]
        place_of = {scan.name: place for place, scan in enumerate(listing.scans)}
        said: dict[int, list[str]] = {}
        if source is not None:
            columns, *rows = medgmae.data.read_table(source)
            place_of = {scan.name: (scan.row or 0) - 2 for scan in listing.scans}
            said = {number - 2: self._reason(reason) for number, reason in listing.broken_rows.items()}
        added = [*self.predictor.columns, "prediction", "error"]
        if taken := sorted(set(added) & set(columns)):
            raise click.UsageError(f"the table has a column {taken[0]!r}, which is one of the predictions; rename it")
        reasons: dict[str, list[str]] = defaultdict(list)
        for one in listing.errors:
            reasons[one["path"]].append(one["error"])
        for scan in listing.scans:
            values = done.get(scan.name)
            reason = reasons[shown(scan.path)]
            said[place_of[scan.name]] = self._cells(values) if values else self._reason(reason.pop(0))
        lines = [[*row, *said[place]] for place, row in enumerate(rows)]
        if source is None:  # what could not even be listed has no row yet
            lines += [["", path, *self._reason(reason)] for path, left in reasons.items() for reason in left]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([[*columns, *added], *lines])
        return text.getvalue()

    def _reason(self, reason: str) -> list[str]:
        return [*[""] * (len(self.predictor.columns) + 1), reason]

    def _cells(self, values: list[float]) -> list[str]:
        import torch

        return [*(f"{value:.9g}" for value in values), self.predictor.best(torch.tensor(values)), ""]
