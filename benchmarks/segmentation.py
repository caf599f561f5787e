"""Memory and time of a whole scan through ``segment_scan``, and its time beside MONAI's ``sliding_window_inference``.

The model is a convolution of 1 x 1 x 1, so that what is measured are the windows, their average and the decision, and
hardly the model.

Memory: 512 x 512 x 600 voxels, 14 classes, each placement in a process of its own. Peak memory is that of the process
(VmHWM) above what it holds once the scan lies in memory, labels included; the labels are taken off. All logits of this
scan would take 8.8 GB.

Prediction, written before tuning: what overlaps with windows to come must be kept, which is at most 51 planes of
512 x 512 with 14 classes in float32 (0.75 GB), 137 MB of one row of windows, 26 MB of one column, and two windows of
50 MB: just under 1 GB. The goal of under 1 GB is for the windows as they are by default ("even"). MONAI's windows
("strided") cannot reach it: the last one is moved back to the end of the scan and has 72 of 96 planes in common with
the one before (1.06 GB), which makes 1.32 GB by the same count; the goal for them is under 1.4 GB.

Outcome: 0.98 GB and 1.34 GB. Before, 1.11 GB: a view of the last block kept a whole window of logits alive beside the
next one, the block at the end of an axis is as large as a window and was divided out of place, and torch.isfinite takes
as much memory as what it looks at.

Time: a scan of 300 x 256 x 256, whose logits MONAI can hold at once, in the same windows ("strided", "uniform"; MONAI's
"constant"), to the label of every voxel: MONAI's logits and their argmax. The sides take turns; logits and labels must
agree.

    python benchmarks/segmentation.py [--size 600 512 512] [--beside 300 256 256] [--classes 14] [--window 96]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medgmae import Volume, predict_logits, segment_scan
from medgmae.data import Grid

RESULT = Path(__file__).parent / "results/segmentation.json"
BLENDS = {
    "even": "gaussian",
    "strided": "uniform",
}  # our default; what SelfMedMAE takes of MONAI
GOALS = {"even": 1.0e9, "strided": 1.4e9}  # bytes of memory
OVERLAP = 0.5


def status(name: str) -> int:
    """Bytes that the kernel counts of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def measure(size: Any, classes: int, window: int, placement: Any) -> dict[str, Any]:
    """Memory and time of one placement, in this process."""
    torch.set_num_threads(1)
    blend: Any = BLENDS[placement]
    model = torch.nn.Conv3d(1, classes, 1)
    segment_scan(model, Volume(torch.rand(1, 16, 16, 16)), window=16, progress=False)  # loads what the first call loads
    scan = Volume(torch.rand(1, *size), Grid(size, (1.0, 0.8, 0.8)))
    before, start, work = status("VmRSS"), time.perf_counter(), time.process_time()
    result = segment_scan(model, scan, window=window, placement=placement, blend=blend, progress=False)
    labels = result.labels.data
    return {
        "blend": blend,
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - work,
        "peak_bytes_beside_scan_and_labels": status("VmHWM") - before - labels.numel() * labels.element_size(),
        "scan_bytes": scan.data.numel() * 4,
        "all_logits_bytes": scan.data.numel() * 4 * classes,
        "classes_found": len(labels.unique()),
    }


def beside_monai(size: Any, classes: int, window: int, repeats: int) -> dict[str, Any]:
    """Medians of the seconds that both take for the labels of one scan, and how far they agree."""
    from monai.inferers import sliding_window_inference

    torch.manual_seed(0)
    model = torch.nn.Conv3d(1, classes, 1)
    scan = Volume(torch.rand(1, *size), Grid(size, (1.0, 0.8, 0.8)))
    options: Any = {"window": window, "overlap": OVERLAP, "placement": "strided", "blend": "uniform", "progress": False}

    def their_logits() -> Tensor:
        with torch.no_grad():
            return sliding_window_inference(scan.tensor, (window,) * 3, 1, model, OVERLAP, "constant")  # type: ignore

    sides: dict[str, Callable[[], Tensor]] = {
        "medgmae": lambda: segment_scan(model, scan, **options).labels.data[0],
        "monai": lambda: their_logits().argmax(1)[0],
    }
    apart = float((predict_logits(model, scan, **options).data - their_logits()[0]).abs().max())
    found: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, work in sides.items():
            start = time.perf_counter()
            found[side] = work()
            seconds[side].append(time.perf_counter() - start)
    different = int((found["medgmae"] != found["monai"]).sum())  # of rounding, where two logits are as large
    if apart > 1e-5 or different > 1e-5 * found["monai"].numel():
        raise SystemExit(f"the sides disagree: logits by {apart:.1e}, labels of {different} voxels")
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    return {
        "size": size,
        "repeats": repeats,
        "seconds": {side: round(median, 2) for side, median in medians.items()},
        "speed_against_monai": round(medians["monai"] / medians["medgmae"], 2),
        "largest_difference_of_logits": apart,
        "voxels_with_other_labels": different,
    }


def main() -> int:
    """Measure, print a table, write the JSON; the exit code says whether the goals are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=[600, 512, 512])
    parser.add_argument("--beside", type=int, nargs=3, default=[300, 256, 256])
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--window", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", choices=list(GOALS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(measure(tuple(options.size), options.classes, options.window, options.one)))
        return 0
    runs, met = {}, {}
    for placement, goal in GOALS.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--one", placement]
        run = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        peak = run["peak_bytes_beside_scan_and_labels"]
        runs[placement], met[placement] = run, peak < goal
        verdict = f"goal: under {goal / 1e9:g} GB: {'met' if met[placement] else 'MISSED'}"
        print(f"{placement:8} {peak / 1e9:6.3f} GB beside scan and labels   {run['seconds']:7.1f} s   {verdict}")
    beside = beside_monai(tuple(options.beside), options.classes, options.window, options.repeats)
    print(f"beside MONAI: {beside}")
    result = {
        "size": options.size,
        "classes": options.classes,
        "window": options.window,
        "overlap": OVERLAP,
        "memory": runs,
        "goal_bytes": GOALS,
        "met": met,
        "beside_monai": beside,
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": version("monai"),
        "cpus": os.cpu_count(),
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
