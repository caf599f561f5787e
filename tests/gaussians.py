"""Random Gaussians for the tests of the renderer, and a slow, plain account of what a renderer should return.

The account shares no formula with the library: it turns the axes by quaternion products, inverts the covariance
numerically, and finds the published box with exact fractions that are rounded once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from medgmae.ops import native_info
from medgmae.ops.voxel import native, reference
from medgmae.ops.voxel.inputs import VoxelInputs
from medgmae.ops.voxel.operator import support_code

torch.set_num_threads(1)  # the tensors are so small that threads would only wait for each other

Parameters = tuple[Tensor, Tensor, Tensor, Tensor]
SUPPORTS: list[Any] = ["box", 2.5, None]
RUNNABLE = [name for name, runs in native_info()["cpu_variants"].items() if runs]


def make(
    batch: int = 2,
    count: int = 5,
    dtype: torch.dtype = torch.float64,
    *,
    scale: float = 0.12,
    spread: float = 0.3,
    margin: float = 0.1,
    seed: int = 0,
    device: str = "cpu",
) -> Parameters:
    """Means (uniform, up to ``margin`` outside), scales (lognormal), quaternions and densities (of both signs)."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, count, *shape, generator=random, dtype=torch.float64)

    means = torch.rand(batch, count, 3, generator=random, dtype=torch.float64) * (1 + 2 * margin) - margin
    values = means, scale * (spread * normal(3)).exp(), normal(4), normal()
    return tuple(value.to(device, dtype) for value in values)  # type: ignore[return-value]


def leaves(parameters: Sequence[Tensor]) -> Parameters:
    """Copies that ask for a gradient."""
    return tuple(p.detach().clone().requires_grad_() for p in parameters)  # type: ignore[return-value]


def hamilton(p: Sequence[float], q: Sequence[float]) -> list[float]:
    """Product of two quaternions (w, x, y, z)."""
    a, b, c, d = p
    e, f, g, h = q
    return [
        a * e - b * f - c * g - d * h,
        a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f,
        a * h + b * g - c * f + d * e,
    ]


def covariance(scales: Sequence[float], quat: Sequence[float]) -> np.ndarray:
    """Σ s_k² r_k r_kᵀ over the turned axes r_k = q e_k q*; a quaternion of zeros turns nothing."""
    norm = math.sqrt(sum(v * v for v in quat))
    q = [v / norm for v in quat] if norm else [1.0, 0.0, 0.0, 0.0]
    total = np.zeros((3, 3))
    for k, s in enumerate(scales):
        axis = hamilton(hamilton(q, [0.0] + [float(j == k) for j in range(3)]), [q[0], -q[1], -q[2], -q[3]])[1:]
        total += s * s * np.outer(axis, axis)
    return total


def round_to_float32(value: Fraction) -> Fraction:
    """The float32 nearest to an exact number, ties to even."""
    if value == 0:
        return value
    exponent = math.frexp(float(abs(value)))[1]
    if abs(value) >= Fraction(2) ** exponent:  # float() rounded up to a power of two, or down below one
        exponent += 1
    elif abs(value) < Fraction(2) ** (exponent - 1):
        exponent -= 1
    unit = Fraction(2) ** max(exponent - 24, -149)
    return round(value / unit) * unit


def box(center: float, scale: float, n: int) -> range:
    """Indices of the published box along one axis: n·c ∓ e in one float32 rounding, e = float32(n · float32(2 s))."""
    c, s = Fraction(float(np.float32(center))), Fraction(float(np.float32(scale)))
    extent = round_to_float32(n * round_to_float32(2 * s))
    first, last = int(round_to_float32(n * c - extent)), int(round_to_float32(n * c + extent))
    return range(max(0, first), max(0, min(n - 1, last) + 1))


def slow_render(parameters: Sequence[Tensor], size: Sequence[int], support: Any) -> Tensor:
    """(B, 1, D, H, W) in float64: every voxel, every Gaussian, one after the other."""
    means, scales, quats, densities = (p.detach().double().numpy() for p in parameters)
    out = np.zeros((means.shape[0], 1, *size))
    for b, k in itertools.product(*map(range, means.shape[:2])):
        inverse = np.linalg.inv(covariance(scales[b, k], quats[b, k]))
        inside = [box(means[b, k, j], scales[b, k, j], n) if support == "box" else range(n) for j, n in enumerate(size)]
        for voxel in itertools.product(*inside):
            d = np.array([i / (n - 1) if n > 1 else 0.0 for i, n in zip(voxel, size, strict=True)]) - means[b, k]
            square = d @ inverse @ d
            if support in ("box", None) or square <= support**2:
                out[(b, 0, *voxel)] += densities[b, k] * math.exp(-0.5 * square)
    return torch.from_numpy(out)


def cut(volume: Tensor, patches: Tensor, patch: Sequence[int]) -> Tensor:
    """The patches (B, n) of a volume (B, 1, D, H, W), flattened: (B, n, prod(patch))."""
    grid = [s // p for s, p in zip(volume.shape[2:], patch, strict=True)]
    rows = []
    for b, row in enumerate(patches.tolist()):
        for number in row:
            z, y, x = number // (grid[1] * grid[2]), number // grid[2] % grid[1], number % grid[2]
            corner = [z * patch[0], y * patch[1], x * patch[2]]
            part = volume[(b, 0, *(slice(c, c + p) for c, p in zip(corner, patch, strict=True)))]
            rows.append(part.flatten())
    return torch.stack(rows).reshape(*patches.shape, -1)


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative L2 difference."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def peak_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest absolute value."""
    expected = expected.double()
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


class Path(NamedTuple):
    """One implementation: what the registration of ``medgmae::voxelize`` takes."""

    name: str
    forward: Callable[..., Tensor]
    backward: Callable[..., Parameters]

    def render(
        self,
        parameters: Sequence[Tensor],
        size: Sequence[int],
        support: Any,
        patches: Tensor | None = None,
        patch: Sequence[int] | None = None,
    ) -> Tensor:
        """(B, 1, D, H, W), or (B, n, prod(patch)); differentiable."""
        batch = parameters[0].shape[0]
        if patches is None or patch is None:
            whole = torch.zeros(batch, 1, dtype=torch.int64, device=parameters[0].device)
            out: Tensor = _Render.apply(self, *parameters, whole, list(size), list(size), support_code(support))
            return out.reshape(batch, 1, *size)
        return _Render.apply(self, *parameters, patches, list(size), list(patch), support_code(support))

    def gradients(self, parameters: Sequence[Tensor], cotangent: Tensor, *args: Any) -> tuple[Tensor, Parameters]:
        """The rendering and the gradients of its product with a cotangent; the rest as for :meth:`render`."""
        inputs = leaves(parameters)
        out = self.render(inputs, *args)
        return out.detach(), torch.autograd.grad(out, inputs, cotangent)


class _Render(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, path: Path, *inputs: Any) -> Tensor:
        ctx.path, ctx.rest = path, inputs[5:]
        ctx.save_for_backward(*inputs[:5])
        return path.forward(VoxelInputs(*inputs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return (None, *ctx.path.backward(grad, VoxelInputs(*ctx.saved_tensors, *ctx.rest)), None, None, None, None)


REFERENCE = Path("reference", reference.forward, reference.backward)
NATIVE = [
    Path(name, partial(native.forward, variant=name), partial(native.backward, variant=name)) for name in RUNNABLE
]
PATHS = [REFERENCE, *NATIVE]
