"""JSON files of strangers: a dictionary, or an error that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medgmae.checkpoints.cards import WeightsError

_LARGEST = 100_000_000  # bytes


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        WeightsError: it is not one; the message ends with ``remedy``.
    """
    refuse_folder(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise WeightsError(f"{path}: a configuration of {path.stat().st_size} bytes is not read")
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path}: the configuration is not UTF-8 text ({error}){remedy}") from error
    except RecursionError as error:
        raise WeightsError(f"{path}: the configuration is nested too deeply{remedy}") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: the configuration is not valid JSON: {error}{remedy}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: the configuration should be a JSON object, got {type(config).__name__}{remedy}")
    return config


def refuse_folder(path: Path) -> None:
    """Raise a WeightsError where a folder stands in the place of a file."""
    if path.is_dir():
        raise WeightsError(f"{path}: a folder stands where a file is expected; remove it, or rename it")
