"""Small runs of fine-tuning for tests: scans made up here whose label shows, a model of two narrow blocks."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medgmae.data import Grid, Volume
from medgmae.training import Machine, TuneSettings, finetune
from medgmae.training.tables import read_table

MACHINE = Machine(device="cpu", log_every=2, checkpoint_every=3, picture_every=0, progress=False)
SIZE = (20, 18, 22)


def case_file(path: Path, bright: float, seed: int) -> Path:
    """A textured box in the dark whose lower half is as bright as ``bright``."""
    data = torch.zeros(1, *SIZE)
    box = data[:, 3:-3, 3:-3, 3:-3]
    box.copy_(60 + 20 * torch.rand(box.shape, generator=torch.Generator().manual_seed(seed)))
    box[:, : box.shape[1] // 2] += bright
    path.parent.mkdir(parents=True, exist_ok=True)
    Volume(data, Grid(SIZE, (2.0, 2.0, 2.0))).save(path)
    return path


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def cases(folder: Path, count: int = 12) -> Path:
    """A table of cases: every other one is bright; three labels, a number, a time, patients with two scans each."""
    rows = []
    for k in range(count):
        bright = k % 2
        case_file(folder / f"case{k}.nii.gz", 60.0 * bright, k)
        rows.append(
            {
                "path": f"case{k}.nii.gz",
                "id": f"case{k}",
                "label": ("dark", "bright")[bright],
                "spot": bright,
                "other": "" if k == 3 else k // 2 % 2,
                "height": 10.0 + 5 * bright + 0.1 * k,
                "months": 30 - 10 * bright + k % 3,
                "died": int(k % 4 != 3),
                "patient": f"p{k // 2}",
                "fold": k // 2 % 3,
            }
        )
    return write_table(folder / "cases.csv", rows)


def tune_settings(**changes: Any) -> TuneSettings:
    """A run of nine updates on the middle of the scans."""
    table = {
        "model": "vit_nano_patch8_32",
        "model_options": {"img_size": 16, "global_pool": "avg"},
        "input": {"orientation": "RAS", "window": [0, 160], "range": [0, 1]},
        "augmentation": {"flip": [0.0, 0.0, 0.5], "scale": [1.0, [-0.05, 0.05]]},
        "training": {"steps": 9, "batch_size": 4, "lr": 3e-3, "warmup_steps": 1, "clip": 1.0, "layer_decay": 0.75},
        "held_out": 0.34,
    }
    return read_table(TuneSettings, table).changed(changes)


def tune(settings: TuneSettings, data: Path, out: Path, machine: Machine = MACHINE, **options: Any) -> Path:
    return finetune(settings, [data], out, machine=machine, **options)
