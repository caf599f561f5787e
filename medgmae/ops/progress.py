"""Progress bars, shown by default where a person can see them."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Bar(Protocol):
    """A progress bar, one of tqdm's."""

    def update(self, n: int = 1) -> object:
        """``n`` steps more are done."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Text behind the bar."""


def interactive() -> bool:
    """Whether a person can see a progress bar: standard error is a terminal, or a notebook is running."""
    if sys.stderr is not None and sys.stderr.isatty():
        return True
    ipython: Any = sys.modules.get("IPython")  # a notebook has imported it; nothing else needs to
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def progress_bar(
    total: int, desc: str, progress: bool | None = None, *, unit: str = "it"
) -> AbstractContextManager[Bar]:
    """A bar on standard error, or in the notebook, that goes away when its ``with`` block ends.

    Args:
        total: number of steps.
        desc: text in front of the bar.
        progress: whether to show it. None: where :func:`interactive` says so; tqdm's own None hides it in notebooks.
        unit: what a step is called.
    """
    from tqdm.auto import tqdm

    shown = interactive() if progress is None else progress
    bar: AbstractContextManager[Bar] = tqdm(total=total, desc=desc, unit=unit, leave=False, disable=not shown)
    return bar
