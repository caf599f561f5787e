"""Finds the native module `medgmae._C`, decides where its kernels run, and reports both."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TypedDict

import torch

# Of the bindings in cuda/module.cpp: raise both with every change of what a binding takes or writes.
INTERFACE = 4
# Codes of cuda/common.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1}
# What CUDA says where a module holds no code that the device and its driver can run.
NO_CODE = ("NoKernelImageForDevice", "InvalidKernelImage", "InvalidPtx", "UnsupportedPtxVersion", "JitCompiler")

_C: ModuleType | None
IMPORT_ERROR: str | None = None
try:
    import medgmae._C as _C
except ImportError as error:
    IMPORT_ERROR = (
        f"{type(error).__name__}: {error} (operators run their torch reference; to build the module: pip install . in "
        "a clone of the repository)"
    )
    _C = None
else:
    if getattr(_C, "interface", None) != INTERFACE:
        IMPORT_ERROR = (
            "medgmae._C was built for another version of medgmae (its interface is "
            f"{getattr(_C, 'interface', 'unnumbered')}, expected {INTERFACE}); rebuild it: pip install -e ."
        )
        _C = None
        warnings.warn(f"operators run their torch reference: {IMPORT_ERROR}", RuntimeWarning, stacklevel=2)


class DeviceInfo(TypedDict):
    """A GPU. `usable`: whether the kernels run on it, None where this process has not tried; `reason`: why not."""

    name: str
    capability: str
    usable: bool | None
    reason: str | None


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
    """The CUDA half: `version` of the toolkit that compiled it, and the highest that the `driver` supports.

    `driver_error` says why there are no `devices`.
    """

    version: str
    architectures: list[str]
    driver: str | None
    devices: list[DeviceInfo]
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
    cuda_missing: str | None


class NativeInfo(BuildInfo):
    """What :func:`native_info` returns."""

    loaded: bool
    error: str | None


def native_info() -> NativeInfo:
    """Report whether the native module is loaded, why not, what is in it, and on which GPUs its kernels run.

    The call starts the CUDA driver in this process: make it after forking workers, not before. Kernels are tried on
    the current device only, because trying takes memory of a device.

    Returns:
        `loaded`; `error`: the text of the failed import, or None; `version`, `compiler`, `cpp_standard`,
        `cpu_variants` (compiled instruction sets and whether this processor runs them), `cpu_variant` (the one in
        use), `openmp` (date of the standard, or None) and `cuda`: None, or `version` of the toolkit, `architectures`,
        `driver` (the highest CUDA version that it supports), `driver_error`, and `devices`, each with `name`,
        `capability`, `usable` (None: not tried in this process) and `reason`; `cuda_missing` says why the build left
        the CUDA half out. Without the module these are None, and `cpu_variants` is empty.
    """
    if _C is None:
        return {
            "loaded": False,
            "error": IMPORT_ERROR,
            "version": None,
            "compiler": None,
            "cpp_standard": None,
            "cpu_variants": {},
            "cpu_variant": None,
            "openmp": None,
            "cuda": None,
            "cuda_missing": None,
        }
    info: BuildInfo = _C.build_info()
    current = torch.cuda.current_device() if torch.cuda.is_available() else None
    for index, device in enumerate(info["cuda"]["devices"] if info["cuda"] else []):
        if current is None:
            device["usable"], device["reason"] = False, f"torch {torch.__version__} sees no GPU"
        elif index == current or index in _PROBLEMS:
            device["reason"] = device_problem(index)
            device["usable"] = device["reason"] is None
    return {"loaded": True, "error": None, **info}


_enabled = True
_PROBLEMS: dict[int, str | None] = {}  # by number of the CUDA device: those that were tried
_WARNED: set[int] = set()


@contextmanager
def use_native(enabled: bool) -> Iterator[None]:
    """Within the context, run the native kernels, or with False the torch reference of every operator: for debugging.

    The switch is the whole process's, because autograd runs backwards in threads of its own: run a backward within the
    context too, and no two contexts at a time in several threads. Operators ask at every call, so what is compiled or
    exported obeys; what a CUDA graph captured stays captured.

    Raises:
        RuntimeError: within a function that torch compiles as one graph; put the context around its call.
    """
    global _enabled
    if torch.compiler.is_compiling():  # a compiled graph would run after the switch was put back
        raise RuntimeError("use_native cannot be part of a compiled graph: put it around the call of the function")
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def native_runs(device: torch.device) -> bool:
    """Whether the native kernels are to run on a CPU or CUDA device; the first refusal of a GPU is a warning."""
    if not _enabled:
        return False
    if device.type == "cpu":
        return _C is not None
    problem = device_problem(device.index)
    if problem is not None and device.index not in _WARNED:
        _WARNED.add(device.index)
        warnings.warn(
            f"the CUDA kernels of medgmae cannot run on {device} ({torch.cuda.get_device_name(device)}): {problem}. "
            "Its operators run their torch reference there, which gives the same results many times slower",
            RuntimeWarning,
            stacklevel=2,
        )
    return problem is None


def device_problem(index: int) -> str | None:
    """Why the kernels cannot run on a CUDA device that torch sees, and what to do; None if they can. Tried once."""
    if index not in _PROBLEMS:
        _PROBLEMS[index] = _try_device(index)
    return _PROBLEMS[index]


def _try_device(index: int) -> str | None:
    if torch.version.hip is not None:
        return f"this torch is built for ROCm {torch.version.hip}, and the kernels are for GPUs of NVIDIA only"
    if _C is None:
        return IMPORT_ERROR
    if not hasattr(_C, "cuda_problem"):
        missing = _C.build_info()["cuda_missing"]
        return (
            f"medgmae._C was built without CUDA kernels{f' ({missing})' if missing else ''}. Rebuild on a machine with "
            "nvcc: MEDGMAE_CUDA=1 pip install --force-reinstall ."
        )
    with torch.cuda.device(index):
        said: str | None = _C.cuda_problem()
    return said and explain(_C.build_info()["cuda"], said, torch.cuda.get_device_capability(index))


def explain(cuda: CudaInfo, said: str, capability: tuple[int, int]) -> str:
    """What CUDA ``said`` when it was to load a kernel on a device of that capability, in a user's words; the remedy."""
    if "InsufficientDriver" in said:
        has = f"supports CUDA {cuda['driver']}" if cuda["driver"] else "was not found"
        return (
            f"medgmae._C was built with CUDA {cuda['version']} and the driver {has}. Update the driver, or rebuild "
            "with the CUDA version that torch has (torch.version.cuda)"
        )
    if any(word in said for word in NO_CODE):
        major, minor = capability
        return (
            f"medgmae._C holds code for {' '.join(cuda['architectures'])}, which this GPU (sm_{major}{minor}) or its "
            f"driver (CUDA {cuda['driver']}) cannot run ({said}). Rebuild with a CUDA toolkit that compiles for "
            f"sm_{major}{minor} and is no newer than the driver: MEDGMAE_CUDA=1 "
            f"MEDGMAE_CUDA_ARCHITECTURES={major}{minor} pip install --force-reinstall ."
        )
    return f"loading a kernel failed ({said})"
