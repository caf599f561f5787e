"""The renderer on a GPU, for `renderer.py --device cuda`: CUDA graphs of forward + backward, timed with events.

The rival is published_scheme.cu, our rebuild of the published scheme (one thread for one Gaussian), compiled here with
nvcc. Both sides compute gradients to centres, densities and, ours, to scales and rotations, the rival to the precision
matrix, so that the chain rule is ours alone to pay. Goals on an H100, 4 samples of 512 Gaussians in 96 voxels a side,
box support: at most 0.30 ms at s = 0.2, 0.12 ms at s <= 0.1, and 200 times the rival.
"""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from renderer_checks import gaussians
from torch import Tensor

from medgmae.ops import native_info, voxelize
from medgmae.ops.voxel import reference

CASES = [(4, 512, 96, 0.05), (4, 512, 96, 0.1), (4, 512, 96, 0.2), (1, 65536, 256, 0.01)]
GOALS_MS = {(512, 0.05): 0.12, (512, 0.1): 0.12, (512, 0.2): 0.30, (65536, 0.01): 1.0}


class Published:
    """The rival for one set of parameters."""

    def __init__(self, library: ctypes.CDLL, parameters: list[Tensor], side: int, cotangent: Tensor) -> None:
        means, self.scales, quats, self.densities = (p.detach() for p in parameters)
        self.library, self.means, self.size, self.cotangent = library, means, (side,) * 3, cotangent
        self.precision = reference.precision_matrix(self.scales, quats).contiguous()
        line = torch.linspace(0, 1, side, device="cuda")
        self.grid = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).contiguous()
        self.volume = torch.empty_like(cotangent)
        self.gradients = [torch.empty_like(t) for t in (means, self.precision, self.densities)]

    def call(self, name: str, sample: int, extra: list[Tensor]) -> None:
        """Launch one kernel for one sample."""
        tensors = [self.means[sample], self.scales[sample], self.precision[sample], self.densities[sample], self.grid]
        addresses = [ctypes.c_void_p(t.data_ptr()) for t in (*tensors, *extra)]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = getattr(self.library, name)(self.means.shape[1], *self.size, *addresses, stream)
        if error:
            raise RuntimeError(f"{name}: CUDA error {error}")

    def forward(self) -> Tensor:
        """The volumes (B, 1, D, H, W)."""
        self.volume.zero_()
        for b in range(len(self.means)):
            self.call("published_forward", b, [self.volume[b]])
        return self.volume

    def both(self) -> None:
        """Forward and backward."""
        self.forward()
        for gradient in self.gradients:
            gradient.zero_()
        for b in range(len(self.means)):
            self.call("published_backward", b, [self.cotangent[b], *(g[b] for g in self.gradients)])


def build(folder: Path, here: Path) -> ctypes.CDLL:
    """Compile the rival."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    library = folder / "published_scheme.so"
    command = [
        nvcc,
        "-O3",
        "-arch=native",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-o",
        library,
        here / "published_scheme.cu",
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def graph_of(run: Callable[[], Any]) -> Callable[[], None]:
    """The work of a call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return lambda: graph.replay()


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Per call, by events around so many of them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def measure(library: ctypes.CDLL, case: tuple[int, int, int, float], rounds: int) -> dict[str, Any]:
    """One case: ours and the rival in turns, results compared first."""
    batch, count, side, scale = case
    parameters = [p.detach().cuda().requires_grad_() for p in gaussians(count, scale, batch)]
    size, cotangent = (side,) * 3, torch.rand(batch, 1, side, side, side, device="cuda")
    rival = Published(library, parameters, side, cotangent)

    def forward() -> Tensor:
        with torch.no_grad():
            return voxelize(*parameters, size, support="box")

    def both() -> Any:
        return torch.autograd.grad(voxelize(*parameters, size, support="box"), parameters, cotangent)

    volume, gradients = forward(), both()
    rival.both()
    for name, got, expected in [("volume", rival.volume, volume), ("centres", rival.gradients[0], gradients[0]),
                                ("densities", rival.gradients[2], gradients[3])]:  # fmt: skip
        error = float((got - expected).norm() / expected.norm())
        if not error < 1e-3:
            raise SystemExit(f"the rival's {name} differ by {error:.1e}")
    ways = {"forward": graph_of(forward), "both": graph_of(both), "both without a graph": both,
            "published, forward": rival.forward, "published, both": rival.both}  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            times[name].append(milliseconds(run, 3 if name.startswith("published") else 50))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    first, last = reference.box_bounds(parameters[0].detach(), parameters[1].detach(), size)
    pairs = int((last - first + 1).clamp(min=0).prod(-1).sum())
    row = {"batch": batch, "gaussians": count, "size": size, "scale": scale, "pairs": pairs, "ms": medians}
    return row | {
        "times_faster": medians["published, both"] / medians["both"],
        "gpairs_per_s": pairs / medians["both"] / 1e6,
    }


def on_cuda(rounds: int, here: Path) -> dict[str, Any]:
    """All cases, the machine and the goals."""
    if not torch.cuda.is_available():
        raise SystemExit(f"no CUDA device: {native_info().get('cuda')}")
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder), here)
        rows = [measure(library, case, rounds) for case in CASES]
    goals: dict[str, float] = {}
    for row in rows:
        print(row)
        goal = GOALS_MS[row["gaussians"], row["scale"]]
        name = f"N={row['gaussians']} B={row['batch']} s={row['scale']}"
        goals[f"{name}: forward + backward, ms, goal {goal}"] = row["ms"]["both"]
        goals[f"{name}: times faster than the published scheme, goal 200"] = row["times_faster"]
    info = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "native": native_info()["cuda"]}
    return {"machine": info, "rounds": rounds, "cases": rows, "goals": goals}
