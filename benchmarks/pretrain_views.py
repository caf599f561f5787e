"""The training step of GL-MAE at full size, one scan: where its time goes, and what views in sequence save and cost.

    python benchmarks/pretrain_views.py [--repeats 2] [--threads 1] [--device cuda]

The step is that of ``medgmae pretrain --recipe glmae`` but for batch 1: 2 global views of 160³ and 8 local ones of 96³
of a prepared scan of examples/data, gradient checkpointing, projectors with 65,536 prototypes. "at once" is the
recipe's way, "in sequence" has ``global_local.views_at_once = 1``; they take turns in one process, on the same weights.
Loss and gradient of both must agree before the first update.

The parts are timed within these updates: waiting for the views (no workers), the teacher's pass with its projector, the
student's passes with their reconstruction loss of local and of global views, the rest of the forward (projectors,
consistencies, masks), backward of all, the norm of the gradient with its clipping, AdamW, and the teacher that follows.
Medians, and the parts of the update whose total is the median; "processor" is what the process itself had of a core,
which other work on the machine does not lengthen as it does the others. What is left over must be below a tenth. Memory
is that of a process of its own: its peak in two steps above what it had before the model.

There is no rival: nobody has published GL-MAE's pre-training, and one put together here would be this code again. The
floor is as in pretrain.py, from the products that torch counts; those that checkpointing makes twice are among them.

Written down before the first run, one core with AVX-512: 20 s at once, of which the teacher 2.5, backward 12.5, AdamW
0.1; in sequence the same within 5 %; memory 3.3 and 3.0 GB with checkpointing, 7 and 4 without.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pretrain import DATA, HERE, keep, machine_of, now, session_of, timer
from torch.utils.flop_counter import FlopCounterMode
from unetr import resident

from medgmae.training import read_recipe
from medgmae.training.batches import load
from medgmae.training.engine import memory

NAME = "glmae_vit_base_patch16_96"
WAYS = {"at once": 0, "in sequence": 1}
PARTS = ("data", "teacher", "local", "global", "projectors", "backward", "norm", "adamw", "follow")


class Bench:
    """A run of GL-MAE as ``medgmae pretrain`` begins it."""

    def __init__(self, folder: Path, device: str, checkpointing: bool) -> None:
        changes = {"training.batch_size": 1, "training.steps": 1000, "training.warmup_steps": 0, "held_out": 0.0}
        settings = read_recipe("glmae").changed({**changes, "training.checkpointing": checkpointing})
        session, job = session_of(settings, DATA / "ct_thorax.nii.gz", folder, device)
        self.engine, self.job = session.engine, job
        self.model: Any = session.engine.plain
        self.device = self.engine.accelerator.device
        self.batches = load(job.samples, self.engine.share, 0, 1000, 0, self.device.type == "cuda")
        self.step = 0

    def take(self, way: str) -> None:
        """From now on the views at once, or in sequence."""
        objective: Any = self.job.objective
        objective.options = replace(objective.options, views_at_once=WAYS[way])

    def update(self) -> float:
        """One update; seconds that it waited for views."""
        self.step += 1
        waited = self.engine.update(self.step, self.batches)["waited"]
        self.job.updated(self.engine, self.step)
        return waited

    def agree(self) -> tuple[dict[str, float], int]:
        """How far loss and gradient of the two ways lie apart, relative; and the products of a step, in FLOP."""
        batch = next(self.batches).to(self.device)
        stem = self.model.get_parameter("student.encoder.patch_embed.proj.weight")  # which everything shapes
        found = []
        for way in WAYS:
            self.take(way)
            with FlopCounterMode(display=False) as counter:
                total = 0.0
                for part in self.engine.parts(batch, 0):
                    loss = self.engine.values(part, 0)["loss"]
                    loss.backward()
                    total += float(loss.detach())
            found.append((total, stem.grad.clone()))
            self.model.zero_grad()
        (ours, pulled), (theirs, turned) = found
        apart = {"loss": abs(ours - theirs) / ours, "gradient": float((turned - pulled).norm() / pulled.norm())}
        if not (apart["loss"] < 1e-5 and apart["gradient"] < 1e-3):
            raise SystemExit(f"at once and in sequence disagree: {apart}")
        return apart, int(counter.get_total_flops())

    @contextmanager
    def clocked(self) -> Iterator[dict[str, float]]:
        """Seconds by part, of the updates within."""
        seconds: dict[str, float] = defaultdict(float)
        timed = functools.partial(timer, seconds, functools.partial(now, self.device))
        model, engine = self.model, self.engine
        seen = model.student.forward_with_tokens
        kinds = {kind: timed(kind, seen) for kind in ("global", "local")}
        local = tuple(self.job.settings.global_local.local_size)  # type: ignore[union-attr]

        def sees(x: torch.Tensor, *rest: Any) -> Any:
            return kinds["local" if tuple(x.shape[2:]) == local else "global"](x, *rest)

        wrapped: list[tuple[Any, str, str]] = [
            (engine, "parts", "before"),
            (engine, "values", "forward"),
            (model, "taught", "teacher"),
            (model, "follow", "follow"),
            (engine.accelerator, "backward", "backward"),
            (engine.accelerator, "clip_grad_norm_", "norm"),
            (engine.prepared, "step", "adamw"),
        ]
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(model.student, "forward_with_tokens", sees))
            for owner, name, part in wrapped:
                stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
            yield seconds


def measure(bench: Bench, repeats: int, peaks: tuple[float, float]) -> dict[str, Any]:
    """Both ways in turns: medians, and their parts."""
    apart, flop = bench.agree()
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    bench.update()  # which makes the optimiser's moments
    for _ in range(repeats):
        for way in WAYS:
            bench.take(way)
            with bench.clocked() as seconds:
                begin, worked = now(bench.device), time.process_time()
                seconds["data"] = bench.update()
                seconds["total"], seconds["processor"] = now(bench.device) - begin, time.process_time() - worked
            row = dict(seconds)
            row["projectors"] = row["before"] - row["teacher"] + row["forward"] - row["local"] - row["global"]
            row["left_over"] = row["total"] - sum(row[part] for part in PARTS)
            row["computing"] = row["total"] - row["data"]
            if row["left_over"] > 0.1 * row["total"]:
                raise SystemExit(f"{row['left_over']:.3f} s of {row['total']:.3f} s are in no part: {row}")
            rows[way].append(row)
    middle = {way: sorted(found, key=lambda row: row["total"])[(len(found) - 1) // 2] for way, found in rows.items()}
    ratios = [b["computing"] / a["computing"] for a, b in zip(*rows.values(), strict=True)]
    parameters = sum(p.numel() for p in bench.model.parameters() if p.requires_grad)
    floor = {"products": 1e-9 * flop / peaks[0], "adamw": 28e-9 * parameters / peaks[1]}
    return {
        "rival": None,
        "views": {"global": [2, 1, 160, 160, 160], "local": [8, 1, 96, 96, 96]},
        "repeats": repeats,
        "mega_parameters": round(parameters / 1e6, 1),
        "giga_flop": round(flop / 1e9, 1),
        "floor_seconds": {name: round(value, 3) for name, value in floor.items()},
        "seconds": {
            way: {name: round(row[name], 4) for name in (*PARTS, "left_over", "total", "computing", "processor")}
            for way, row in middle.items()
        },
        "computing_over_floor": round(middle["at once"]["computing"] / sum(floor.values()), 2)
        if any(floor.values())
        else None,
        "in_sequence_over_at_once": round(statistics.median(ratios), 3),
        "relative_difference": {name: float(f"{value:.1e}") for name, value in apart.items()},
    }


def measure_memory(way: str, checkpointing: bool, device: str) -> float:
    """MiB of two steps: a process of its own."""
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), device, checkpointing)
        bench.take(way)
        for _ in range(2):
            bench.update()
    return memory(bench.device) / 1.048576 if bench.device.type == "cuda" else resident("VmHWM") - before


def main() -> None:
    """Measure, print, and write the row into results/pretrain.json; the others stay."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--no-checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "results/pretrain.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        return print(measure_memory(options.memory, not options.no_checkpointing, options.device))
    where, peaks = machine_of(options.threads, options.device)
    mebibytes: dict[str, dict[str, int]] = {"checkpointing": {}, "without": {}}
    for kept, found in mebibytes.items():
        for way in WAYS:
            command = [sys.executable, __file__, "--memory", way, "--device", options.device]
            command += ["--threads", str(options.threads), *(["--no-checkpointing"] if kept == "without" else [])]
            run = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            found[way] = round(float(run.stdout.split()[-1]))
            print(json.dumps(mebibytes), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Bench(Path(folder), options.device, True), options.repeats, peaks)
    keep(options.out, options.device, NAME, row | {"mebibytes": mebibytes, "machine": where})


if __name__ == "__main__":
    main()
