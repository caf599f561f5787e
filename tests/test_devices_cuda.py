"""Every operator on a GPU: which device, which stream, which kernels; the first call; the reference on request."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from test_native_choice import filtered, rendered, scanned
from torch import Tensor

from medgmae.ops import native_info, use_native

pytestmark = pytest.mark.gpu
every_operator = pytest.mark.parametrize("make", [rendered, scanned, filtered], ids=["voxelize", "scan", "conv"])


def results(run: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of its squares."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, wanted, strict=True))


def test_the_kernels_run_here() -> None:
    """Else the tests on a GPU would measure the torch reference."""
    cuda = native_info()["cuda"]
    assert cuda is not None
    device = cuda["devices"][torch.cuda.current_device()]
    assert device["usable"], device["reason"]


@every_operator
def test_tensors_on_a_device_that_is_not_the_current_one(make: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, here is {torch.cuda.device_count()}")
    run, inputs = make()
    wanted = results(run, [tensor.to("cuda:0") for tensor in inputs])
    for current, other in ((0, 1), (1, 0)):
        with torch.cuda.device(current):
            found = results(run, [tensor.to(f"cuda:{other}") for tensor in inputs])
            assert all(tensor.device == torch.device("cuda", other) for tensor in found)
            assert torch.cuda.current_device() == current
        assert_same(found, wanted)


@every_operator
def test_a_stream_of_its_own(make: Any) -> None:
    """The kernels wait for what the stream holds: here the inputs are made in it, late."""
    run, inputs = make()
    wanted = results(run, [tensor.cuda() for tensor in inputs])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [torch.zeros_like(t, device="cuda").copy_(t.pin_memory(), non_blocking=True) for t in inputs]
        found = results(run, late)
    stream.synchronize()
    assert_same(found, wanted)


@every_operator
def test_the_reference_on_request(make: Any) -> None:
    run, inputs = make()
    there = [tensor.cuda() for tensor in inputs]
    with use_native(False):
        wanted = results(run, there)
    for got, value in zip(results(run, there), wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)


def test_the_first_call_may_be_captured_in_a_graph() -> None:
    """In a fresh process: loading a kernel and asking about it belong to no graph and break none."""
    code = """
import torch
from medgmae.ops import causal_conv1d, native_info, selective_scan
x, weight = torch.rand(1, 9, 2, device="cuda").transpose(1, 2), torch.rand(2, 3, device="cuda")
A, B = -torch.rand(2, 3, device="cuda"), torch.rand(1, 3, 9, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = selective_scan(causal_conv1d(x, weight), x, A, B, B)
graph.replay()
assert torch.equal(out, selective_scan(causal_conv1d(x, weight), x, A, B, B))
assert native_info()["cuda"]["devices"][0]["usable"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
