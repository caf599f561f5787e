"""The CUDA projector's thread blocks, run on the host one thread after the other, against the float64 reference.

This tests the arithmetic and the walk over pixels and Gaussians; tests/test_project_cuda.py has what only a GPU shows.
"""

from __future__ import annotations

import ctypes
import functools
import math
import subprocess
import tempfile
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from projections import KINDS, REFERENCE, SIZE, Path, circle, make, peak_error, relative
from test_project_native import case
from test_voxelize_blocks import COMPILER, FLAGS
from torch import Tensor

from medgmae.ops.projection.inputs import ProjectInputs

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))


@functools.cache
def library() -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        target = FilePath(folder, "project.so")
        source = FilePath(__file__).parent / "cuda_host/project.cpp"
        subprocess.run([COMPILER, *FLAGS, str(source), "-o", str(target)], check=True)
        loaded = ctypes.CDLL(str(target))
    loaded.medgmae_project_blocks.restype = ctypes.c_bool
    return loaded


def call(inputs: ProjectInputs, others: list[Tensor], backward: bool) -> None:
    tensors = [tensor.contiguous() for tensor in (*inputs[:5], *others)]
    done = library().medgmae_project_blocks(
        {torch.float32: 0, torch.float64: 1}[inputs.means.dtype],
        (ctypes.c_int64 * 3)(*inputs.means.shape[:2], inputs.views.shape[1]),
        (ctypes.c_void_p * 10)(*[tensor.data_ptr() for tensor in tensors]),
        (ctypes.c_int * 2)(*inputs.size),
        ctypes.c_double(inputs.support),
        (ctypes.c_bool * 2)(inputs.parallel, inputs.affine),
        ctypes.c_bool(backward),
    )
    assert done


def forward(inputs: ProjectInputs) -> Tensor:
    out = inputs.means.new_full((*inputs.views.shape[:2], *inputs.size), 12345.0)
    call(inputs, [out], False)
    return out


def backward(grad: Tensor, inputs: ProjectInputs) -> Any:
    gradients = [torch.full_like(t, 12345.0).contiguous() for t in inputs[:4]]
    call(inputs, [grad, *gradients], True)
    return tuple(gradients)


BLOCKS = Path("blocks", forward, backward)


@pytest.mark.parametrize("number", range(len(KINDS)))
@pytest.mark.parametrize("size", [(1, 1), (1, 70), (33, 50)], ids=str)
@pytest.mark.parametrize(("scale", "spread"), [(3.0, 0.4), (15.0, 0.4), (8.0, 2.0)], ids=["small", "wide", "needles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_equal_the_reference(
    number: int, size: tuple[int, int], scale: float, spread: float, dtype: torch.dtype
) -> None:
    parameters, views, cotangent, rim, expected, wanted = case(size, number, scale, spread)
    wide = [p.to(dtype) for p in parameters]
    image, gradients = BLOCKS.gradients(wide, cotangent.to(dtype), views, size, **KINDS[number])
    bounds = (5e-6, 1e-5) if dtype == torch.float32 else (1e-12, 1e-11)
    assert peak_error(image.masked_fill(rim, 0), expected.masked_fill(rim, 0)) <= bounds[0]
    for got, gradient in zip(gradients, wanted, strict=True):
        assert relative(got, gradient) <= bounds[1]


# Rounds, lists and regions are the same code for every kind; the reference takes seconds for each.
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in KINDS[:1])) for kind in KINDS],
    ids=lambda kind: "-".join(map(str, kind.values())),
)
def test_many_gaussians_in_order(kind: dict[str, Any]) -> None:
    """More than one round of words, lists longer than a block, and more than one region."""
    for count, scale in [(4200, 1.0), (300, 40.0)]:
        parameters, size = make(1, count, scale=scale, spread=0.1), (20, 70)
        views = circle(1, size, beam=kind["beam"], pixel=(4.0, 9.0))
        cotangent = torch.randn(1, 1, *size, dtype=torch.float64)
        expected, wanted = REFERENCE.gradients(parameters, cotangent, views, size, **kind)
        image, gradients = BLOCKS.gradients(parameters, cotangent, views, size, **kind)
        assert peak_error(image, expected) <= 1e-12
        for got, gradient in zip(gradients, wanted, strict=True):
            assert relative(got, gradient) <= 1e-10


@pytest.mark.parametrize("support", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_source_inside_a_support(support: Any, dtype: torch.dtype) -> None:
    views = circle(2, tilt=0.3)
    source, axis = views[0, 0], views[0, 1] - views[0, 0]
    means = torch.stack([source + 0.05 * axis, source - 0.1 * axis, source + 0.5 * axis])[None].to(dtype)
    scales = torch.tensor([[[90.0, 60.0, 70.0], [90.0, 60.0, 70.0], [9.0, 20.0, 400.0]]]).to(dtype)
    parameters = means, scales, torch.tensor([[[0.5, 1, 0.3, 0.1]] * 3]).to(dtype), torch.ones(1, 3).to(dtype)
    cotangent = torch.randn(1, 2, *SIZE, dtype=torch.float64)
    exact = [p.double() for p in parameters]
    expected, wanted = REFERENCE.gradients(exact, cotangent, views, support=support)
    image, gradients = BLOCKS.gradients(parameters, cotangent.to(dtype), views, support=support)
    assert peak_error(image, expected) <= (5e-6 if dtype == torch.float32 else 1e-12)
    for got, gradient in zip(gradients, wanted, strict=True):
        assert relative(got, gradient) <= (1e-5 if dtype == torch.float32 else 1e-11)


@every_kind
@pytest.mark.parametrize(("index", "value"), [(0, math.nan), (1, 0.0), (2, math.nan), (3, math.inf)])
def test_bad_gaussians(kind: dict[str, Any], index: int, value: float) -> None:
    parameters, views = make(dtype=torch.float32), circle(2, beam=kind["beam"])
    cotangent = torch.ones(2, 2, *SIZE)
    good = BLOCKS.gradients(parameters, cotangent, views, **kind)
    parameters[index][1, 2].flatten()[:1].fill_(value)
    image, gradients = BLOCKS.gradients(parameters, cotangent, views, **kind)
    assert torch.equal(image[0], good[0][0])
    assert image[1].isnan().all()
    rest = torch.arange(12).reshape(2, 6) != 8
    for got, expected in zip(gradients, good[1], strict=True):
        assert got[1, 2].isnan().all()
        assert torch.equal(got[rest], expected[rest])


@every_kind
def test_a_view_that_is_no_detector_is_nan(kind: dict[str, Any]) -> None:
    parameters = make()
    for row in (0, 3):
        views = circle(3, beam=kind["beam"])
        views[1, row] = 2 * views[1, 2] + (views[1, 1] if row == 0 and kind["beam"] == "cone" else 0)
        image, gradients = BLOCKS.gradients(parameters, torch.ones(2, 3, *SIZE).double(), views, **kind)
        assert image[:, 1].isnan().all()
        assert image[:, [0, 2]].isfinite().all()
        assert all(gradient.isnan().all() for gradient in gradients)


@every_kind
def test_nothing_to_project(kind: dict[str, Any]) -> None:
    for batch, count, views in [(2, 0, 2), (0, 3, 2), (2, 3, 0)]:
        cotangent = torch.ones(batch, views, *SIZE).double()
        image, gradients = BLOCKS.gradients(make(batch, count), cotangent, circle(views, beam=kind["beam"]), **kind)
        assert image.shape == (batch, views, *SIZE)
        assert not image.any()
        assert not any(gradient.any() for gradient in gradients)
