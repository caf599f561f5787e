"""The CUDA projector, through the public function, against the float64 reference; and how it behaves in a stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from projections import KINDS, SIZE, circle, leaves, make, peak_error, relative
from test_project_native import SIZES, case

from medgmae.ops import project
from medgmae.ops.native import native_runs

pytestmark = pytest.mark.gpu
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))


def gradients(parameters: Any, cotangent: torch.Tensor, views: torch.Tensor, size: Any, **kwargs: Any) -> Any:
    inputs = leaves([p.cuda() for p in parameters])
    image = project(*inputs, views.cuda(), size, **kwargs)
    return image.detach(), torch.autograd.grad(image, inputs, cotangent.cuda())


def test_the_kernels_are_there() -> None:
    """Else every test below would measure the torch reference."""
    assert native_runs(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("number", range(len(KINDS)))
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("scale", "spread"), [(3.0, 0.4), (15.0, 0.4), (8.0, 2.0)], ids=["small", "wide", "needles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(
    number: int, size: tuple[int, int], scale: float, spread: float, dtype: torch.dtype
) -> None:
    parameters, views, cotangent, rim, expected, wanted = case(size, number, scale, spread)
    wide = [p.to(dtype) for p in parameters]
    image, got = gradients(wide, cotangent.to(dtype), views, size, **KINDS[number])
    assert image.dtype == dtype
    assert peak_error(image.cpu().masked_fill(rim, 0), expected.masked_fill(rim, 0)) <= 5e-6
    for gradient, exact in zip(got, wanted, strict=True):
        assert relative(gradient.cpu(), exact) <= 1e-5


@every_kind
def test_two_runs_give_the_same_bits(kind: dict[str, Any]) -> None:
    parameters, views = make(2, 3000, torch.float32, scale=6.0), circle(3, (200, 170), beam=kind["beam"])
    cotangent = torch.randn(2, 3, 200, 170)
    first = gradients(parameters, cotangent, views, (200, 170), **kind)
    again = gradients(parameters, cotangent, views, (200, 170), **kind)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@every_kind
def test_a_call_is_captured_in_a_graph(kind: dict[str, Any]) -> None:
    parameters = [p.cuda() for p in make(1, 200, torch.float32)]
    views = circle(2, beam=kind["beam"]).cuda()
    expected = project(*parameters, views, SIZE, **kind)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        image = project(*parameters, views, SIZE, **kind)
    image.zero_()
    graph.replay()
    assert torch.equal(image, expected)


@every_kind
def test_a_view_that_is_no_detector_is_nan(kind: dict[str, Any]) -> None:
    views = circle(3, beam=kind["beam"])
    views[1, 3] = 2 * views[1, 2]
    image, got = gradients(make(), torch.ones(2, 3, *SIZE).double(), views, SIZE, **kind)
    assert image[:, 1].isnan().all()
    assert image[:, [0, 2]].isfinite().all()
    assert all(gradient.isnan().all() for gradient in got)
