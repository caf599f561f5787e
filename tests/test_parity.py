"""Every fixture of the reference code bases against this library: ``pytest tests/test_parity.py --fixtures DIR``."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity import run
from parity.case import Case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fixture_file" in metafunc.fixturenames:
        folder = Path(metafunc.config.option.fixtures_dir)
        files = sorted(folder.glob("*/*.json"))
        if not files:
            raise pytest.UsageError(f"--fixtures {folder}: no SYSTEM/NAME.json in it")
        metafunc.parametrize("fixture_file", files, ids=[f"{file.parent.name}/{file.stem}" for file in files])


def test_parity(fixture_file: Path, tmp_path: Path) -> None:
    run(Case(fixture_file, tmp_path))
