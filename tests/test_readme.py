"""README and docs are true: the blocks of these pages run; docs/models.md is the registry."""

from __future__ import annotations

import ast
import importlib
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import warm_python
from _pytest.mark import ParameterSet
from small_models import full_size

import medgmae
from medgmae.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = ("slices", "data", "preparation", "probe", "prepared", "training", "finetune", "export", "saliency", "scale")
NAMES += ("tomography",)
PAGES = README + "".join((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in NAMES)
MODELS = (ROOT / "docs/models.md").read_text(encoding="utf-8")
# What builds, and so cannot run inside the tests.
BUILDS = ("make demo", "pip install", "mkdir")
# What takes seconds and is done by another test too: the test of the command, or of the function. Of these blocks the
# quick tests look up the commands with their options, and the names.
SLOW = (
    "monai",
    "medgmae fit",
    "training import Machine",
    "data prepare",
    "data check",
    "medgmae probe",
    "medgmae pretrain",
    "medgmae features",
    "medgmae convert",
    "medgmae reconstruct examples",
    "--out build/side",
    "--shard",
    "--dry-run",
    "build/aorta_run",
    "medgmae latent-map",
    "medgmae saliency",
    "medgmae export",
    "segment_scan(",
    "patch_labels(aorta",
    "features.nrrd",
    "cosine_schedule",
    "nibabel.load",
    "vim_small_patch16_160",
    "latent_to_spatial",
    "probe_features",
    "ViewSampler",
    "onnxruntime",
    "saliency_map",
)


def blocks() -> list[ParameterSet]:
    """Language and text of every block of code, under its heading."""
    cases, title = [], ""
    pattern = r"^#+ ([^\n]+)$|^```(python|bash)\n(.*?)^```"
    for heading, language, code in re.findall(pattern, PAGES, flags=re.S | re.M):
        title = heading or title
        if code and not any(word in code for word in BUILDS):
            slow = [pytest.mark.slow] if any(word in code for word in SLOW) else []
            cases.append(pytest.param(language, code, id=f"{title}, {language}", marks=slow))
    return cases


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What blocks read: once for all of them, none of which changes it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "weights"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def place(copies: Path) -> Iterator[Path]:
    """A folder with these and nothing else, whatever the block before has left."""
    yield copies
    for path in copies.iterdir():
        if path.name not in ("examples", "weights"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(("language", "code"), blocks())
def test_block_runs_and_leaves_nothing(language: str, code: str, place: Path) -> None:
    build = place / "build"
    build.mkdir()
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    # The commands of this environment, and what -m pytest put on the path.
    clean = {
        "PATH": f"{warm_python.commands()}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    interpreter = {"python": ["python", "-W", "error::UserWarning:medgmae", "-c"], "bash": ["bash", "-ec"]}
    command = [*interpreter[language], code]
    done = subprocess.run(command, cwd=place, env=os.environ | clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(build)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()} == before


def slow_code(wanted: str) -> list[Any]:
    """Blocks of a language that the quick tests do not run, and that call the library."""
    chosen = [case for case in blocks() if case.marks and case.values[0] == wanted and "medgmae" in case.values[1]]
    return [pytest.param(case.values[1], id=case.id) for case in chosen]


@pytest.mark.parametrize("code", slow_code("bash"))
def test_commands_have_the_options_that_are_shown(code: str) -> None:
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    calls = [words[1:] for words in lines if words[:1] == ["medgmae"]]
    assert calls
    for arguments in calls:
        context, command = click.Context(main), main
        while isinstance(command, click.Group):
            name, command, arguments = command.resolve_command(context, arguments)
            context = click.Context(command, parent=context, info_name=name)
        _, left, _ = command.make_parser(context).parse_args(list(arguments))
        assert left == []


@pytest.mark.parametrize("code", slow_code("python"))
def test_names_that_are_shown_are_there(code: str) -> None:
    tree = ast.parse(code)
    for statement in ast.walk(tree):
        if isinstance(statement, ast.ImportFrom) and str(statement.module).split(".")[0] == "medgmae":
            module = importlib.import_module(str(statement.module))
            assert [name.name for name in statement.names if not hasattr(module, name.name)] == []
    for path in re.findall(r"\bmedgmae((?:\.[A-Za-z_]+)+)\(", code):
        attrgetter(path[1:])(medgmae)


def test_every_block_is_run() -> None:
    assert len(blocks()) == PAGES.count("```python") + PAGES.count("```bash") - 1  # but the one that builds


def test_model_table_is_the_registry() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", MODELS, flags=re.M))
    expected = {}
    for name in medgmae.list_models():
        expected[name] = f"{sum(p.numel() for p in full_size(name).parameters()) / 1e6:.1f}"
    assert rows == expected
    counts = f"lists all {len(expected)} architectures and {len(medgmae.list_weights())} sets of weights"
    assert counts in (ROOT / "README.md").read_text(encoding="utf-8")


def test_weight_table_is_the_cards() -> None:
    rows = dict(re.findall(r"^\| `(\w+\.\w+)` \| ([^|]+?) \|", MODELS, flags=re.M))
    assert rows == {tag: medgmae.weight_card(tag).license or "none stated" for tag in medgmae.list_weights()}


def test_encoder_table_is_the_code() -> None:
    """Every encoder that is downloaded, with the numbers of its model."""
    row = r"^\| `(\w+\.\w+)` \| [^|]+ \| (\d) x ([\dx]+) \| (\d+) \| (\d+) \| ([\d.]+) \|"
    rows = {tag: numbers for tag, *numbers in re.findall(row, MODELS, flags=re.M)}
    expected = {}
    for tag in medgmae.list_weights():
        if medgmae.weight_card(tag).availability in ("hub", "url") and not tag.startswith("mae_"):
            with torch.device("meta"):
                model: Any = medgmae.create_model(tag, pretrained=False)
            numbers = [model.in_chans, "x".join(map(str, model.img_size)), math.prod(model.grid_size), model.embed_dim]
            count = sum(parameter.numel() for parameter in model.parameters())
            expected[tag] = [*map(str, numbers), f"{count / 1e6:.1f}"]
    assert rows == expected


def test_citation_names_this_version() -> None:
    assert f"\nversion: {medgmae.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", [path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))], ids=str
)
def test_links_lead_somewhere(page: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text):
        assert not target or (ROOT / page.parent / target).exists(), target
