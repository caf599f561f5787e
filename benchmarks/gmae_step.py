"""One training step of gmae_vit_base_patch16_96 at batch 2 on the CPU: the native renderer against the best torch one.

A step is forward, backward and AdamW, with a fixed mask over three quarters of the patches. Both sides are the same
model with the same weights; in the rival the renderer is replaced by a loop over Gaussians on the slices of their boxes
(renderer_rivals.py), the best torch that we know. So both have MedGMAE's box support. Loss and gradients of the first
step must agree. The renderer's own share is measured beside it: forward and backward of a new model's Gaussians alone.

    python benchmarks/gmae_step.py [--repeats 5] [--threads N] [--model gmae_vit_base_patch16_96]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from renderer import cpu_name
from torch import Tensor, nn
from torch_renderer import SliceLoopRenderer

import medgmae
from medgmae import GaussianRenderer, Gaussians, Masking

HERE = Path(__file__).parent


class Side:
    """A model with its renderer and optimiser."""

    def __init__(self, model: nn.Module, renderer: nn.Module) -> None:
        self.model: Any = copy.deepcopy(model)
        self.model.renderer = renderer
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1.5e-4)
        self.seconds: list[float] = []

    def step(self, x: Tensor, masking: Masking) -> float:
        """One timed step; its loss."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        loss: Tensor = self.model(x, masking).loss
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - begin)
        return float(loss.detach())

    def gradient(self) -> Tensor:
        """Of all parameters, as one vector."""
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def rendering(renderer: nn.Module, gaussians: Gaussians, x: Tensor, masking: Masking, patch: Any) -> float:
    """Seconds of one rendering of the masked patches, forward and backward."""
    leaves = Gaussians(*(tensor.detach().clone().requires_grad_() for tensor in gaussians.tensors()))
    hidden = torch.stack([torch.nonzero(mask).flatten() for mask in masking.mask])
    begin = time.perf_counter()
    renderer(leaves, x.shape[2:], hidden, patch).sum().backward()
    return time.perf_counter() - begin


def compare(name: str, repeats: int) -> dict[str, Any]:
    """Medians and ratios; the sides take turns."""
    torch.manual_seed(0)
    model = medgmae.create_model(name)
    encoder: Any = model.encoder
    x = torch.rand(2, 1, *encoder.img_size)
    masking = medgmae.random_masking(2, torch.Size(encoder.grid_size).numel(), 0.75)
    renderers = {"native": GaussianRenderer("box"), "slice loop": SliceLoopRenderer()}
    made = {side: Side(model, renderer) for side, renderer in renderers.items()}
    losses = {side: one.step(x, masking) for side, one in made.items()}
    ours, theirs = made["native"].gradient(), made["slice loop"].gradient()
    gradients = float((ours - theirs).norm() / theirs.norm())
    off = abs(losses["native"] - losses["slice loop"]) / losses["slice loop"]
    if gradients > 1e-3 or off > 1e-5:
        raise SystemExit(f"the sides disagree: losses {losses}, gradients {gradients:.1e}")
    for one in made.values():
        one.seconds.clear()  # the first step warms up
    for _ in range(repeats):
        for one in made.values():
            one.step(x, masking)
    gaussians = model.gaussians(x, masking)
    alone: dict[str, list[float]] = {side: [] for side in made}
    for _ in range(repeats + 1):
        for side, renderer in renderers.items():
            alone[side].append(rendering(renderer, gaussians, x, masking, encoder.patch_size))
    medians = {side: statistics.median(one.seconds) for side, one in made.items()}
    shares = {side: statistics.median(seconds[1:]) for side, seconds in alone.items()}
    return {
        "seconds_per_step": {side: round(value, 4) for side, value in medians.items()},
        "speedup": round(medians["slice loop"] / medians["native"], 2),
        "renderer_milliseconds": {side: round(1e3 * seconds, 2) for side, seconds in shares.items()},
        "renderer_speedup": round(shares["slice loop"] / shares["native"], 1),
        "loss_relative_difference": off,
        "gradients_relative_difference": gradients,
    }


def main() -> None:
    """Print a table and write results/gmae_step.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", default="gmae_vit_base_patch16_96")
    parser.add_argument("--out", type=Path, default=HERE / "results/gmae_step.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = compare(options.model, options.repeats)
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": options.threads, "load": os.getloadavg()[0]}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    facts = {"model": options.model, "batch": 2, "repeats": options.repeats}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps({**facts, **result, "machine": machine, "versions": versions}, indent=1) + "\n")
    print(f"{options.model}, batch 2: {result['seconds_per_step']} s per step; torch / native = {result['speedup']}")
    print(f"renderer alone {result['renderer_milliseconds']} ms; gradients differ by ", end="")
    print(f"{result['gradients_relative_difference']:.1e}, losses by {result['loss_relative_difference']:.1e}")


if __name__ == "__main__":
    main()
