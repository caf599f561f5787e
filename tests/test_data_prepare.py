"""``medgmae data prepare``: prepared once, trained on as they are."""

from __future__ import annotations

import json
from pathlib import Path

from test_cli import run
from training_runs import MACHINE, numbers, run_of, scans, settings_of

import medgmae


def test_prepared_scans_train_like_the_scans_themselves(tmp_path: Path) -> None:
    data, recipe, settings = scans(tmp_path / "scans"), tmp_path / "recipe.toml", settings_of()
    recipe.write_text(settings.toml(), encoding="utf-8")
    done = run("data", "prepare", data, "--out", tmp_path / "prepared", "--recipe", recipe, "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["scans"], facts["broken"]) == (3, [])
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "prepared").glob("*.b2nd"))
    expected = medgmae.create_transform(settings.input_block, whole=True)(data / "scan1.nii.gz")
    prepared = medgmae.data.open_prepared(tmp_path / "prepared").scans[1].volume()
    assert prepared.grid == expected.grid
    assert (prepared.data - expected.data).abs().max() < 1e-3  # stored with 11 bits
    ours = run_of(settings, tmp_path / "prepared", tmp_path / "a", MACHINE)
    assert numbers(ours) == numbers(run_of(settings, data, tmp_path / "b", MACHINE))
    again = run("data", "prepare", data, "--out", tmp_path / "prepared", "--recipe", recipe)
    assert again.exit_code == 0
    assert "3 scans" in again.stdout


def test_broken_scans_and_wrong_use(tmp_path: Path) -> None:
    data = scans(tmp_path / "scans", 2)
    (data / "broken.nii.gz").write_bytes(b"no scan")
    common = ["--out", tmp_path / "prepared", "--tag", "mae_vit_tiny_patch8_64.demo"]
    stopped = run("data", "prepare", data, *common)
    assert (stopped.exit_code, "broken.nii.gz" in stopped.stderr) == (1, True)
    skipped = run("data", "prepare", data, *common, "--skip-broken")
    assert (skipped.exit_code, "2 scans" in skipped.stdout, "broken.nii.gz" in skipped.stderr) == (1, True, True)
    for wrong in ([], ["--recipe", "quick", "--tag", "mae_vit_tiny_patch8_64.demo"]):
        result = run("data", "prepare", data, "--out", tmp_path / "none", *wrong)
        assert (result.exit_code, "--recipe or --tag" in result.stderr) == (2, True)
    (tmp_path / "empty").mkdir()
    assert run("data", "prepare", tmp_path / "empty", *common).exit_code == 1
