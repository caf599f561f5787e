"""The work on one scan, the same wherever it is done: read and prepare it, then run the model over it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import medgmae
from medgmae.cli.journal import state_of
from medgmae.cli.options import gathered, overlap_option, sizes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Extraction:
    """How scans go through the model, and which features are written."""

    want_map: bool | None
    pooled: bool
    window: Any
    overlap: float
    resize: bool
    batch_size: int
    bf16: bool

    def checked(self, vectors_only: bool, ending: str) -> Extraction:
        """With a decision about maps, after a check that the options go together."""
        if vectors_only and (self.want_map or not self.pooled):
            raise click.UsageError(f"{ending} holds pooled vectors only; write maps to a .safetensors file")
        want_map = not vectors_only if self.want_map is None else self.want_map
        if not want_map and not self.pooled:
            raise click.UsageError("--no-map and --no-pooled leave nothing to write")
        if self.resize and self.window == "whole":
            raise click.UsageError("--resize needs a window to resize to; leave out --window whole")
        return replace(self, want_map=want_map)


extraction_options = gathered(
    "how",
    Extraction,
    click.option("--map/--no-map", "want_map", default=None, help="Write feature maps: the default for .safetensors."),
    click.option("--pooled/--no-pooled", default=True, help="Write pooled vectors: the default."),
    click.option(
        "--window",
        callback=sizes("model", "whole"),
        metavar="N|D,H,W",
        default="model",
        help="Voxels that the model sees at once: 'model' for the size it was built for, 'whole' for the scan in one "
        "pass.",
    ),
    overlap_option,
    click.option("--resize", is_flag=True, help="Resample each scan to the window's size instead of sliding over it."),
    click.option("--batch-size", type=click.IntRange(1), default=1, help="Windows per pass."),
    click.option("--bf16", is_flag=True, help="Run the model under bfloat16 autocast."),
)


@dataclass(frozen=True)
class Prepared:
    """A scan that the model can take, the state of its files before they were read, and how long that took."""

    volume: Any
    state: list[int]
    seconds: float


@dataclass(frozen=True)
class Result:
    """What came of a scan: facts about the features, the features by name, and the state of its files."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    state: list[int]


@dataclass(frozen=True)
class Preparer:
    """The half of the work that needs no model, in whichever process."""

    preprocessing: Any

    def __call__(self, scan: medgmae.data.Scan) -> Prepared:
        """The prepared scan.

        Raises:
            VolumeError: the scan is broken.
            OSError: it cannot be read.
        """
        start = time.perf_counter()
        state = state_of(scan)
        given: Any = scan.source if scan.series is None else scan.read(self.preprocessing.input["channels"])
        volume = self.preprocessing(given)
        return Prepared(volume, state, time.perf_counter() - start)


@dataclass(frozen=True)
class Extractor:
    """A model with its preprocessing and the options of a run."""

    model: Any
    prepare: Preparer
    how: Extraction

    def features(self, prepared: Prepared) -> Result:
        """The features of a prepared scan."""
        import torch

        start = time.perf_counter()
        features = medgmae.extract_features(
            self.model,
            prepared.volume,
            window=None if self.how.window == "whole" else self.how.window,
            overlap=self.how.overlap,
            resize=self.how.resize,
            outside=self.prepare.preprocessing.pad,
            want_map=bool(self.how.want_map),
            batch_size=self.how.batch_size,
            autocast=torch.bfloat16 if self.how.bf16 else None,
        )
        tensors = {"pooled": features.pooled} if self.how.pooled else {}
        facts: dict[str, Any] = {"features": len(features.pooled), "map": None}
        if features.map is not None:
            tensors["map"], facts["map"] = features.map.data, geometry(features.map)
        seconds = prepared.seconds + time.perf_counter() - start
        return Result({**facts, "seconds": round(seconds, 3)}, tensors, prepared.state)


def geometry(volume: medgmae.Volume) -> dict[str, Any]:
    """Size, spacing, origin and direction of a volume; direction as rows."""
    return {
        "shape": list(volume.data.shape),
        "spacing": list(volume.spacing),
        "origin": list(volume.origin),
        "direction": [[float(value) for value in row] for row in volume.direction],
    }


def absolute(scan: medgmae.data.Scan) -> medgmae.data.Scan:
    """The scan for a process with another working directory."""

    def place(path: Path) -> Path:
        return path.absolute()

    files = None if scan.files is None else tuple(map(place, scan.files))
    contrasts = None if scan.contrasts is None else {name: place(path) for name, path in scan.contrasts.items()}
    return replace(scan, path=place(scan.path), files=files, contrasts=contrasts)
