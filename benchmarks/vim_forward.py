"""A full-size state-space classifier on the CPU: 64,000 tokens of a 160³ volume in four contrasts, time and memory.

    python benchmarks/vim_forward.py [--model vim_small_patch4_160] [--threads 1 2] [--rounds 1] [--train] [--size 160]

Every measurement is a fresh process: a forward of a small volume to warm up, then forwards without gradients. Memory is
the peak resident size (VmHWM) above what the process held before, weights and input included in neither. In one more
forward every operator of torch is timed by itself, which says what the time goes to. With --train a training step with
recomputed blocks (``set_grad_checkpointing``) follows: forward, and backward to every parameter. Processes with
different numbers of threads must find the same logits.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from renderer import machine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import medgmae

RESULT = Path(__file__).parent / "results/vim_forward.json"
# What an operator counts as; all others are "the rest": norms, rotations, sums, copies.
PARTS = {
    "selective_scan": "scan",
    "causal_conv1d": "convolution",
    **dict.fromkeys(("linear", "mm", "addmm"), "products"),
}


class Clock(TorchDispatchMode):
    """Adds up the seconds of every operator that reaches a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        self.seconds[PARTS.get(name, "rest")] += time.perf_counter() - begin
        return result


def status(field: str) -> int:
    """A number of bytes that the operating system keeps of this process."""
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0]) * 1024


def reset_peak() -> int:
    """Forget the peak so far; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def forwards(model: Any, x: Tensor, rounds: int) -> dict[str, Any]:
    """Times, memory and parts of forwards without gradients."""
    seconds, clock = [], Clock()
    with torch.inference_mode():
        model(x[..., : 4 * model.patch_size[0]])
        before = reset_peak()
        for _ in range(rounds):
            begin = time.perf_counter()
            logits = model(x)
            seconds.append(time.perf_counter() - begin)
        peak = status("VmHWM") - before
        with clock:
            model(x)
    total = sum(clock.seconds.values())
    row: dict[str, Any] = {"forward_s": statistics.median(seconds), "forward_peak_mb": peak / 1e6}
    row["shares"] = {part: value / total for part, value in sorted(clock.seconds.items())}
    return row | {"logits": logits[0].tolist()}


def training_step(model: Any, x: Tensor) -> dict[str, Any]:
    """Time and memory of forward and backward, blocks recomputed."""
    model.train().set_grad_checkpointing()
    before = reset_peak()
    begin = time.perf_counter()
    model(x).square().sum().backward()
    row = {"step_s": time.perf_counter() - begin, "step_peak_mb": (status("VmHWM") - before) / 1e6}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    return row


def measure(options: argparse.Namespace, threads: int) -> dict[str, Any]:
    """One row, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    more = {} if options.size is None else {"img_size": options.size}
    model: Any = medgmae.create_model(options.model, num_classes=2, **more).eval()
    x = torch.randn(1, model.in_chans, *model.img_size)
    tokens = math.prod(model.grid_size)
    row = {"model": options.model, "tokens": tokens, "threads": threads, **forwards(model, x, options.rounds)}
    return row | (training_step(model, x) if options.train else {})


def told(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    shares = ", ".join(f"{part} {share:.0%}" for part, share in row["shares"].items())
    text = f"{row['model']}, {row['tokens']:,} tokens, {row['threads']} thread(s): forward {row['forward_s']:.1f} s "
    text += f"({shares}), peak {row['forward_peak_mb']:,.0f} MB"
    if "step_s" in row:
        text += f"; training step {row['step_s']:.1f} s, peak {row['step_peak_mb']:,.0f} MB"
    return text


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vim_small_patch4_160")
    parser.add_argument("--size", type=int, help="voxels per axis; the model's own if not given")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options, options.child)))
        return
    report: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "rows": []}
    for threads in options.threads:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", str(threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        report["rows"].append(json.loads(done.stdout))
        print(told(report["rows"][-1]), flush=True)
    first = torch.tensor(report["rows"][0]["logits"])
    for row in report["rows"][1:]:
        torch.testing.assert_close(torch.tensor(row["logits"]), first, atol=1e-4, rtol=1e-4)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
