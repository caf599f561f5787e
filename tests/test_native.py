"""The native module: what it says about itself, that every path in it computes, and that it refuses nonsense."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python

import medgmae
from medgmae import _C
from medgmae.ops import check, conv, native_info, scan, self_test, voxel
from medgmae.ops.conv.call import Call
from medgmae.ops.conv.inputs import ConvInputs
from medgmae.ops.scan.inputs import ScanInputs
from medgmae.ops.voxel.inputs import VoxelInputs

X86_VARIANTS = ["generic", "avx2", "avx512"]


def convolution() -> Call:
    """A small call with memory for its result."""
    call = Call(ConvInputs(torch.ones(1, 5, 4), torch.ones(4, 3), None, False, False), torch.float32)
    call.stream("out", torch.zeros(1, 5, 4))
    return call


def test_info_describes_the_build() -> None:
    info = native_info()
    assert info["loaded"]
    assert info["error"] is None
    assert info["version"] == medgmae.__version__
    assert info["cpp_standard"] >= 201703
    assert info["cpu_variants"]["generic"] is True
    assert info["cpu_variants"][info["cpu_variant"]] is True
    if sys.platform == "linux":
        assert info["openmp"] >= 201511


def test_best_variant_that_runs_is_used() -> None:
    info = native_info()
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or list(info["cpu_variants"]) != X86_VARIANTS:
        pytest.skip("needs Linux on x86-64")
    words = set(flags.read_text().split())
    assert info["cpu_variants"]["avx2"] == ({"avx2", "fma"} <= words)
    assert info["cpu_variants"]["avx512"] == ({"avx512f", "fma"} <= words)
    assert info["cpu_variant"] == [name for name in X86_VARIANTS if info["cpu_variants"][name]][-1]


def test_self_test_takes_every_path() -> None:
    errors = self_test()
    runnable = [name for name, runs in native_info()["cpu_variants"].items() if runs]
    operators = ["voxelize", "voxelize in levels", "project", "project in parallel", "selective_scan", "causal_conv1d"]
    paths = itertools.product(runnable, ("float32", "float64"), operators)
    assert {"/".join(("cpu", *path)) for path in paths} <= set(errors)
    assert max(errors.values()) < 1e-5
    assert min(errors.values()) > 0  # the reference was not compared with itself


def test_self_test_renders_on_coarse_lattices() -> None:
    """The only way to the banded product."""
    inputs = next(case.inputs for case in check._cases() if case.name == "voxelize in levels")
    assert voxel.levels.strides(VoxelInputs(*(t.float() for t in inputs[:4]), *inputs[4:])) == (4, 2)


@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_a_wrong_result_is_reported(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    real = getattr(conv.native, broken)

    def wrong(*inputs: Any, **options: Any) -> Any:
        result = real(*inputs, **options)
        (result if isinstance(result, torch.Tensor) else result[1]).flatten()[3] += 0.01
        return result

    monkeypatch.setattr(conv.native, broken, wrong)
    with pytest.raises(RuntimeError, match=r"differ from torch .*causal_conv1d") as caught:
        self_test()
    assert "selective_scan" not in str(caught.value)


def test_a_gpu_that_the_module_cannot_use_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla")
    monkeypatch.setattr(check, "device_problem", lambda index: f"number {index} is too old")
    with pytest.raises(RuntimeError, match="torch sees the GPU Tesla, but number 0 is too old"):
        self_test()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": -1}, "sizes must be 0 or more"),
        ({"input": 0}, "null pointer"),
        ({"threads": 0}, "threads is 0"),
        ({"variant": "sse"}, "no CPU variant 'sse'"),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], message: str) -> None:
    first, weights, x, out = torch.zeros(1, dtype=torch.int64), torch.ones(1, 1, 4), torch.ones(1, 1, 4), torch.zeros(4)
    addresses = {"first": first.data_ptr(), "weights": weights.data_ptr(), "input": x.data_ptr(), "out": out.data_ptr()}
    sizes = {"stack": 1, "rows_in": 1, "rows_out": 1, "length": 4, "taps": 1}
    with pytest.raises(ValueError, match=message):
        _C.banded(**{**sizes, **addresses, "add": False, "threads": 1, **change})
    assert not out.any()


def test_an_unknown_dtype_is_refused() -> None:
    call = convolution()
    with pytest.raises(ValueError, match="dtype code 9"):
        _C.causal_conv1d(9, call.sizes, call.streams, call.arrays, 9, 1)


@pytest.mark.parametrize("name", ["weight", "bias", "sums"])
def test_a_convolution_with_other_buffers_is_refused(name: str) -> None:
    """As Python files have that do not belong to the module, and sum over segments of another length."""
    x, weight, bias = torch.ones(1, 300, 4), torch.ones(4, 3), torch.ones(4)
    call, sums = Call(ConvInputs(x, weight, bias, False, False), torch.float32), torch.zeros(1, 2, 4, 4)
    for stream, tensor in {"grad": x, "dx": torch.zeros_like(x)}.items():
        call.stream(stream, tensor)
    call.array("sums", sums)
    _C.causal_conv1d(0, call.sizes, call.streams, call.arrays, 0, 1)
    assert sums.all()
    address, numbers = call.arrays[name]
    call.arrays[name] = address, numbers + 4
    with pytest.raises(ValueError, match=f"'{name}' has {numbers + 4} numbers: expected {numbers}; .*rebuild"):
        _C.causal_conv1d(0, call.sizes, call.streams, call.arrays, 0, 1)


@pytest.mark.parametrize("slab", [32, 128])
def test_a_scan_with_other_buffers_is_refused(monkeypatch: pytest.MonkeyPatch, slab: int) -> None:
    u, A, B = torch.ones(1, 5, 256), -torch.ones(256, 3), torch.ones(1, 5, 1, 3)
    inputs = ScanInputs(u, u, A, B, B, None, None, None, False, False, 64)
    states = scan.native.forward(inputs)[1]
    monkeypatch.setattr(scan.native, "SLAB", slab)
    with pytest.raises(ValueError, match=f"'dB' has {256 // slab * 15} numbers: expected 60"):
        scan.native.backward(u, None, states, inputs)
    with pytest.raises(ValueError, match="'kept' has 0 numbers: expected 768"):
        scan.native.backward(u, None, states[:, :0], inputs)


def test_missing_module_is_explained() -> None:
    done = warm_python.run(
        "-c",
        "import sys; sys.modules['medgmae._C'] = None\n"
        "from medgmae.ops import native_info, self_test\n"
        "info = native_info(); assert info['loaded'] is False, info\n"
        "assert info['cuda'] is None and info['cpu_variants'] == {}, info\n"
        "assert '_C' in info['error'] and 'pip install' in info['error'], info\n"
        "self_test()",
    )
    assert "RuntimeError: the native module is not loaded" in done.stderr, done.stderr


def test_a_module_of_another_version_is_not_used() -> None:
    """What an old build does is unknown, so it is not asked: its attributes fail here."""
    done = warm_python.run(
        "-c",
        "import sys, types, warnings\n"
        "sys.modules['medgmae._C'] = types.SimpleNamespace(interface=-1)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    from medgmae.ops import causal_conv1d, native_info\n"
        "text = 'its interface is -1, expected'\n"
        "assert [w.category for w in caught if text in str(w.message)] == [RuntimeWarning], caught\n"
        "info = native_info(); assert info['loaded'] is False, info\n"
        "assert text in info['error'] and 'pip install -e .' in info['error'], info\n"
        "import torch; assert causal_conv1d(torch.ones(1, 2, 3), torch.ones(2, 2)).sum() == 10",
    )
    assert done.returncode == 0, done.stderr


def test_types_of_the_module_are_true() -> None:
    """_C.pyi names every function and its arguments in their order."""
    tree = ast.parse((Path(medgmae.__file__).parent / "_C.pyi").read_text())
    stated = {f.name: [a.arg for a in f.args.args] for f in tree.body if isinstance(f, ast.FunctionDef)}
    found = {}
    for name, function in vars(_C).items():
        if callable(function) and not name.startswith("_"):
            signature = function.__doc__.splitlines()[0]
            found[name] = re.findall(r"[(,] *(\w+):", re.sub(r"\[.*?\](?=[,)\]])", "", signature.split(" -> ")[0]))
    if native_info()["cuda"] is None:
        stated = {name: arguments for name, arguments in stated.items() if "cuda" not in name}
    assert found == stated


def test_operators_are_functions_and_no_modules() -> None:
    for name in ("causal_conv1d", "project", "selective_scan", "self_test", "voxelize"):
        assert callable(getattr(medgmae.ops, name))
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"medgmae.ops.{name}")


def test_importing_starts_no_cuda_driver_and_one_openmp_runtime() -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    code = (
        "import torch, medgmae.ops, medgmae._C\n"
        "paths = {line.split()[-1] for line in open('/proc/self/maps')}\n"
        "names = [path.rsplit('/', 1)[-1] for path in paths]\n"
        "assert not [n for n in names if n.startswith('libcuda.so')], names\n"
        "assert sum('gomp' in n or 'iomp' in n for n in names) == 1, names"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_cuda_half_says_what_it_finds() -> None:
    cuda = native_info()["cuda"]
    if cuda is None:
        assert not hasattr(_C, "causal_conv1d_cuda")
        return
    assert cuda["architectures"][-1].endswith("+PTX")
    assert bool(cuda["devices"]) == (cuda["driver_error"] is None)
    if not cuda["devices"]:
        call = convolution()
        for _ in range(2):  # an error does not stay
            assert _C.cuda_problem().startswith("cudaError")
            with pytest.raises(RuntimeError, match="causal_conv1d on CUDA: cudaError"):
                _C.causal_conv1d_cuda(0, call.sizes, call.streams, call.arrays, 0, 0)


@pytest.mark.gpu
def test_self_test_runs_on_the_gpu() -> None:
    operators = {path.split("/")[-1] for path in self_test() if path.startswith("cuda/")}
    assert operators == {"voxelize", "voxelize in levels", "selective_scan", "causal_conv1d"}


@pytest.mark.gpu
def test_compute_sanitizer_finds_nothing() -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        pytest.skip("no compute-sanitizer in this CUDA toolkit")
    code = "from medgmae.ops import self_test; assert any(path.startswith('cuda/') for path in self_test())"
    command = [tool, "--error-exitcode", "9", "--target-processes", "all", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
