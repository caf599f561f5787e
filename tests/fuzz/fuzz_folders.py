"""Hostile folders and tables of scans through the command line: every scan is a row, or is said to be none.

    python tests/fuzz/fuzz_folders.py --count 10000 --seed 0

Each case is a folder made by folder_trees.py and a run, or several, of ``medgmae features`` in a process of its own,
with limits of memory and time. What must come of it is known by how it was made: the rows with their ids, labels and
features, which are those of each scan read alone; what is skipped and what is an error; the exit code. The files that
are written are read by csv, safetensors and numpy. Run as root, some cases become a user from whom files are shut.
A crash, a hang, an exception that is not ours, a row too many, too few or wrong, and exit code 0 with a loss are
findings; the exit status is then 1. POSIX only.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 - sets the path and the number of threads
import numpy as np
import torch
from cli_runs import saved_nano
from folder_tables import Table, make_table
from folder_trees import Maker, Pool, Row, Tree

import medgmae
from medgmae.cli import main as medgmae_main
from medgmae.cli.options import DEFAULT_INPUT
from medgmae.data import path_of, shown

MEMORY = 4 << 30  # bytes that a case may take
SECONDS, PATIENCE = 10, 90.0  # of work, and of waiting on a machine that does other things too
NOBODY = 65534
KINDS = ("list", "run", "run", "strict", "series", "table", "table", "resume", "settings", "vanish", "change", "there")


class Finding(Exception):
    """What must not be."""


def expect(same: bool, what: str) -> None:
    if not same:
        raise Finding(what)


class Bench:
    """A model, sound scans, and the features of each, read alone."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder, self.model_name = folder, saved_nano(folder / "nano")
        (folder / "pool").mkdir()
        self.pool = Pool(folder / "pool")
        model = medgmae.create_model(self.model_name).eval()
        prepare = medgmae.create_transform({"channels": 1, **DEFAULT_INPUT, "resample": None}, whole=True)
        self.vectors = {}
        for key, (path, series) in self.pool.sources().items():
            scan = medgmae.read_volume(path, series=series)
            self.vectors[key] = medgmae.extract_features(model, prepare(scan)).pooled.numpy()
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)


class Run:
    """What came of one command: exit code, facts from stdout, and what was said on stderr."""

    def __init__(self, bench: Bench, case: Path, *args: str | Path) -> None:
        said = [case / "stdout", case / "stderr"]
        kept = [os.dup(1), os.dup(2)]
        for number, path in enumerate(said, 1):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
            os.close(handle)
        try:
            medgmae_main([os.fspath(arg) for arg in ("features", "--json", *args)], prog_name="medgmae")
            self.code: Any = 0
        except SystemExit as end:
            self.code = end.code
        except BaseException as error:
            self.code = f"{type(error).__name__}: {error} {traceback.format_exc()[-600:]}"
        finally:
            sys.stdout.flush()
            for number, handle in enumerate(kept, 1):
                os.dup2(handle, number)
        out, self.said = (path.read_bytes().decode() for path in said)
        expect(
            isinstance(self.code, int) and "Traceback" not in self.said, f"exit code {self.code}: {self.said[-600:]}"
        )
        self.facts: Any = json.loads(out) if out else None
        expect(self.facts is not None or self.code == 2 or "Error: " in self.said, f"nothing said: {self.said[-300:]}")


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The rows of a file of features, by an independent reader: name, path, series, labels, vector."""
    if out.suffix == ".csv":
        with out.open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file, strict=True))
        vectors = [[float(row.pop(f"f{i}")) for i in range(sum(k[0] == "f" and k[1:].isdigit() for k in row))]
                   for row in table]  # fmt: skip
        about = [{name: row.pop(name) or None for name in ("name", "path", "series")} for row in table]
        arrays = [np.array(vector, np.float32) for vector in vectors]
        return [{**a, "labels": b, "vector": c} for a, b, c in zip(about, table, arrays, strict=True)]
    if out.suffix == ".npy":
        facts, array = json.loads(out.with_suffix(".json").read_text()), np.load(out, allow_pickle=False)
        expect(facts["paths"] == [facts["scans"][name]["path"] for name in facts["names"]], "paths of the .json")
        vectors = dict(zip(facts["names"], array, strict=True))
    else:
        from safetensors import safe_open

        with safe_open(out, "np") as file:
            facts = json.loads(file.metadata()["medgmae"])
            vectors = {name: file.get_tensor(f"{name}/pooled") for name in facts["scans"]}
            maps = sum(name.endswith("/map") for name in file.keys())  # noqa: SIM118
            expect(maps == len(vectors) and len(list(file.keys())) == 2 * maps, "other tensors than said")
    return [{"name": name, "path": one["path"], "series": one.get("series"), "labels": one.get("labels", {}),
             "vector": vectors[name]} for name, one in facts["scans"].items()]  # fmt: skip


def check_rows(bench: Bench, out: Path, rows: list[Row]) -> None:
    """Raises unless the file has a row for each of these, with the features of the scan alone."""
    wanted = {(row.path, row.series): row.key for row in rows if row.key is not None}
    expect(bool(wanted) == out.exists(), f"the file is there: {out.exists()}, and {len(wanted)} rows are expected")
    written = rows_of(out) if wanted else []
    found = {(path_of(row["path"]), row["series"]): row for row in written}
    expect(len(found) == len(written) == len({row["name"] for row in written}), "rows of one name or scan")
    apart = sorted(map(str, found.keys() ^ wanted.keys()))
    expect(not apart, f"{len(found)} rows for {len(wanted)}: {apart[:4]}")
    for place, row in found.items():
        expect(np.array_equal(row["vector"], bench.vectors[wanted[place] or ""]), f"other features of {place}")


def check_said(tree: Tree, facts: Any, chosen: str | None = None) -> None:
    """Raises unless every file that is no row is skipped or an error, and nothing else is."""
    skipped = {path_of(one["path"]) for one in facts["skipped"]}
    wrong = {row.path for row in tree.rows if row.key is None}
    expected, failed = set(tree.skipped), tree.failed | wrong
    if chosen:  # series that were not chosen are skipped as such
        expected -= tree.of_series
        failed -= tree.of_series
    expect(expected <= skipped, f"not said: {sorted(map(str, expected - skipped))[:4]}")
    errors = {path_of(one["path"]) for one in facts["errors"]}
    expect(errors == failed, f"errors: {sorted(map(str, errors ^ failed))[:4]}")
    if not chosen:
        expect(skipped == expected, f"skipped: {sorted(map(str, skipped - expected))[:4]}")


def _replace(bench: Bench, rng: random.Random, row: Row) -> None:
    """Another scan in place of a file."""
    ending = (row.key or "")[:-1]
    number = (int((row.key or "")[-1]) + rng.randint(1, 3)) % 4
    bench.pool.place(ending, number, row.path)
    row.key = f"{ending}{number}"


def _hooked(call: int, action: Callable[[], None]) -> None:
    """Let something happen before scan number ``call`` goes through the model."""
    real, calls = medgmae.extract_features, []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == call:
            action()
        return real(*args, **options)

    medgmae.extract_features = counted


def _interrupted(bench: Bench, case: Path, call: int, *args: str | Path) -> None:
    """A run in a process of its own that ends at scan number ``call``, as if killed."""
    child = os.fork()
    if child == 0:
        try:
            _hooked(call, lambda: os._exit(9))
            Run(bench, case, *args)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    for path in case.glob("f.*"):  # it had fewer scans
        if path.is_file():
            path.unlink()


def folder_case(bench: Bench, rng: random.Random, case: Path, kind: str, closed: bool) -> None:
    """One folder, run in one way."""
    tree = Maker(rng, case, bench.pool, closed).make()
    out = case / f"f{rng.choice(('.csv', '.npy', '.safetensors'))}"
    command: list[str | Path] = ["--model", bench.model_name, "--out", out, "--", tree.top]
    lost = bool(tree.failed) or any(row.key is None for row in tree.rows)
    good = [row for row in tree.rows if row.key is not None]
    files = [row for row in good if row.series is None and not row.path.is_symlink()]
    if kind == "list":
        run = Run(bench, case, "--list", "--", tree.top)
        listed = {(path_of(row["path"]), row.get("series")) for row in run.facts["scans"]}
        wanted = {(row.path, row.series) for row in tree.rows}
        expect(listed == wanted, f"listed: {sorted(map(str, listed ^ wanted))[:4]}")
        expect(run.code == int(bool(tree.failed)), f"exit code {run.code}")
        return
    if kind == "series":
        chosen = [row.series for row in good if row.series]
        if chosen:
            uid = rng.choice(chosen)
            tree.rows = [row for row in tree.rows if row.series in (None, uid)]
            run = Run(bench, case, "--series", rng.choice((uid, f"{uid[:-1]}[{uid[-1]}]")), *command)
            check_rows(bench, out, tree.rows)
            check_said(tree, run.facts, uid)
            return
    if kind == "settings":
        _interrupted(bench, case, rng.randint(2, 3), "--overlap", "0", *command)
        if (kept := out.with_name(f"{out.name}.partial")).exists() and len(list(kept.glob("*.safetensors"))):
            expect(Run(bench, case, *command).code == 2 and not out.exists(), "results of other settings were mixed in")
        command.insert(0, "--overwrite")
    if kind == "resume":
        _interrupted(bench, case, rng.randint(2, 5), *command)
        kept = sorted(out.with_name(f"{out.name}.partial").glob("*.safetensors"))
        if kept:
            torn = rng.choice(kept)
            torn.write_bytes(rng.choice((b"", torn.read_bytes()[:-5], torn.read_bytes()[:9], b"\0" * 200)))
        for row in files[:2]:
            _replace(bench, rng, row)
    if kind == "there":
        out.write_text("mine")
        expect(Run(bench, case, *command).code == 2 and out.read_text() == "mine", "a file was replaced unasked")
        command.insert(0, "--overwrite")
    if kind in ("vanish", "change"):
        victim = rng.choice(files)
        _hooked(1, victim.path.unlink if kind == "vanish" else lambda: _replace(bench, rng, victim))
    if kind == "strict":
        command.insert(0, "--strict")
    run = Run(bench, case, *command)
    if kind == "vanish" or (kind == "change" and any(one["path"] == shown(victim.path) for one in run.facts["errors"])):
        victim.key = None
        lost = True
    check_rows(bench, out, tree.rows)
    check_said(tree, run.facts)
    complains = kind == "strict" and not all(tree.skipped.values())
    expect(run.code == int(lost or complains), f"exit code {run.code}, lost {lost}, strict {complains}")
    expect(not out.with_name(f"{out.name}.partial").exists(), "what is done with is left")


def table_case(bench: Bench, rng: random.Random, case: Path) -> None:
    """A table that names scans of a folder."""
    tree = Maker(rng, case, bench.pool, False).make()
    rows = [row for row in tree.rows if row.plain]
    table: Table = make_table(rng, case, rng.sample(rows, rng.randint(1, len(rows))))
    out = case / f"f{rng.choice(('.csv', '.npy', '.safetensors'))}"
    run = Run(bench, case, "--model", bench.model_name, "--out", out, "--", table.path)
    if table.wrong:
        expect(run.code == 2 and not out.exists(), f"{table.wrong}: exit code {run.code}")
        return
    wanted = {one.name: one for one in table.lines if one.row is not None and one.row.key is not None}
    lost = len(wanted) < len(table.lines)
    expect(run.code == int(lost), f"exit code {run.code}: {run.said[-300:]}")
    expect(out.exists() == bool(wanted), "a file, and no rows")
    expect(len(run.facts["errors"]) == len(table.lines) - len(wanted), f"errors: {run.facts['errors']}")
    order = list(wanted)
    for i, row in enumerate(rows_of(out) if wanted else []):
        expect(not table.ids or row["name"] == order[i], f"row {i} is {row['name']}, not {order[i]}")
        one = wanted.pop(order[i])
        expect(one.row is not None and np.array_equal(row["vector"], bench.vectors[one.row.key or ""]), "features")
        expect(row["labels"] == one.labels, f"labels {row['labels']} for {one.labels}")
        expect(one.row is not None and path_of(row["path"]).samefile(one.row.path), "another path")
    expect(not wanted, f"rows are missing: {list(wanted)[:3]}")


def _judge(bench: Bench, kind: str, seed: str, case: Path) -> str:
    rng = random.Random(seed)
    closed = rng.random() < 0.25
    if closed and os.getuid() == 0:
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    try:
        if kind == "table":
            table_case(bench, rng, case)
        else:
            folder_case(bench, rng, case, kind, closed)
    except Finding as error:
        return f"finding: {error}; said: {(case / 'stderr').read_text(errors='replace')[-500:]}"
    return "right"


def _run(bench: Bench, kind: str, seed: str, case: Path, pipe: int) -> None:
    """Judges a case in this process, which ends with it."""
    try:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        cpu = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (cpu + SECONDS, cpu + SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            verdict = _judge(bench, kind, seed, case)
        except BaseException:
            verdict = f"finding: {traceback.format_exc()[-1500:]}"
        os.write(pipe, verdict.encode("utf-8", "backslashreplace")[:4000])
    finally:
        os._exit(0)


def judged(bench: Bench, kind: str, seed: str, case: Path) -> str:
    """The verdict of a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _run(bench, kind, seed, case, writer)
    os.close(writer)
    ready = select.select([reader], [], [], PATIENCE)[0]
    verdict = os.read(reader, 4000).decode() if ready else "finding: hang"
    os.close(reader)
    if not ready:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return verdict or f"finding: {'hang' if code == -signal.SIGXCPU else f'crash: code {code}'}"


def fuzz(count: int, seed: int, keep: Path | None = None) -> tuple[Counter[str], list[str]]:
    """Outcomes of ``count`` cases by kind and verdict, and a line for every finding."""
    import logging

    outcomes: Counter[str] = Counter()
    bad: list[str] = []
    logging.getLogger("medgmae").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        for ending in ("csv", "safetensors"):  # what is imported at the first use is so before the processes part
            (first := Path(name) / ending).mkdir()
            (first / "t.csv").write_bytes(b"path\n../pool/0.nii\n".decode("utf-8-sig").encode())
            out = first / f"f.{ending}"
            for scans in (bench.folder / "pool", first / "t.csv"):
                Run(bench, first, "--model", bench.model_name, "--overwrite", "--out", out, scans)
            rows_of(out)
        gc.freeze()
        for number in range(count):
            kind, case = KINDS[number % len(KINDS)], Path(name) / f"case{number}"
            case.mkdir()
            case.chmod(0o777)
            verdict = judged(bench, kind, f"{seed}-{number}", case)
            outcomes[f"{kind} {verdict.split(':')[0]}"] += 1
            if verdict != "right":
                bad.append(f"case {number} of seed {seed} ({kind}): {verdict}")
                if keep is not None:
                    ignore = shutil.ignore_patterns("pipe")
                    shutil.copytree(case, keep / f"case{number}", symlinks=True, ignore=ignore, dirs_exist_ok=True)
            shutil.rmtree(case, ignore_errors=True)
    return outcomes, bad


def main(arguments: list[str] | None = None) -> int:
    """Runs the fuzzer; exit code 1 with findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options: Any = parser.parse_args(arguments)
    started = time.perf_counter()
    outcomes, bad = fuzz(options.count, options.seed)
    for line in [*(f"{key:24} {number}" for key, number in sorted(outcomes.items())), *bad]:
        sys.stdout.buffer.write(f"{line}\n".encode("utf-8", "backslashreplace"))
    sys.stdout.write(f"{options.count} cases, {len(bad)} findings, {time.perf_counter() - started:.0f} s\n")
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
