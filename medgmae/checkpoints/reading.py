"""Reading checkpoint files safely: tensors, plain containers, ``argparse.Namespace``, numpy scalars, nothing else."""

from __future__ import annotations

import argparse
import json
import re
import struct
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from medgmae.checkpoints.cards import WeightsError

# Where training code puts the weights, in the order in which they are looked for. GL-MAE's student comes before all.
CONTAINER_KEYS = ("student", "state_dict", "model", "model_state", "model_state_dict")

# Entries under which files hold weights that are not the ones to load.
OTHER_WEIGHTS = ("teacher", "optimizer", "ema")

# Name of the metadata entry of our own safetensors files: the model's config as JSON.
CONFIG_KEY = "medgmae"


class Checkpoint(NamedTuple):
    """The weights in a file.

    state: name to tensor, as the file spells them.
    container: entry that held them, "" for a bare dictionary.
    config: the model's config when the file is one of ours, else None.
    """

    state: dict[str, Tensor]
    container: str
    config: dict[str, Any] | None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a .safetensors file or anything that ``torch.save`` wrote; tensors are mapped from disk where possible.

    Raises:
        WeightsError: not a checkpoint, damaged, holds objects other than the allowed ones, or no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(16)
    if path.suffix == ".safetensors" or head[8:10] == b'{"':
        return _read_safetensors(path)
    checkpoint = find_state(_torch_load(path, zipped=head.startswith(b"PK\x03\x04")), str(path))
    hollow = [name for name, tensor in checkpoint.state.items() if tensor.is_meta]
    if hollow:
        raise WeightsError(
            f"{path}: {len(hollow)} tensors have a shape but no values, {hollow[0]!r} for one. Save the state "
            "dictionary again when every tensor is in memory (gathered from all processes, not on the meta device)"
        )
    return checkpoint


def _read_safetensors(path: Path) -> Checkpoint:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        config = json.loads(metadata[CONFIG_KEY]) if CONFIG_KEY in metadata else None
    except Exception as error:  # safetensors raises several kinds for damaged files
        raise WeightsError(f"{path}: not a readable safetensors file ({error}); fetch it again") from error
    if not isinstance(config, dict | None):
        raise WeightsError(f"{path}: its {CONFIG_KEY!r} entry should be a JSON object, got {type(config).__name__}")
    if not state:
        raise WeightsError(f"{path}: the file holds no tensors")
    return Checkpoint(state, "", config)


def _allowed() -> list[Any]:
    """Objects besides tensors and plain containers that training code puts into its files."""
    scalar = np.float64(0).__reduce__()[0]  # what a pickle names; in numpy 1.26 numpy._core exists and lacks it
    kinds = [np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64, np.uint8, np.bool_]
    dtypes: list[Any] = [type(np.dtype(kind)) for kind in kinds]
    # numpy 1 and 2 spell the module differently, and files name either.
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [argparse.Namespace, np.dtype, *dtypes, *((scalar, name) for name in names)]


def _safe_globals() -> AbstractContextManager[Any]:
    return torch.serialization.safe_globals(_allowed())  # type: ignore[no-any-return, no-untyped-call, unused-ignore]


def _torch_load(path: Path, zipped: bool) -> Any:
    try:
        if zipped:
            _check_archive(path)
        with _safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises over ten kinds for damaged files
        names = _forbidden_names(path) if zipped else re.findall(r"GLOBAL ([\w.]+)", str(error))
        if names:
            raise WeightsError(
                f"{path}: refused, because it holds objects that run code when they are read: {', '.join(names)}. "
                "Only tensors, plain containers, argparse.Namespace and numpy scalars are read. If you trust the "
                "file, open it yourself, keep the state dictionary and save that with torch.save"
            ) from error
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "weights_only" in first:  # torch advises to load without safety: not a thing to pass on
            first = "it is not a file of torch.save, or it is damaged"
        raise WeightsError(f"{path}: cannot be read as a PyTorch checkpoint ({first}); fetch it again") from error


def _check_archive(path: Path) -> None:
    """Raise BadZipFile for damage anywhere but in the bytes of tensors: a file that is mapped has no other check.

    Tensors are left out because to sum them is to read them all, which takes longer than loading.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{entry.filename} is compressed, which torch.save never does")
            file.seek(entry.header_offset)
            header = file.read(30)
            name, extra = struct.unpack("<HH", header[26:])
            sound = header.startswith(b"PK\x03\x04") and file.read(name) == entry.orig_filename.encode()
            file.seek(entry.header_offset + 30 + name + extra + entry.file_size)
            if not sound or file.read(2) != b"PK":  # what follows an entry is its sum, the next one or the directory
                raise zipfile.BadZipFile(f"{entry.filename} is not where the directory says")
            if "/data/" not in entry.filename:
                archive.read(entry)  # compares the checksum


def _forbidden_names(path: Path) -> list[str]:
    """Globals that the pickle in a zip checkpoint names and that are not allowed; found without running it."""
    try:
        with _safe_globals():
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # a damaged pickle has no such list; the caller reports the damage
        return []


def find_state(content: Any, origin: str) -> Checkpoint:
    """The state dictionary inside what a file held.

    Args:
        content: the unpickled object.
        origin: the file's name, for messages.

    Raises:
        WeightsError: no dictionary of tensors under any known entry.
    """
    if not isinstance(content, Mapping):
        raise WeightsError(f"{origin}: expected a dictionary of weights, found {type(content).__name__}")
    container: list[str] = []
    while not _is_state(content):
        entry = next((k for k in CONTAINER_KEYS if isinstance(content.get(k), Mapping)), None)
        if entry is None or len(container) > 3:
            entries = [repr(key) if isinstance(key, str) else type(key).__name__ for key in list(content)[:8]]
            spare = [k for k in OTHER_WEIGHTS if k in content]
            hint = f" ({' and '.join(spare)} alone are not loaded)" if spare else ""
            raise WeightsError(
                f"{origin}: no weights found. Expected tensors by name, or such a dictionary under one of "
                f"{', '.join(CONTAINER_KEYS)}; found {', '.join(entries) or 'nothing'}{hint}"
            )
        container.append(entry)
        content = content[entry]
    odd = next((key for key in content if not isinstance(key, str)), None)
    if odd is not None:
        raise WeightsError(
            f"{origin}: the name of a weight is of type {type(odd).__name__}, expected text; fetch the file again"
        )
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    return Checkpoint(state, ".".join(container), None)


def _is_state(content: Mapping[Any, Any]) -> bool:
    """Whether a mapping is names to tensors; a container has its tensors one level down."""
    if any(isinstance(content.get(k), Mapping) for k in CONTAINER_KEYS):
        return False
    return any(isinstance(v, Tensor) for v in content.values())
