"""Client processes for tests of the hub, each with settings of its own: huggingface_hub reads them when it is imported.

They are forked from a server that has imported torch and our package and nothing else; so this module, which they
import too, must not lead to huggingface_hub.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hub_server import HubServer

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["medgmae", "medgmae.checkpoints.sources"])

# Start of every client: `out` is what the test gets back; `attempt` gives an error's text, not the error.
_PRELUDE = """
import ctypes, os, sys
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


class Client:
    """A process that runs ``code`` after the prelude, with the environment ``env``."""

    def __init__(self, code: str, env: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.process = _CONTEXT.Process(target=_run, args=(code, env, self._folder.name), daemon=True)
        self.process.start()

    def finish(self) -> dict[str, Any]:
        """What the process put into ``out``; its error output fails the test if it failed."""
        with self._folder:
            self.process.join(240)
            said = Path(self._folder.name, "said").read_text()
            assert self.process.exitcode == 0, said
            out: dict[str, Any] = json.loads(Path(self._folder.name, "out.json").read_text())
        self.process.close()
        return out

    def kill(self) -> None:
        """End the process as the system would, without a chance to clean up."""
        self.process.kill()
        self.process.join()
        self._folder.cleanup()


def _run(code: str, env: dict[str, str], folder: str) -> None:
    said = os.open(Path(folder, "said"), os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.clear()
    os.environ.update(env)
    warnings.simplefilter("error", ResourceWarning)
    names: dict[str, Any] = {"out": {}}
    try:
        if "huggingface_hub" in sys.modules:
            raise RuntimeError("huggingface_hub is imported already and has read other settings")
        exec(_PRELUDE + code, names)
        Path(folder, "out.json").write_text(json.dumps(names["out"]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        raise SystemExit(1) from None


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
