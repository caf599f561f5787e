"""What loading did, to read on a terminal or in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass, field

_SHOWN = 8  # names of tensors in a line of text


@dataclass(frozen=True, repr=False)
class LoadReport:
    """What :func:`load_pretrained` did; names are the model's, in ``unused`` the file's.

    ``print(report)`` gives the whole text, a notebook shows a table.

    source: where the weights came from and what they were recognised as.
    loaded: parameters and buffers that were filled, adapted ones included.
    resized: table of positions to the grids "from to".
    adapted: other tensor to what was done to fit it; setting to what the file's model has and this one has.
    unused: name in the file to the reason why it was left out.
    missing: parameters that are missing from the file and keep their random start.
    notes: what else to know: which of several sets of weights was read and which not, a prefix that was taken off the
        names, a table without a row for the class token.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    adapted: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        counts = {name: len(getattr(self, name)) for name in ("loaded", "resized", "adapted", "unused", "missing")}
        return f"LoadReport({self.source!r}, {', '.join(f'{name}={count}' for name, count in counts.items())})"

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        lines += [f"  {name}: {what}" for name, what in {**self.resized, **self.adapted}.items()]
        lines += [f"  note: {note}" for note in self.notes]
        if self.missing:
            lines.append(f"  not in the file, randomly initialised: {self._missing()}")
        lines += [f"  unused ({why}): {count} tensors" for why, count in self._reasons().items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [("source", self.source), ("loaded", f"{len(self.loaded)} tensors")]
        rows += [(f"resized: {name}", what) for name, what in self.resized.items()]
        rows += [(f"adapted: {name}", what) for name, what in self.adapted.items()]
        rows += [("note", note) for note in self.notes]
        rows += [(f"unused: {count} tensors", why) for why, count in self._reasons().items()]
        if self.missing:
            rows.append((f"missing: {len(self.missing)} tensors, randomly initialised", self._missing()))
        return html_table(rows)

    def _missing(self) -> str:
        """The names of what is missing, the first ones of many."""
        more = f" and {len(self.missing) - _SHOWN} more" if len(self.missing) > _SHOWN else ""
        return ", ".join(self.missing[:_SHOWN]) + more

    def _reasons(self) -> dict[str, int]:
        """Reason to the number of entries that were left out for it."""
        reasons = list(self.unused.values())
        return {why: reasons.count(why) for why in sorted(set(reasons))}


def html_table(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns for a notebook; what looks like markup in them is shown as it stands."""
    lines = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f'<table style="text-align: left">{"".join(lines)}</table>'
