"""The folder of a run: its settings, what it was made with, its log of numbers, and the lock that keeps others out."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from medgmae._version import __version__
from medgmae.data.store import write_whole
from medgmae.training.settings import RunSettings, S, TuneSettings, read_run_settings
from medgmae.training.tables import TrainingError

_MEASURES = ("psnr", "auc", "dice", "r2", "concordance", "accuracy", "loss")

SETTINGS, METRICS, ABOUT = "settings.toml", "metrics.jsonl", "run.json"


class Run:
    """A run's folder; only the first process writes in it.

    settings.toml: what decides its outcome, a recipe in itself. run.json: versions, command lines and data.
    metrics.jsonl: one object per line. checkpoints/: states. model.safetensors, config.json, README.md: the model.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder = Path(folder)
        self.checkpoints, self.pictures = folder / "checkpoints", folder / "pictures"
        self._lock = FileLock(folder / ".lock")

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.folder / SETTINGS).exists()

    def settings(self, kind: type[S]) -> S:
        """The settings of the run that was begun here.

        Raises:
            TrainingError: there is none, or it is of another kind.
        """
        if not self.exists:
            raise TrainingError(f"{self.folder} holds no run; start one without --resume")
        settings = read_run_settings(self.folder / SETTINGS)
        if not isinstance(settings, kind):
            word = "fine-tuning" if isinstance(settings, TuneSettings) else "pre-training"
            raise TrainingError(f"{self.folder} is a run of {word}; go on with that command, or choose another folder")
        return settings

    def starts(self) -> list[dict[str, Any]]:
        """What the run was started with, each time."""
        path = self.folder / ABOUT
        return json.loads(path.read_text(encoding="utf-8"))["starts"] if path.exists() else []

    def open(self) -> None:
        """Hold the folder for this process.

        Raises:
            TrainingError: another run holds it, or it cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout:
            raise TrainingError(
                f"another run is writing {self.folder}; wait for it, stop it, or choose another --out"
            ) from None
        except OSError as error:
            raise TrainingError(f"{self.folder} cannot be written: {error.strerror or error}") from None

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.release()

    def begin(self, settings: RunSettings, about: Mapping[str, Any], step: int) -> None:
        """Note a start: the settings the first time, what it runs with every time, and no numbers beyond ``step``."""
        place = self.folder / SETTINGS
        if not place.exists():
            write_whole(place, f"{settings.toml()}\n".encode())
        starts = self.starts()
        starts.append({"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **_versions(), **about})
        write_whole(self.folder / ABOUT, json.dumps({"starts": starts}, indent=2).encode())
        log = self.folder / METRICS
        kept = [json.dumps(one) for one in read_metrics(log) if one["step"] <= step]
        write_whole(log, "".join(f"{line}\n" for line in kept).encode())

    def log(self, values: Mapping[str, Any]) -> None:
        """Add a line of numbers."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log, none where there is no log yet; a last one that was cut with the power is left out."""
    path, found = Path(path), []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def summary_of(folder: str | Path) -> dict[str, Any]:
    """Where a run is: its model and length, its last numbers, and of the measure of its held-out data ("psnr", "auc",
    "dice", "r2", "concordance", "accuracy", "loss") the last and the best; None of what it does not have.

    Raises:
        TrainingError: no run.
    """
    run = Run(folder)
    settings, log = run.settings(RunSettings), run.folder / METRICS
    lines = read_metrics(log)
    losses = [one for one in lines if "loss" in one]
    measure = next((name for name in _MEASURES if any(f"validation_{name}" in one for one in lines)), None)
    scores = [one[f"validation_{measure}"] for one in lines if f"validation_{measure}" in one]
    last: dict[str, Any] = losses[-1] if losses else {}
    return {
        "run": str(folder),
        "model": settings.model,
        "step": last.get("step", 0),
        "epoch": last.get("epoch"),
        "loss": last.get("loss"),
        "measure": measure,
        "value": scores[-1] if scores else None,
        "best": (min if measure == "loss" else max)(scores, default=None),
        "crops_per_second": last.get("crops_per_second"),
        "data_wait": last.get("data_wait"),
        "memory_mb": last.get("memory_mb"),
    }


def _versions() -> dict[str, str]:
    return {
        "medgmae": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "command": " ".join(sys.argv),
    }
