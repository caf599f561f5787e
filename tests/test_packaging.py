"""From the source tree to an installed package: sdist -> wheel -> clean environment, editable install, their content.

Nothing is downloaded: builds use the build tools of this environment, and the clean environments borrow its torch.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import setuptools

import medgmae

ROOT = Path(__file__).parent.parent
SOURCES = ["cuda", "medgmae", "weights", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]
SOURCES += ["CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "constraints.txt"]
PROBE = """
import json, sys
from importlib.metadata import entry_points, version
from importlib.resources import files
import medgmae
from medgmae.ops import native_info
json.dump({
    "file": medgmae.__file__, "version": [medgmae.__version__, version("medgmae")], "info": native_info(),
    "models": medgmae.list_models(),
    "cards": sorted(path.name for path in files("medgmae.weights").iterdir() if path.name.endswith(".json")),
    "command": [script.load().name for script in entry_points(group="console_scripts", name="medgmae")],
}, sys.stdout)
"""
# What every machine can do, with the native module or without: a model with a gradient, and every operator.
USE = """
import torch, medgmae
from medgmae.ops import causal_conv1d, selective_scan
medgmae.create_model("mae_vit_nano_patch8_32")(torch.rand(1, 1, 32, 32, 32)).loss.backward()
medgmae.create_model("vim_tiny_patch8_64", num_classes=2)(torch.rand(1, 1, 16, 16, 16)).sum().backward()
out = medgmae.create_model("gmae_vit_tiny_patch8_64", img_size=16)(torch.rand(1, 1, 16, 16, 16))
out.loss.backward()
u = torch.rand(1, 4, 9, requires_grad=True)
y = selective_scan(causal_conv1d(u, torch.rand(4, 3)), u.sigmoid(), -torch.ones(4, 2), u[:, :2], u[:, 2:])
y.sum().backward()
assert u.grad.isfinite().all() and out.volume.isfinite().all()
"""
# Stands for a compiler: says so on stderr, writes its arguments to $LOG, and makes an empty file of what follows -o.
COMPILER = """#!/bin/sh
echo compiling >&2
echo "$@" >> "$LOG"
while [ $# -gt 0 ]; do [ "$1" != -o ] || : > "$2"; shift; done
"""
NVCC = """#!/bin/sh
case $1 in
    --version) echo "Cuda compilation tools, release 12.8, V12.8.93" ;;
    --list-gpu-arch) printf 'compute_%s\\n' 75 80 86 89 90 100 120 ;;
    *) COMPILE ;;
esac
"""


def run(*command: str | Path, cwd: Path, timeout: float = 900, **environment: str) -> str:
    """Run a command that must succeed; return what it wrote."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MEDGMAE_", "PYTHONPATH"))}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def copy_sources(to: Path) -> Path:
    """Copy what the build may see, without what earlier builds left in the tree."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, to / name)
    return to


def build(kind: str, source: Path, out: Path, **environment: str) -> Path:
    """Build an sdist or a wheel by the standard hooks, in this environment; return the file."""
    code = f"import sys, setuptools.build_meta as b; sys.stdout.write('\\n' + b.build_{kind}({str(out)!r}))"
    return out / run(sys.executable, "-c", code, cwd=source, **environment).splitlines()[-1]


def clean_environment(folder: Path) -> Path:
    """Make an environment that holds nothing, but finds the libraries of this one; return its site-packages."""
    venv.create(folder, with_pip=False, symlinks=True)
    target = next(folder.glob("lib/python*/site-packages"))
    # A plain entry: the .pth files in there, an editable medgmae among them, are not read.
    (target / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return target


def unpack(wheel: Path, environment: Path) -> Path:
    """Install a wheel, as pip does for one without scripts; return the environment's interpreter."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(clean_environment(environment))
    return environment / "bin/python"


def probe(python: Path, cwd: Path, more: str = "", **environment: str) -> dict[str, object]:
    """Ask the medgmae of an environment about itself, from a folder that has no medgmae in it; and do ``more``."""
    return json.loads(run(python, "-W", "error", "-c", PROBE + more, cwd=cwd, **environment))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", copy_sources(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
def wheel(request: pytest.FixtureRequest, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without the CUDA half; and one with it where there is a compiler for it, which takes minutes.

    The first is not optimised, which takes a third of the time: an install has compiled it as it is released.
    """
    environment = {}
    if request.param == "cpu":
        compiler = tmp_path_factory.mktemp("compiler") / "c++"
        compiler.write_text(f'#!/bin/sh\nexec {sysconfig.get_config_var("CXX")} "$@" -O0\n')
        compiler.chmod(0o755)
        environment = {"MEDGMAE_CUDA": "0", "CC": str(compiler), "CXX": str(compiler)}
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"), **environment)


@pytest.fixture
def fake_build(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Runs the build with compilers that do nothing, and a CUDA toolkit whose nvcc runs `nvcc`.

    The function returns the exit status, what was written to stderr, and the arguments of the compilers.
    """
    log, compiler, toolkit = tmp_path / "log", tmp_path / "c++", tmp_path / "toolkit"
    for folder in ("bin", "include", "lib"):  # no lib64: packages of PyPI have none
        (toolkit / folder).mkdir(parents=True)
    (toolkit / "include/cuda_runtime.h").touch()
    (toolkit / "lib/libcudart_static.a").touch()
    log.touch()

    def build(nvcc: str, **environment: str) -> tuple[int, str, str]:
        for path, text in {compiler: COMPILER, toolkit / "bin/nvcc": NVCC.replace("COMPILE", nvcc)}.items():
            path.write_text(text)
            path.chmod(0o755)
        compilers = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED", "FAKE"), str(compiler))
        command = [sys.executable, "setup.py", "-q", "build_ext", "-b", tmp_path / "out", "-t", tmp_path / "temp"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MEDGMAE_")}
        environment = clean | compilers | {"LOG": str(log), "CUDA_HOME": str(toolkit)} | environment
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        return done.returncode, done.stderr, log.read_text()

    return build


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_sdist_holds_every_source(unpacked: Path) -> None:
    package = ["*.py", "*.pyi", "*.toml", "py.typed"]
    for folder, patterns in {"cuda": ["*"], "medgmae": package, "weights": ["*"]}.items():
        expected = {path.relative_to(ROOT) for pattern in patterns for path in (ROOT / folder).rglob(pattern)}
        expected = {path for path in expected if (ROOT / path).is_file() and "__pycache__" not in path.parts}
        assert not {path for path in expected if not (unpacked / path).exists()}
    assert not [path for path in unpacked.rglob("*") if path.suffix in (".so", ".o", ".pyc")]


def test_wheel_holds_code_and_cards_and_nothing_else(wheel: Path) -> None:
    files = [path for ending in ("*.py", "*.toml") for path in (ROOT / "medgmae").rglob(ending)]
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    kept = [path for path in (ROOT / "weights").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected |= {f"medgmae/{path.relative_to(ROOT).as_posix()}" for path in kept}
    expected |= {"medgmae/py.typed", "medgmae/_C.pyi"}
    held = {name for name in names(wheel) if ".dist-info/" not in name}
    native = {name for name in held if name.endswith((".so", ".pyd"))}
    assert held - native == expected
    assert len(native) == 1
    assert [name for name in held if name.endswith(".json")], "no weight card in the wheel"
    assert not [name for name in names(wheel) if "test" in name or name.startswith(("examples", "benchmarks", "cuda"))]


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"medgmae-{medgmae.__version__}.dist-info"
        assert f"{info}/licenses/LICENSE" in archive.namelist()
        assert "medgmae = medgmae.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    names = "viz monai evaluation train tensorboard wandb lora parquet cluster test dev"
    for extra in names.split():
        assert f"Provides-Extra: {extra}\n" in metadata


def test_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    # Without a GPU, for which self_test would miss kernels in a wheel that has no CUDA half.
    found = probe(unpack(wheel, tmp_path / "env"), tmp_path, CUDA_VISIBLE_DEVICES="")
    assert str(found["file"]).startswith(str(tmp_path / "env"))
    assert set(found["version"]) == {medgmae.__version__}
    assert found["info"]["loaded"], found["info"]
    assert found["info"]["version"] == medgmae.__version__
    assert found["cards"] == sorted(path.name for path in (ROOT / "weights").glob("*.json"))
    assert found["models"] == medgmae.list_models()
    assert len(found["command"]) == 1
    assert (found["info"]["cuda"] is None) == (found["info"]["cuda_missing"] is not None)
    if found["info"]["cuda"] is None:
        assert found["info"]["cuda_missing"] == "the build was told MEDGMAE_CUDA=0"


@pytest.mark.slow  # build_wheels.sh runs it for every wheel
def test_wheel_passes_the_check_of_releases(wheel: Path, tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    python = unpack(wheel, tmp_path / "env")
    said = run(python, ROOT / "packaging/check_wheel.py", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert "OpenMP: lib" in said


@pytest.mark.slow
def test_the_check_of_releases_sees_a_second_openmp_runtime(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    code = f"""
import ctypes, runpy, shutil
openmp_runtimes = runpy.run_path({str(ROOT / "packaging/check_wheel.py")!r})["openmp_runtimes"]
(own,) = openmp_runtimes()
ctypes.CDLL(shutil.copy(own, {str(tmp_path / "libgomp-0a1b2c3d.so.1.0.0")!r}))
assert len(openmp_runtimes()) == 2, openmp_runtimes()
"""
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_native_module_needs_neither_torch_nor_cuda(wheel: Path, tmp_path: Path) -> None:
    if not (shutil.which("ldd") and shutil.which("nm")):
        pytest.skip("no ldd or nm here")
    name = next(name for name in names(wheel) if name.endswith(".so"))
    with zipfile.ZipFile(wheel) as archive:
        module = Path(archive.extract(name, tmp_path))
    needed = re.findall(r"^\s*(\S+)\.so", run("ldd", module, cwd=tmp_path), re.MULTILINE)
    allowed = re.compile(r"linux-vdso|libstdc\+\+|libgomp|libgcc_s|libc|libm|libdl|librt|libpthread|/lib.*/ld-linux.*")
    assert needed
    assert not [library for library in needed if not allowed.fullmatch(library)]
    symbols = "\n".join(line.split()[-1] for line in run("nm", "-D", module, cwd=tmp_path).splitlines())  # no addresses
    assert "PyInit__C" in symbols
    # An exported cudart would answer for the one that torch loads; a torch symbol would tie the wheel to one torch.
    assert not re.search(r"\bcuda\w+|c10|torch|at::", symbols)
    # libgomp is torch's own, which is older than the compiler's: that of torch 2.6 knows OpenMP 4.5.
    versions = {tuple(map(int, version)) for version in re.findall(r"@G?OMP_(\d+)\.(\d+)", symbols)}
    assert versions
    assert max(versions) <= (4, 5)


def test_without_native_module_the_wheel_is_pure_python(unpacked: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(unpacked, tmp_path / "tree")
    wheel = build("wheel", tree, tmp_path, MEDGMAE_NATIVE="0")
    assert wheel.name.endswith("py3-none-any.whl")
    found = probe(unpack(wheel, tmp_path / "env"), tmp_path, USE)
    assert found["info"]["loaded"] is False
    assert "pip install" in found["info"]["error"]
    assert found["models"] == medgmae.list_models()


def test_windows_gets_the_package_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delenv("MEDGMAE_NATIVE", raising=False)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    assert given["packages"]
    assert given["ext_modules"] == []


def test_the_build_says_first_what_it_builds(fake_build: Callable[..., tuple[int, str, str]]) -> None:
    status, said, arguments = fake_build('exec "$FAKE" "$@"', MEDGMAE_CUDA_ARCHITECTURES="9.0;80")
    assert status == 0, said
    first = said.splitlines()[0]
    assert first.startswith("medgmae: building CPU kernels (generic")
    assert re.search(r" and CUDA kernels \(nvcc 12.8, for sm_80 90\), about \d+ s if", first)
    assert "MEDGMAE_CUDA=0 leaves CUDA out" in first
    assert {"sm_80", "sm_90", "compute_90"} == set(re.findall(r",code=(\w+)", arguments))
    assert "-DMEDGMAE_CUDA_MISSING" not in arguments
    assert re.search(r"-L\S*/toolkit/lib .*-lcudart_static", arguments)


def test_a_broken_nvcc_leaves_cuda_out_unless_it_was_asked_for(
    fake_build: Callable[..., tuple[int, str, str]],
) -> None:
    broken = "echo 'nvcc warning : old' >&2; echo 'sh: 1: cicc: not found' >&2; exit 127"
    status, said, arguments = fake_build(broken)
    assert status == 0, said
    assert re.search(
        "^medgmae: warning: building CPU kernels .* and no CUDA kernels: .*cicc: not found", said, re.MULTILINE
    )
    assert re.search("-DMEDGMAE_CUDA_MISSING=.*cicc: not found", arguments)
    assert "cudart_static" not in arguments
    status, said, _ = fake_build(broken, MEDGMAE_CUDA="1")
    assert status != 0
    assert re.search("MEDGMAE_CUDA=1, but .*cicc: not found", said)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ziglang") is None, reason="needs clang from the package ziglang")
def test_sources_compile_for_systems_that_are_not_at_hand() -> None:
    said = run(ROOT / "packaging/check_compilers.sh", cwd=ROOT, PYTHON=sys.executable, timeout=1200)
    assert said.count(": compiled generic") == 4


@pytest.mark.slow  # every `make test` begins with an editable install
def test_editable_install(unpacked: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(unpacked, tmp_path / "tree")
    code = f"import setuptools.build_meta as b; b.build_editable({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=tree, MEDGMAE_CUDA="0")
    python = unpack(next(tmp_path.glob("*.whl")), tmp_path / "env")
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # self_test would miss the CUDA kernels for a GPU
    found = probe(python, tmp_path, **hidden)
    assert str(found["file"]).startswith(str(tree))
    assert found["info"]["loaded"]
    assert found["info"]["cuda"] is None
    assert found["cards"] == sorted(path.name for path in (ROOT / "weights").glob("*.json"))
    (tree / "weights/new.json").write_text("{}")
    assert "new.json" in probe(python, tmp_path, **hidden)["cards"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MEDGMAE_NATIVE": "yes"}, "MEDGMAE_NATIVE is 'yes': expected 0, 1 or nothing"),
        ({"MEDGMAE_CUDA": "1", "CUDA_HOME": "/nowhere"}, "set CUDA_HOME (tried /nowhere)"),
        ({"MEDGMAE_CUDA": "0", "CXX": "/bin/false", "CC": "/bin/false"}, "MEDGMAE_NATIVE=0 all of it"),
    ],
)
def test_failing_build_says_what_to_do(
    environment: dict[str, str], message: str, unpacked: Path, tmp_path: Path
) -> None:
    tree = shutil.copytree(unpacked, tmp_path / "tree")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "out"]
    done = subprocess.run(command, cwd=tree, env=os.environ | environment, capture_output=True, text=True, timeout=900)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize("asked", ["7.0;80", "elephant", ";"])
def test_unknown_architectures_are_refused(asked: str, fake_build: Callable[..., tuple[int, str, str]]) -> None:
    status, said, _ = fake_build('exec "$FAKE" "$@"', MEDGMAE_CUDA_ARCHITECTURES=asked)
    assert status != 0
    assert f"MEDGMAE_CUDA_ARCHITECTURES is '{asked}': nvcc 12.8 compiles for 75 80 86 89 90 100 120, not for" in said
    assert "write 80;90 or 8.0;9.0" in said


def test_declared_versions_agree() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    declared = re.findall(r'^    "([a-z0-9-]+)>=([0-9.]+)"', pyproject, re.MULTILINE)
    pins = dict(re.findall(r"^([a-z0-9-]+)==([0-9.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {"torch", "timm", "pytest"} <= {name for name, _ in declared}
    for name, lowest in declared:
        assert name in pins, f"{name} is required but not pinned in constraints.txt"
        assert [int(part) for part in pins[name].split(".")] >= [int(part) for part in lowest.split(".")], name
    assert "://" not in (ROOT / "constraints.txt").read_text()
