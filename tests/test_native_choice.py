"""Where the native kernels run and where the torch reference: the switch, GPUs that cannot run them, and why."""

from __future__ import annotations

import threading
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from medgmae.ops import causal_conv1d, conv, native, native_info, scan, selective_scan, use_native, voxel, voxelize
from medgmae.ops.native import CudaInfo, explain
from medgmae.ops.register import choices

pytestmark = pytest.mark.skipif(not native_info()["loaded"], reason="no native module: nothing to choose from")

NO_IMAGE = "cudaErrorNoKernelImageForDevice: no kernel image is available for execution on the device"
OLD_DRIVER = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"


def cuda_half(driver: str | None, devices: int = 0) -> CudaInfo:
    """A CUDA half for two architectures."""
    return {
        "version": "13.0",
        "architectures": ["75", "90", "90+PTX"],
        "driver": driver,
        "devices": [{"name": "Tesla", "capability": "7.0", "usable": None, "reason": None} for _ in range(devices)],
        "driver_error": None,
    }


@pytest.mark.parametrize(
    ("driver", "said", "capability", "words"),
    [
        ("12.4", OLD_DRIVER, (9, 0), ["CUDA 13.0", "the driver supports CUDA 12.4", "Update the driver"]),
        (None, OLD_DRIVER, (9, 0), ["the driver was not found"]),
        ("13.0", NO_IMAGE, (7, 0), ["code for 75 90 90+PTX", "(sm_70)", "NoKernelImage", "ARCHITECTURES=70 pip"]),
        ("12.8", "cudaErrorUnsupportedPtxVersion: ...", (12, 1), ["(sm_121)", "driver (CUDA 12.8)", "Rebuild with"]),
        ("13.0", "cudaErrorInvalidPtx: ...", (11, 0), ["(sm_110)", "InvalidPtx"]),
        ("13.0", "cudaErrorMemoryAllocation: out of memory", (9, 0), ["failed (cudaErrorMemoryAllocation"]),
    ],
    ids=["old driver", "no driver", "V100", "old driver for PTX", "Thor", "memory"],
)
def test_reasons(driver: str | None, said: str, capability: tuple[int, int], words: list[str]) -> None:
    text = explain(cuda_half(driver), said, capability)
    assert all(word in text for word in words), text


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two GPUs that torch sees; `said`: what CUDA says when a kernel is loaded, `tried`: on which devices it was."""
    fake = SimpleNamespace(said=NO_IMAGE, tried=[], current=0)

    def enter(index: int) -> Any:
        fake.current = index
        return nullcontext()

    def cuda_problem() -> str | None:
        fake.tried.append(fake.current)
        return fake.said

    module = SimpleNamespace(cuda_problem=cuda_problem, build_info=lambda: {"cuda": cuda_half("13.0", 2)})
    monkeypatch.setattr(native, "_C", module)
    monkeypatch.setattr(native, "_PROBLEMS", {})
    monkeypatch.setattr(native, "_WARNED", set())
    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla")
    return fake


def test_a_gpu_that_cannot_run_the_kernels_gets_the_reference_and_one_warning(gpus: SimpleNamespace) -> None:
    choose = choices(conv.reference, conv.native, conv.cuda)["CUDA"]
    for index in (0, 1):
        device = torch.device("cuda", index)
        with pytest.warns(RuntimeWarning, match=rf"cannot run on cuda:{index} \(Tesla\): .*sm_70.*Rebuild") as caught:
            assert choose(device) is conv.reference
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choose(device) is conv.reference
    assert gpus.tried == [0, 1]


def test_a_gpu_that_can_runs_them_and_is_tried_once(gpus: SimpleNamespace) -> None:
    gpus.said = None
    choose = choices(conv.reference, conv.native, conv.cuda)["CUDA"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [choose(torch.device("cuda", 1)) for _ in range(3)] == [conv.cuda] * 3
    assert gpus.tried == [1]
    with use_native(False):
        assert choose(torch.device("cuda", 1)) is conv.reference


def test_rocm_is_not_tried(gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are CUDA's to torch, but lie in no memory that a kernel here could read."""
    gpus.said = None
    monkeypatch.setattr(torch.version, "hip", "6.4.0")
    with pytest.warns(RuntimeWarning, match="built for ROCm"):
        assert not native.native_runs(torch.device("cuda", 0))
    assert gpus.tried == []


def test_without_a_cuda_half_the_reference_runs(gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_C", SimpleNamespace(build_info=lambda: {"cuda_missing": "nvcc found no compiler"}))
    with pytest.warns(
        RuntimeWarning, match=r"without CUDA kernels \(nvcc found no compiler\). Rebuild.*MEDGMAE_CUDA=1"
    ):
        assert not native.native_runs(torch.device("cuda", 0))


def test_info_tries_the_current_gpu_only(gpus: SimpleNamespace) -> None:
    first, second = native_info()["cuda"]["devices"]
    assert (first["usable"], first["reason"]) == (False, native.device_problem(0))
    assert "sm_70" in first["reason"]
    assert (second["usable"], second["reason"]) == (None, None)
    gpus.said = None
    assert native.device_problem(1) is None
    assert native_info()["cuda"]["devices"][1]["usable"] is True
    assert gpus.tried == [0, 1]


def test_info_without_a_gpu_in_torch(gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    devices = native_info()["cuda"]["devices"]
    assert [device["usable"] for device in devices] == [False, False]
    assert "sees no GPU" in devices[0]["reason"]
    assert gpus.tried == []


def rendered() -> tuple[Any, list[Tensor]]:
    inputs = [torch.rand(1, 4, 3), torch.rand(1, 4, 3), torch.rand(1, 4, 4), torch.rand(1, 4)]
    return lambda *a: voxelize(*a, 8), inputs


def scanned() -> tuple[Any, list[Tensor]]:
    return selective_scan, [torch.rand(1, 2, 9), torch.rand(1, 2, 9), -torch.rand(2, 3), *torch.rand(2, 1, 3, 9)]


def filtered() -> tuple[Any, list[Tensor]]:
    return causal_conv1d, [torch.rand(1, 2, 9), torch.rand(2, 3)]


OPERATORS = pytest.mark.parametrize(
    ("room", "make"), [(voxel, rendered), (scan, scanned), (conv, filtered)], ids=["voxelize", "scan", "conv"]
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran, by the name of its module."""
    found: list[str] = []

    def recorded(name: str, function: Any) -> Any:
        return lambda *args, **options: found.append(name) or function(*args, **options)

    for room in (voxel, scan, conv):
        for kernels in ("native", "reference"):
            module = getattr(room, kernels)
            for direction in ("forward", "backward"):
                name = f"{kernels}.{direction}"
                monkeypatch.setattr(module, direction, recorded(name, getattr(module, direction)))
    return found


def differentiate(run: Any, inputs: list[Tensor]) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    torch.autograd.grad(run(*leaves).sum(), leaves)


@OPERATORS
def test_the_switch_reaches_both_directions(room: Any, make: Any, calls: list[str]) -> None:
    run, inputs = make()
    differentiate(run, inputs)
    with use_native(False):
        differentiate(run, inputs)
        with use_native(True):
            run(*inputs)
        run(*inputs)
    run(*inputs)
    native, reference = ["native.forward", "native.backward"], ["reference.forward", "reference.backward"]
    assert calls == [*native, *reference, "native.forward", "reference.forward", "native.forward"]


@OPERATORS
def test_a_backward_takes_what_the_other_forward_kept(room: Any, make: Any) -> None:
    run, inputs = make()

    def gradients(forward: bool, backward: bool) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        with use_native(forward):
            out = run(*leaves)
        with use_native(backward):
            return torch.autograd.grad(out.square().sum(), leaves)

    wanted = gradients(False, False)
    for forward, backward in ((True, False), (False, True)):
        for got, value in zip(gradients(forward, backward), wanted, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)


def test_the_switch_reaches_other_threads_and_an_error_puts_it_back(calls: list[str]) -> None:
    run, inputs = filtered()

    def fail() -> None:
        with use_native(False):
            thread = threading.Thread(target=differentiate, args=(run, inputs))
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    run(*inputs)
    assert calls == ["reference.forward", "reference.backward", "native.forward"]


def test_a_compiled_function_obeys_at_every_call(calls: list[str]) -> None:
    run, inputs = filtered()
    compiled = torch.compile(lambda *a: run(*a) + 1, backend="eager", fullgraph=True)
    compiled(*inputs)
    with use_native(False):
        compiled(*inputs)
    assert calls == ["native.forward", "reference.forward"]


def test_the_switch_is_no_part_of_a_graph(calls: list[str]) -> None:
    """In a graph it would be put back before the operators run."""
    run, inputs = filtered()

    def switched(*tensors: Tensor) -> Tensor:
        with use_native(False):
            return run(*tensors)

    torch.compile(switched, backend="eager")(*inputs)
    assert calls == ["reference.forward"]
    torch.compiler.reset()
    with pytest.raises(Exception, match="put it around the call"):
        torch.compile(switched, backend="eager", fullgraph=True)(*inputs)
