"""Files of safetensors: the header is bounded and free of doubt before the library of that name gets to see it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from torch import Tensor

from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.tensors import check_names

# The header of a ViT-H with a decoder has 0.1 MB. Safetensors itself takes 100 MB, and a gigabyte to understand it.
MAX_HEADER = 8 << 20


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, mapped from it, and its metadata.

    Raises:
        WeightsError: it is no such file, damaged, or its header is larger than a checkpoint's or names an entry twice.
    """
    from safetensors import safe_open

    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            check_names(names, str(path))
            return {name: file.get_tensor(name) for name in names}, metadata
    except WeightsError:
        raise
    except Exception as error:  # safetensors and torch raise several kinds for damaged files, some of many lines
        why = _first_line(error)
        remedy = "give the folder and the file plain names" if "not valid UTF-8" in why else "fetch it again"
        raise WeightsError(f"{path}: not a readable safetensors file ({why}); {remedy}") from error


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata: the same ones give the same bytes.

    Raises:
        OSError: the file system refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # how safetensors reports a file system that refuses
        raise OSError(str(error)) from error
    with path.open("rb+") as file:  # safetensors writes the metadata in an order that changes from run to run
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # what does not fit stays as it is
            file.seek(8)
            file.write(text.ljust(length))


def _check_header(path: Path) -> None:
    """Raise for what safetensors would take much memory for, or would read as one of two meanings."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length > MAX_HEADER:
            raise WeightsError(
                f"{path}: not a safetensors file, or damaged: its header would have {length} bytes, a checkpoint's has "
                f"{MAX_HEADER} at most; fetch it again"
            )
        text = file.read(length)
    try:
        json.loads(text, object_pairs_hook=_once)
    except DoubleError as error:
        raise WeightsError(f"{path}: its header names {str(error)[:200]} twice; save the weights again") from error
    except (ValueError, RecursionError):
        return  # which safetensors says better


class DoubleError(Exception):
    """A key stands in an object of JSON twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise DoubleError(repr(next(name for name in found if names.count(name) > 1)))
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
