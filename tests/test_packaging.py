"""From the source tree to an installed package: sdist -> wheel -> clean environment, editable install, their content.

Nothing is downloaded: builds use the build tools of this environment, and the clean environments borrow its torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import medgmae

ROOT = Path(__file__).parent.parent
SOURCES = ["cuda", "medgmae", "weights", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]
SOURCES += ["CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "constraints.txt"]
PROBE = """
import json, sys
from importlib.metadata import entry_points, version
from importlib.resources import files
import medgmae
from medgmae.ops import native_info, self_test
info = native_info()
json.dump({
    "file": medgmae.__file__, "version": [medgmae.__version__, version("medgmae")], "info": info,
    "errors": self_test() if info["loaded"] else None, "models": medgmae.list_models(),
    "cards": sorted(path.name for path in files("medgmae.weights").iterdir() if path.name.endswith(".json")),
    "command": [script.load().name for script in entry_points(group="console_scripts", name="medgmae")],
}, sys.stdout)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command that must succeed; return what it wrote."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MEDGMAE_", "PYTHONPATH"))}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
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


def probe(python: Path, cwd: Path, **environment: str) -> dict[str, object]:
    """Ask the medgmae of an environment about itself, from a folder that has no medgmae in it."""
    return json.loads(run(python, "-W", "error", "-c", PROBE, cwd=cwd, **environment))


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
    """A wheel without the CUDA half; and one with it where there is a compiler for it, which takes minutes."""
    environment = {"MEDGMAE_CUDA": "0"} if request.param == "cpu" else {}
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"), **environment)


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_sdist_holds_every_source(unpacked: Path) -> None:
    for folder, patterns in {"cuda": ["*"], "medgmae": ["*.py", "*.pyi", "py.typed"], "weights": ["*"]}.items():
        expected = {path.relative_to(ROOT) for pattern in patterns for path in (ROOT / folder).rglob(pattern)}
        expected = {path for path in expected if (ROOT / path).is_file() and "__pycache__" not in path.parts}
        assert not {path for path in expected if not (unpacked / path).exists()}
    assert not [path for path in unpacked.rglob("*") if path.suffix in (".so", ".o", ".pyc")]


def test_wheel_holds_code_and_cards_and_nothing_else(wheel: Path) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "medgmae").rglob("*.py")}
    expected |= {f"medgmae/weights/{path.name}" for path in (ROOT / "weights").iterdir() if path.is_file()}
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
    for extra in ("viz", "monai", "evaluation", "test", "dev"):
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


def test_without_native_module_the_wheel_is_pure_python(unpacked: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(unpacked, tmp_path / "tree")
    wheel = build("wheel", tree, tmp_path, MEDGMAE_NATIVE="0")
    assert wheel.name.endswith("py3-none-any.whl")
    found = probe(unpack(wheel, tmp_path / "env"), tmp_path)
    assert found["info"]["loaded"] is False
    assert "pip install" in found["info"]["error"]
    assert found["models"] == medgmae.list_models()


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
        ({"CXX": "/bin/false", "CC": "/bin/false"}, "MEDGMAE_NATIVE=0 all of it"),
    ],
)
def test_failing_build_says_what_to_do(
    environment: dict[str, str], message: str, unpacked: Path, tmp_path: Path
) -> None:
    tree = shutil.copytree(unpacked, tmp_path / "tree")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "out"]
    done = subprocess.run(command, cwd=tree, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert message in done.stderr


def test_declared_versions_agree() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    declared = re.findall(r'^    "([a-z0-9-]+)>=([0-9.]+)"', pyproject, re.MULTILINE)
    pins = dict(re.findall(r"^([a-z0-9-]+)==([0-9.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {"torch", "timm", "pytest"} <= {name for name, _ in declared}
    for name, lowest in declared:
        assert name in pins, f"{name} is required but not pinned in constraints.txt"
        assert [int(part) for part in pins[name].split(".")] >= [int(part) for part in lowest.split(".")], name
    assert "://" not in (ROOT / "constraints.txt").read_text()
