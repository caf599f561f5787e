"""The rules of the house that a machine can check: who imports whom, sizes of files, what `import medgmae` loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import warm_python

import medgmae

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "medgmae"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
SCRIPTS = sorted(path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
NATIVE = sorted(path for path in (ROOT / "cuda").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))

# Which rooms a room of the package may import beside itself.
MAY_IMPORT: dict[str, list[str]] = {
    "_version": [],
    "ops": ["_C"],
    "data": ["_version", "ops.progress"],
    "evaluation": ["losses", "data"],
    "losses": ["ops"],
    "layers": ["ops"],
    "gaussians": ["ops"],
    "models": ["layers", "gaussians", "losses"],
    # ops.onnx: an export writes operators in ONNX's words.
    "checkpoints": ["_version", "layers", "models.encoder", "models.parts", "models.registry", "ops.onnx"],
    "inference": ["models.encoder", "models.parts", "layers", "gaussians", "data", "ops.progress"],
    "factory": ["checkpoints", "models", "data"],
    "tomography": ["ops", "data", "gaussians", "inference", "losses"],
    "visualize": ["inference", "evaluation", "data"],
    "training": [
        "_version",
        "factory",
        "checkpoints",
        "inference",
        "evaluation",
        "data",
        "losses",
        "layers",
        "models.autoencoder",
        "models.consistency",
        "models.glmae",
        "visualize",
        "ops.progress",
    ],
    "cli": [],
}
# Heavy or optional libraries and the only modules that may import them.
ONLY_IN: dict[str, list[str]] = {
    "SimpleITK": ["data"],
    "accelerate": ["training"],
    "blosc2": ["data"],
    "click": ["cli"],
    "highdicom": ["data"],
    "huggingface_hub": ["checkpoints"],
    "matplotlib": ["visualize"],
    "monai": ["data"],
    "nibabel": ["data"],
    "onnxruntime": ["checkpoints.exporting"],
    "onnxscript": ["ops.onnx"],
    "peft": ["training"],
    "pickle": ["tomography.scenes"],
    "pyarrow": ["cli.features.parquet"],
    "pydicom": ["data"],
    "ray": ["cli.features.ray_engine"],
    "requests": [],
    "scipy": ["evaluation"],
    "sklearn": ["evaluation"],
    "timm": ["checkpoints.opening", "training"],
    "torchvision": [],
    "yaml": ["checkpoints.training_config"],
}


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Every node of a file, which several tests look through."""
    return tuple(ast.walk(ast.parse(path.read_text(), str(path))))


def inside(module: str, parents: list[str]) -> bool:
    return any(module == parent or module.startswith(parent + ".") for parent in parents)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it; `from medgmae import data` counts as medgmae.data."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join([*path.relative_to(ROOT).parts[: -node.level], node.module or ""]).strip(".")
            module = origin if node.level else node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield full if full in MODULES or full == "medgmae._C" else module


def dotted(node: ast.AST) -> str:
    """``a.b`` of such an expression, without the cost of ast.unparse; empty for one that is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(path: Path, name: str) -> Iterator[ast.Call]:
    for node in nodes(path):
        if isinstance(node, ast.Call) and dotted(node.func) == name:
            yield node


def room_of(module: str) -> str:
    """The row of the table that a module belongs to."""
    return module.removeprefix("medgmae.").split(".")[0]


def test_imports_follow_the_table() -> None:
    for module in sorted(MODULES.keys() - {"medgmae", "medgmae.__main__"}):
        room = room_of(module)
        assert room in MAY_IMPORT, f"{module} is in a new room: say in MAY_IMPORT which rooms it may import"
        for imported in imports(MODULES[module]):
            if imported.startswith("medgmae."):
                assert inside(imported.removeprefix("medgmae."), [room, *MAY_IMPORT[room]]), (
                    f"{module} must not import {imported}"
                )
            library = imported.split(".")[0]
            if library in ONLY_IN:
                assert inside(module.removeprefix("medgmae."), ONLY_IN[library]), f"{module} must not import {library}"


def test_there_are_few_rooms() -> None:
    rooms = {room_of(name) for name in MODULES} - {"medgmae", "__main__", "_version"}
    assert rooms == set(MAY_IMPORT) - {"_version"}
    assert len(rooms) <= 14


def test_the_table_has_no_circle() -> None:
    order: list[str] = []

    def visit(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, f"circle: {' -> '.join((*path, room))}"
        if room in MAY_IMPORT and room not in order:
            for other in MAY_IMPORT[room]:
                visit(other.split(".")[0], (*path, room))
            order.append(room)

    for room in MAY_IMPORT:
        visit(room, ())


def test_no_two_modules_import_each_other() -> None:
    """No circle among files either: imports at the top of a module, and those inside its functions."""
    arrows = {
        name: {other for other in imports(path) if other in MODULES and other not in (name, "medgmae")}
        for name, path in MODULES.items()
        if name not in ("medgmae", "medgmae.__main__")
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for other in arrows.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in arrows:
        visit(module, ())


USERS = [path for name, path in MODULES.items() if inside(name, ["medgmae.cli"])]
USERS += [path for path in SCRIPTS if inside(path.parent.name, ["benchmarks", "examples"])]
# What a program may import beside the names of `medgmae` itself; the references of operators are for benchmarks.
ROOMS = {"data", "evaluation", "models", "ops", "tomography", "training", "visualize"}
PUBLIC_MODULES = [f"medgmae.{name}" for name in ("cli", *ROOMS)]


@pytest.mark.parametrize("path", USERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_users_of_the_library_use_public_names(path: Path) -> None:
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module == "medgmae":
            private = {alias.name for alias in node.names} - {*medgmae.__all__, *ROOMS}
            assert not private, f"{path.name}:{node.lineno}: {private} are not public names"
        if isinstance(node, ast.Attribute) and dotted(node.value) == "medgmae":
            public = node.attr in medgmae.__all__ or f"medgmae.{node.attr}" in MODULES
            assert public, f"{path.name}:{node.lineno}: medgmae.{node.attr} is not a public name"
    for imported in imports(path):
        if imported.startswith("medgmae."):
            assert inside(imported, PUBLIC_MODULES), f"{path.name} imports the private module {imported}"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_files_and_functions_stay_short() -> None:
    for path in (*MODULES.values(), *SCRIPTS, ROOT / "setup.py", *NATIVE):
        lines = len(path.read_text().splitlines())
        assert lines < 400, f"{path.name} has {lines} lines; split it"
        if path.suffix == ".py":
            for node in functions(path):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length < 80, f"{path.name}:{node.lineno}: {node.name} has {length} lines; split it"


def test_the_library_prints_nothing_and_logs_in_one_place() -> None:
    for path in MODULES.values():
        for call in calls(path, "print"):
            pytest.fail(f"{path}:{call.lineno}: print in the library; return the text, or log it")
        for call in calls(path, "logging.getLogger"):
            names = [ast.literal_eval(argument) for argument in call.args if isinstance(argument, ast.Constant)]
            if path == PACKAGE / "checkpoints/exporting.py" and names == ["onnxscript"]:
                continue  # whose remarks on every step of a model it silences
            assert names == ["medgmae"], f"{path}:{call.lineno}: the one logger is logging.getLogger('medgmae')"


def test_nothing_is_unpickled() -> None:
    for path in MODULES.values():
        for call in calls(path, "torch.load"):
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("weights_only") == "True"
            assert safe, f"{path}:{call.lineno}: torch.load without weights_only=True"


def test_heavy_libraries_load_when_used() -> None:
    """A new process that imports the library and builds a model has none of them."""
    script = "import sys, medgmae\nmedgmae.create_model('vit_nano_patch8_32')\n"
    script += "sys.stdout.write(' '.join({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "medgmae" in loaded
    assert not loaded & {
        "SimpleITK",
        "blosc2",
        "highdicom",
        "huggingface_hub",
        "matplotlib",
        "monai",
        "onnxscript",
        "peft",
        "pyarrow",
        "pydicom",
        "ray",
        "sklearn",
        "timm",
        "torchvision",
    }


# Each in a fork of one process, so that none finds what another has imported.
EACH = """
import os, medgmae
for name in ("data", "evaluation", "models", "ops", "training", "visualize"):
    child = os.fork()
    if not child:
        try:
            found = getattr(medgmae, name).__name__
        except BaseException as error:
            found = repr(error)
        print(name, found, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_modules_are_there_without_an_import_of_their_own() -> None:
    done = warm_python.run("-c", EACH)
    assert done.returncode == 0, done.stderr
    names = ("data", "evaluation", "models", "ops", "training", "visualize")
    assert done.stdout.splitlines() == [f"{name} medgmae.{name}" for name in names]
