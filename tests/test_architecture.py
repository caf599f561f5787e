"""The rules of the house that a machine can check: who imports whom, sizes of files, what `import medgmae` loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import medgmae

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "medgmae"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
SCRIPTS = sorted(path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
NATIVE = sorted(path for path in (ROOT / "cuda").iterdir() if path.suffix in (".h", ".cuh", ".cpp", ".cu"))

# Which modules of the package a module may import, most specific entry first; an entry also allows what is below it.
BORDER = ["adapt", "cards", "checkpoint", "convert", "convert_file", "convert_gaussian", "convert_vim", "download"]
BORDER += ["expectations", "export", "integrity", "registry", "transfer"]
MAY_IMPORT: dict[str, list[str]] = {
    "ops": ["ops", "_C"],
    "masking": ["ops"],
    "precision": [],
    "losses": ["ops", "masking", "precision"],
    "registry": [],
    "layers": ["ops", "masking"],
    "frames": ["ops"],
    "ply": [],
    "fitting": ["data", "ops", "rendering"],
    "rendering": ["frames", "ops", "ply"],
    "models.vit": ["layers", "masking", "losses", "registry"],
    "mamba": ["layers", "ops"],
    "models.vim": ["layers", "mamba", "masking", "registry"],
    "models.gaussian_decoder": ["layers", "precision", "rendering"],
    "models.gmae": ["layers", "masking", "losses", "rendering", "registry", "models.vit", "models.gaussian_decoder"],
    "models.mae_vim": ["layers", "losses", "mamba", "masking", "models.mae", "models.vim", "registry"],
    "models.mae": ["layers", "losses", "mamba", "masking", "models.vit", "registry"],
    "models": ["layers", "masking", "losses", "rendering", "registry", "models.vit"],
    "cards": [],
    "integrity": ["cards"],
    "transfer": ["cards", "integrity"],
    "download": ["cards", "integrity", "transfer"],
    "checkpoint": ["cards"],
    "convert": ["cards", "convert_file", "convert_gaussian", "convert_vim"],
    "convert_file": ["cards", "layers"],
    "convert_gaussian": [],
    "convert_vim": ["cards", "convert_file"],
    "adapt": ["layers"],
    "expectations": ["cards", "registry"],
    "export": ["cards", "download", "registry", "transfer"],
    "hub": [*BORDER, "layers"],
    "factory": [*BORDER, "hub", "layers"],
    "inspect": [*BORDER, "factory", "hub", "layers"],
    "data.transforms": ["data", "hub", "cards"],
    "data": ["data"],
    "evaluation": [],
    "features": ["data"],
    "reconstruction": ["data", "features", "masking", "rendering"],
    "latent_maps": ["data", "features", "masking", "models.vim", "reconstruction"],
    "training": [*BORDER, "data", "factory", "hub", "layers", "losses", "masking", "models", "ops", "training"],
    "visualize": [
        "data",
        "features",
        "latent_maps",
        "layers",
        "losses",
        "masking",
        "models",
        "reconstruction",
        "rendering",
        "visualize",
    ],
    "cli": ["cli"],
}
# Heavy or optional libraries and the only modules that may import them.
ONLY_IN: dict[str, list[str]] = {
    "SimpleITK": ["data"],
    "click": ["cli"],
    "huggingface_hub": ["download", "export", "hub", "integrity", "transfer"],
    "matplotlib": ["visualize"],
    "monai": [],
    "nibabel": [],
    "pickle": [],
    "pydicom": [],
    "requests": [],
    "sklearn": ["evaluation"],
    "timm": ["hub", "training"],
    "torchvision": [],
}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def inside(module: str, parents: list[str]) -> bool:
    return any(module == parent or module.startswith(parent + ".") for parent in parents)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it; `from medgmae import hub` counts as medgmae.hub."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join([*path.relative_to(ROOT).parts[: -node.level], node.module or ""]).strip(".")
            module = origin if node.level else node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield full if full in MODULES or full == "medgmae._C" else module


def calls(path: Path, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
            yield node


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ("medgmae", "medgmae.__main__")])
def test_imports_follow_the_table(module: str) -> None:
    name = module.removeprefix("medgmae.")
    if name == "models":  # the package only holds the families
        rule: list[str] | None = []
    else:
        rule = next((allowed for entry, allowed in MAY_IMPORT.items() if inside(name, [entry])), None)
    assert rule is not None, f"{module} is new: say in MAY_IMPORT which modules it may import"
    for imported in imports(MODULES[module]):
        if imported.startswith("medgmae."):
            assert inside(imported.removeprefix("medgmae."), rule), f"{module} must not import {imported}"
        library = imported.split(".")[0]
        if library in ONLY_IN:
            assert inside(name, ONLY_IN[library]), f"{module} must not import {library}"


def test_the_table_has_no_circle() -> None:
    done: set[str] = set()

    def visit(entry: str, path: tuple[str, ...]) -> None:
        assert entry not in path, f"circle: {' -> '.join((*path, entry))}"
        if entry not in done:
            for other in MAY_IMPORT[entry]:
                if other in MAY_IMPORT and not inside(entry, [other]):
                    visit(other, (*path, entry))
            done.add(entry)

    for entry in MAY_IMPORT:
        visit(entry, ())


USERS = [path for name, path in MODULES.items() if inside(name, ["medgmae.cli"])]
USERS += [path for path in SCRIPTS if inside(path.parent.name, ["examples"])]


@pytest.mark.parametrize("path", USERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_command_line_and_examples_use_public_names(path: Path) -> None:
    for imported in imports(path):
        assert not imported.startswith("medgmae._"), f"{path.name} imports the private module {imported}"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "medgmae":
            public = node.attr in medgmae.__all__ or f"medgmae.{node.attr}" in MODULES
            assert public, f"{path.name}:{node.lineno}: medgmae.{node.attr} is not a public name"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize(
    "path", [*MODULES.values(), *SCRIPTS, ROOT / "setup.py", *NATIVE], ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_and_functions_stay_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines < 400, f"{path.name} has {lines} lines; split it"
    if path.suffix == ".py":
        for node in functions(path):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length < 80, f"{path.name}:{node.lineno}: {node.name} has {length} lines; split it"


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_the_library_prints_nothing_and_logs_in_one_place(path: Path) -> None:
    for call in calls(path, "print"):
        pytest.fail(f"{path}:{call.lineno}: print in the library; return the text, or log it")
    for call in calls(path, "logging.getLogger"):
        names = [ast.literal_eval(argument) for argument in call.args if isinstance(argument, ast.Constant)]
        assert names == ["medgmae"], f"{path}:{call.lineno}: the one logger is logging.getLogger('medgmae')"


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_nothing_is_unpickled(path: Path) -> None:
    for call in calls(path, "torch.load"):
        safe = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("weights_only") == "True"
        assert safe, f"{path}:{call.lineno}: torch.load without weights_only=True"


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys; sys.stdout.write(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code", ["import medgmae", "import medgmae\nmedgmae.create_model('vit_nano_patch8_32')"], ids=["import", "create"]
)
def test_heavy_libraries_load_when_used(code: str) -> None:
    loaded = loaded_after(code)
    assert "medgmae" in loaded
    assert not loaded & {"SimpleITK", "huggingface_hub", "matplotlib", "monai", "sklearn", "timm", "torchvision"}


@pytest.mark.parametrize("module", ["data", "evaluation", "ops", "training", "visualize"])
def test_modules_are_there_without_an_import_of_their_own(module: str) -> None:
    assert "medgmae" in loaded_after(f"import medgmae\nassert medgmae.{module}.__name__ == 'medgmae.{module}'")
