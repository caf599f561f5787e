"""The CUDA kernels, through the public function, against the float64 reference; and how they behave in a stream."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussians import REFERENCE, SUPPORTS, cut, leaves, make, peak_error, relative
from test_voxelize_native import COUNT, SIZES, case

from medgmae.ops import voxelize
from medgmae.ops.native import native_runs

pytestmark = pytest.mark.gpu
every_support = pytest.mark.parametrize("support", SUPPORTS, ids=str)
SIZE = (48, 40, 56)


def gradients(
    parameters: Any, cotangent: torch.Tensor, size: Any, **kwargs: Any
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    inputs = leaves([p.cuda() for p in parameters])
    out = voxelize(*inputs, size, **kwargs)
    return out.detach(), torch.autograd.grad(out, inputs, cotangent.cuda())


def test_the_kernels_are_there() -> None:
    """Else every test below would measure the torch reference."""
    assert native_runs(torch.device("cuda", torch.cuda.current_device()))


@every_support
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scale", [0.05, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients(support: Any, size: tuple[int, ...], scale: float, dtype: torch.dtype) -> None:
    parameters, cotangent, rim, expected, wanted = case(size, support, scale)
    volume, got = gradients([p.to(dtype) for p in parameters], cotangent.to(dtype), size, support=support)
    assert volume.dtype == dtype
    assert peak_error(volume.cpu().masked_fill(rim, 0), expected.masked_fill(rim, 0)) <= 5e-6
    for gradient, exact in zip(got, wanted, strict=True):
        assert relative(gradient.cpu(), exact) <= 1e-5


@every_support
def test_box_membership_and_patches(support: Any) -> None:
    means, scales, quats, densities = make(count=COUNT, dtype=torch.float32)
    patches = torch.stack([torch.randperm(480)[:120] for _ in range(2)])
    parameters = [p.cuda() for p in (means, scales, quats, densities.abs())]
    volume = voxelize(*parameters, SIZE, support=support)
    rendered = voxelize(*parameters, SIZE, support=support, patches=patches.cuda(), patch_size=(8, 4, 7))
    expected = cut(volume.cpu(), patches, (8, 4, 7))
    off = ((rendered.cpu() - expected).abs() > 5e-6 * float(expected.max())).float().mean()
    assert float(off) <= (1e-5 if isinstance(support, float) else 0)
    if support == "box":
        one = [p[:, :1].contiguous() for p in parameters[:3]]
        ones = torch.ones(2, 1, device="cuda")
        inside = REFERENCE.render([p.cpu() for p in (*one, ones)], SIZE, "box") > 1e-20
        assert torch.equal(voxelize(*one, ones, SIZE, support="box").cpu() > 1e-20, inside)


@pytest.mark.parametrize("support", ["box", None])
def test_needles(support: Any) -> None:
    size = (40, 33, 50)
    parameters, cotangent, _, expected, wanted = case(size, support, 0.05, 1.5)
    volume, got = gradients(parameters, cotangent, size, support=support)
    assert peak_error(volume.cpu(), expected) <= 2e-5
    for gradient, exact in zip(got, wanted, strict=True):
        assert relative(gradient.cpu(), exact) <= 1e-4


@every_support
@pytest.mark.parametrize(("index", "value"), [(0, math.nan), (1, 0.0), (1, math.inf), (2, math.nan), (3, math.inf)])
def test_bad_gaussians(support: Any, index: int, value: float) -> None:
    parameters, size = make(count=6, dtype=torch.float32), (5, 17, 6)
    parameters[index][1, 2].flatten()[:1].fill_(value)
    volume, got = gradients(parameters, torch.ones(2, 1, *size), size, support=support)
    assert volume[0].isfinite().all()
    assert volume[1].isnan().all()
    rest = torch.arange(12, device="cuda").reshape(2, 6) != 8
    for gradient in got:
        assert gradient[1, 2].isnan().all()
        assert gradient[rest].isfinite().all()


@every_support
def test_nothing_to_render(support: Any) -> None:
    for batch, count in [(2, 0), (0, 3)]:
        volume, _ = gradients(make(batch, count), torch.ones(batch, 1, 4, 3, 5).double(), (4, 3, 5), support=support)
        assert volume.shape == (batch, 1, 4, 3, 5)
        assert not volume.any()


@every_support
@pytest.mark.parametrize("count", [40, 6000])
def test_two_runs_give_the_same_bits(support: Any, count: int) -> None:
    parameters = make(count=count, dtype=torch.float32, scale=0.05)
    cotangent = torch.randn(2, 1, *SIZE)
    first = gradients(parameters, cotangent, SIZE, support=support)
    for _ in range(3):
        again = gradients(parameters, cotangent, SIZE, support=support)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@every_support
def test_a_patch_that_is_not_there_is_nan(support: Any) -> None:
    """Nobody waits for the device to look at the numbers."""
    parameters, patch = make(dtype=torch.float32), (8, 4, 7)
    patches = torch.tensor([[0, 480, 5], [-1, 2, 2**40]])
    there = (patches >= 0) & (patches < 480)
    cotangent = torch.randn(2, 3, 224)
    volume, got = gradients(parameters, cotangent, SIZE, support=support, patches=patches.cuda(), patch_size=patch)
    assert torch.equal(volume.isnan().all(-1).cpu(), ~there)
    assert torch.equal(volume.isfinite().all(-1).cpu(), there)
    cotangent[~there] = 0
    known = patches.where(there, 0).cuda()
    _, wanted = gradients(parameters, cotangent, SIZE, support=support, patches=known, patch_size=patch)
    for gradient, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def test_many_gaussians_and_many_patches() -> None:
    """More words of Gaussians than a block reads at once, more blocks than two dimensions of a grid hold."""
    means, scales, quats, densities = make(1, 65536, torch.float32, scale=0.02)
    parameters = means, scales, quats, densities.abs()
    volume, got = gradients(parameters, torch.ones(1, 1, *SIZE), SIZE, support="box")
    halves = [gradients([p[:, i::2] for p in parameters], torch.ones(1, 1, *SIZE), SIZE, support="box") for i in (0, 1)]
    assert peak_error(halves[0][0] + halves[1][0], volume) <= 1e-5
    for k, whole in enumerate(got):
        for i in (0, 1):
            assert relative(halves[i][1][k], whole[:, i::2]) <= 1e-5

    few = make(2, 3, torch.float32, scale=0.3)
    patches = torch.randint(13440, (2, 100_000), device="cuda")
    rendered, _ = gradients(few, torch.ones(2, 100_000, 8), SIZE, support=None, patches=patches, patch_size=2)
    dense = voxelize(*[p.cuda() for p in few], SIZE, support=None)
    grid = dense.reshape(2, 24, 2, 20, 2, 28, 2).permute(0, 1, 3, 5, 2, 4, 6).reshape(2, 13440, 8)
    expected = grid.gather(1, patches[..., None].expand(-1, -1, 8))
    assert peak_error(rendered, expected) <= 5e-6


def test_half_precision_and_autocast() -> None:
    parameters = [p.cuda() for p in make(dtype=torch.float16)]
    expected = voxelize(*[p.float() for p in parameters], SIZE)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(voxelize(*parameters, SIZE), expected)


@every_support
def test_a_stream_of_its_own(support: Any) -> None:
    """The kernels wait for what the stream holds: here the parameters are made in it, late."""
    parameters = make(count=COUNT, dtype=torch.float32)
    expected = voxelize(*[p.cuda() for p in parameters], SIZE, support=support)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = [torch.zeros_like(p, device="cuda").copy_(p.pin_memory(), non_blocking=True) for p in parameters]
        volume = voxelize(*late, SIZE, support=support)
    stream.synchronize()
    assert torch.equal(volume, expected)


@pytest.mark.parametrize("support", ["box", 3.0])
def test_captured_in_a_graph(support: Any) -> None:
    parameters = make(count=COUNT, dtype=torch.float32)
    static = [p.cuda().requires_grad_() for p in parameters]
    cotangent = torch.randn(2, 1, *SIZE, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(voxelize(*static, SIZE, support=support), static, cotangent)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        volume = voxelize(*static, SIZE, support=support)
        captured = torch.autograd.grad(volume, static, cotangent)
    others = make(count=COUNT, dtype=torch.float32, seed=5)
    with torch.no_grad():
        for tensor, value in zip(static, others, strict=True):
            tensor.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    expected, wanted = gradients(others, cotangent, SIZE, support=support)
    assert torch.equal(volume, expected)
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


def test_memory_does_not_grow() -> None:
    """Nothing is allocated behind torch's back, and every call leaves as much as the one before."""
    parameters = [p.cuda() for p in make(count=2000, dtype=torch.float32, scale=0.05)]
    cotangent = torch.randn(2, 1, *SIZE, device="cuda")
    gradients(parameters, cotangent, SIZE, support="box")
    torch.cuda.synchronize()
    held, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    for _ in range(20):
        gradients(parameters, cotangent, SIZE, support="box")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == held
    assert torch.cuda.mem_get_info()[0] >= free - (8 << 20)


def test_compute_sanitizer_script_finds_nothing() -> None:
    script = Path(__file__).parent / "sanitize/cuda.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([str(script)], capture_output=True, text=True, timeout=900, env=environment)
    if done.returncode == 77:
        pytest.skip("no compute-sanitizer in this CUDA toolkit")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
