"""docs/segmentation.md is true: its blocks run as written, one after the other."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import warm_python

ROOT = Path(__file__).parent.parent


def test_blocks_run_in_order(tmp_path: Path) -> None:
    text = (ROOT / "docs/segmentation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(python|bash)\n(.*?)^```", text, flags=re.S | re.M)
    assert len(blocks) == text.count("```") // 2
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "build").mkdir()
    clean = {
        "PATH": f"{warm_python.commands()}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for language, code in blocks:
        command = ["python", "-c", code] if language == "python" else ["bash", "-ec", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | clean, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    made = {path.name for path in (tmp_path / "build").iterdir()}
    assert made == {"labels.nii.gz", "labels.png", "segmented", "scores.csv"}
    assert (tmp_path / "build/segmented/ct_abdomen.nii.gz").exists()
