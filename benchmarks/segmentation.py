"""Memory and time of a whole scan through ``segment_scan``: 512 x 512 x 600 voxels, 14 classes.

The model is a convolution of 1 x 1 x 1, so that what is measured are the windows, their average and the decision, and
hardly the model. Peak memory is that of the process (VmHWM) above what it holds once the scan lies in memory, labels
included; the labels are taken off. All logits of this scan would take 8.8 GB.

Prediction, written before tuning: what overlaps with windows to come must be kept, which is at most 51 planes of
512 x 512 with 14 classes in float32 (0.75 GB), 137 MB of one row of windows, 26 MB of one column, and two windows of
50 MB: just under 1 GB. The goal of under 1 GB is for the windows as they are by default ("even").

Outcome: 0.98 GB. Before, 1.11 GB: a view of the last block kept a whole window of logits alive beside the next one, the
block at the end of an axis is as large as a window and was divided out of place, and torch.isfinite takes as much
memory as what it looks at. MONAI's windows take 1.34 GB: its last one is moved back to the end of the scan and
has 72 of 96 planes in common with the one before.

    python benchmarks/segmentation.py [--size 600 512 512] [--classes 14] [--window 96]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from medgmae import Volume, segment_scan
from medgmae.data import Grid

RESULT = Path(__file__).parent / "results/segmentation.json"
GOAL = 1e9


def status(name: str) -> int:
    """Bytes that the kernel counts of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def measure(size: tuple[int, int, int], classes: int, window: int, placement: Any, blend: Any) -> dict[str, Any]:
    """One run in this process."""
    torch.set_num_threads(1)
    model = torch.nn.Conv3d(1, classes, 1)
    segment_scan(model, Volume(torch.rand(1, 16, 16, 16)), window=16, progress=False)  # loads what the first call loads
    scan = Volume(torch.rand(1, *size), Grid(size, (1.0, 0.8, 0.8)))
    before, start, work = status("VmRSS"), time.perf_counter(), time.process_time()
    result = segment_scan(model, scan, window=window, placement=placement, blend=blend, progress=False)
    labels = result.labels.data
    return {
        "size": size,
        "placement": placement,
        "blend": blend,
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - work,
        "peak_bytes_beside_scan_and_labels": status("VmHWM") - before - labels.numel() * labels.element_size(),
        "scan_bytes": scan.data.numel() * 4,
        "all_logits_bytes": scan.data.numel() * 4 * classes,
        "classes_found": len(labels.unique()),
    }


def main() -> int:
    """Measure each choice in a fresh process, print a table, write the JSON; the exit code says whether the goal is
    met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=[600, 512, 512])
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--window", type=int, default=96)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(tuple(options.size), options.classes, options.window, *options.one)))
        return 0
    runs = []
    for choice in (["even", "gaussian"], ["strided", "uniform"]):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", *choice]
        runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        peak, seconds = runs[-1]["peak_bytes_beside_scan_and_labels"], runs[-1]["seconds"]
        print(f"{' '.join(choice):20} {peak / 1e9:6.3f} GB beside scan and labels   {seconds:7.1f} s")
    met = runs[0]["peak_bytes_beside_scan_and_labels"] < GOAL  # the default
    print(f"goal: under {GOAL / 1e9:g} GB by default: {'met' if met else 'MISSED'}")
    result = {
        "classes": options.classes,
        "window": options.window,
        "overlap": 0.5,
        "runs": runs,
        "goal_bytes": GOAL,
        "met": met,
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
