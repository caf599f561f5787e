"""Finds the native module `medgmae._C` and reports what is in it."""

from __future__ import annotations

import os
from types import ModuleType
from typing import TypedDict

import torch

# Codes of cuda/common.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1}

_C: ModuleType | None
IMPORT_ERROR: str | None = None
try:
    import medgmae._C as _C
except ImportError as error:
    _C, IMPORT_ERROR = None, f"{type(error).__name__}: {error}"


_in_forked_child = False


def _forked() -> None:
    global _in_forked_child
    _in_forked_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def threads() -> int:
    """How many threads a CPU kernel uses: torch's number, and 1 in a forked process.

    OpenMP's threads are not copied by a fork, and a kernel in the child that asks for them waits for ever.
    """
    return 1 if _in_forked_child else torch.get_num_threads()


class CudaInfo(TypedDict):
    """The CUDA half: `version` of the toolkit that compiled it; `driver_error` says why there are no `devices`."""

    version: str
    architectures: list[str]
    devices: int
    driver_error: str | None


class BuildInfo(TypedDict):
    """What the native module says about itself."""

    version: str | None
    compiler: str | None
    cpp_standard: int | None
    cpu_variants: dict[str, bool]
    cpu_variant: str | None
    openmp: int | None
    cuda: CudaInfo | None


class NativeInfo(BuildInfo):
    """What :func:`native_info` returns."""

    loaded: bool
    error: str | None


def native_info() -> NativeInfo:
    """Report whether the native module is loaded, why not, and what is in it.

    The call starts the CUDA driver in this process: make it after forking workers, not before.

    Returns:
        `loaded`; `error`: the text of the failed import, or None; `version`, `compiler`, `cpp_standard`,
        `cpu_variants` (compiled instruction sets and whether this processor runs them), `cpu_variant` (the one in
        use), `openmp` (date of the standard, or None) and `cuda`: None, or `version` of the toolkit, `architectures`,
        number of `devices` and `driver_error`. Without the module these are None, and `cpu_variants` is empty.
    """
    if _C is not None:
        info: BuildInfo = _C.build_info()
        return {"loaded": True, "error": None, **info}
    hint = "operators run their torch reference; to build the module: pip install . in a clone of the repository"
    return {
        "loaded": False,
        "error": f"{IMPORT_ERROR} ({hint})",
        "version": None,
        "compiler": None,
        "cpp_standard": None,
        "cpu_variants": {},
        "cpu_variant": None,
        "openmp": None,
        "cuda": None,
    }
