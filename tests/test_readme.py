"""The README is true: its Python runs as written, its tables are the registry's and the cards'."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import medgmae

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICK_STARTS = README[README.index("## Quick starts") : README.index("## Models")]
BLOCKS = re.findall(r"### ([^\n]+)\n.*?```python\n(.*?)```", QUICK_STARTS, flags=re.S)


def glmae_file(path: Path) -> None:
    """A file laid out like GL-MAE's, with random weights: student, DDP and backbone prefixes, a class row."""
    torch.manual_seed(0)
    encoder = medgmae.create_model("vit_base_patch16_96")
    state = encoder.state_dict()
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 768), state["pos_embed"]], dim=1)
    student = {f"module.backbone.{name}": tensor for name, tensor in state.items()}
    student["module.head.mlp.0.weight"] = torch.zeros(8, 768)
    torch.save({"student": student, "epoch": 1600, "args": argparse.Namespace(lr=5e-4)}, path)


# MONAI takes ten seconds to import.
CASES = [pytest.param(*block, id=block[0], marks=[pytest.mark.slow] if "MONAI" in block[0] else []) for block in BLOCKS]


@pytest.mark.parametrize(("title", "code"), CASES)
def test_quick_start_runs(title: str, code: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    if "checkpoint-1599.pth" in code:
        glmae_file(tmp_path / "checkpoint-1599.pth")
    command = [sys.executable, "-W", "error::UserWarning:medgmae", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_five_quick_starts() -> None:
    assert len(BLOCKS) == 5


def test_model_table_is_the_registry() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", README, flags=re.M))
    expected = {}
    for name in medgmae.list_models():
        with torch.device("meta"):
            model = medgmae.create_model(name)
        expected[name] = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}"
    assert rows == expected


def test_weight_table_is_the_cards() -> None:
    rows = dict(re.findall(r"^\| `(\w+\.\w+)` \| ([^|]+?) \|", README, flags=re.M))
    assert rows == {tag: medgmae.weight_card(tag).license or "none stated" for tag in medgmae.list_weights()}
