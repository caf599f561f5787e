"""Our reconstruction on voxels beside RTK's: agreement of projections, and PSNR and seconds on the example's data.

    pip install -e '.[rtk]'; python benchmarks/rtk.py [--rounds 3]

The projections are those of examples/ct_from_projections.py: the chest CT at 1.5 mm in 20 views with 1e5 photons,
reconstructed at 3 mm. Ours and RTK's take turns, on one thread each. Seconds are of the clock and of the processor (all
threads of the process), up to the best iteration, which only the truth tells.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from renderer import machine
from torch import Tensor

from medgmae import Volume, tomography

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import ct_from_projections as example
import rtk_methods as rtk

RESULT = Path(__file__).parent / "results/rtk.json"
VIEWS, PHOTONS, SART, CG = 20, 1e5, 10, 16
BODY = 0.01  # 1/mm, -500 HU


class Best(example.Best):
    """The best iteration, with the seconds of the processor until it."""

    def __init__(self, truth: Volume) -> None:
        super().__init__(truth)
        self.begin = time.process_time()

    def __call__(self, number: int, volume: Volume, seconds: float) -> None:
        """Look at one."""
        spent = time.process_time() - self.begin
        super().__call__(number, volume, seconds)
        if self.volume is volume:
            self.row["processor"] = spent


def apart(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Difference relative in L2, and the largest as a part of the largest value."""
    difference = found - expected
    largest = difference.abs().max() / expected.abs().max()
    return {"l2": float(difference.norm() / expected.norm()), "largest": float(largest)}


def agreement(data: tomography.Projections, truth: Volume) -> dict[str, Any]:
    """Of projections of the CT, as it is and smooth, and of what filtered back-projection makes of the data."""
    smooth = truth.with_data(torch.nn.functional.avg_pool3d(truth.data, 5, 1, 2))
    ours, theirs = tomography.fdk(data, truth.grid), rtk.fdk(data, truth.grid)
    body = truth.data > BODY
    found = {"fdk in the body": apart(theirs.data[body], ours.data[body])}
    for name, volume in (("projections", truth), ("projections, means of 5 x 5 x 5 voxels", smooth)):
        found[name] = apart(rtk.joseph(volume, data.geometry).data, tomography.project(volume, data.geometry).data)
    return found


def main() -> None:
    """Measure, print, and write results/rtk.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    try:
        rtk.toolkit()
    except ImportError as error:
        print(f"nothing measured: {error}")
        return
    data, truth = example.measured("ct_thorax", VIEWS, PHOTONS)
    report: dict[str, Any] = {"machine": machine() | {name: version(name) for name in ("itk", "itk-rtk")}}
    report |= {"views": VIEWS, "photons": PHOTONS, "rounds": rounds, "agreement": agreement(data, truth)}

    def once(method: Callable[..., Volume]) -> Callable[[Best], Any]:
        def run(best: Best) -> None:
            begin = time.perf_counter()
            found = method(data, truth.grid)
            best(1, found, time.perf_counter() - begin)

        return run

    ways: dict[str, Callable[[Best], Any]] = {
        "FDK": once(tomography.fdk),
        "RTK FDK": once(rtk.fdk),
        "SART": lambda best: tomography.sart(data, truth.grid, SART, watch=best, progress=False),
        "RTK SART": lambda best: rtk.sart(data, truth.grid, SART, watch=best),
        "CG": lambda best: tomography.cg(data, truth.grid, CG, watch=best, progress=False),
        "RTK CG": lambda best: rtk.cg(data, truth.grid, CG, watch=best),
    }
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            best = Best(truth)
            way(best)
            rows[name].append(best.row)
            print(name, json.dumps(best.row), flush=True)
    report["rounds_of"] = rows
    report["medians"] = {
        name: {key: statistics.median(row[key] for row in some) for key in some[0]} for name, some in rows.items()
    }
    print(json.dumps({key: report[key] for key in ("machine", "agreement", "medians")}, indent=1))
    RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
