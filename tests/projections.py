"""Random Gaussians in millimetres, views around them, and the ways to project them, for the tests of the projector."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from gaussians import RUNNABLE, Parameters, leaves, peak_error, relative
from torch import Tensor

from medgmae.ops.projection import native, reference
from medgmae.ops.projection.inputs import ProjectInputs
from medgmae.ops.projection.operator import support_code

torch.set_num_threads(1)

__all__ = [
    "KINDS",
    "NATIVE",
    "REFERENCE",
    "SIZE",
    "Parameters",
    "Path",
    "circle",
    "leaves",
    "make",
    "peak_error",
    "relative",
]

SIZE = (13, 19)
KINDS: list[dict[str, Any]] = [
    {"beam": "cone"},
    {"beam": "cone", "support": 2.5},
    {"beam": "cone", "affine": True},
    {"beam": "parallel"},
    {"beam": "parallel", "support": 2.5},
]


def make(
    batch: int = 2,
    count: int = 6,
    dtype: torch.dtype = torch.float64,
    *,
    scale: float = 12.0,
    spread: float = 0.5,
    field: float = 60.0,
    seed: int = 0,
) -> Parameters:
    """Means within ±field mm, scales (lognormal), quaternions and densities (of both signs)."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, count, *shape, generator=random, dtype=torch.float64)

    means = (torch.rand(batch, count, 3, generator=random, dtype=torch.float64) * 2 - 1) * field
    values = means, scale * (spread * normal(3)).exp(), normal(4), 0.02 * normal()
    return tuple(value.to(dtype) for value in values)  # type: ignore[return-value]


def circle(
    views: int,
    size: Sequence[int] = SIZE,
    *,
    beam: str = "cone",
    source: float = 400.0,
    detector: float = 700.0,
    pixel: Sequence[float] = (14.0, 16.0),
    shift: Sequence[float] = (3.0, -5.0),
    tilt: float = 0.1,
) -> Tensor:
    """Views (V, 4, 3) on a circle around the z axis; the detector is shifted and tilted, its pixels are no squares."""
    found = []
    for i in range(views):
        angle = 0.3 + 2 * math.pi * i / max(views, 1)
        ray = torch.tensor([-math.cos(angle), -math.sin(angle), 0.0], dtype=torch.float64)
        across = torch.tensor([-math.sin(angle), math.cos(angle), 0.0], dtype=torch.float64)
        up = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64)
        column = pixel[0] * (math.cos(tilt) * across + math.sin(tilt) * ray)
        row = pixel[1] * (math.cos(tilt) * up - math.sin(tilt) * across * 0.5)
        centre = (detector - source) * ray + shift[0] * across + shift[1] * up
        corner = centre - (size[1] - 1) / 2 * column - (size[0] - 1) / 2 * row
        found.append(torch.stack([ray if beam == "parallel" else -source * ray, corner, column, row]))
    return torch.stack(found) if found else torch.zeros(0, 4, 3, dtype=torch.float64)


class Path(NamedTuple):
    """One implementation: what the registration of ``medgmae::project`` takes."""

    name: str
    forward: Callable[..., Tensor]
    backward: Callable[..., Parameters]

    def project(
        self,
        parameters: Sequence[Tensor],
        views: Tensor,
        size: Sequence[int] = SIZE,
        *,
        beam: str = "cone",
        support: Any = None,
        affine: bool = False,
    ) -> Tensor:
        """(B, V, H, W); differentiable."""
        views = views.expand(parameters[0].shape[0], *views.shape[-3:])
        rest = (list(size), support_code(support), beam == "parallel", affine)
        image: Tensor = _Project.apply(self, *parameters, views, *rest)
        return image

    def gradients(
        self, parameters: Sequence[Tensor], cotangent: Tensor, views: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Parameters]:
        """The images and the gradients of their product with a cotangent; the rest as for :meth:`project`."""
        inputs = leaves(parameters)
        out = self.project(inputs, views, *args, **kwargs)
        return out.detach(), torch.autograd.grad(out, inputs, cotangent)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, path: Path, *inputs: Any) -> Tensor:
        ctx.path, ctx.rest = path, inputs[5:]
        ctx.save_for_backward(*inputs[:5])
        return path.forward(ProjectInputs(*inputs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        found = ctx.path.backward(grad, ProjectInputs(*ctx.saved_tensors, *ctx.rest))
        return (None, *found, None, None, None, None, None)


REFERENCE = Path("reference", reference.forward, reference.backward)
NATIVE = [
    Path(name, partial(native.forward, variant=name), partial(native.backward, variant=name)) for name in RUNNABLE
]
