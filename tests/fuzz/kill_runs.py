"""Runs that are killed again and again: their log and their weights are those of one that was not.

    python tests/fuzz/kill_runs.py --kills 200 --seed 0 [--task finetune|views]

Every process is killed with SIGKILL at a random moment, while it starts, reads, computes or writes, and the next one
resumes; a run that ended begins a new one. Differences in any loss, any measurement or any bit of the model (of
fine-tuning: of any fold, and in any metric or prediction) are findings, and so is a run that cannot be resumed.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import accelerate  # noqa: F401 - with timm, most of what a process of training imports: the forked ones have it
import checkout  # noqa: F401 - sets the path and the number of threads
import timm  # noqa: F401
import torch
import tuning_runs
from training_runs import MACHINE, outcome, scans, settings_of

from medgmae.training import Run, Settings, finetune, pretrain
from medgmae.training.states import read_state

SETTINGS = settings_of(**{"training.steps": 14})
VIEWS = settings_of(
    "glmae_vit_nano_patch8_32",
    **{
        "model_options": {"img_size": 16, "mask_ratio": 0.5},
        "global_local": {"local_size": [16, 8, 8], "local_mask_ratio": 0.5, "projector": [32, 16, 64]},
        "training.steps": 14,
    },
)
TUNING = tuning_runs.tune_settings(folds=2, **{"tuning.select": ["auc", "loss"], "training.steps": 8})


def train(data: Path, out: Path, settings: Settings) -> None:
    """A run of pre-training on a folder, of fine-tuning on a table."""
    if data.suffix == ".csv":
        finetune(TUNING, [data], out, resume=Run(out).exists, machine=tuning_runs.MACHINE)
    else:
        pretrain(settings, [data], out, resume=Run(out).exists, machine=MACHINE)


def result(out: Path) -> list[object]:
    """What must not depend on interruptions, of every model of a run."""
    # what a killed process was about to write lies in a folder of its own that nobody opens
    found = (path.parent for path in out.rglob("model.safetensors"))
    models = sorted(folder for folder in found if not folder.name.startswith(".saving-"))
    logged = [folder for folder in models if (folder / "metrics.jsonl").exists()]
    tables = sorted([*out.rglob("metrics.json"), *out.rglob("predictions.csv")])
    return [
        *(outcome(folder) for folder in logged),
        *((folder / "model.safetensors").read_bytes() for folder in models),
        *(
            {name: tensor.numpy().tobytes() for name, tensor in read_state(path).model.items()}
            for path in sorted(out.glob("checkpoints/step_*.safetensors"))[-1:]
        ),
        *((str(path.relative_to(out)), path.read_bytes()) for path in tables),
    ]


def start(data: Path, out: Path, settings: Settings) -> int:
    """A process that begins the run or goes on with it; the number of the process."""
    child = os.fork()
    if child:
        return child
    code = 1
    faulthandler.dump_traceback_later(120, exit=True)
    try:
        torch.set_num_threads(1)
        train(data, out, settings)
        code = 0
    except BaseException as error:  # the parent reports it: the child must not go on in its code
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Kill runs until there were enough kills, then compare."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--task", choices=["pretrain", "finetune", "views"], default="pretrain")
    options.add_argument("--folder", type=Path)
    given = options.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="kill-runs-"))
    rng, data = random.Random(given.seed), folder / "scans"
    if not (maker := os.fork()):  # here, ITK would start threads, which children do not have
        if given.task == "finetune":
            tuning_runs.cases(data)
        else:
            scans(data)
        os._exit(0)
    os.waitpid(maker, 0)
    data = data / "cases.csv" if given.task == "finetune" else data
    settings = VIEWS if given.task == "views" else SETTINGS
    begin = time.perf_counter()
    os.waitpid(start(data, folder / "undisturbed", settings), 0)
    seconds, expected = time.perf_counter() - begin, result(folder / "undisturbed")
    kills = findings = runs = 0
    out = folder / "killed"
    while kills < given.kills or out.exists():
        child = start(data, out, settings)
        if kills < given.kills:
            time.sleep(rng.uniform(0, 1.1 * seconds))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            continue
        runs += 1
        if os.waitstatus_to_exitcode(status) != 0 or result(out) != expected:
            findings += 1
            sys.stdout.write(f"finding: run {runs} after {kills} kills differs or failed\n")
        shutil.rmtree(out)
    seconds = time.perf_counter() - begin
    sys.stdout.write(f"{kills} kills, {runs} runs to their end, {findings} findings, {seconds:.0f} s\n")
    if given.folder is None:
        shutil.rmtree(folder)
    sys.exit(findings > 0)


if __name__ == "__main__":
    main()
