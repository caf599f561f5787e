"""What a run that has ended left in its file, of which nothing needs to be computed again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medgmae.cli.common import shown
from medgmae.cli.features import parquet, shards
from medgmae.cli.features.results import Finished, Row, Tensors
from medgmae.cli.features.writers import sidecar

if TYPE_CHECKING:
    from torch import Tensor


def read_results(path: Path) -> Finished | None:
    """The results in a file, or None where it holds none that say what they are of, as a .csv does not."""
    readers = {".safetensors": _of_tensors, ".npy": _of_array, ".parquet": parquet.read_table}
    try:
        return shards.read_folder(path) if path.is_dir() else readers[path.suffix.lower()](path)
    except (KeyError, ValueError, OSError, TypeError):  # another format, or not a file of ours
        return None


def earlier_results(path: Path, description: Mapping[str, Any], overwrite: bool) -> Finished | None:
    """The results in ``path`` that need not be computed again.

    Raises:
        click.UsageError: it holds something else, and ``overwrite`` does not discard that.
    """
    there = [one for one in (path, sidecar(path)) if one is not None and os.path.lexists(one)]
    found = read_results(path) if there else None
    if found is not None and found.is_of(description):
        return found
    if there and not overwrite:
        other = "" if found is None else " and holds results of another run (other weights, options or version)"
        raise click.UsageError(f"{shown(there[0])} exists{other}; choose another name, or --overwrite to replace it")
    return None


def refuse_loss(path: Path, earlier: Finished | None, keys: set[str], overwrite: bool) -> None:
    """Raise a usage error where results of scans that are not named now would go."""
    lost = [row for key, row in earlier.by_key.items() if key not in keys] if earlier else []
    if lost and not overwrite:
        raise click.UsageError(
            f"{shown(path)} holds results of {len(lost)} scan(s) that are not among these, such as "
            f"{lost[0].said['path']}; name them too, choose another --out, or --overwrite to drop them"
        )


def _rows(scans: Mapping[str, Any], tensors: Callable[[int, str], Tensors]) -> list[Row]:
    return [Row(name, said, tensors(place, name)) for place, (name, said) in enumerate(scans.items())]


def _of_tensors(path: Path) -> Finished:
    from safetensors import SafetensorError, safe_open

    def tensors(place: int, name: str) -> Tensors:
        def read() -> Mapping[str, Tensor]:
            with safe_open(path, "pt") as file:
                return {part: file.get_tensor(f"{name}/{part}") for part in parts if f"{name}/{part}" in names}

        return read

    try:
        with safe_open(path, "pt") as file:
            facts, names = json.loads(file.metadata()["medgmae"]), set(file.keys())
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    parts = ("map", "pooled")
    return Finished(facts, _rows(facts["scans"], tensors))


def _of_array(path: Path) -> Finished:
    import numpy as np
    import torch

    facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    array = np.load(path, allow_pickle=False, mmap_mode="r")
    if len(array) != len(facts["scans"]):
        raise ValueError(f"{path} and its .json are not of one run")

    def tensors(place: int, name: str) -> Tensors:
        return lambda: {"pooled": torch.from_numpy(np.array(array[place]))}

    return Finished(facts, _rows(facts["scans"], tensors))
