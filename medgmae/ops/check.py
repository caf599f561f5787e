"""Runs every operator on every native path that this machine has, and compares it with the torch reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medgmae.ops import conv, projection, rays, scan, voxel
from medgmae.ops.conv.inputs import ConvInputs
from medgmae.ops.native import device_problem, native_info
from medgmae.ops.projection.inputs import ProjectInputs
from medgmae.ops.rays.inputs import RayInputs
from medgmae.ops.scan.inputs import ScanInputs
from medgmae.ops.voxel.inputs import VoxelInputs

# Largest difference from the reference in float64, over the largest value of each result.
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-9}


class _Case(NamedTuple):
    """An operator (a package with the modules reference, native and cuda) and what it is run on, in float64."""

    name: str
    operator: Any
    inputs: Any


def self_test(threads: int | None = None) -> dict[str, float]:
    """Run every operator, forward and backward, on every native path that this machine has.

    Paths are the CPU's instruction sets and the current GPU, each in float32 and float64; inputs are tiny, so this
    takes about a second.

    Args:
        threads: CPU threads; torch's own number if None.

    Returns:
        For each path, such as `"cpu/avx2/float32/voxelize"`, the largest difference from the torch reference in
        float64, relative to the largest value of the result or gradient.

    Raises:
        RuntimeError: the native module is not loaded, a path differs by more than rounding, or torch sees a GPU that
            the native module cannot use.
    """
    info = native_info()
    if not info["loaded"]:
        raise RuntimeError(f"the native module is not loaded: {info['error']}")
    problem = device_problem(torch.cuda.current_device()) if torch.cuda.is_available() else None
    if problem:
        raise RuntimeError(f"torch sees the GPU {torch.cuda.get_device_name()}, but {problem}")
    errors, wrong = {}, {}
    for case in _cases():
        wanted = _results((case.operator.reference.forward, case.operator.reference.backward), case.inputs)
        for dtype, bound in BOUNDS.items():
            for path, device, run in _paths(case.operator, info["cpu_variants"], threads):
                name = f"{path}/{str(dtype).removeprefix('torch.')}/{case.name}"
                errors[name] = _error(run, case.inputs, dtype, device, wanted)
                if not errors[name] <= bound:
                    wrong[name] = errors[name]
    if wrong:
        raise RuntimeError(f"native kernels differ from torch (largest relative difference): {wrong}; rebuild medgmae")
    return errors


Run = tuple[Callable[..., Any], Callable[..., Any]]


def _paths(operator: Any, variants: dict[str, bool], threads: int | None) -> Iterator[tuple[str, str, Run]]:
    """Name, device, forward and backward of every native implementation that runs here."""
    for variant, runs in variants.items():
        if runs:
            options = {"variant": variant, "threads": threads}
            native = operator.native
            yield f"cpu/{variant}", "cpu", (partial(native.forward, **options), partial(native.backward, **options))
    if torch.cuda.is_available():
        yield f"cuda/{torch.cuda.get_device_name()}", "cuda", (operator.cuda.forward, operator.cuda.backward)


def _error(run: Run, inputs: Any, dtype: torch.dtype, device: str, wanted: list[Tensor]) -> float:
    """The largest relative difference among results and gradients."""

    def there(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    got = _results(run, type(inputs)(*map(there, inputs)))
    return max(_difference(a.cpu().double(), b) for a, b in zip(got, wanted, strict=True))


def _results(run: Run, inputs: Any) -> list[Tensor]:
    """All that an operator returns, and all gradients of its sum weighted by a ramp."""
    forward, backward = run
    out = forward(inputs)
    first, *further = out if isinstance(out, tuple) else (out,)
    ramp = torch.linspace(-1, 1, first.numel(), dtype=torch.float64).view(first.shape).float().to(first)
    gradients: Sequence[Tensor | None] = backward(ramp, *[None] * len(further), *further, inputs)
    return [first, *further, *(g for g in gradients if g is not None)]


def _difference(got: Tensor, wanted: Tensor) -> float:
    difference = float((got - wanted).abs().max())
    return difference / float(wanted.abs().max()) if math.isfinite(difference) else math.inf


def _cases() -> Iterator[_Case]:
    """What is run: numbers that float32 holds exactly."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).double()

    whole = torch.zeros(2, 1, dtype=torch.int64)
    # Wide Gaussians without truncation are rendered on coarse lattices, which are interpolated by banded products.
    for name, count, size, scale, support in [
        ("voxelize", 20, (9, 17, 21), 0.1, 0.0),
        ("voxelize in levels", 96, (32, 32, 32), 0.4, math.inf),
    ]:
        means, scales = 0.5 + 0.25 * normal(2, count, 3), (scale * (0.4 * normal(2, count, 3)).exp()).float().double()
        gaussians = means, scales, normal(2, count, 4), normal(2, count)
        yield _Case(name, voxel, VoxelInputs(*gaussians, whole, size, size, support))
    views = torch.tensor([[[64.0, 3, 1], [-32, -20, -16], [0, 2, 0.5], [1, 0, 2]]], dtype=torch.float64).expand(
        2, 1, 4, 3
    )
    for name, support, parallel in [("project", 3.0, False), ("project in parallel", math.inf, True)]:
        means, scales = 8 * normal(2, 20, 3), (2 * (0.4 * normal(2, 20, 3)).exp()).float().double()
        gaussians = means, scales, normal(2, 20, 4), normal(2, 20)
        inputs = ProjectInputs(*gaussians, views, (17, 21), support, parallel, False)
        yield _Case(name, projection, inputs)
    scanned = ScanInputs(
        u=normal(2, 70, 20),
        delta=normal(2, 70, 20),
        A=-normal(20, 16).abs(),
        B=normal(2, 70, 2, 16),
        C=normal(2, 70, 1, 16),
        D=normal(20),
        z=normal(2, 70, 20),
        delta_bias=normal(20),
        softplus=True,
        reverse=False,
        chunk=64,
    )
    yield _Case("selective_scan", scan, scanned)
    yield _Case("causal_conv1d", conv, ConvInputs(normal(2, 70, 20), normal(20, 4), normal(20), True, False))
    views = torch.tensor([[[-40, 3, 4], [30, -6, -6], [0, 3, 0], [0, 0.5, 3]]], dtype=torch.float64)
    spacing = torch.tensor([2.0, 1.0, 1.5], dtype=torch.float64)
    yield _Case("project_volume", rays, RayInputs(normal(2, 8, 9, 10), views, spacing, (5, 5), False))
