"""The configuration of a training that lies beside published weights: what of the model no tensor shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medgmae.checkpoints.cards import WeightsError

MAX_BYTES = 1 << 20
_ABSENT = object()


def compare_config(path: Path, expected: Mapping[str, Any]) -> list[str]:
    """What a YAML file says otherwise than expected, in words.

    Args:
        path: the file; nothing in it is executed.
        expected: values by dotted name, ``"datasets.0.norm.mean"``: numbers in the name count entries of lists.

    Raises:
        WeightsError: it cannot be read, or is no YAML.
    """
    import yaml  # type: ignore[import-untyped]  # huggingface-hub and timm need it too

    try:
        content = path.read_bytes()
        if len(content) > MAX_BYTES:
            raise WeightsError(f"{path}: {len(content)} bytes, expected a configuration of at most {MAX_BYTES}")
        config = yaml.safe_load(content)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise WeightsError(f"{path}: no readable YAML ({str(error)[:300]})") from error
    differing = []
    for name, value in expected.items():
        found = _look_up(config, name)
        if found is _ABSENT:
            differing.append(f"{name} is missing, the card's is {value!r}")
        elif not _same(found, value):
            differing.append(f"{name} is {str(found)[:80]!r}, the card's {value!r}")
    return differing


def _look_up(config: Any, name: str) -> Any:
    for key in name.split("."):
        if isinstance(config, dict) and key in config:
            config = config[key]
        elif isinstance(config, list) and key.isdecimal() and int(key) < len(config):
            config = config[int(key)]
        else:
            return _ABSENT
    return config


def _same(found: Any, value: Any) -> bool:
    """Numbers by value: YAML takes 1e-05 for text."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(found) == value if number and not isinstance(found, bool) else bool(found == value)
    except (TypeError, ValueError):
        return False
