"""Small runs of pre-training for tests: scans made up here, a model of two narrow blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from medgmae.data import Grid, Volume
from medgmae.training import Machine, Settings, pretrain, read_metrics, read_settings

# Numbers of a log that a clock or the system decides.
MEASURED = ("crops_per_second", "data_wait", "memory_mb")
MACHINE = Machine(device="cpu", log_every=2, checkpoint_every=3, picture_every=0, progress=False)


def scan_file(path: Path, seed: int = 0, size: tuple[int, int, int] = (24, 20, 22)) -> Path:
    """A bright box with texture in the dark, different for each seed."""
    rng = torch.Generator().manual_seed(seed)
    data = torch.zeros(1, *size)
    inside = data[:, 4:-4, 3:-3, 5:-5]
    inside.copy_(100 + 20 * torch.rand(inside.shape, generator=rng))
    path.parent.mkdir(parents=True, exist_ok=True)
    Volume(data, Grid(size, (2.0, 2.0, 2.0))).save(path)
    return path


def scans(folder: Path, count: int = 3) -> Path:
    for seed in range(count):
        scan_file(folder / f"scan{seed}.nii.gz", seed)
    return folder


def settings_of(model: str = "mae_vit_nano_patch8_32", **changes: Any) -> Settings:
    """A run of nine updates on crops of 16 voxels."""
    table = {
        "model": model,
        "model_options": {"img_size": 16},
        "input": {"orientation": "RAS", "window": [0, 130], "range": [0, 1]},
        "crops": {"per_scan": 2, "foreground": 0.75},
        "augmentation": {"flip": 0.5, "scale": [1.0, [-0.1, 0.1]]},
        "training": {"steps": 9, "batch_size": 4, "lr": 1e-3, "warmup_steps": 1, "clip": 1.0},
        "held_out": 0.34,
    }
    return read_settings(table).changed(changes)


def run_of(settings: Settings, data: Path, out: Path, machine: Machine = MACHINE, **options: Any) -> Path:
    return pretrain(settings, [data], out, machine=machine, **options)


def numbers(run: Path) -> list[dict[str, Any]]:
    """The log without what a clock decides."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(run / "metrics.jsonl")]


def outcome(run: Path) -> tuple[list[dict[str, Any]], bytes, dict[str, Any]]:
    """What must not depend on interruptions: the log, the model's bytes, its config."""
    config = json.loads((run / "config.json").read_text())
    return numbers(run), (run / "model.safetensors").read_bytes(), config
