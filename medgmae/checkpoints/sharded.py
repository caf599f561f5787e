"""Weights in several safetensors files, with an index that says which tensor is in which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.json_files import read_json
from medgmae.checkpoints.reading import Checkpoint, read_checkpoint
from medgmae.checkpoints.tensors import check_names

INDEX_SUFFIX = ".safetensors.index.json"
_MOST_SHARDS = 1000
_LONGEST = 8 << 20  # bytes of an index


def read_weights(path: Path, wanted: str = "") -> Checkpoint:
    """:func:`~medgmae.checkpoints.reading.read_checkpoint`, also of an index, whose files lie beside it.

    Raises:
        WeightsError: as there, or the index and its files do not belong together.
    """
    if not path.name.endswith(INDEX_SUFFIX):
        return read_checkpoint(path, wanted)
    if wanted:
        raise WeightsError(f"{path}: an index has one set of weights, not several; leave out {wanted!r}")
    due_in: dict[str, set[str]] = {name: set() for name in shard_names(path)}
    for tensor, name in _weight_map(path).items():
        due_in[name].add(tensor)
    state: dict[str, Tensor] = {}
    for name, due in due_in.items():
        shard = read_checkpoint(path.parent / name)
        if due != set(shard.state):
            missing, unknown = sorted(due - set(shard.state)), sorted(set(shard.state) - due)
            raise WeightsError(
                f"{path}: does not belong to {name} beside it: missing there {missing[:3]}, not in the index "
                f"{unknown[:3]}; fetch all files of one edition"
            )
        state |= shard.state
    return Checkpoint(state, "", None)


def weight_bytes(path: Path) -> int:
    """Size of a weight file, or of all files that an index names."""
    files = [path.parent / name for name in shard_names(path)] if path.name.endswith(INDEX_SUFFIX) else [path]
    return sum(file.stat().st_size for file in files)


def shard_names(index: Path, remedy: str = "") -> list[str]:
    """The files that an index names.

    Raises:
        WeightsError: the index is damaged, or names something else than files beside it; the message ends with
            ``remedy``.
    """
    names = sorted(set(_weight_map(index, remedy).values()))
    for name in names:
        if not name.endswith(".safetensors") or Path(name).name != name or "\\" in name or not name.isprintable():
            raise WeightsError(f"{index}: names {name[:200]!r}, expected safetensors files beside the index{remedy}")
    if len(names) > _MOST_SHARDS:
        raise WeightsError(f"{index}: names {len(names)} files, at most {_MOST_SHARDS} are read{remedy}")
    return names


def _weight_map(index: Path, remedy: str = "") -> dict[str, str]:
    places: Any = read_json(index, remedy, _LONGEST).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise WeightsError(f"{index}: expected a 'weight_map' of tensors to files{remedy}")
    check_names(places, str(index))
    return places
