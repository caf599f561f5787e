"""Results of scans as rows, and what a run has left."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = "Callable[[], Mapping[str, Tensor]]"
# What results say of the work on a scan; the rest is what the list says of the scan.
WORK = ("features", "map", "seconds", "key", "state")


@dataclass(frozen=True)
class Row:
    """One scan: its name, what the results say of it ("key" and "state" among it), and its features, which are read
    when they are asked for."""

    name: str
    said: Mapping[str, Any]
    tensors: Tensors

    @property
    def work(self) -> dict[str, Any]:
        """What is said of the work on the scan."""
        return {name: self.said[name] for name in WORK}


@dataclass(frozen=True)
class Finished:
    """What a file of results holds: facts about the run, and its rows."""

    facts: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def by_key(self) -> dict[str, Row]:
        """Rows by what stands for their scans."""
        return {row.said["key"]: row for row in self.rows}

    def is_of(self, description: Mapping[str, Any]) -> bool:
        """Whether these are results of a run that is described so."""
        expected: dict[str, Any] = json.loads(json.dumps(description))
        return {name: self.facts.get(name) for name in expected} == expected
