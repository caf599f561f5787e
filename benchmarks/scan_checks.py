"""Inputs, accuracy and memory of the selective scan, for scan.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scan_rivals import TorchReference, rivals
from torch import Tensor

from medgmae.ops import selective_scan
from medgmae.ops.conv import native as conv_native
from medgmae.ops.scan import native as scan_native

HERE = Path(__file__).parent
CHANNELS, STATES = 768, 16
Way = Callable[[], Any]
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def force(variant: str) -> None:
    """Have the CPU kernels of an instruction set run from now on."""
    for module in (scan_native, conv_native):
        run = module._run
        module._run = lambda call, _, threads, run=run: run(call, variant, threads)  # type: ignore[misc]


def scan_inputs(length: int) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias as a mixer has them at the start of training, (1, L, D) and (1, L, N)."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    by_token = [normal(1, length, CHANNELS) for _ in range(3)]
    decay = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    matrices = [normal(1, length, STATES) for _ in range(2)]
    bias = torch.linspace(-6.9, -2.25, CHANNELS)  # steps of 0.001 to 0.1 behind softplus
    return [by_token[0], 0.5 * by_token[1], decay, *matrices, 1 + 0.1 * normal(CHANNELS), by_token[2], bias]


def conv_inputs(length: int) -> list[Tensor]:
    """x (1, L, D), weight of four taps, bias."""
    random = torch.Generator().manual_seed(0)
    shapes = (1, length, CHANNELS), (CHANNELS, 4), (CHANNELS,)
    return [torch.randn(*shape, generator=random) for shape in shapes]


def swapped(tokens: Sequence[Tensor]) -> list[Tensor]:
    """What has a token axis with the channels first, contiguous."""
    return [t.transpose(1, 2).contiguous() if t.dim() == 3 else t for t in tokens]


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, to differentiate by."""
    return [t.detach().requires_grad_() for t in tensors]


def ours(tokens: Sequence[Tensor]) -> Tensor:
    """The public function on (1, L, D) tensors."""
    u, delta, A, B, C, D, z, bias = tokens
    by_channel = [t.transpose(1, 2) for t in (u, delta, B, C, z)]
    out: Tensor = selective_scan(*by_channel[:2], A, *by_channel[2:4], D, by_channel[4], bias, delta_softplus=True)
    return out.transpose(1, 2)


def way(run: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor | None) -> Way:
    """Forward without gradients, or forward and the gradients of everything."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [run(*tensors)]

    def both() -> list[Tensor]:
        out = run(*tensors)
        return [out.detach(), *torch.autograd.grad(out, list(tensors), grad)]

    return forward if grad is None else both


def results(run: Any, tensors: Sequence[Tensor], grad: Tensor) -> dict[str, Tensor]:
    """The result and all gradients by name."""
    inputs = leaves(tensors)
    out = run(*inputs)
    gradients = torch.autograd.grad(out, inputs, grad)
    return {"out": out.detach(), **{f"d {name}": g for name, g in zip(NAMES, gradients, strict=True)}}


def accuracy(length: int, device: str) -> dict[str, Any]:
    """Largest error over the largest value, ours and the best rival's, against the torch reference in float64."""
    tokens = scan_inputs(length)
    grad = torch.randn(1, length, CHANNELS, generator=torch.Generator().manual_seed(1))
    exact = results(TorchReference.apply, [t.double() for t in tokens], grad.double())
    row: dict[str, Any] = {"length": length}
    ways = {"ours": lambda *tensors: ours(tensors), "torch reference of this library": TorchReference.apply}
    for name, run in ways.items():
        computed = results(run, [t.to(device) for t in tokens], grad.to(device))
        row[name] = {key: float((computed[key].cpu() - e).abs().max() / e.abs().max()) for key, e in exact.items()}
    return row


MEMORY = """
import sys; sys.path[:0] = [{here!r}]
import scan_checks
print(scan_checks.peak({length}, {both}, {who!r}))
"""


def peak(length: int, both: bool, who: str) -> int:
    """Bytes at the peak of one call beyond what the process held before it."""
    rival = None if who == "ours" else rivals("cpu")[who]
    torch.set_num_threads(1)

    def prepared(length: int) -> Any:
        tokens = scan_inputs(length)
        tensors = leaves(tokens if rival is None or rival.tokens else swapped(tokens))
        grad = torch.ones_like(tensors[0])
        run = (lambda *t: ours(t)) if rival is None else rival.run
        return way(run, tensors, grad if both else None)

    prepared(128)()  # loads code and fills what libraries keep
    run = prepared(length)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = run()
    del result
    return status("VmHWM") - before


def status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    return int(Path("/proc/self/status").read_text().partition(key + ":")[2].split()[0]) * 1024


def memory(length: int, both: bool, who: str) -> dict[str, Any]:
    """Peak resident memory of one call in a fresh process, above what the process held with the inputs made, in MB.

    The operating system's own count (VmHWM, reset before the call): whoever allocates, torch or the kernels, is in it.
    Glibc is told to give freed blocks back, so that what an earlier call left behind is not used again.
    """
    code = MEMORY.format(here=str(HERE), length=length, both=both, who=who)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    held = 4e-6 * sum(t.numel() for t in scan_inputs(length))
    written = 4e-6 * length * CHANNELS + (held if both else 0)
    extra = int(done.stdout) / 1e6 - written
    row = {"length": length, "both": both, "who": who, "inputs_mb": held, "outputs_mb": written, "extra_mb": extra}
    return row | {"extra_over_tensors": extra / (held + written)}
