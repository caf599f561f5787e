"""Finds the native module `medgmae._C`, says what is in it, and proves that it computes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

# Codes of cuda/common.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1}

_C: ModuleType | None
IMPORT_ERROR: str | None = None
try:
    import medgmae._C as _C
except ImportError as error:
    _C, IMPORT_ERROR = None, f"{type(error).__name__}: {error}"


def native_info() -> dict[str, Any]:
    """Say whether the native module is loaded, why not, and what is in it.

    Asking starts the CUDA driver in this process, so ask after forking workers, not before.

    Returns:
        `loaded`; `error`: the text of the failed import, or None; and if it is loaded: `version`, `compiler`,
        `cpp_standard`, `cpu_variants` (compiled instruction sets and whether this processor runs them), `cpu_variant`
        (the one in use), `openmp` (date of the standard, or None) and `cuda`: None, or `version` of the toolkit,
        `architectures`, number of `devices` and `driver_error`.
    """
    if _C is None:
        hint = "operators run their torch reference; to build the module: pip install . in a clone of the repository"
        return {"loaded": False, "error": f"{IMPORT_ERROR} ({hint})"}
    return {"loaded": True, "error": None, **_C.build_info()}


def self_test(n: int = 10_007, threads: int | None = None) -> dict[str, float]:
    """Compute y + a x by every native path that this machine can run and compare with torch.

    Args:
        n: number of elements.
        threads: CPU threads; torch's own number if None.

    Returns:
        For each path, such as `"cpu/avx2/float32"`, the largest relative difference from torch.

    Raises:
        RuntimeError: the native module is not loaded, or a path is off by more than rounding.
    """
    if _C is None:
        raise RuntimeError(f"the native module is not loaded: {native_info()['error']}")
    info = _C.build_info()
    paths = [("cpu", name) for name, runs in info["cpu_variants"].items() if runs]
    if info["cuda"] and info["cuda"]["devices"] and torch.cuda.is_available():
        paths.append(("cuda", torch.cuda.get_device_name()))
    errors = {
        f"{device}/{name}/{str(dtype).removeprefix('torch.')}": _axpy_error(_C, device, name, dtype, n, threads)
        for device, name in paths
        for dtype in DTYPE_CODES
    }
    wrong = {path: error for path, error in errors.items() if not error <= 1e-6}
    if wrong:
        raise RuntimeError(
            f"native kernels differ from torch (largest relative difference): {wrong}; rebuild medgmae here"
        )
    return errors


def _axpy_error(
    native: ModuleType, device: str, variant: str, dtype: torch.dtype, n: int, threads: int | None
) -> float:
    x = torch.linspace(-1, 1, n, dtype=dtype, device=device)
    y = torch.linspace(2, 3, n, dtype=dtype, device=device)
    expected = y + 0.3 * x
    arguments = (DTYPE_CODES[dtype], n, 0.3, x.data_ptr(), y.data_ptr())
    if device == "cuda":
        native.axpy_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        native.axpy(*arguments, threads or torch.get_num_threads(), variant)
    return float(((y - expected) / expected).abs().max()) if n else 0.0
