"""Signals that ask a run to end: it finishes its update, saves and says how to go on."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C; what systems and schedulers send before they kill; what SLURM is often told to send: --signal=USR1@120.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")


class Stopped(Exception):
    """A run was asked to stop and has saved its state.

    signal: number of the signal.
    step: updates that are done.
    """

    def __init__(self, signal: int, step: int, folder: object) -> None:
        super().__init__(f"stopped after step {step}; the same command with --resume goes on in {folder}")
        self.signal, self.step = signal, step


class StopRequest:
    """A context in which these signals are noted; a second one acts at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                if number := getattr(signal, name, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}
