"""Settings for every test: no network, no use of the developer's caches, one kind of randomness."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

# Read once, when the libraries are imported: so set before anything else. A test that talks to a server starts its own
# and a fresh process, or passes `endpoint`.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="medgmae-hf-home-")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["MPLBACKEND"] = "Agg"
for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"):
    os.environ.pop(name, None)
# A background job of a shell inherits it ignored, and hands that on to every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Ten thousand tests and the libraries they import live to the end: to search them for circles is half of the time
# that collecting takes, and later most of every search. So it begins after them.
gc.disable()
atexit.register(gc.unfreeze)  # extension modules report what is left at the end

import pytest
import torch
from hub_server import HubServer, use_endpoint

from medgmae.checkpoints import wire
from medgmae.checkpoints.hub import Fetching

ROOT = Path(__file__).parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let `--fixtures DIR` name the folder of parity fixtures (SYSTEM/NAME.json with NAME.safetensors beside it).

    pytest has a flag of that name, which lists its fixtures. It still does where no folder of JSON files follows.
    """
    folders = [arg for arg in config.args if Path(arg).is_dir() and any(Path(arg).glob("*/*.json"))]
    if config.option.showfixtures and folders:
        config.option.showfixtures = False
        config.args = [arg for arg in config.args if arg not in folders]
        config.option.fixtures_dir = Path(folders[-1]).resolve()
    elif not hasattr(config.option, "fixtures_dir"):
        config.option.fixtures_dir = ROOT / "tests/fixtures"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests or torch.cuda.is_available():
        return
    from medgmae.ops import native_info

    cuda = native_info().get("cuda") or {}
    reason = f"no CUDA device; the driver says: {cuda.get('driver_error') or 'nothing, the CUDA half is not built'}"
    for item in gpu_tests:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def fixtures_dir(request: pytest.FixtureRequest) -> Path:
    """The folder that --fixtures named; while tests are collected it is `config.option.fixtures_dir`."""
    return request.config.option.fixtures_dir


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """Give every test the same random numbers, whatever ran before it."""
    with torch.random.fork_rng():
        # Where no GPU is to be seeded, torch.manual_seed takes half a millisecond to note a stack trace for later.
        (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server that this process takes for the hub."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(wire, "BACKOFF", 0.01)
    with HubServer() as server:
        use_endpoint(monkeypatch, server.url)
        yield server


@pytest.fixture
def how(tmp_path: Path) -> Fetching:
    """Into a cache of the test's own."""
    return Fetching(tmp_path / "cache", progress=False)
