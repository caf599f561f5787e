"""UNETR against MONAI's of the same size and the same weights: forward, training step, peak memory, on the CPU.

ViT-B/16, 96x96x96 voxels, 16 features, 14 classes, batch 1. MONAI's weights are loaded into ours by load_pretrained;
logits and gradients must agree. A step is forward, cross entropy, backward and AdamW. The sides take turns. Memory is
that of a process of its own per side and mode: its peak above what it took before the model was built.

Floor of a step's memory: weights, gradients and moments of 92.8 million parameters are 1,415 MiB, and what the first
step leaves in glibc's heap makes 1,574 MiB before the second begins. A map of 16 channels at every voxel takes 54 MiB,
more than that heap takes in, so each adds to the peak. The goal of 0.8 of MONAI's 2,440 MiB leaves room for seven.

Before tuning, 2,496 MiB: the backward pass began with 14 maps, kept by autograd, and the copies that oneDNN makes of
each in its own layout were the peak, in the shortcut of the finest block. With channels last, for which
oneDNN copies nothing, without the concatenation, and with norms that keep their result alone, 10 maps: 2,115 MiB.
Prediction for computing the finest step again, branch by branch: six maps, 1,899 MiB: the skip connection, the result
and a norm of the block, the gradient that arrives, and the two that leave.

Outcome: 1,871 MiB, 0.76 of MONAI's. What computing again costs, a twelfth of a step (7.1 s for 6.5 s), is less than
channels last save: a 3x3x3 convolution of 16 to 16 channels takes 98 ms for 158, its gradients 160 for 311. With
checkpointing, which drops the maps of the encoder and of the coarser steps too, 1,801 MiB.

    python benchmarks/unetr.py [--repeats 5] [--threads 1] [--size 96]
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
from pathlib import Path
from typing import Any

import torch
from renderer import cpu_name
from torch import Tensor, nn

import medgmae

HERE = Path(__file__).parent
CLASSES = 14


def rival(size: int) -> nn.Module:
    """MONAI's."""
    from monai.networks.nets import UNETR

    return UNETR(1, CLASSES, (size,) * 3, 16, 768, 3072, 12, "conv")


def ours(size: int) -> Any:
    """This library's, of the same layers."""
    options = {"img_size": size, "class_token": False, "norm_eps": 1e-5, "drop_path_rate": 0.0}
    return medgmae.create_model("unetr_vit_base_patch16_96", **options)


def checkpointed(size: int) -> Any:
    """The same, computing blocks again in the backward pass."""
    model = ours(size)
    model.set_grad_checkpointing()
    return model


SIDES: dict[str, Callable[[int], Any]] = {"monai": rival, "medgmae": ours, "medgmae, checkpointing": checkpointed}


def batch(size: int) -> tuple[Tensor, Tensor]:
    """An image and its labels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, size, size, size, generator=generator)
    return image, torch.randint(CLASSES, (1, size, size, size), generator=generator)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, image: Tensor, labels: Tensor) -> None:
    """One training step."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(image), labels).backward()
    optimizer.step()


def gradients(model: nn.Module, image: Tensor, labels: Tensor) -> Tensor:
    """Of the last layer, which everything before has shaped, and of the patch embedding, which everything shapes."""
    nn.functional.cross_entropy(model(image), labels).backward()
    shapes = {(CLASSES, 16, 1, 1, 1), (768, 1, 16, 16, 16)}
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None and tuple(p.shape) in shapes]
    return torch.cat(sorted(found, key=len))


def check(models: dict[str, Any], image: Tensor, labels: Tensor) -> dict[str, float]:
    """Largest difference of logits and relative one of gradients, of the sides from MONAI; stop where they disagree."""
    found = {}
    with torch.no_grad():
        logits = {side: model.eval()(image) for side, model in models.items()}
    pulled = {side: gradients(model.train(), image, labels) for side, model in models.items()}
    for side in models:
        apart = float((logits[side] - logits["monai"]).abs().max())
        turned = float((pulled[side] - pulled["monai"]).norm() / pulled["monai"].norm())
        if (
            apart > 1e-3 or turned > 1e-2
        ):  # in float64 the gradients agree to 1e-14: float32's rounding grows on the way
            raise SystemExit(f"{side} and MONAI disagree: logits by {apart:.1e}, gradients by {turned:.1e}")
        found[side] = max(apart, turned)
    return found


def resident(field: str) -> float:
    """MiB of this process: "VmRSS" now, "VmHWM" at most so far (``getrusage`` counts what the parent had, too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure_memory(side: str, mode: str, size: int) -> None:
    """For a process of its own: print the peak of one forward or of two steps, above what was there before the model.

    One step's optimiser makes its moments, so that the second is like all that follow.
    """
    image, labels = batch(size)
    import monai.networks.nets  # noqa: F401 - on every side, so that only the models differ

    before = resident("VmRSS")
    model = SIDES[side](size)
    if mode == "forward":
        with torch.no_grad():
            model.eval()(image)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for _ in range(2):
            step(model.train(), optimizer, image, labels)
    print(resident("VmHWM") - before)


def memory(size: int, threads: int) -> dict[str, dict[str, float]]:
    """Mode and side to MiB."""
    found: dict[str, dict[str, float]] = {}
    for mode in ("forward", "step"):
        for side in SIDES:
            command = [sys.executable, __file__, "--memory", side, mode, "--size", str(size), "--threads", str(threads)]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            found.setdefault(mode, {})[side] = round(float(run.stdout), 0)
    return found


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def compare(size: int, repeats: int) -> dict[str, Any]:
    """Medians of the sides, which take turns."""
    torch.manual_seed(0)
    image, labels = batch(size)
    models: dict[str, Any] = {side: make(size) for side, make in SIDES.items()}
    for side, model in models.items():
        if side != "monai":
            medgmae.load_pretrained(model, models["monai"].state_dict())
    differences = check(models, image, labels)
    optimizers = {side: torch.optim.AdamW(model.parameters(), lr=1e-4) for side, model in models.items()}
    seconds: dict[str, dict[str, list[float]]] = {mode: {side: [] for side in models} for mode in ("forward", "step")}
    for _ in range(repeats + 1):
        for side, model in models.items():
            with torch.no_grad():
                seconds["forward"][side].append(timed(lambda model=model: model(image)))
            work = lambda model=model, side=side: step(model, optimizers[side], image, labels)  # noqa: E731
            seconds["step"][side].append(timed(work))
    medians = {mode: {side: statistics.median(s[1:]) for side, s in of.items()} for mode, of in seconds.items()}
    return {
        "seconds": {mode: {side: round(s, 3) for side, s in of.items()} for mode, of in medians.items()},
        "speed_against_monai": {
            mode: {side: round(of["monai"] / s, 2) for side, s in of.items()} for mode, of in medians.items()
        },
        "largest_difference": {side: float(f"{value:.1e}") for side, value in differences.items()},
    }


def main() -> None:
    """Print what was measured and write results/unetr.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--memory", nargs=2, metavar=("SIDE", "MODE"))
    parser.add_argument("--out", type=Path, default=HERE / "results/unetr.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        measure_memory(*options.memory, options.size)
        return
    result = compare(options.size, options.repeats)
    mebibytes = memory(options.size, options.threads)
    result["mebibytes"] = mebibytes
    result["memory_against_monai"] = {
        mode: {side: round(m / of["monai"], 2) for side, m in of.items()} for mode, of in mebibytes.items()
    }
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": options.threads, "load": os.getloadavg()[0]}
    machine["instruction_set"] = torch.backends.cpu.get_cpu_capability()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "monai": _version("monai")}
    facts = {"model": "unetr_vit_base_patch16_96", "size": options.size, "batch": 1, "repeats": options.repeats}
    text = json.dumps({**facts, **result, "machine": machine, "versions": versions}, indent=1)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(text + "\n")
    print(text)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
