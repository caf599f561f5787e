"""The native module: what it says about itself, that every path in it computes, and that it refuses nonsense."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import medgmae
from medgmae import _C
from medgmae.ops import native as _native
from medgmae.ops import native_info, self_test

X86_VARIANTS = ["generic", "avx2", "avx512"]


def python(code: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **kwargs)


def axpy(n: int, dtype: torch.dtype, threads: int = 1, variant: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype)
    expected = y + 0.3 * x
    _C.axpy(_native.DTYPE_CODES[dtype], n, 0.3, x.data_ptr(), y.data_ptr(), threads, variant)
    return y, expected


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
    errors = self_test(1_003)
    runnable = [name for name, runs in native_info()["cpu_variants"].items() if runs]
    assert {f"cpu/{name}/{dtype}" for name in runnable for dtype in ("float32", "float64")} <= set(errors)
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n", [0, 1, 7, 64, 1_000])
def test_axpy_equals_torch_in_every_variant(n: int, threads: int, dtype: torch.dtype) -> None:
    for variant, runs in native_info()["cpu_variants"].items():
        if runs:
            y, expected = axpy(n, dtype, threads, variant)
            torch.testing.assert_close(y, expected)


def test_axpy_stays_within_its_n_elements() -> None:
    x, y = torch.ones(100), torch.zeros(100)
    _C.axpy(0, 61, 1.0, x.data_ptr(), y[3:].data_ptr(), 2)
    assert y.nonzero().flatten().tolist() == list(range(3, 64))


def test_wrong_result_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        build_info = staticmethod(_C.build_info)

        @staticmethod
        def axpy(*args: object) -> None:
            """Leave y as it was."""

    monkeypatch.setattr(_native, "_C", Broken)
    with pytest.raises(RuntimeError, match="differ from torch"):
        self_test(10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": -1}, "n is -1"),
        ({"x": 0}, "null pointer"),
        ({"threads": 0}, "threads is 0"),
        ({"dtype": 9}, "dtype code 9"),
        ({"variant": "sse"}, "no CPU variant 'sse'"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    x, y = torch.ones(4), torch.zeros(4)
    arguments = {"dtype": 0, "n": 4, "a": 1.0, "x": x.data_ptr(), "y": y.data_ptr(), "threads": 1} | change
    with pytest.raises(ValueError, match=message):
        _C.axpy(**arguments)
    assert not y.any()


def test_missing_module_is_explained() -> None:
    done = python(
        "import sys; sys.modules['medgmae._C'] = None\n"
        "from medgmae.ops import native_info, self_test\n"
        "info = native_info(); assert info['loaded'] is False, info\n"
        "assert '_C' in info['error'] and 'pip install' in info['error'], info\n"
        "self_test()"
    )
    assert "RuntimeError: the native module is not loaded" in done.stderr, done.stderr


def test_importing_starts_no_cuda_driver_and_one_openmp_runtime() -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    done = python(
        "import torch, medgmae.ops, medgmae._C\n"
        "paths = {line.split()[-1] for line in open('/proc/self/maps')}\n"
        "names = [path.rsplit('/', 1)[-1] for path in paths]\n"
        "assert not [n for n in names if n.startswith('libcuda.so')], names\n"
        "assert sum('gomp' in n or 'iomp' in n for n in names) == 1, names"
    )
    assert done.returncode == 0, done.stderr


def test_cuda_half_says_what_it_finds() -> None:
    cuda = native_info()["cuda"]
    if cuda is None:
        assert not hasattr(_C, "axpy_cuda")
        return
    assert cuda["architectures"][-1].endswith("+PTX")
    assert (cuda["devices"] > 0) == (cuda["driver_error"] is None)
    if cuda["devices"] == 0:
        x = torch.ones(4)
        with pytest.raises(RuntimeError, match="axpy on CUDA: cudaError"):
            _C.axpy_cuda(0, 4, 1.0, x.data_ptr(), x.data_ptr(), 0)


@pytest.mark.gpu
def test_axpy_on_cuda_in_a_stream_of_its_own() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.randn(1_000_003, device="cuda", dtype=torch.float64)
        y = torch.randn_like(x)
        expected = y + 0.3 * x
        _C.axpy_cuda(1, x.numel(), 0.3, x.data_ptr(), y.data_ptr(), stream.cuda_stream)
    stream.synchronize()
    torch.testing.assert_close(y, expected)
    assert any(path.startswith("cuda/") for path in self_test())


@pytest.mark.gpu
def test_compute_sanitizer_finds_nothing() -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        pytest.skip("no compute-sanitizer in this CUDA toolkit")
    code = "from medgmae.ops import self_test; assert any(path.startswith('cuda/') for path in self_test(10_007))"
    command = [tool, "--error-exitcode", "9", "--target-processes", "all", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
