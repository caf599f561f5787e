"""Recipes and settings: every value is read, written and changed by name, and every recipe trains on real scans."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import MACHINE, numbers, scan_file

import medgmae
from medgmae.training import (
    Settings,
    TrainingError,
    parse_change,
    pretrain,
    read_recipe,
    read_settings,
    recipes,
)
from medgmae.training.engine import Plan

DATA = Path(__file__).parent.parent / "examples" / "data"
# What of each recipe is made small: the model, and what goes with its size. Everything else is the recipe's.
SMALL: dict[str, dict[str, Any]] = {
    "glmae": {
        "model": "glmae_vit_nano_patch8_32",
        "crops.size": [32, 32, 32],
        "global_local.local_size": [16, 16, 16],
        "global_local.projector": [64, 16, 64],
    },
    "glmae_quick": {
        "model": "glmae_vit_nano_patch8_32",
        "crops.size": [32, 32, 32],
        "global_local.local_size": [16, 16, 16],
        "global_local.projector": [64, 16, 64],
    },
    "quick": {"model": "mae_vit_nano_patch8_32"},
    "medgmae": {"model": "gmae_vit_nano_patch8_32", "model_options.num_gaussians": 32},
    "tangerine": {
        "model": "mae_vit_nano_patch8_32",
        "input": {
            **(medgmae.weight_card("mae_vit_large_patch16_256.tangerine").input or {}),
            "size": [32, 32, 32],
        },
    },
    "selfmedmae_btcv": {"model": "mae_vit_nano_patch8_32"},
    "selfmedmae_brats": {"model": "mae_vit_nano_patch8_32"},
    "selfmedmae_2d": {"model": "mae2d_vit_nano_patch8_32"},
    "mamba_mae": {
        "model": "mae_vim_nano_patch8_32",
        "model_options.in_chans": 4,
        "input": {
            **(medgmae.weight_card("mae_vim_small_patch16_160.mamba_mae").input or {}),
            "size": [32, 32, 32],
        },
    },
}


def four_contrasts(folder: Path) -> Path:
    for name in ("flair", "t1", "t1ce", "t2"):
        scan_file(folder / "case" / f"case_{name}.nii.gz", hash(name) % 100, (40, 40, 40))
    return folder


def test_every_recipe_has_a_small_case() -> None:
    assert set(SMALL) == set(recipes())


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_trains_on_scans(name: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = read_recipe(name)
    channels = settings.input_block.get("channels", 1)
    if channels == 4:
        data = [four_contrasts(tmp_path / "data")]
    elif settings.input_block.get("modality") == "CT":
        data = [DATA / "ct_abdomen.nii.gz"]
    else:
        data = [DATA / "ct_abdomen.nii.gz", DATA / "mr_brain_t1.nii.gz"]
    small = settings.lasting(steps=8).changed({**SMALL[name], "training.batch_size": 4})
    folder = pretrain(small, data, tmp_path / "run", machine=replace(MACHINE, checkpoint_every=8, log_every=2))
    torch.set_num_threads(threads)
    losses = [line["loss"] for line in numbers(folder) if "loss" in line]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    assert medgmae.create_model(f"local-dir:{folder}").pretrained_cfg["input"]["channels"] == channels


@pytest.mark.parametrize("name", recipes())
def test_recipes_are_settings_that_are_written_as_they_are_read(name: str, tmp_path: Path) -> None:
    settings = read_recipe(name)
    path = tmp_path / "settings.toml"
    path.write_text(settings.toml(), encoding="utf-8")
    assert read_recipe(path) == settings

    options = dict(settings.model_options)
    with torch.device("meta"):
        medgmae.create_model(settings.model, **options)
    medgmae.create_transform(settings.input_block)


# Sizes of the data sets that the papers name, and the numbers that the papers and codes give for these.
def test_published_numbers() -> None:
    tangerine = read_recipe("tangerine")
    plan = Plan.of(tangerine.training, 98_000)
    assert plan.warmup / plan.steps == pytest.approx(20 / 400)
    assert plan.epoch(plan.steps) == pytest.approx(400, rel=1e-5)
    btcv = read_recipe("selfmedmae_btcv").training
    assert medgmae.training.scale_lr(btcv.lr, btcv.batch_size) == pytest.approx(1.5e-4)
    mamba = read_recipe("mamba_mae").training
    assert medgmae.training.scale_lr(mamba.lr, mamba.batch_size) == pytest.approx(1.5625e-5)
    medgmae_recipe = read_recipe("medgmae").training
    assert (medgmae_recipe.lr_per_256, medgmae_recipe.lr, medgmae_recipe.seed) == (False, 1e-4, 41)


def test_changes_by_name() -> None:
    settings = read_recipe("quick")
    changed = settings.changed({"training.epochs": 3, "training.lr": 1, "augmentation.flip": 0.5, "model": "m"})
    assert (changed.training.epochs, changed.training.steps, changed.training.lr) == (3.0, None, 1.0)
    assert changed.augmentation["flip"] == 0.5
    assert settings.training.steps == 2000
    assert changed.training.warmup_steps == settings.training.warmup_steps
    half = settings.lasting(steps=1000).training
    assert (half.steps, half.warmup_steps) == (1000, 50)
    epochs = read_recipe("tangerine").lasting(epochs=40).training
    assert (epochs.epochs, epochs.warmup_epochs) == (40.0, 2.0)
    assert parse_change("training.betas=[0.9, 0.99]") == ("training.betas", [0.9, 0.99])
    assert parse_change("held_out = fold=0") == ("held_out", "fold=0")
    assert parse_change("training.clip=none") == ("training.clip", None)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "no model is named"),
        ({"model": "m"}, "steps or epochs"),
        ({"model": "m", "training": {"steps": 1, "epochs": 1}}, "steps or epochs"),
        ({"model": "m", "trainin": {}}, "trainin is not a setting"),
        ({"model": "m", "training": {"step": 1}}, "training.step is not a setting"),
        ({"model": "m", "training": {"steps": "many"}}, "training.steps is 'many'; expected a whole number or nothing"),
        ({"model": "m", "training": {"steps": 0}}, "training.steps is 0"),
        ({"model": "m", "training": {"steps": True}}, "training.steps is True"),
        ({"model": "m", "training": {"steps": 1, "lr": -1}}, "training.lr is -1"),
        ({"model": "m", "training": {"steps": 1, "betas": [0.9]}}, "two numbers"),
        ({"model": "m", "training": {"steps": 1, "precision": "half"}}, "precision is 'half'"),
        ({"model": "m", "training": {"steps": 1, "warmup_steps": 1, "warmup_epochs": 1}}, "leave one out"),
        ({"model": "m", "training": {"steps": 1}, "held_out": 1.0}, "held_out is 1.0"),
        ({"model": "m", "training": {"steps": 1}, "crops": 3}, "crops is 3; expected a table"),
        ({"model": "m", "training": {"steps": 1, "phases": [{"until": 1, "train": "all"}]}}, "expected a list"),
    ],
)
def test_settings_that_are_not_valid(table: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError) as failed:
        read_settings(table)
    assert message in str(failed.value)


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="medgmae, quick"):
        read_recipe("none")
    with pytest.raises(TrainingError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("model = ")
    with pytest.raises(TrainingError, match="not valid TOML"):
        read_recipe(tmp_path / "bad.toml")
    with pytest.raises(TrainingError, match="NAME=VALUE"):
        parse_change("training.lr")
    settings: Settings = read_recipe("quick")
    with pytest.raises(TrainingError, match=r"training\.rate is not a setting"):
        settings.changed({"training.rate": 1})
    with pytest.raises(TrainingError, match="no settings below 'lr'"):
        settings.changed({"training.lr.peak": 1})
