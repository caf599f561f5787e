"""What pre-training is worth on labels of real anatomy: fine-tuning from the demonstration weights against random ones.

    python benchmarks/finetune.py [--seeds 3] [--work build/finetune] [--threads 1]
    python benchmarks/finetune.py --table       # of docs/finetune.md, from the results that there are

The data set is that of examples/anatomy_labels.py. Each run is one command, ``medgmae finetune`` with the five folds of
the table, and both starts have the same one but for where the weights come from. A seed decides the order of the cases,
their augmentation, the head and the random weights; places and folds stay. Results are written after every run, and the
same command goes on where it was ended.

Metrics are of all cases, each by the model that has not seen its cell. Beside the heights is the error of who always
says the mean of the cases learned from.

The demonstration weights have seen these very scans, the parts tested included, though without labels.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from renderer import cpu_name

from medgmae.cli import main as medgmae

HERE = Path(__file__).parent
RESULT = HERE / "results/finetune.json"
TAG = "vit_tiny_patch8_64.demo"
STARTS = {
    "demo": ["--model", TAG],
    "random": ["--model", TAG.partition(".")[0], "--input-of", TAG, "--recipe", "quick"],
}
FLIP = ["--set", "augmentation.flip=[0.0, 0.0, 0.5]"]  # left for right
TASKS = {
    "region": ["--label", "region"],
    "aorta": ["--label", "aorta", "--multilabel", *FLIP],
    "height": ["--task", "regress", "--label", "height", *FLIP],
}
TABLES = {"region": "cases.csv", "aorta": "aorta.csv", "height": "cases.csv"}
METRICS = {"region": ("accuracy", "auc"), "aorta": ("auc", "brier"), "height": ("mae", "r2")}
SAME = [
    *("--folds", "5", "--fold-column", "fold", "--group", "cell", "--set", "view.size=[32, 32, 32]"),
    *("--steps", "80", "--batch-size", "8", "--lr", "1e-3", "--set", "training.layer_decay=0.9"),
    *("--precision", "bf16", "--device", "cpu", "--checkpoint-every", "80", "--keep", "1"),
]


def one_run(task: str, start: str, seed: int, data: Path, work: Path, threads: int) -> dict[str, Any]:
    """A run of five folds, or the rest of one that was ended: its metrics, and seconds where it was not."""
    out, prepared = work / f"{task}_{start}_{seed}", work / f"prepared_{data.stem}"
    place = ["--prepared", str(prepared), "--threads", str(threads)]
    begin, fresh = time.perf_counter(), not out.exists()
    if not (out / "metrics.json").exists():
        options = [*STARTS[start], *TASKS[task], *SAME, "--seed", str(seed), "--data", str(data)]
        if not fresh:
            kept = ("--device", "cpu", "--checkpoint-every", "80", "--keep", "1")
            options = ["--resume", "--data", str(data), *kept]
        code = medgmae(["finetune", *options, "--out", str(out), *place], standalone_mode=False)
        if code:  # it was asked to stop, and has saved its state
            raise SystemExit(code)
        for folder in out.glob("fold_*"):  # 150 MB each
            shutil.rmtree(folder)
    pooled = json.loads((out / "metrics.json").read_text())["pooled"]
    found = {name: pooled[name]["value"] for name in METRICS[task]}
    return found | ({"seconds": round(time.perf_counter() - begin)} if fresh else {})


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, and the values."""
    about: dict[str, Any] = {}
    for name in [name for name in runs[0] if name != "seconds"]:
        values = [run[name] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else None
        about[name] = {"mean": statistics.mean(values), "std": spread, "values": values}
    return about | {"seconds": [run.get("seconds") for run in runs]}


def error_of_the_mean(table: Path) -> float:
    """MAE of heights where every case is said to have the mean of the cases of other folds."""
    with table.open(newline="", encoding="utf-8") as file:
        cases = [(row["fold"], float(row["height"])) for row in csv.DictReader(file)]
    means = {fold: statistics.mean(h for other, h in cases if other != fold) for fold, _ in cases}
    return statistics.mean(abs(height - means[fold]) for fold, height in cases)


def facts(data: Path, threads: int) -> dict[str, Any]:
    """Of the cases, and of the machine."""
    with data.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labelled = [row["aorta"] for row in rows if row["aorta"]]
    return {
        "cases": len(rows),
        "cells": len({row["cell"] for row in rows}),
        "aorta": {"labelled": len(labelled), "with": labelled.count("1")},
        "options": SAME,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": threads}
        | {"instruction_set": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "accelerate", "timm")},
    }


def table(results: dict[str, Any]) -> str:
    """The results as docs/finetune.md has them."""
    lines = ["| task | metric | from the demonstration weights | from random weights |", "|---|---|---|---|"]
    for task, starts in results["tasks"].items():
        for name in METRICS[task]:
            digits = 1 if name == "mae" else 3
            cells = []
            for start in STARTS:
                one = starts.get(start, {}).get(name)
                mean = f"{one['mean']:.{digits}f}" if one else ""
                cells.append(mean + (f" ± {one['std']:.{digits}f}" if one and one["std"] is not None else ""))
            unit = ", mm" if name == "mae" else ""
            lines.append(f"| `{task}` | {name}{unit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what has not been run, and write results/finetune.json after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="repeat with seeds 0, 1, ...")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/finetune"), help="runs and data set, to go on")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true", help="print the results that there are as a table")
    options = parser.parse_args()
    if options.table:
        return print(table(json.loads(options.out.read_text())))
    torch.set_num_threads(options.threads)
    work: Path = options.work
    data = work / "data/cases.csv"
    if not data.exists():
        script = HERE.parent / "examples/anatomy_labels.py"
        subprocess.run([sys.executable, str(script), "--out", str(data.parent)], check=True)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {task: {start: [] for start in STARTS} for task in TASKS}
    for seed in range(options.seeds):
        for task in TASKS:
            for start in STARTS:
                run = one_run(task, start, seed, data.with_name(TABLES[task]), work, options.threads)
                runs[task][start].append(run)
                print(seed, task, start, json.dumps(run), flush=True)
                tasks = {t: {s: summary(found) for s, found in ss.items() if found} for t, ss in runs.items()}
                results = facts(data, options.threads) | {"error_of_the_mean_height": error_of_the_mean(data)}
                results |= {"seeds": len(runs["height"]["random"]), "tasks": {t: s for t, s in tasks.items() if s}}
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
