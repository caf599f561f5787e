"""Untruncated rendering on coarse lattices: the interpolation, its adjoint, and which Gaussian goes where."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from medgmae.ops import native_info, voxelize
from medgmae.ops.voxel import levels, native
from medgmae.ops.voxel.inputs import VoxelInputs

pytestmark = pytest.mark.skipif(not native_info()["loaded"], reason="no native module: levels are a part of it")

SIZE = (40, 48, 37)
VARIANTS = [name for name, runs in native_info()["cpu_variants"].items() if runs]


def parameters(scale: float, count: int = 96, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, count, *shape, generator=generator)

    means = torch.rand(batch, count, 3, generator=generator)
    return [means, scale * torch.exp(0.4 * draw(3)), draw(4), draw()]


def dense(gaussians: list[Tensor]) -> VoxelInputs:
    """Two whole volumes, without truncation."""
    return VoxelInputs(*gaussians, torch.zeros(2, 1, dtype=torch.int64), SIZE, SIZE, math.inf)  # type: ignore[arg-type]


@pytest.mark.parametrize("stride", levels.STRIDES)
@pytest.mark.parametrize("width", [levels.WIDTH, 5.0])
def test_a_wide_gaussian_is_known_between_the_points(stride: int, width: float) -> None:
    matrix = levels._interpolation(61, 60 // stride + 1 + levels.TAPS - 1, stride, (levels.TAPS - 1) // 2).double()
    points = (torch.arange(matrix.shape[1], dtype=torch.float64) - ((levels.TAPS - 1) // 2)) * stride
    for center in (30.0, 31.4, -2.3):
        at = [torch.exp(-0.5 * ((x - center) / (width * stride)) ** 2) for x in (points, torch.arange(61.0).double())]
        assert (matrix @ at[0] - at[1]).abs().max() < 5e-7


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("threads", [1, 3])
def test_interpolation_is_three_products_and_gathering_their_adjoint(variant: str, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for lattice in levels.levels(SIZE, levels.STRIDES)[1:]:
        values = torch.randn(2, *lattice.size, generator=generator)
        out = torch.ones(2, *SIZE)
        levels.add_interpolated(lattice, values, out, threads, variant)
        matrices = [axis.up.matrix.double() for axis in lattice.up]
        dense = torch.einsum("bzyx,dz,hy,wx->bdhw", values.double(), *matrices)
        torch.testing.assert_close(out.double(), 1 + dense, rtol=0, atol=1e-5)
        grad = torch.randn(2, *SIZE, generator=generator)
        adjoint = torch.einsum("bdhw,dz,hy,wx->bzyx", grad.double(), *matrices)
        found = levels.gathered(lattice, grad, threads, variant)
        torch.testing.assert_close(found.double(), adjoint, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 9, 40), (33, 2, 16)])
def test_short_axes(size: tuple[int, ...]) -> None:
    for lattice in levels.levels(size, levels.STRIDES)[1:]:
        out = torch.zeros(1, *size)
        levels.add_interpolated(lattice, torch.ones(1, *lattice.size), out, 1)
        torch.testing.assert_close(out, torch.ones_like(out), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("scale", "expected"), [(0.4, (4, 2)), (0.22, (2,)), (0.03, ())])
def test_rendering_in_levels_equals_rendering_directly(scale: float, expected: tuple[int, ...]) -> None:
    values = parameters(scale)
    assert levels.strides(dense(values)) == expected
    grad = torch.randn(2, 1, math.prod(SIZE), generator=torch.Generator().manual_seed(1))
    exact = [v.double() for v in values]
    wanted = native.forward(dense(exact))
    found = native.forward(dense(values))
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    gradients = native.backward(grad.double(), dense(exact))
    for ours, theirs in zip(native.backward(grad, dense(values)), gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_levels_do_not_depend_on_the_threads() -> None:
    values = parameters(0.4)
    grad = torch.randn(2, 1, math.prod(SIZE))
    runs = [
        [
            native.forward(dense(values), threads=threads),
            *native.backward(grad, dense(values), threads=threads),
        ]
        for threads in (1, 2, 3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_every_gaussian_is_in_one_level() -> None:
    for strides in [(4, 2), (2,), (4,), ()]:
        ranges = []
        for lattice in levels.levels(SIZE, strides):
            stride = lattice.step[0] * (SIZE[0] - 1)
            ranges.append((lattice.widths[0] * stride, lattice.widths[1] * stride))
        ranges.sort()
        assert ranges[0][0] == 0
        assert math.isinf(ranges[-1][1])
        assert all(one[1] == pytest.approx(two[0]) for one, two in itertools.pairwise(ranges))


def test_a_bad_gaussian_spoils_its_sample_in_levels_too() -> None:
    values = parameters(0.4)
    values[1][1, 5, 0] = math.nan
    out = voxelize(*values, SIZE, support=None)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
