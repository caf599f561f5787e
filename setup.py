"""Builds the native module medgmae._C; everything else about the package is said in pyproject.toml.

The module knows no torch: it needs a C++ compiler and pybind11, and nvcc for its CUDA half (docs/building.md).

    MEDGMAE_NATIVE=0   no native module: every operator runs its torch reference
    MEDGMAE_CUDA=0|1   leave the CUDA half out, or insist on it (unset: built where a usable nvcc is found)
    MEDGMAE_CUDA_ARCHITECTURES="80;90"   compile the CUDA half for these alone
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

CUDA_ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
X86 = platform.machine().lower() in ("x86_64", "amd64")
# One source, compiled once for each; cuda/module.cpp picks the best that the running processor has.
CPU_VARIANTS = {"generic": []} | ({"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mfma"]} if X86 else {})
HINT = "medgmae: the native module did not compile; MEDGMAE_CUDA=0 leaves out its CUDA half, MEDGMAE_NATIVE=0 all of it"
# Seconds that one core needs for the CPU half, and for each GPU architecture; measured with gcc 12.2 and nvcc 13.0.
CPU_SECONDS, CUDA_SECONDS = 37, 18
TRIAL = "#include <cuda_runtime.h>\n__global__ void add(int* x) { ++*x; }\nint main() { add<<<1, 1>>>(nullptr); }\n"


def say(text: str) -> None:
    """Write to the user at once; pip shows it with -v, or when the build fails."""
    sys.stderr.write(f"medgmae: {text}\n")
    sys.stderr.flush()


def idle_time(seconds: int) -> str:
    """Say how long this takes here."""
    cores = os.cpu_count() or 1
    return f"about {max(1, round(seconds / cores / 10)) * 10} s if {cores} cores are idle"


def switch(name: str) -> bool | None:
    """Read NAME from the environment as 0, 1 or unset (None)."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} is {value!r}: expected 0, 1 or nothing")
    return None if value == "" else value == "1"


class NoCuda(Exception):
    """Why the CUDA half is left out."""


class BrokenCuda(NoCuda):
    """What is wrong with the toolkit that was found."""


class Toolkit(NamedTuple):
    """A CUDA toolkit: its compiler, the folder of libcudart_static.a, and what to compile for."""

    nvcc: Path
    lib: Path
    version: str
    architectures: list[str]

    def code_flags(self) -> list[str]:
        """Tell nvcc to compile for every architecture, and to PTX for those to come."""
        last = self.architectures[-1]
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.architectures]
        return [*code, f"-gencode=arch=compute_{last},code=compute_{last}"]


def ask(nvcc: Path, *arguments: str | Path) -> str:
    """Return what nvcc writes; raise BrokenCuda with its complaint where it fails."""
    try:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
    except OSError as error:
        raise BrokenCuda(f"{nvcc} does not run: {error.strerror}") from error
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if re.search("error|cannot|not found|no such", line, re.IGNORECASE)]
        complaint = (errors or lines or [f"it failed with status {done.returncode}"])[0]
        raise BrokenCuda(f"{nvcc} cannot be used: {complaint}")
    return done.stdout


def find_toolkit() -> Toolkit:
    """Find a CUDA toolkit whose nvcc answers; raise NoCuda where there is none.

    CUDA_HOME or CUDA_PATH is believed. Without them: an nvcc on PATH may be a wrapper script in a folder of its own, so
    a folder counts only if the headers are there.
    """
    if switch("MEDGMAE_CUDA") is False:
        raise NoCuda("the build was told MEDGMAE_CUDA=0")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    guesses = [Path(on_path).resolve().parent.parent] if on_path else []
    tried = [Path(named)] if named else [*guesses, Path("/usr/local/cuda")]
    home = next((folder for folder in tried if (folder / "bin/nvcc").exists() and headers(folder)), None)
    if home is None:
        where = ", ".join(map(str, tried))
        kind = BrokenCuda if named else NoCuda
        raise kind(f"no bin/nvcc with include/cuda_runtime.h; set CUDA_HOME (tried {where})")
    # A toolkit has lib64, its packages on PyPI lib, Debian a folder in lib, conda one per target.
    libs = [path for pattern in ("lib64", "lib", "lib/*-linux-gnu", "targets/*/lib") for path in home.glob(pattern)]
    lib = next((path for path in libs if (path / "libcudart_static.a").exists()), None)
    if lib is None:
        raise BrokenCuda(f"no libcudart_static.a in {', '.join(map(str, libs)) or home}")
    nvcc = home / "bin/nvcc"
    version = re.search(r"release ([0-9.]+)", ask(nvcc, "--version"))
    if version is None:
        raise BrokenCuda(f"{nvcc} --version names no release")
    return Toolkit(nvcc, lib, version[1], cuda_architectures(nvcc, version[1]))


def headers(home: Path) -> bool:
    """Whether a folder holds the headers of CUDA."""
    return any(home.glob("include/cuda_runtime.h")) or any(home.glob("targets/*/include/cuda_runtime.h"))


def cuda_architectures(nvcc: Path, version: str) -> list[str]:
    """Return what to compile for: what was asked for, else those of CUDA_ARCHITECTURES that this nvcc knows."""
    known = [line.removeprefix("compute_") for line in ask(nvcc, "--list-gpu-arch").split()]
    asked = os.environ.get("MEDGMAE_CUDA_ARCHITECTURES", "")
    if not asked:
        chosen = [arch for arch in CUDA_ARCHITECTURES if arch in known]
        if not chosen:
            raise BrokenCuda(f"nvcc {version} compiles for none of {' '.join(CUDA_ARCHITECTURES)}")
        return chosen
    wanted = {word: re.sub(r"^(\d+)\.(\d)$", r"\1\2", word) for word in re.split(r"[;,\s]+", asked) if word}
    unknown = [word for word, arch in wanted.items() if arch not in known]
    if unknown or not wanted:
        raise SystemExit(
            f"MEDGMAE_CUDA_ARCHITECTURES is {asked!r}: nvcc {version} compiles for {' '.join(known)}, "
            f"not for {' '.join(unknown) or 'nothing'}; write 80;90 or 8.0;9.0"
        )
    return [arch for arch in known if arch in wanted.values()]


def check_toolkit(toolkit: Toolkit) -> None:
    """Compile and link three lines of CUDA: a nvcc may be there without its parts, or refuse the C++ compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.cu")
        source.write_text(TRIAL)
        arch = f"-gencode=arch=compute_{toolkit.architectures[-1]},code=sm_{toolkit.architectures[-1]}"
        ask(toolkit.nvcc, arch, "-std=c++17", f"-L{toolkit.lib}", source, "-o", source.with_suffix(""))


class BuildNative(build_ext):
    """Compiles cuda/cpu_kernels.cpp once per CPU variant, the .cu files with nvcc, and links them with the bindings."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Build one extension; a compiler error ends with what can be switched off."""
        ext.define_macros.append(("MEDGMAE_VERSION", f'"{self.distribution.get_version()}"'))
        try:
            toolkit = self.choose_cuda(ext)
            jobs = [*self.cpu_jobs(ext), *self.cuda_jobs(toolkit)]  # an unusable C++ compiler shows at once
            with ThreadPoolExecutor(self.parallel or os.cpu_count()) as pool:
                running = [pool.submit(job) for job in jobs]
                try:
                    ext.extra_objects = [name for job in running for name in job.result()]
                finally:
                    pool.shutdown(cancel_futures=True)
            ext.sources = []  # compiled, like the rest
            super().build_extension(ext)
        except (CompileError, LinkError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{error}\n{HINT}") from error

    def choose_cuda(self, ext: Pybind11Extension) -> Toolkit | None:
        """Find a toolkit that works and say what will be built; prepare ext for the CUDA half, or tell it why not."""
        insists = switch("MEDGMAE_CUDA")
        cpu = f"CPU kernels ({', '.join(CPU_VARIANTS)})"
        try:
            toolkit = find_toolkit()
            seconds = CPU_SECONDS + CUDA_SECONDS * len(toolkit.architectures)
            say(
                f"building {cpu} and CUDA kernels (nvcc {toolkit.version}, for sm_{' '.join(toolkit.architectures)}), "
                f"{idle_time(seconds)}; MEDGMAE_CUDA=0 leaves CUDA out, MEDGMAE_CUDA_ARCHITECTURES=90 compiles for one "
                "kind of GPU"
            )
            check_toolkit(toolkit)
        except NoCuda as reason:
            if insists:
                raise SystemExit(f"medgmae: MEDGMAE_CUDA=1, but {reason}") from reason
            warning = "warning: " if isinstance(reason, BrokenCuda) else ""
            say(f"{warning}building {cpu}, {idle_time(CPU_SECONDS)}, and no CUDA kernels: {reason}")
            ext.define_macros.append(("MEDGMAE_CUDA_MISSING", json.dumps(str(reason))))
            return None
        listed = f"{' '.join(toolkit.architectures)} {toolkit.architectures[-1]}+PTX"
        ext.define_macros.append(("MEDGMAE_CUDA_ARCHITECTURES", f'"{listed}"'))
        ext.library_dirs.append(str(toolkit.lib))
        ext.libraries += ["cudart_static", "dl", "pthread", "rt"]
        return toolkit

    def cpu_jobs(self, ext: Pybind11Extension) -> list[Callable[[], list[str]]]:
        """Compile the bindings, and the kernels for each CPU variant."""

        def compile_one(source: str, folder: str, macros: list[tuple[str, str | None]], flags: list[str]) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp, folder)),
                macros=macros,
                include_dirs=ext.include_dirs,
                extra_postargs=[*ext.extra_compile_args, *flags],
            )

        kernels = [
            partial(compile_one, "cuda/cpu_kernels.cpp", name, [("MEDGMAE_VARIANT", name)], flags)
            for name, flags in CPU_VARIANTS.items()
        ]
        return [*kernels, partial(compile_one, "cuda/module.cpp", "module", ext.define_macros, [])]

    def cuda_jobs(self, toolkit: Toolkit | None) -> list[Callable[[], list[str]]]:
        """Compile the CUDA kernels into fat objects."""
        if toolkit is None:
            return []
        flags = ["-O3", "-std=c++17", "-cudart", "static", "-t", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden,-g0"]
        flags += ["-Xfatbin", "-compress-all"]  # a fifth of the size

        def compile_one(source: Path) -> list[str]:
            target = Path(self.build_temp, "cuda", source.stem + "_cuda.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            self.spawn([str(toolkit.nvcc), "-c", str(source), "-o", str(target), *flags, *toolkit.code_flags()])
            return [str(target)]

        sources = sorted(Path("cuda").rglob("*.cu"), key=lambda path: -path.stat().st_size)
        return [partial(compile_one, source) for source in sources]


def native_modules() -> list[Pybind11Extension]:
    """Describe medgmae._C, unless it is switched off."""
    wanted = switch("MEDGMAE_NATIVE")
    if wanted is None and sys.platform == "win32":  # the kernels use the vectors of GCC and clang
        say("no native module on Windows: every operator runs its torch reference")
        wanted = False
    if wanted is False:
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
