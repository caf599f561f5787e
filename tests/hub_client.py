"""Clients of the hub as processes, each with settings of its own, which huggingface_hub reads when it is imported."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import warm_python

if TYPE_CHECKING:
    from hub_server import HubServer

# Start of every client: `out` is what the test gets back; `attempt` gives an error's text, not the error.
_PRELUDE = """
import ctypes, json, os, sys, warnings
if "huggingface_hub" in sys.modules:
    raise RuntimeError("huggingface_hub is imported already and has read other settings")
warnings.simplefilter("error", ResourceWarning)
out = {}
from medgmae.checkpoints.cards import WeightCard, WeightsError
from medgmae.checkpoints.sources import Fetching, fetch

def attempt(call, *args, **options):
    try:
        return str(call(*args, **options))
    except WeightsError as error:
        return f"{type(error).__name__}: {error}"

def obey_file_modes():  # root may write to read-only folders, unless it gives up this privilege
    if os.geteuid() != 0:
        return
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0, ctypes.get_errno()
    data[0] &= ~0b110  # effective: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, data) == 0, ctypes.get_errno()
"""


_END = """
with open(sys.argv[1], "w") as file:
    json.dump(out, file)
"""


class Client:
    """A process that runs ``code`` after the prelude, with the environment ``env``."""

    def __init__(self, code: str, env: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._said = Path(self._folder.name, "out.json"), Path(self._folder.name, "said")
        with self._said.open("w") as said:
            self.process = warm_python.Process(
                "-c", _PRELUDE + code + _END, self._out, stdout=said, stderr=said, env=env
            )

    def finish(self) -> dict[str, Any]:
        """What the process put into ``out``; its error output fails the test if it failed."""
        with self._folder:
            assert self.process.wait(240) == 0, self._said.read_text()
            out: dict[str, Any] = json.loads(self._out.read_text())
        return out

    def kill(self) -> None:
        self.process.kill()
        self._folder.cleanup()


def start_client(code: str, hub: HubServer, home: Path, **env: str) -> Client:
    """A process of its own that takes ``hub`` for the hub and has its cache in ``home``."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return Client(code, {**kept, **settings, **env})


def run_client(code: str, hub: HubServer, home: Path, **env: str) -> dict[str, Any]:
    """Start a client and wait for it."""
    return start_client(code, hub, home, **env).finish()
