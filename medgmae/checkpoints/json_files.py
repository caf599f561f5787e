"""JSON of strangers: a dictionary of bounded size and depth, or an error that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from medgmae.checkpoints.cards import WeightsError

MAX_TEXT = 1 << 20  # bytes of a configuration
MAX_NESTING = 16


def read_json(path: Path, remedy: str = "", longest: int = MAX_TEXT) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        WeightsError: it is not one; the message ends with ``remedy``.
    """
    refuse_folder(path)
    try:
        with path.open("rb") as file:
            text = file.read(longest + 1)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    return parse_json(text.removeprefix(b"\xef\xbb\xbf"), str(path), remedy, longest)


def parse_json(text: str | bytes, origin: str, remedy: str = "", longest: int = MAX_TEXT) -> dict[str, Any]:
    """A JSON object from its text.

    Raises:
        WeightsError: not UTF-8, not a JSON object, or longer, deeper or with larger numbers than any configuration has;
            the message ends with ``remedy``.
    """
    if len(text) > longest:
        raise WeightsError(f"{origin}: the configuration is longer than {longest} characters{remedy}")
    try:
        config = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
        json.dumps(config, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeError as error:  # halves of characters are found in the second step, as NaN is
        raise WeightsError(f"{origin}: the configuration is not UTF-8 text ({error}){remedy}") from error
    except RecursionError as error:
        raise WeightsError(f"{origin}: the configuration is nested too deeply{remedy}") from error
    except ValueError as error:
        raise WeightsError(f"{origin}: the configuration is not valid JSON: {str(error)[:200]}{remedy}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{origin}: the configuration should be a JSON object, got {type(config).__name__}{remedy}")
    if _nesting(config) > MAX_NESTING:
        raise WeightsError(f"{origin}: the configuration is nested more than {MAX_NESTING} deep{remedy}")
    return config


def _nesting(config: Any) -> int:
    """Levels of lists and objects, without recursion."""
    level, depth = [config], 0
    while level:
        depth += 1
        inner = [
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list)
        ]
        level = [value for values in inner for value in values]
    return depth


def refuse_folder(path: Path) -> None:
    """Raise a WeightsError where a folder stands in the place of a file."""
    if path.is_dir():
        raise WeightsError(f"{path}: a folder stands where a file is expected; remove it, or rename it")
