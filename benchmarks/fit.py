"""Steps of fitting Gaussians to the chest CT of examples/data: the native renderer against the same loop on torch.

The rivals take the place of the renderer and nothing else: the library's torch reference (every Gaussian at every
voxel, in chunks), and the best torch that we know, a loop over Gaussians on the slices of their boxes with a backward
fed by hand. All have MedGMAE's box support, which the loop needs. Every side starts from the same Gaussians, those of
`fit_gaussians` with 0 steps, and takes its steps in turn with the others, by Adam as `fit_gaussians` does; the
gradients of the first step and the PSNR after the last must agree.

  small   4 mm, 500 Gaussians: all three
  demo    1.5 mm as stored, 20,000 Gaussians: the reference would take hours

    python benchmarks/fit.py [--steps 5] [--threads N] [--case small|demo]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from renderer import cpu_name
from torch import Tensor, nn
from torch_renderer import ReferenceRenderer, SliceLoopRenderer

from medgmae import GaussianRenderer, Gaussians, Volume, create_transform, fit_gaussians

HERE = Path(__file__).parent
RATES = (0.3, 0.1, 0.06, 0.02)  # of centres, scales, rotations and densities: those fit_gaussians begins with
CASES: dict[str, tuple[float, int]] = {"small": (4.0, 500), "demo": (1.5, 20_000)}


def scan(spacing: float) -> Volume:
    """The chest CT, [-1000, 400] HU to 0..1."""
    block = {"window": [-1000, 400], "spacing": [spacing] * 3, "resample": {"to": "spacing"}}
    return create_transform(block, whole=True)(HERE.parent / "examples/data/ct_thorax.nii.gz")


def sides(case: str) -> dict[str, nn.Module]:
    """The renderers that a case compares, ours first."""
    renderers: dict[str, nn.Module] = {"native": GaussianRenderer("box"), "slice loop": SliceLoopRenderer()}
    return {**renderers, "reference": ReferenceRenderer()} if case == "small" else renderers


class Descent:
    """Adam on Gaussians through a renderer, in voxels, logarithms and parts of the scan's range, as fit_gaussians."""

    def __init__(self, volume: Volume, start: Gaussians, renderer: nn.Module) -> None:
        self.values, self.renderer = volume.data, renderer
        self.span = float(self.values.max() - self.values.min())
        self.unit = 1 / (torch.tensor(volume.size) - 1.0)  # a voxel in units of the axis
        tensors = (start.means / self.unit, (start.scales / self.unit).log(), start.quats, start.densities / self.span)
        self.parameters = [tensor.clone().requires_grad_() for tensor in tensors]
        groups = [{"params": [p], "lr": lr} for p, lr in zip(self.parameters, RATES, strict=True)]
        self.adam = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-15)

    def step(self) -> float:
        """One step; the PSNR in dB before it."""
        means, log_scales, quats, densities = self.parameters
        gaussians = Gaussians(means * self.unit, log_scales.exp() * self.unit, quats, densities * self.span)
        rendered = self.renderer(gaussians, self.values.shape[1:])[0]
        loss = (rendered - self.values).div(self.span).square().mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return -10 * math.log10(float(loss.detach()))


def disagreement(fits: dict[str, Descent]) -> float:
    """Largest relative L2 difference of any parameter's gradient from the native one's."""
    ours: list[Tensor] = [p.grad.clone() for p in fits["native"].parameters]
    return max(
        float((p.grad - g).norm() / g.norm())
        for fit in fits.values()
        for p, g in zip(fit.parameters, ours, strict=True)
    )


def compare(case: str, steps: int) -> dict[str, Any]:
    """Seconds per step and ratios; the sides take turns."""
    spacing, count = CASES[case]
    volume = scan(spacing)
    start = fit_gaussians(volume, count, steps=0, support="box")
    fits = {name: Descent(volume, start, renderer) for name, renderer in sides(case).items()}
    times: dict[str, list[float]] = {name: [] for name in fits}
    psnr: dict[str, float] = {}
    gradients = 0.0
    for step in range(1, steps + 1):
        for name, fit in fits.items():
            begin = time.perf_counter()
            psnr[name] = fit.step()
            times[name].append(time.perf_counter() - begin)
        if step == 1:
            gradients = disagreement(fits)
    if gradients > 1e-3 or max(psnr.values()) - min(psnr.values()) > 0.02:
        raise SystemExit(f"{case}: the sides disagree: gradients {gradients:.1e}, PSNR {psnr}")
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "size": list(volume.size),
        "gaussians": count,
        "seconds_per_step": {name: round(value, 5) for name, value in medians.items()},
        "speedup": {name: round(value / medians["native"], 1) for name, value in medians.items() if name != "native"},
        "gradients_relative_difference": gradients,
        "psnr": psnr,
    }


def main() -> None:
    """Print a table and write results/fit.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--case", choices=list(CASES), action="append")
    parser.add_argument("--out", type=Path, default=HERE / "results/fit.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = {case: compare(case, options.steps) for case in options.case or CASES}
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": options.threads, "load": os.getloadavg()[0]}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    report = {"cases": cases, "machine": machine, "versions": versions, "steps": options.steps}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, case in cases.items():
        print(f"{name:6} {case['seconds_per_step']} s per step; rivals / native = {case['speedup']}")
        print(f"       gradients differ by {case['gradients_relative_difference']:.1e}; PSNR {case['psnr']}")


if __name__ == "__main__":
    main()
