"""Progress bars: shown in terminals and notebooks unless told otherwise, on standard error, and gone at the end."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import medgmae
from medgmae.inference.features import dense_features
from medgmae.ops.progress import interactive, progress_bar

RUNS = """
import torch, medgmae
from medgmae.inference.features import dense_features
model = medgmae.create_model("mae_vit_nano_patch8_32")
scan = medgmae.Volume(torch.rand(1, 40, 32, 32))
for run in (medgmae.extract_features, medgmae.reconstruct_scan, dense_features):
    run(model, scan)
    run(model, scan, progress=False)
"""


def in_a_terminal(code: str) -> tuple[str, str]:
    """What a process says on standard output, and what a terminal gets on its standard error."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))  # lines and columns
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        shown = bytearray()
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # Linux says EIO where the other side is closed
            pass
        stdout = process.communicate(timeout=120)[0]
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    return stdout, shown.decode()


def test_bars_are_shown_in_a_terminal_and_go_away() -> None:
    stdout, shown = in_a_terminal(RUNS)
    assert stdout == ""
    assert shown.count("windows:   0%|") == 3  # with progress=False there are none
    assert "0/2 " in shown
    assert "0/16 " in shown  # 8 shifts of 2 windows are one bar
    assert shown.rpartition("\r")[0].endswith(" ")  # overwritten by blanks


@pytest.mark.parametrize("run", [medgmae.extract_features, medgmae.reconstruct_scan, dense_features])
def test_elsewhere_they_are_shown_when_asked_for(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, scan = medgmae.create_model("mae_vit_nano_patch8_32"), medgmae.Volume(torch.rand(1, 40, 32, 32))
    run(model, scan)
    assert capsys.readouterr().err == ""
    run(model, scan, progress=True)
    said = capsys.readouterr()
    assert "windows" in said.err
    assert said.out == ""


@pytest.mark.parametrize(("config", "expected"), [({"IPKernelApp": {}}, True), ({}, False)])
def test_a_notebook_is_known_by_its_kernel(config: Any, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """IPython is not among this library's requirements: a stand-in for what a kernel, or a plain shell, says."""
    assert not interactive()
    ipython: Any = ModuleType("IPython")
    ipython.get_ipython = lambda: SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert interactive() is expected
    ipython.get_ipython = lambda: None  # imported by a script
    assert not interactive()


def test_no_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    assert not interactive()
    with progress_bar(3, "steps") as bar:
        bar.update()
