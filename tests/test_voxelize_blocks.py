"""The CUDA renderer's thread blocks, run on the host one thread after the other, against the float64 reference.

This tests the arithmetic and the walk over the voxels. What only a GPU shows is for tests/test_voxelize_cuda.py.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from gaussians import REFERENCE, SUPPORTS, Parameters, Path, cut, make, peak_error, relative
from test_voxelize_native import SIZES, case
from torch import Tensor

from medgmae.ops.voxel.inputs import VoxelInputs

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
FLAGS = ["-std=c++17", "-O1", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
every_support = pytest.mark.parametrize("support", SUPPORTS, ids=str)


@functools.cache
def library() -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        target = FilePath(folder, "blocks.so")
        source = FilePath(__file__).parent / "cuda_host/blocks.cpp"
        subprocess.run([COMPILER, *FLAGS, str(source), "-o", str(target)], check=True)
        loaded = ctypes.CDLL(str(target))
    loaded.medgmae_blocks.restype = ctypes.c_bool
    return loaded


def call(
    tensors: list[Tensor], size: Sequence[int], patch: Sequence[int], support: float, backward: bool, **fields: Any
) -> None:
    means, patches = tensors[0], tensors[4]
    counts = (ctypes.c_int64 * 3)(means.shape[0], means.shape[1], patches.shape[1])
    steps = [1 / (n - 1) if n > 1 else 0.0 for n in size]
    ends = [*fields.get("origin", (0.0, 0.0, 0.0)), *fields.get("step", steps)]
    done = library().medgmae_blocks(
        {torch.float32: 0, torch.float64: 1}[means.dtype],
        counts,
        (ctypes.c_void_p * 10)(*[tensor.data_ptr() for tensor in tensors]),
        (ctypes.c_int * 3)(*size),
        (ctypes.c_int * 3)(*patch),
        (ctypes.c_double * 6)(*ends),
        ctypes.c_double(support),
        (ctypes.c_double * 2)(*fields.get("widths", (0.0, math.inf))),
        ctypes.c_bool(backward),
    )
    assert done


def forward(inputs: VoxelInputs, **fields: Any) -> Tensor:
    *tensors, size, patch, support = inputs
    out = tensors[0].new_full((*tensors[4].shape, math.prod(patch)), 12345.0)
    call([t.contiguous() for t in tensors] + [out], size, patch, support, False, **fields)
    return out


def backward(grad: Tensor, inputs: VoxelInputs, **fields: Any) -> Parameters:
    *tensors, size, patch, support = inputs
    means, scales, quats, densities = (torch.full_like(t, 12345.0).contiguous() for t in tensors[:4])
    kept = [t.contiguous() for t in (*tensors, grad)]
    call([*kept, means, scales, quats, densities], size, patch, support, True, **fields)
    return means, scales, quats, densities


BLOCKS = Path("blocks", forward, backward)


@every_support
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scale", [0.05, 0.2])
def test_float32_is_exact_to_rounding(support: Any, size: tuple[int, ...], scale: float) -> None:
    parameters, cotangent, rim, expected, wanted = case(size, support, scale)
    volume, gradients = BLOCKS.gradients(parameters, cotangent, size, support)
    assert peak_error(volume.masked_fill(rim, 0), expected.masked_fill(rim, 0)) <= 5e-6
    for got, gradient in zip(gradients, wanted, strict=True):
        assert relative(got, gradient) <= 1e-5


@every_support
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64_is_the_reference(support: Any, size: tuple[int, ...]) -> None:
    parameters, cotangent, rim, expected, wanted = case(size, support, 0.2)
    exact = [p.double() for p in parameters]
    volume, gradients = BLOCKS.gradients(exact, cotangent.double(), size, support)
    assert peak_error(volume.masked_fill(rim, 0), expected.masked_fill(rim, 0)) <= 1e-12
    for got, gradient in zip(gradients, wanted, strict=True):
        assert relative(got, gradient) <= 1e-11


@pytest.mark.parametrize("support", ["box", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_needles(support: Any, dtype: torch.dtype) -> None:
    size = (40, 33, 50)
    parameters, cotangent, _, expected, wanted = case(size, support, 0.05, 1.5)
    volume, gradients = BLOCKS.gradients([p.to(dtype) for p in parameters], cotangent.to(dtype), size, support)
    assert peak_error(volume, expected) <= (5e-6 if dtype == torch.float32 else 1e-7)
    for got, gradient in zip(gradients, wanted, strict=True):
        assert relative(got, gradient) <= (1e-4 if dtype == torch.float32 else 1e-7)


@pytest.mark.parametrize("support", ["box", None])
@pytest.mark.parametrize("scale", [0.1, 0.2])
def test_error_of_a_volume_full_of_gaussians(support: Any, scale: float) -> None:
    """The bound of docs/renderer.md at the size of the published models, in a few patches of the volume."""
    means, scales, quats, densities = make(1, 256, torch.float32, scale=scale, margin=0.0, seed=11)
    parameters, size, patch = (means, scales, quats, densities.abs()), (96, 96, 96), (12, 12, 12)
    patches = torch.randperm(512, generator=torch.Generator().manual_seed(2))[None, :8]
    cotangent = torch.randn(1, 8, 1728)
    doubles = [p.double() for p in parameters]
    expected, wanted = REFERENCE.gradients(doubles, cotangent.double(), size, support, patches, patch)
    rendered, gradients = BLOCKS.gradients(parameters, cotangent, size, support, patches, patch)
    assert peak_error(rendered, expected) <= 2e-6
    for got, gradient in zip(gradients, wanted, strict=True):
        assert relative(got, gradient) <= 1e-5


@every_support
@pytest.mark.parametrize("patch", [(12, 12, 12), (48, 24, 3), (2, 6, 48)], ids=str)
def test_patches_equal_the_volume(support: Any, patch: tuple[int, ...]) -> None:
    size, parameters = (48, 24, 48), make(count=70)
    count = math.prod(s // p for s, p in zip(size, patch, strict=True))
    patches = torch.stack([torch.randperm(count)[: (count + 3) // 4] for _ in range(2)])
    volume = BLOCKS.render(parameters, size, support)
    rendered = BLOCKS.render(parameters, size, support, patches, patch)
    torch.testing.assert_close(rendered, cut(volume, patches, patch), rtol=1e-10, atol=1e-12)
    cotangent = torch.randn_like(rendered)
    gradients = BLOCKS.gradients(parameters, cotangent, size, support, patches, patch)[1]
    wanted = REFERENCE.gradients(parameters, cotangent, size, support, patches, patch)[1]
    for got, gradient in zip(gradients, wanted, strict=True):
        assert relative(got, gradient) <= 1e-9


@pytest.mark.parametrize("support", ["box", *(pytest.param(s, marks=pytest.mark.slow) for s in (2.5, None))], ids=str)
def test_many_gaussians_in_order(support: Any) -> None:
    """More than one round of words, and lists longer than a block; few reach a tile, or all do."""
    for count, scale in [(2500, 0.02), (2100, 0.6)]:
        parameters, size = make(1, count, scale=scale, spread=0.1), (18, 9, 40)
        cotangent = torch.randn(1, 1, *size, dtype=torch.float64)
        expected, wanted = REFERENCE.gradients(parameters, cotangent, size, support)
        volume, gradients = BLOCKS.gradients(parameters, cotangent, size, support)
        torch.testing.assert_close(volume, expected, rtol=1e-9, atol=1e-11)
        for got, gradient in zip(gradients, wanted, strict=True):
            assert relative(got, gradient) <= 1e-9


@every_support
@pytest.mark.parametrize(("index", "value"), [(0, math.nan), (1, 0.0), (1, math.inf), (2, math.nan), (3, math.inf)])
def test_bad_gaussians(support: Any, index: int, value: float) -> None:
    parameters, size = make(count=6, dtype=torch.float32), (5, 17, 6)
    good = BLOCKS.gradients(parameters, torch.ones(2, 1, *size), size, support)
    parameters[index][1, 2].flatten()[:1].fill_(value)
    volume, gradients = BLOCKS.gradients(parameters, torch.ones(2, 1, *size), size, support)
    assert torch.equal(volume[0], good[0][0])
    assert volume[1].isnan().all()
    rest = torch.arange(12).reshape(2, 6) != 8
    for got, expected in zip(gradients, good[1], strict=True):
        assert got[1, 2].isnan().all()
        assert torch.equal(got[rest], expected[rest])


@every_support
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_least_scale(support: Any, dtype: torch.dtype) -> None:
    """As in test_voxelize.py."""
    for factor in (1 + 1e-5, 1 - 1e-5):
        parameters, size = make(count=4, dtype=dtype), (5, 9, 7)
        parameters[0][0, 1] = 0.5  # on a voxel
        parameters[1][0, 1, 2] = factor * torch.finfo(dtype).max ** -0.5
        volume, gradients = BLOCKS.gradients(parameters, torch.ones(2, 1, *size, dtype=dtype), size, support)
        assert volume[1].isfinite().all()
        assert volume[0].isfinite().all() if factor > 1 else volume[0].isnan().all()
        for gradient in gradients:
            assert gradient[0, 1].isfinite().all() if factor > 1 else gradient[0, 1].isnan().all()
        if factor > 1:
            for gradient, expected in zip(gradients, (0.0, 0.0, 0.0, 1.0), strict=True):
                torch.testing.assert_close(gradient[0, 1], torch.full_like(gradient[0, 1], expected))


@every_support
def test_a_patch_that_is_not_there_is_nan(support: Any) -> None:
    parameters, size, patch = make(), (8, 4, 12), (4, 4, 4)
    patches = torch.tensor([[0, 6, 5], [-1, 2, 2**40]])
    rendered = BLOCKS.render(parameters, size, support, patches, patch)
    there = (patches >= 0) & (patches < 6)
    assert torch.equal(rendered.isnan().all(-1), ~there)
    assert torch.equal(rendered.isfinite().all(-1), there)
    cotangent = torch.randn_like(rendered)
    gradients = BLOCKS.gradients(parameters, cotangent, size, support, patches, patch)[1]
    cotangent[~there] = 0
    wanted = REFERENCE.gradients(parameters, cotangent, size, support, patches.where(there, 0), patch)[1]
    for got, gradient in zip(gradients, wanted, strict=True):
        assert relative(got, gradient) <= 1e-10


@every_support
def test_nothing_to_render(support: Any) -> None:
    for batch, count in [(2, 0), (0, 3), (0, 0)]:
        cotangent = torch.ones(batch, 1, 4, 3, 5, dtype=torch.float64)
        volume, _ = BLOCKS.gradients(make(batch, count), cotangent, (4, 3, 5), support)
        assert volume.shape == (batch, 1, 4, 3, 5)
        assert not volume.any()
    none = torch.zeros(2, 0, dtype=torch.int64)
    _, gradients = BLOCKS.gradients(make(), torch.ones(2, 0, 8).double(), (4, 4, 4), support, none, (2, 2, 2))
    assert not any(g.any() for g in gradients)


def test_widths_pick_the_gaussians_and_leave_the_others() -> None:
    parameters, size = make(1, 40, scale=0.1, spread=0.8), (20, 17, 30)
    inputs = VoxelInputs(*parameters, torch.zeros(1, 1, dtype=torch.int64), size, size, 3.0)
    bands = [(0.0, 1.0), (1.0, 2.5), (2.5, math.inf)]
    parts = [forward(inputs, widths=band) for band in bands]
    torch.testing.assert_close(sum(parts), forward(inputs), rtol=1e-10, atol=1e-12)
    assert all(part.any() for part in parts)
    grad = torch.randn_like(parts[0])
    expected = backward(grad, inputs)
    touched = torch.zeros(40)
    for band in bands:
        got = backward(grad, inputs, widths=band)
        mine = got[3][0] != 12345
        touched += mine
        for value, whole in zip(got, expected, strict=True):
            assert torch.equal(value[0, mine], whole[0, mine])
            assert (value[0, ~mine] == 12345).all()
    assert (touched == 1).all()


@every_support
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_parameters_give_numbers(support: Any, dtype: torch.dtype) -> None:
    """From far smaller than a voxel to far larger than the volume, far away, with huge densities."""
    size = (7, 18, 20)
    for scale in (1e-12, 1e-6, 1e-3, 1.0, 1e6):
        means, scales, quats, densities = make(2, 30, scale=scale, spread=2.0, margin=1.0)
        means[:, 0] = 1e6
        means[:, 1] = torch.tensor([0.5, 0.0, 1.0])
        scales[:, 2] = torch.tensor([scale, 1.0, 1e-3])
        densities[:, 3] = 1e20
        parameters = [p.to(dtype) for p in (means, scales, quats, densities)]
        volume, gradients = BLOCKS.gradients(parameters, torch.randn(2, 1, *size, dtype=dtype), size, support)
        expected = REFERENCE.render([p.double() for p in parameters], size, support)
        assert all(value.isfinite().all() for value in (volume, *gradients)) or not expected.isfinite().all()
