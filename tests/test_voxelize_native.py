"""The compiled CPU kernels against the float64 reference, at sizes where their tiles, recurrences and threads show."""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import Any

import pytest
import torch
from gaussians import NATIVE, REFERENCE, SUPPORTS, Parameters, Path, cut, leaves, make, peak_error, relative

from medgmae.ops import voxelize
from medgmae.ops.voxel import native
from medgmae.ops.voxel.inputs import VoxelInputs

every_path = pytest.mark.parametrize("path", NATIVE, ids=lambda path: path.name)
every_support = pytest.mark.parametrize("support", SUPPORTS, ids=str)
# Sizes that are no multiples of a tile, axes shorter than one, one voxel, and one beyond a tile.
SIZES = [(33, 50, 97), (16, 16, 16), (1, 1, 70), (17, 1, 31), (5, 33, 15)]
COUNT = 24
# Of the largest value.
FORWARD_BOUND = 2e-6


def at_the_rim(parameters: Parameters, size: tuple[int, ...], k: float) -> torch.Tensor:
    """Voxels (B, 1, D, H, W) so near to the edge of an ellipsoid that rounding decides on which side they are."""
    means, scales, quats, _ = (p.double() for p in parameters)
    axes = [torch.arange(n, dtype=torch.float64) / max(n - 1, 1) for n in size]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
    w, xyz = quats[..., :1] / quats.norm(dim=-1, keepdim=True), quats[..., 1:] / quats.norm(dim=-1, keepdim=True)
    near = torch.zeros(means.shape[0], len(grid), dtype=torch.bool)
    for i in range(means.shape[1]):
        d = grid[None] - means[:, i : i + 1]
        v, u = -xyz[:, i : i + 1].expand_as(d), w[:, i : i + 1]  # the turn back
        t = 2 * torch.linalg.cross(v, d, dim=-1)
        local = d + u * t + torch.linalg.cross(v, t, dim=-1)
        square = (local / scales[:, i : i + 1]).square().sum(-1)
        near |= (square / k**2 - 1).abs() < 1e-5
    return near.reshape(means.shape[0], 1, *size)


@functools.cache
def case(size: tuple[int, ...], support: Any, scale: float, spread: float = 0.3) -> tuple[Any, ...]:
    """Float32 parameters, a cotangent that is 0 at rims, and what the reference makes of them in float64."""
    means, scales, quats, densities = make(count=COUNT, dtype=torch.float32, scale=scale, spread=spread, seed=7)
    parameters = means, scales, quats, densities.abs()
    cotangent = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(1))
    rim = torch.zeros(cotangent.shape, dtype=torch.bool)
    if isinstance(support, float):
        rim = at_the_rim(parameters, size, support)
        cotangent[rim] = 0
    exact = REFERENCE.gradients([p.double() for p in parameters], cotangent.double(), size, support)
    return parameters, cotangent, rim, *exact


@every_path
@every_support
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scale", [0.05, 0.2])
def test_float32_is_exact_to_rounding(path: Path, support: Any, size: tuple[int, ...], scale: float) -> None:
    parameters, cotangent, rim, expected, wanted = case(size, support, scale)
    volume, gradients = path.gradients(parameters, cotangent, size, support)
    assert peak_error(volume.masked_fill(rim, 0), expected.masked_fill(rim, 0)) <= FORWARD_BOUND
    for got, gradient in zip(gradients, wanted, strict=True):
        assert relative(got, gradient) <= 1e-5


@every_path
@pytest.mark.parametrize("support", ["box", None])
@pytest.mark.parametrize("scale", [0.1, 0.2])
def test_error_of_a_volume_full_of_gaussians(path: Path, support: Any, scale: float) -> None:
    """The stated bound, at the size of the published models; the reference renders a few patches of the volume."""
    means, scales, quats, densities = make(1, 256, torch.float32, scale=scale, margin=0.0, seed=11)
    parameters, size = (means, scales, quats, densities.abs()), (96, 96, 96)
    patches = torch.randperm(512, generator=torch.Generator().manual_seed(2))[None, :8]
    expected = REFERENCE.render([p.double() for p in parameters], size, support, patches, (12, 12, 12))
    volume = path.render(parameters, size, support)
    error = float((cut(volume, patches, (12, 12, 12)) - expected).abs().max() / volume.max())
    assert error <= 2e-6


@every_path
@every_support
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64_is_the_reference(path: Path, support: Any, size: tuple[int, ...]) -> None:
    parameters, cotangent, rim, expected, wanted = case(size, support, 0.2)
    exact = [p.double() for p in parameters]
    volume, gradients = path.gradients(exact, cotangent.double(), size, support)
    assert peak_error(volume.masked_fill(rim, 0), expected.masked_fill(rim, 0)) <= 1e-12
    for got, gradient in zip(gradients, wanted, strict=True):
        assert relative(got, gradient) <= 1e-11


@every_path
@pytest.mark.parametrize("support", ["box", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_needles(path: Path, support: Any, dtype: torch.dtype) -> None:
    """Scales that differ by a factor of hundreds: factors of the recurrence would overflow."""
    size = (40, 33, 50)
    parameters, cotangent, _, expected, wanted = case(size, support, 0.05, 1.5)
    ratios = parameters[1].amax(-1) / parameters[1].amin(-1)
    assert float(ratios.max()) > 100
    volume, gradients = path.gradients([p.to(dtype) for p in parameters], cotangent.to(dtype), size, support)
    assert peak_error(volume, expected) <= (2e-5 if dtype == torch.float32 else 1e-7)
    for got, gradient in zip(gradients, wanted, strict=True):
        assert relative(got, gradient) <= (1e-4 if dtype == torch.float32 else 1e-7)


@every_path
@every_support
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_the_threads(path: Path, support: Any, dtype: torch.dtype) -> None:
    size, parameters = (33, 20, 50), make(batch=3, count=300, dtype=dtype, scale=0.08)
    cotangent = torch.randn(3, 1, *size, dtype=dtype)
    patches = torch.tensor([[3, 0, 9], [1, 1, 4], [7, 2, 5]])
    of_patches = torch.randn(3, 3, 1100, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 1):
        same = Path(path.name, partial(path.forward, threads=threads), partial(path.backward, threads=threads))
        volume, gradients = same.gradients(parameters, cotangent, size, support)
        part, others = same.gradients(parameters, of_patches, size, support, patches, (11, 10, 10))
        results.append([volume, part, *gradients, *others])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@every_path
@every_support
@pytest.mark.parametrize("patch", [(12, 12, 12), (16, 8, 24), (48, 24, 3)], ids=str)
def test_patches_equal_the_volume(path: Path, support: Any, patch: tuple[int, ...]) -> None:
    size, parameters = (48, 24, 48), make(count=30, dtype=torch.float32)
    parameters = (*parameters[:3], parameters[3].abs())
    count = math.prod(s // p for s, p in zip(size, patch, strict=True))
    patches = torch.stack([torch.randperm(count)[: (count + 3) // 4] for _ in range(2)])
    volume = path.render(parameters, size, support)
    expected = cut(volume, patches, patch)
    rendered = path.render(parameters, size, support, patches, patch)
    if isinstance(support, float):  # the rim may fall on the other side
        rim = cut(at_the_rim(parameters, size, support), patches, patch)
        rendered, expected = rendered.masked_fill(rim, 0), expected.masked_fill(rim, 0)
    assert peak_error(rendered, expected) <= FORWARD_BOUND


@every_path
@pytest.mark.parametrize("scale", [0.02, 0.1])
def test_what_lies_outside_of_a_gaussian_does_not_reach_its_gradient(path: Path, scale: float) -> None:
    """Not even NaN does, although vectors read beyond the Gaussian's box."""
    size, parameters = (33, 40, 70), make(1, 1, torch.float32, scale=scale, margin=-0.3)
    inside = path.render((*parameters[:3], torch.ones(1, 1)), size, "box") != 0
    cotangent = torch.randn(1, 1, *size)
    expected = path.gradients(parameters, cotangent, size, "box")[1]
    spoiled = cotangent.masked_fill(~inside, math.nan)
    for got, wanted in zip(path.gradients(parameters, spoiled, size, "box")[1], expected, strict=True):
        assert torch.equal(got, wanted)


def flush(x: torch.Tensor) -> float:
    return float(x.mul(0.5).sum())


@every_path
def test_floating_point_mode_of_the_caller_is_left_alone(path: Path) -> None:
    """The kernels treat subnormal numbers as zero; what runs after them does not."""
    smallest = torch.full((8,), 1e-40)
    before = flush(smallest)
    path.gradients(make(dtype=torch.float32), torch.ones(2, 1, 9, 9, 9), (9, 9, 9), "box")
    assert flush(smallest) == before != 0


@every_path
@every_support
def test_nothing_is_written_outside(path: Path, support: Any) -> None:
    """Guards on both sides of every buffer that a kernel reads or writes."""
    size, parameters = (9, 17, 19), [p.contiguous() for p in make(dtype=torch.float32, margin=3.0, scale=0.5)]
    real = torch.Tensor.new_empty
    guarded = []

    def new_empty(tensor: torch.Tensor, *shape: Any, **kwargs: Any) -> torch.Tensor:
        wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = math.prod(wanted)
        whole = real(tensor, count + 128, **kwargs).fill_(12345.0)
        guarded.append((whole, count))
        return whole[64 : 64 + count].view(*wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        path.gradients(parameters, torch.randn(2, 1, *size), size, support)
    assert len(guarded) >= 5
    for whole, count in guarded:
        assert (whole[:64] == 12345.0).all()
        assert (whole[64 + count :] == 12345.0).all()
        assert not (whole[64 : 64 + count] == 12345.0).any()


def levels_case(size: tuple[int, int, int], count: int = 40) -> list[torch.Tensor]:
    """Gaussians of all widths, enough of them that the wide ones are rendered on coarse lattices."""
    means, scales, quats, densities = make(1, count, torch.float32, scale=0.12, spread=0.7, seed=3)
    return [means, scales, quats, densities.abs()]


@pytest.mark.parametrize("size", [(96, 80, 72), (1, 180, 190), (33, 50, 97)], ids=str)
def test_untruncated_rendering_of_wide_gaussians(size: tuple[int, int, int]) -> None:
    """On coarse lattices, through the public function: within the documented error."""
    parameters = levels_case(size)
    cotangent = torch.randn(1, 1, *size)
    expected, wanted = REFERENCE.gradients([p.double() for p in parameters], cotangent.double(), size, None)
    inputs = leaves(parameters)
    volume = voxelize(*inputs, size, support=None)
    assert peak_error(volume.detach(), expected) <= 5e-6
    for got, gradient in zip(torch.autograd.grad(volume, inputs, cotangent), wanted, strict=True):
        assert relative(got, gradient) <= 1e-5


def test_coarse_lattices_give_the_same_bits_with_any_number_of_threads() -> None:
    size, parameters = (64, 50, 70), leaves(levels_case((64, 50, 70), 100))
    cotangent, runs, before = torch.randn(1, 1, *size), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            volume = voxelize(*parameters, size, support=None)
            runs.append([volume, *torch.autograd.grad(volume, parameters, cotangent)])
    finally:
        torch.set_num_threads(before)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize(("index", "value"), [(0, math.nan), (1, 0.0), (1, math.inf), (2, math.inf), (3, math.nan)])
def test_a_bad_gaussian_among_those_on_coarse_lattices(index: int, value: float) -> None:
    size = (40, 40, 40)
    parameters = [torch.cat([p, p]) for p in levels_case(size)]
    parameters[index][1, 5].flatten()[:1].fill_(value)
    inputs = leaves(parameters)
    volume = voxelize(*inputs, size, support=None)
    assert volume[0].isfinite().all()
    assert volume[1].isnan().all()
    rest = torch.arange(80).reshape(2, 40) != 45
    for gradient in torch.autograd.grad(volume, inputs, torch.ones_like(volume)):
        assert gradient[1, 5].isnan().all()
        assert gradient[rest].isfinite().all()


def test_the_public_function_uses_the_kernels() -> None:
    parameters = make(dtype=torch.float32)
    volume = voxelize(*parameters, (20, 20, 20), support="box")
    whole = torch.zeros(2, 1, dtype=torch.int64)
    direct = native.forward(VoxelInputs(*parameters, whole, [20] * 3, [20] * 3, 0.0))
    assert torch.equal(volume, direct.reshape(2, 1, 20, 20, 20))
