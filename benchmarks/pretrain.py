"""The training step of full-size masked autoencoders at batch 1: where its time goes, and the same in plain torch.

    python benchmarks/pretrain.py [--models NAME ...] [--repeats 5] [--threads 1] [--device cuda]

Ours is what ``medgmae pretrain`` runs: crops of a prepared scan of examples/data from the loader, then
``Engine.update``, with the recipe of the model but for batch 1. The parts are timed within these updates: waiting for
the crop (no workers), the forward of encoder, decoder and renderer, the rest of the forward (masks, targets, loss),
backward of all, the norm of the gradient with its clipping, AdamW. The renderer's own backward is a part of "backward",
timed from the gradient of the rendering to that of the Gaussians. What is left over must be below a tenth.

Beside it the same step in plain torch (pretrain_rivals.py) with the same parameters, optimiser and loader, which is not
timed for it. Loss and gradient of both must agree before the first update. The sides take turns; medians, and the parts
of the update whose total is the median. Memory is that of a process of its own: its peak in two steps above what it had
before the model.

The floor is FLOP of the matrix products (forward and backward, counted by torch) over the measured peak, and 28 bytes
per parameter of AdamW over the measured rate of changes in place. Scans and renderers are not in it. What torch's own
products reach on the shapes of the wide encoder's blocks is beside it ("product_gflops").

GL-MAE's step, of views with a teacher, is in pretrain_views.py, which shares this one's setting and file of results.

Written down before the first run, one core with AVX-512, seconds of a step without the crop, ours over plain torch:
mae_vit_base_patch16_96 0.7, 0.9; gmae_vit_wide_patch12_96 4, 0.75, of which the renderer 1 %;
mae_vim_small_patch16_160 1, 0.15, and 2 for the crop, whose four channels are turned and zoomed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from pretrain_rivals import RIVALS, in_place_rate, native_for, product_rate
from renderer import cpu_name, fma_peak
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from unetr import resident

from medgmae.training import Machine, Run, Settings, read_recipe
from medgmae.training.batches import MaskedBatch, load
from medgmae.training.corpus import corpus_of
from medgmae.training.engine import memory
from medgmae.training.global_local import GlobalLocalPretraining, with_teacher
from medgmae.training.machine import accelerator_for
from medgmae.training.pretrain import start_model
from medgmae.training.pretraining import Pretraining, crop_size
from medgmae.training.session import Session
from medgmae.training.stopping import StopRequest

HERE = Path(__file__).parent
DATA = HERE.parent / "examples/data"
PARTS = ("data", "encoder", "decoder", "renderer", "loss", "backward", "norm", "adamw")


class Case(NamedTuple):
    """A model's recipe, the scan it learns from, what it is measured against, how often, and options for that."""

    recipe: str
    scan: str
    rival: str
    repeats: int
    options: dict[str, Any]


MONAI, TIMM, SCAN = RIVALS
CASES = {
    "mae_vit_base_patch16_96": Case("selfmedmae_btcv", "ct_thorax", MONAI, 5, {"norm_eps": 1e-5}),  # MONAI's epsilon
    "gmae_vit_wide_patch12_96": Case("medgmae", "ct_thorax", TIMM, 3, {}),
    "mae_vim_small_patch16_160": Case("mamba_mae", "mr_brain_t1", SCAN, 5, {}),
}


def session_of(settings: Settings, data: Path, folder: Path, device: str) -> tuple[Session, Pretraining]:
    """A run as ``medgmae pretrain`` begins it, and what it trains for."""
    model: Any = start_model(settings)
    machine, run = Machine(device=device), Run(folder)
    accelerator = accelerator_for(machine, settings.training.precision, folder)
    corpus = corpus_of(
        settings.input_block, [data], crop_size(settings, model), folder / "prepared", False, accelerator
    )
    if settings.global_local is None:
        job = Pretraining(settings, run, model, corpus)
    else:
        job = GlobalLocalPretraining(settings, run, with_teacher(model, settings), corpus)
    return Session(job, machine, run, accelerator, StopRequest()), job


class Bench:
    """A run of one model as ``medgmae pretrain`` begins it, and the way of plain torch to the same loss."""

    def __init__(self, name: str, folder: Path, device: str) -> None:
        case = CASES[name]
        changes = {"model": name, "training.batch_size": 1, "training.steps": 1000, "training.warmup_steps": 0}
        changes |= {f"model_options.{key}": value for key, value in case.options.items()}
        settings = read_recipe(case.recipe).changed({**changes, "held_out": 0.0})
        data = DATA / f"{case.scan}.nii.gz"
        contrasts = settings.input_block.get("contrasts")
        if contrasts:  # the same scan for each: neither the work nor its time depends on what is in it
            for one in contrasts:
                shutil.copy(data, folder / f"{one}.nii.gz")
            data = folder / "scans.csv"
            header, row = (f"path_{one}" for one in contrasts), (f"{one}.nii.gz" for one in contrasts)
            data.write_text(f"{','.join(header)}\n{','.join(row)}\n")
        session, job = session_of(settings, data, folder, device)
        self.size = crop_size(settings, job.model)
        self.engine, self.model, self.rival = session.engine, session.engine.plain, case.rival
        self.device = self.engine.accelerator.device
        self.batches = load(job.samples, self.engine.share, 0, 1000, 0, self.device.type == "cuda")
        self.loss = RIVALS[case.rival](self.model)
        self.step = 0

    def ours(self) -> dict[str, float]:
        """One update."""
        self.step += 1
        return self.engine.update(self.step, self.batches)

    def plain(self, batch: MaskedBatch) -> float:
        """The same of plain torch; its loss."""
        self.engine.schedule.step(self.step)
        x, masking = batch.x, batch.masking(self.model.mask_ratio)
        with native_for(self.rival):
            with self.engine.accelerator.autocast():
                loss = self.loss(x, masking)
            loss.backward()
        if self.engine.training.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.engine.training.clip)
        self.engine.optimizer.step()
        self.engine.optimizer.zero_grad()
        return float(loss.detach())

    def next(self) -> MaskedBatch:
        """A crop with its noise, on the device."""
        return next(self.batches).to(self.device)

    def now(self) -> float:
        """Seconds, when all is done that was asked for."""
        return now(self.device)

    def agree(self) -> dict[str, float]:
        """How far loss and gradient of the two ways lie apart, relative; stop where they disagree."""
        batch = self.next()
        masking = batch.masking(self.model.mask_ratio)
        stem: Any = self.model.get_parameter("encoder.patch_embed.proj.weight")  # which everything shapes
        found: list[tuple[float, Tensor]] = []
        for native, way in ((True, lambda x, m: self.model(x, m).loss), (False, self.loss)):
            with contextlib.nullcontext() if native else native_for(self.rival):
                loss = way(batch.x, masking)
                loss.backward()
            found.append((float(loss.detach()), stem.grad.clone()))
            self.model.zero_grad()
        (ours, ours_stem), (plain, plain_stem) = found
        apart = {
            "loss": abs(ours - plain) / plain,
            "gradient": float((ours_stem - plain_stem).norm() / plain_stem.norm()),
        }
        if not (apart["loss"] < 1e-5 and apart["gradient"] < 1e-2) and self.engine.accelerator.mixed_precision == "no":
            raise SystemExit(f"ours and {self.rival} disagree: {apart}, losses {ours} and {plain}")
        return apart

    def flop(self) -> int:
        """Of the matrix products of a step."""
        batch = self.next()
        with FlopCounterMode(display=False) as counter:
            self.engine.values(batch, 0)["loss"].backward()
        self.model.zero_grad()
        return int(counter.get_total_flops())

    @contextlib.contextmanager
    def clocked(self) -> Iterator[dict[str, float]]:
        """Seconds by part, of the updates within."""
        seconds: dict[str, float] = defaultdict(float)
        timed = functools.partial(timer, seconds, self.now)

        def rendered(gaussians: Any, *rest: Any) -> Tensor:
            volume: Tensor = render(gaussians, *rest)
            marks: list[float] = []
            volume.register_hook(lambda grad: marks.append(self.now()))
            for tensor in gaussians.tensors():
                tensor.register_hook(lambda grad: seconds.__setitem__("renderer_backward", self.now() - marks[0]))
            return volume

        model, engine = self.model, self.engine
        ways = ("decode", "predict") if hasattr(model.decoder, "decode") else ("forward",)
        wrapped: list[tuple[Any, str, str]] = [
            (engine, "values", "forward"),
            (model.encoder, "_encode", "encoder"),  # without the last norm
            *((model.decoder, name, "decoder") for name in ways),
            (engine.accelerator, "backward", "backward"),
            (engine.accelerator, "clip_grad_norm_", "norm"),
            (engine.prepared, "step", "adamw"),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, part in wrapped:
                stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
            if renderer := getattr(model, "renderer", None):
                render = timed("renderer", renderer.forward)
                stack.enter_context(mock.patch.object(renderer, "forward", rendered))
            yield seconds


def now(device: torch.device) -> float:
    """Seconds, when all is done that was asked of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timer(
    seconds: dict[str, float], clock: Callable[[], float], part: str, run: Callable[..., Any]
) -> Callable[..., Any]:
    """A function that does the same, and adds the time it takes to a part."""

    def runs(*arguments: Any, **options: Any) -> Any:
        begin = clock()
        result = run(*arguments, **options)
        seconds[part] += clock() - begin
        return result

    return runs


def compare(bench: Bench, repeats: int, peaks: tuple[float, float]) -> dict[str, Any]:
    """Both sides in turns: medians, and the parts of ours."""
    apart, flop = bench.agree(), bench.flop()
    rows: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        with bench.clocked() as seconds:
            begin = bench.now()
            seconds["data"] = bench.ours()["waited"]
            seconds["total"] = bench.now() - begin
        batch = bench.next()
        begin = bench.now()
        bench.plain(batch)
        rows.append({**seconds, "plain": bench.now() - begin})
    rows = rows[1:]  # the first made the optimiser's moments
    for row in rows:
        row["loss"] = row["forward"] - sum(row.get(part, 0.0) for part in ("encoder", "decoder", "renderer"))
        row["left_over"] = row["total"] - sum(row.get(part, 0.0) for part in PARTS)
        row["computing"] = row["total"] - row["data"]
        row["ratio"] = row["computing"] / row["plain"]
        row["renderer_share"] = (row.get("renderer", 0.0) + row.get("renderer_backward", 0.0)) / row["total"]
        if row["left_over"] > 0.1 * row["total"]:
            raise SystemExit(f"{row['left_over']:.3f} s of {row['total']:.3f} s are in no part: {row}")
    middle = sorted(rows, key=lambda row: row["total"])[len(rows) // 2]  # whose parts add up
    parameters = sum(p.numel() for p in bench.model.parameters() if p.requires_grad)
    floor = {"products": 1e-9 * flop / peaks[0], "adamw": 28e-9 * parameters / peaks[1]}
    return {
        "rival": bench.rival,
        "crop": [bench.model.in_chans, *bench.size],
        "repeats": repeats,
        "mega_parameters": round(parameters / 1e6, 1),
        "giga_flop": round(flop / 1e9, 1),
        "floor_seconds": {name: round(value, 3) for name, value in floor.items()},
        "computing_over_floor": round(middle["computing"] / sum(floor.values()), 2) if any(floor.values()) else None,
        "seconds": {n: round(middle[n], 4) for n in (*PARTS, "left_over", "total", "computing") if n in middle},
        "plain_torch_seconds": round(statistics.median(row["plain"] for row in rows), 4),
        "renderer_backward_seconds": round(middle.get("renderer_backward", 0.0), 4),
        "renderer_share": round(middle["renderer_share"], 4),
        "time_over_plain_torch": round(statistics.median(row["ratio"] for row in rows), 2),
        "relative_difference": {name: float(f"{value:.1e}") for name, value in apart.items()},
    }


def measure_memory(name: str, side: str, device: str) -> float:
    """MiB of two steps, of one side: a process of its own, with all libraries loaded on either."""
    import monai.networks.nets  # noqa: F401
    import timm.models.vision_transformer  # noqa: F401

    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(name, Path(folder), device)
        for _ in range(2):
            bench.ours() if side == "medgmae" else bench.plain(bench.next())
    return memory(bench.device) / 1.048576 if bench.device.type == "cuda" else resident("VmHWM") - before


def machine_of(threads: int, device: str) -> tuple[dict[str, Any], tuple[float, float]]:
    """Where this runs, for the results; and the peaks of products and of changes in place."""
    on_gpu = device == "cuda"  # whose peaks nothing here measures
    peaks = (float("inf"), float("inf")) if on_gpu else (fma_peak(threads), in_place_rate())
    where = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": threads, "load": os.getloadavg()[0]}
    where |= {"instruction_set": torch.backends.cpu.get_cpu_capability()}
    if not on_gpu:
        rates = {"fma_peak_gflops": peaks[0], "product_gflops": product_rate(), "in_place_gb_per_s": peaks[1]}
        where |= {rate: round(value, 1) for rate, value in rates.items()}
    where |= {name: version(name) for name in ("torch", "timm", "monai", "accelerate")}
    return {**where, "python": platform.python_version()}, peaks


def keep(out: Path, device: str, name: str, row: dict[str, Any]) -> None:
    """Print a model's row and write it to the results; the others stay."""
    kept = json.loads(out.read_text()) if out.is_file() else {}
    kept.setdefault(device, {})[name] = row
    print(name, json.dumps(row, indent=1), flush=True)
    out.write_text(json.dumps(kept, indent=1) + "\n")


def main() -> None:
    """Measure, print, and write results/pretrain.json; models that are not measured keep their results there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, help="timed steps of each side; of the large model 3, else 5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", choices=("medgmae", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "results/pretrain.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        return print(measure_memory(options.models[0], options.memory, options.device))
    where, peaks = machine_of(options.threads, options.device)
    for name in options.models:
        mebibytes = {}
        for side in ("medgmae", "plain"):
            command = [sys.executable, __file__, "--models", name, "--memory", side, "--device", options.device]
            run = subprocess.run([*command, "--threads", str(options.threads)], stdout=subprocess.PIPE, check=True)
            mebibytes[side] = round(float(run.stdout.split()[-1]))
        with tempfile.TemporaryDirectory() as folder:
            row = compare(Bench(name, Path(folder), options.device), options.repeats or CASES[name].repeats, peaks)
        keep(options.out, options.device, name, row | {"mebibytes": mebibytes, "machine": where})


if __name__ == "__main__":
    main()
