"""Builds the native module medgmae._C; everything else about the package is said in pyproject.toml.

The module knows no torch: it needs a C++ compiler and pybind11, and nvcc for its CUDA half.

    MEDGMAE_NATIVE=0   no native module: every operator runs its torch reference
    MEDGMAE_CUDA=0|1   leave the CUDA half out, or insist on it (unset: built when nvcc is found)
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

CUDA_ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
X86 = platform.machine().lower() in ("x86_64", "amd64")
# One source, compiled once for each; cuda/module.cpp picks the best that the running processor has.
CPU_VARIANTS = {"generic": []} | ({"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mfma"]} if X86 else {})
HINT = "medgmae: the native module did not compile; MEDGMAE_CUDA=0 leaves out its CUDA half, MEDGMAE_NATIVE=0 all of it"


def switch(name: str) -> bool | None:
    """Read NAME from the environment as 0, 1 or unset (None)."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} is {value!r}: expected 0, 1 or nothing")
    return None if value == "" else value == "1"


def find_cuda() -> Path | None:
    """Return the folder of a complete CUDA toolkit, or None.

    CUDA_HOME or CUDA_PATH is believed. Without them: an nvcc on PATH may be a wrapper script in a folder of its own, so
    a folder counts only if the headers are there.
    """
    if switch("MEDGMAE_CUDA") is False:
        return None
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    guesses = [Path(nvcc).resolve().parent.parent] if nvcc else []
    tried = [Path(named)] if named else [*guesses, Path("/usr/local/cuda")]
    for folder in tried:
        if (folder / "bin/nvcc").exists() and (folder / "include/cuda_runtime.h").exists():
            return folder
    if switch("MEDGMAE_CUDA"):
        looked = ", ".join(map(str, tried))
        raise SystemExit(f"MEDGMAE_CUDA=1, but no bin/nvcc with include/cuda_runtime.h; set CUDA_HOME (tried {looked})")
    return None


def cuda_architectures(nvcc: Path) -> list[str]:
    """Return those of CUDA_ARCHITECTURES that this nvcc can compile for (toolkits add new and drop old ones)."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    return [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in known]


class BuildNative(build_ext):
    """Compiles cuda/cpu_kernels.cpp once per CPU variant, the .cu files with nvcc, and links them with the bindings."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Build one extension; a compiler error ends with what can be switched off."""
        try:
            ext.define_macros.append(("MEDGMAE_VERSION", f'"{self.distribution.get_version()}"'))
            find_cuda()  # a toolkit that was asked for and is not there stops the build before minutes of compiling
            ext.extra_objects = [*self.cpu_objects(ext), *self.cuda_objects(ext)]
            super().build_extension(ext)
        except (CompileError, LinkError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{error}\n{HINT}") from error

    def cpu_objects(self, ext: Pybind11Extension) -> list[str]:
        """Compile the kernels for each CPU variant."""
        objects: list[str] = []
        for name, flags in CPU_VARIANTS.items():
            objects += self.compiler.compile(
                ["cuda/cpu_kernels.cpp"],
                output_dir=str(Path(self.build_temp, name)),
                macros=[("MEDGMAE_VARIANT", name)],
                extra_postargs=[*ext.extra_compile_args, "-std=c++17", *flags],
            )
        return objects

    def cuda_objects(self, ext: Pybind11Extension) -> list[str]:
        """Compile the CUDA kernels into fat objects and add what linking it needs to ext."""
        home = find_cuda()
        self.announce(f"medgmae: CUDA kernels: {f'with {home}' if home else 'left out'}", level=2)
        if home is None:
            return []
        architectures = cuda_architectures(home / "bin/nvcc")
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
        code.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
        flags = ["-O3", "-std=c++17", "-cudart", "static", "-t", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden,-g0"]
        flags += ["-Xfatbin", "-compress-all"]  # a fifth of the size
        objects = []
        for source in sorted(Path("cuda").rglob("*.cu")):
            objects.append(str(Path(self.build_temp, "cuda", source.stem + "_cuda.o")))
            Path(objects[-1]).parent.mkdir(parents=True, exist_ok=True)
            self.spawn([str(home / "bin/nvcc"), "-c", str(source), "-o", objects[-1], *flags, *code])
        ext.define_macros.append(("MEDGMAE_CUDA_ARCHITECTURES", f'"{" ".join(architectures)} {architectures[-1]}+PTX"'))
        ext.include_dirs.append(str(home / "include"))
        ext.library_dirs.append(str(home / "lib64"))
        ext.libraries += ["cudart_static", "dl", "pthread", "rt"]
        return objects


def native_modules() -> list[Pybind11Extension]:
    """Describe medgmae._C, unless it is switched off."""
    if switch("MEDGMAE_NATIVE") is False:
        return []
    # Apple's compiler has no OpenMP runtime; the kernels then run on one thread.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    module = Pybind11Extension(
        "medgmae._C",
        ["cuda/module.cpp"],
        cxx_std=17,
        depends=[str(path) for path in sorted(Path("cuda").rglob("*")) if path.is_file()],
        extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", *openmp],
        # The static CUDA runtime must not answer for the one that torch loads.
        extra_link_args=[*openmp, *(["-Wl,--exclude-libs,ALL", "-s"] if sys.platform == "linux" else [])],
    )
    module.define_macros += [(f"MEDGMAE_{name.upper()}", None) for name in CPU_VARIANTS]
    return [module]


setup(
    packages=["medgmae", *(f"medgmae.{name}" for name in find_packages("medgmae")), "medgmae.weights"],
    ext_modules=native_modules(),
    cmdclass={"build_ext": BuildNative},
)
