"""The command: which scans, by which engine, kept where."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any

import click

import medgmae
from medgmae.cli.batches import Scope, failure, leave, list_scans, report_skipped, scope_options, show_listing
from medgmae.cli.common import echo_json, is_reported, reports_errors, shown
from medgmae.cli.features.extraction import Extraction, Extractor, Preparer, Result, extraction_options
from medgmae.cli.features.local import InTurn, Readers, attempt
from medgmae.cli.features.merge import merge_command
from medgmae.cli.features.parquet import require_pyarrow
from medgmae.cli.features.ray_engine import RayEngine
from medgmae.cli.features.schedule import results
from medgmae.cli.features.stores import FileStore, ShardStore, Store
from medgmae.cli.features.writers import check_out, sidecar
from medgmae.cli.files import keep_inputs
from medgmae.cli.journal import journal_of, key_of, state_of, weights_digest
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
    overwrite_option,
    preprocessing_of,
)


class _WithMerge(click.Command):
    """A command whose first argument may be the word "merge", which is another command."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of the one or the other."""
        if args[:1] == ["merge"]:
            return merge_command.make_context(f"{info_name} merge", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)


@dataclasses.dataclass(frozen=True)
class Engines:
    """What does the work, and which part of it this run does."""

    engine: str
    address: str | None
    workers: int | None
    shard: tuple[int, int] | None
    patient_id: bool


def _shard(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """``2/8`` as numbers."""
    if text is None:
        return None
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise click.BadParameter(
            f"{text!r} is not a part such as 1/8 or 8/8: its number from 1 on, and how many there are"
        )
    return int(number), int(of)


engine_options = gathered(
    "engines",
    Engines,
    click.option(
        "--engine", type=click.Choice(["local", "ray"]), default="local", help="Processes here, or a Ray cluster."
    ),
    click.option(
        "--address", help="Of the Ray cluster's head node, or 'auto'; without it, Ray is started on this machine."
    ),
    click.option(
        "--workers",
        type=click.IntRange(0),
        help="Local: processes that read ahead of the model, 0 for none; by default one for each core and four scans. "
        "Ray: actors, each with the model; by default as many as there is room for.",
    ),
    click.option(
        "--shard",
        callback=_shard,
        metavar="I/N",
        help='Do part I of N, every N-th scan; "medgmae features merge" joins the parts.',
    ),
    click.option("--patient-id", is_flag=True, help="Write the PatientID of DICOM, too."),
)


@click.command("features", cls=_WithMerge)
@click.argument("scans", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_options(required=False)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=check_out,
    help="A .safetensors, .parquet, .csv or .npy file; a name without an ending is a folder of Parquet tables.",
)
@overwrite_option
@scope_options
@engine_options
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
    engines: Engines,
    how: Extraction,
    inputs: InputChoice,
    machine: Machine,
    as_json: bool,
) -> None:
    """Compute features of SCANS: files; folders, which are searched to their ends for scan files and DICOM, where every
    series is a scan; one .txt list with a path per line; or one CSV file with a column "path", perhaps "id" and
    "series", and others that are carried into the results. For a model of several contrasts: 4-D files; folders with a
    file for each, such as a_t1.nii.gz, a_t2.nii.gz, a_t1ce.nii.gz and a_flair.nii.gz; or a CSV file with a column for
    each, path_t1, path_t2 and so on, instead of "path". "medgmae features merge" joins the parts of --shard.

    .safetensors: NAME/pooled (F,) and NAME/map (E, d, h, w) per scan, with geometry, model and preprocessing as JSON in
    the metadata entry "medgmae". .parquet, .csv and .npy: pooled vectors, one row per scan. Bytes of a name that are
    not UTF-8 are written as \\xNN.

    What is not a scan is skipped and said. A scan that cannot be read is reported and left out. What is done is kept in
    OUT.partial after every scan: the same command goes on from there. It also goes on from an OUT that is finished,
    unless that is a .csv: scans that are new or were changed are computed. Exit code 0: all are done; 1: some are not;
    2: wrong usage.
    """
    if scope.only_list:
        show_listing(_part(scans, contrasts_of(choice, inputs, machine), scope, engines).listing, scope, as_json)
        return
    if choice.name is None or out is None:
        raise click.UsageError(f"missing option '{'--out' if choice.name else '--model'}'")
    ending = out.suffix.lower()
    if ending in ("", ".parquet"):
        require_pyarrow()
    how = how.checked(ending != ".safetensors", ending or "a folder of Parquet tables")
    keep_inputs(scans, [out, sidecar(out)])
    with journal_of(out) as journal:
        # The model of a cluster is moved to a device where the work is done.
        here = dataclasses.replace(machine, device="cpu") if engines.engine == "ray" else machine
        model, weights = open_model(choice, here)
        extractor = Extractor(model, Preparer(preprocessing_of(model, inputs)), how)
        part = _part(scans, extractor.prepare.preprocessing.input["contrasts"], scope, engines)
        listing = part.listing
        report_skipped(listing)
        run = _Run(extractor, weights, engines, machine, part)
        journal.begin(run.about(), overwrite)
        kind = FileStore if ending else ShardStore
        store = kind(journal, listing.scans, run.described, run.about(), overwrite)
        run.extract_all(store)
        facts = {**run.about(), "listing": part.digest, "errors": listing.errors, "skipped": listing.skipped}
        rows = store.in_order()
        if rows:
            store.finish(facts)
    if as_json:
        said = {row.name: row.said for row in rows}
        echo_json({"out": shown(out) if rows else None, **facts, "scans": said, "speed": run.speed})
    else:
        total = len(rows) + len(listing.errors)
        click.echo(f"{len(rows)} of {total} scans: {shown(out)}" if rows else "nothing was written")
    leave(listing, scope)


@dataclasses.dataclass(frozen=True)
class _Part:
    """The scans of this run, the place of the first in the whole list and the step to the next, and a digest of that
    list."""

    listing: medgmae.data.Listing
    first: int
    step: int
    digest: str


def _part(scans: tuple[Path, ...], contrasts: Any, scope: Scope, engines: Engines) -> _Part:
    """All scans, or of N parts one: every N-th; what failed or was skipped is divided among the parts, too."""
    whole = list_scans(scans, contrasts, scope.series)
    number, of = engines.shard or (1, 1)
    mine = slice(number - 1, None, of)
    listing = medgmae.data.Listing(
        scans=whole.scans[mine],
        skipped=whole.skipped[mine],
        unexpected=whole.unexpected if number == 1 else 0,
        errors=whole.errors[mine],
    )
    keys = [f"{key_of(scan)} {scan.name}" for scan in whole.scans]
    return _Part(listing, number - 1, of, hashlib.sha256("\n".join(keys).encode()).hexdigest()[:24])


def _unless_changed(scan: medgmae.data.Scan, outcome: Result | Exception) -> Result | Exception:
    """The outcome, or an error where the scan has become another since it was read."""
    if isinstance(outcome, Exception) or attempt(lambda: state_of(scan)) == outcome.state:
        return outcome
    return OSError(f"{scan.path} was changed while it was read; expected it to stay as it is")


class _Run:
    """Features of scans, and what came of each."""

    def __init__(
        self,
        extractor: Extractor,
        weights: str,
        engines: Engines,
        machine: Machine,
        part: _Part,
    ) -> None:
        self.extractor, self.weights, self.engines, self.machine = extractor, weights, engines, machine
        self.listing = part.listing
        self.places = {scan.name: part.first + part.step * place for place, scan in enumerate(part.listing.scans)}
        self.speed: dict[str, float] = {}
        self.digest = weights_digest(extractor.model)

    def extract_all(self, store: Store) -> None:
        """Features of every scan into the store; scans that fail are reported and left out."""
        from tqdm.auto import tqdm

        scans = self.listing.scans
        todo = [scan for scan in scans if key_of(scan) not in store.rows]
        if len(todo) < len(scans):
            click.echo(f"{len(scans) - len(todo)} of {len(scans)} scans were done by an earlier run", err=True)
        if not todo:
            return
        errors: dict[int, dict[str, str]] = {}
        start = time.perf_counter()
        before = len(scans) - len(todo)
        bar = tqdm(total=len(scans), initial=before, desc="scans", unit="scan", disable=None)
        with self._engine(todo) as engine, bar:
            for number, outcome in results(engine, todo):
                outcome = _unless_changed(todo[number], outcome)
                if isinstance(outcome, Exception):
                    if not is_reported(outcome):
                        raise outcome
                    errors[number] = {"name": todo[number].name, **failure(todo[number], outcome)}
                else:
                    store.put(todo[number], outcome)
                bar.update()
            self.speed = {"seconds": time.perf_counter() - start, "model_waited": engine.waited}
        self.listing.errors += [errors[number] for number in sorted(errors)]

    def _engine(self, todo: list[medgmae.data.Scan]) -> InTurn | Readers | RayEngine:
        """What does the work."""
        engines = self.engines
        if engines.engine == "ray":
            return RayEngine(self.extractor, self.machine, engines.workers, engines.address)
        readers = medgmae.data.Listing(todo).processes if engines.workers is None else engines.workers
        return Readers(self.extractor, min(readers, len(todo))) if readers else InTurn(self.extractor)

    def described(self, scan: medgmae.data.Scan) -> dict[str, Any]:
        """What the results say of a scan; of a part of a run also its place, by which parts are joined."""
        said = scan.described
        if self.engines.patient_id and scan.patient is not None:
            said["patient"] = shown(scan.patient)
        return {**said, **({"place": self.places[scan.name]} if self.engines.shard else {})}

    def about(self) -> dict[str, Any]:
        """What a reader of the features needs to know, and what tells one run from another."""
        how, model = self.extractor.how, self.extractor.model
        return {
            "medgmae": medgmae.__version__,
            "architecture": model.config["architecture"],
            "model_args": model.config["model_args"],
            "weights": shown(self.weights),
            "digest": self.digest,
            "input": self.extractor.prepare.preprocessing.input,
            "window": how.window,
            "overlap": how.overlap,
            "resize": how.resize,
            "bf16": how.bf16,
            "pooled": how.pooled,
            "map": how.want_map,
            "shard": self.engines.shard,
            "geometry": "LPS world in mm = origin + direction @ (spacing * index), index along the map's axes",
        }
