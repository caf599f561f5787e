"""Accuracy and memory of the renderer, for renderer.py."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medgmae.ops import voxelize
from medgmae.ops.voxel import reference
from medgmae.ops.voxel.inputs import VoxelInputs

HERE = Path(__file__).parent
SIZE = (96, 96, 96)
SCALES = (0.05, 0.1, 0.2)


def gaussians(count: int, scale: float, batch: int = 1) -> list[Tensor]:
    """Random parameters that ask for gradients."""
    random = torch.Generator().manual_seed(0)
    normal = [torch.randn(batch, count, width, generator=random) for width in (3, 4)]
    uniform = torch.rand(batch, count, 4, generator=random)
    values = [uniform[..., :3], scale * (0.3 * normal[0]).exp(), normal[1], uniform[..., 3]]
    return [value.contiguous().requires_grad_() for value in values]


def accuracy() -> list[dict[str, Any]]:
    """Largest error over the largest value, and relative L2 error of the gradients, against the reference in float64.

    The volume is rendered whole. The reference renders a random sixteenth of its patches; the cotangent is 0 outside.
    """
    rows = []
    patches = torch.randperm(512, generator=torch.Generator().manual_seed(1))[None, :32]
    for scale in SCALES:
        parameters = gaussians(512, scale)
        cotangent = torch.rand(1, 32, 1728, generator=torch.Generator().manual_seed(2))
        for name, support in (("box", "box"), ("everywhere", None)):
            code = 0.0 if support == "box" else math.inf
            exact = VoxelInputs(*(p.detach().double() for p in parameters), patches, list(SIZE), [12] * 3, code)
            expected = reference.forward(exact)
            wanted = reference.backward(cotangent.double(), exact)
            volume = voxelize(*parameters, SIZE, support=support)  # type: ignore[arg-type]
            blocks = volume.reshape(1, 8, 12, 8, 12, 8, 12).permute(0, 1, 3, 5, 2, 4, 6).reshape(1, 512, 1728)
            part = blocks[:, patches[0]]
            got = torch.autograd.grad(part, parameters, cotangent)
            top = float(volume.detach().max())
            names = ("means", "scales", "quats", "densities")
            rows.append(
                {
                    "scale": scale,
                    "support": name,
                    "forward": float((part.detach() - expected).abs().max()) / top,
                    "gradients": {
                        n: float((g - w).norm() / w.norm()) for n, g, w in zip(names, got, wanted, strict=True)
                    },
                }
            )
    return rows


MEMORY = """
import sys; sys.path[:0] = [{here!r}]
import torch, renderer_checks
from medgmae.ops import voxelize
def status(key): return int(open("/proc/self/status").read().partition(key + ":")[2].split()[0]) * 1024
torch.set_num_threads({threads})
parameters = renderer_checks.gaussians({count}, 0.1)
size = renderer_checks.SIZE
cotangent = torch.rand(1, 1, *size)
torch.autograd.grad(voxelize(*parameters, size, support={support!r}), parameters, cotangent)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
result = torch.autograd.grad(voxelize(*parameters, size, support={support!r}), parameters, cotangent)
print(status("VmHWM") - before)
"""


def memory(count: int, support: Any, threads: int) -> dict[str, Any]:
    """Peak resident memory of forward + backward in a fresh process, above what it held before, in MB.

    The operating system's own count (VmHWM, reset before the call): whoever allocates, torch or the kernels, is in it.
    A first call of the same kind does not count: it loads code and fills what libraries keep. Glibc is told to give
    freed blocks back, or that call would leave behind what the second one needs.
    """
    code = MEMORY.format(here=str(HERE), threads=threads, count=count, support=support)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    peak, volume, gradients = int(done.stdout) / 1e6, 4e-6 * math.prod(SIZE), 44e-6 * count
    row = {"gaussians": count, "support": support or "everywhere", "threads": threads, "peak_mb": peak}
    return row | {"volume_mb": volume, "gradients_mb": gradients, "extra_mb": peak - volume - gradients}
