"""Labels of real anatomy are what they say; the notebook and the table of docs/finetune.md are of runs that were."""

from __future__ import annotations

import base64
import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from medgmae import read_volume
from medgmae.data import Grid, Volume

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "finetune.ipynb"
FIRST_SLICE = {"ct_abdomen": 82, "ct_thorax": 0}  # of the scan that the label map begins with
LABELS = {"ct_abdomen": ("ct_abdomen_seg", 52), "ct_thorax": ("ct_thorax_aorta_seg", 1)}


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, str]], list[Volume]]:
    """Rows of the table, and the crops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        anatomy = importlib.import_module("anatomy_labels")
    folder = tmp_path_factory.mktemp("anatomy")
    done = CliRunner().invoke(anatomy.main, ["--out", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    with open(folder / "cases.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return rows, [read_volume(folder / row["path"]) for row in rows]


def centre(grid: Grid) -> Any:
    """LPS position in mm."""
    return grid.world([(n - 1) / 2 for n in grid.size])


def test_crops_of_two_folds_share_no_voxel(crops: tuple[list[dict[str, str]], list[Volume]]) -> None:
    rows, volumes = crops
    assert {row["fold"] for row in rows} == {"0", "1", "2", "3", "4"}
    assert all(volume.data.shape == (1, 32, 32, 32) and volume.spacing == (2.0, 2.0, 2.0) for volume in volumes)
    places = [(row["scan"], row["fold"], row["cell"], centre(v.grid)) for row, v in zip(rows, volumes, strict=True)]
    apart = {True: 0, False: 0}
    for one, other in combinations(places, 2):
        if one[0] == other[0]:
            overlap = bool((np.abs(one[3] - other[3]) < 64 - 1e-3).all())
            assert not overlap or one[2] == other[2], (one, other)
            apart[overlap] += 1
    assert apart[True] > 100  # crops of one cell do
    assert len({(cell, fold) for _, fold, cell, _ in places}) == len({cell for *_, cell, _ in places})


def test_labels_lie_where_they_say(crops: tuple[list[dict[str, str]], list[Volume]]) -> None:
    rows, volumes = crops
    for name in ("ct_abdomen", "ct_thorax", "mr_brain_t1"):
        scan = read_volume(EXAMPLES / f"data/{name}.nii.gz").grid
        ends = scan.world([0, 0, 0])[2], scan.world([n - 1 for n in scan.size])[2]
        bottom = min(ends)
        found = [(row, centre(v.grid)) for row, v in zip(rows, volumes, strict=True) if row["scan"] == name]
        for row, at in found:
            assert float(row["height"]) == pytest.approx(at[2] - bottom, abs=2.0), row["id"]
            assert row["region"].endswith("upper") == (float(row["height"]) > (max(ends) - bottom) / 2), row["id"]
        left, right = ([at[0] for row, at in found if row["side"] == side] for side in ("left", "right"))
        assert min(left) - max(right) > 63  # L of LPS: the crops of either side end at one plane
        assert not name.startswith("mr") or (min(left) > 31 and max(right) < -31)  # of the atlas: x = 0


def test_aorta_is_what_the_label_maps_hold(crops: tuple[list[dict[str, str]], list[Volume]]) -> None:
    rows, volumes = crops
    seen = {"0": 0, "1": 0, "": 0}
    for name, (file, number) in LABELS.items():
        labels = read_volume(EXAMPLES / f"data/{file}.nii.gz")
        scan = read_volume(EXAMPLES / f"data/{name}.nii.gz").grid
        voxels = (labels.data[0] == number).nonzero().numpy() + np.array([FIRST_SLICE[name], 0, 0])
        world = scan.world(voxels)
        for row, volume in zip(rows, volumes, strict=True):
            if row["scan"] != name:
                continue
            index = volume.grid.index(world)
            inside = ((index > -0.5) & (index < np.array(volume.grid.size) - 0.5)).all(1).sum()
            litres = inside * np.prod(scan.spacing) * 1e-6
            assert {"1": litres > 2e-4, "0": litres < 1e-4, "": True}[row["aorta"]], (row, litres)
            seen[row["aorta"]] += 1
    assert min(seen.values()) > 0
    assert all(row["aorta"] == "" for row in rows if row["scan"].startswith("mr"))


def test_notebook_is_stored_with_what_it_shows() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 300_000
    notebook = json.loads(text)
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2  # ROC, map
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    said = "".join(part for cell in notebook["cells"] for part in cell["source"])
    said += "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"/(home|root|work|tmp|Users)/", said)


@pytest.mark.slow  # five runs of fine-tuning
def test_notebook_runs(tmp_path: Path) -> None:
    for name in ("examples", "weights"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, ROOT / "tests/run_notebook.py", "examples/finetune.ipynb", "--write"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def kinds(file: Path) -> list[list[str]]:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        return [[output["output_type"] for output in cell.get("outputs", ())] for cell in cells]

    assert kinds(tmp_path / "examples/finetune.ipynb") == kinds(NOTEBOOK)


def test_table_of_the_docs_is_that_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    study = importlib.import_module("finetune")
    results = json.loads(study.RESULT.read_text())
    text = (ROOT / "docs/finetune.md").read_text(encoding="utf-8")
    assert study.table(results) in text
    assert f"{results['cases']} crops of {results['cells']} cells" in text
    assert f"{results['error_of_the_mean_height']:.1f} mm" in text
