"""Where the hub and its cache are said to be: endpoints, proxies, addresses of version 6, disks, locks."""

from __future__ import annotations

import hashlib
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hub_client import run_client, start_client
from hub_server import CONFIG, FILES, WEIGHTS, HubServer, use_endpoint
from huggingface_hub.utils import set_client_factory
from huggingface_hub.utils._http import default_client_factory

import medgmae
from medgmae.checkpoints import download, wire
from medgmae.checkpoints.cards import WeightCard, WeightsError
from medgmae.checkpoints.hub import Fetching
from medgmae.checkpoints.saving import push_to_hub
from medgmae.checkpoints.sources import fetch

MD5 = hashlib.md5(WEIGHTS).hexdigest()


def card(hub: HubServer) -> WeightCard:
    hub.files["/big.pth"] = WEIGHTS
    return WeightCard("vit_x.y", url=f"{hub.url}/big.pth", md5=MD5)


# The endpoint

NO_ADDRESSES = [
    "",
    " ",
    "huggingface.co",
    "localhost:80",
    "file:///tmp",
    "ftp://hub",
    "http://",
    "//hub",
    " http://hub",
]
BROKEN = ["http://[::1", "http://hub:abc", "http://hub:99999", "http://hub?a=b", "http://hub#f", "http://h\nub"]


@pytest.mark.parametrize("endpoint", NO_ADDRESSES + BROKEN)
def test_endpoints_that_are_none(how: Fetching, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    message = r"HF_ENDPOINT is '.*', expected an address such as https://huggingface.co; correct or unset it"
    with pytest.raises(WeightsError, match=message):
        fetch("hf-hub:lab/net", how)
    with pytest.raises(WeightsError, match=message):
        push_to_hub(medgmae.create_model("vit_nano_patch8_32"), "lab/net")


def test_an_endpoint_on_which_the_client_fails_when_it_is_imported(hub: HubServer, tmp_path: Path) -> None:
    code = 'out["text"] = attempt(fetch, "hf-hub:lab/net")'
    assert "HF_ENDPOINT is 'http://[::1'" in run_client(code, hub, tmp_path, HF_ENDPOINT="http://[::1")["text"]


def test_a_password_in_the_endpoint_is_not_shown(how: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@hub.example.org")
    with pytest.raises(WeightsError, match=r"HF_ENDPOINT holds a name or a password; write them into") as caught:
        fetch("hf-hub:lab/net", how)
    assert "secret" not in str(caught.value)


def test_an_endpoint_that_is_no_hub(hub: HubServer, how: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("lab/net", FILES)
    use_endpoint(monkeypatch, f"{hub.url}/hub")
    with pytest.raises(WeightsError, match=r"404 Not Found\); call again later; if it stays so, check HF_ENDPOINT"):
        fetch("hf-hub:lab/net", how)
    use_endpoint(monkeypatch, hub.url.replace("http:", "https:"))
    with pytest.raises(WeightsError, match=r"https://.* does not serve it .*SSL.*gave up"):
        fetch("hf-hub:lab/net", how)


# Proxies


@pytest.fixture
def proxy() -> Iterator[socket.socket]:
    """A place that accepts no connection until it listens, and then says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener


@pytest.mark.parametrize("kind", ["closed", "silent", "unknown", "socks", "no kind"])
def test_proxies_that_do_not_answer(
    how: Fetching, monkeypatch: pytest.MonkeyPatch, proxy: socket.socket, kind: str
) -> None:
    monkeypatch.setattr(wire, "ANSWER", 0.5)
    if kind == "silent":
        proxy.listen(5)
    place = "no-such-proxy.invalid" if kind == "unknown" else "127.0.0.1"
    scheme = {"socks": "socks5", "no kind": "ftp"}.get(kind, "http")
    address = f"{place}:{proxy.getsockname()[1]}"
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HTTPS_PROXY", f"{scheme}://me:secret@{address}")
    use_endpoint(monkeypatch, "https://hub.example.org")
    set_client_factory(default_client_factory)  # a session reads the proxies once
    official = WeightCard("vit_x.y", url="https://files.example.org/big.pth", md5=MD5)
    model = medgmae.create_model("vit_nano_patch8_32")
    for call in (
        lambda: fetch("hf-hub:lab/net", how),
        lambda: fetch(official, how),
        lambda: push_to_hub(model, "lab/net", token="hf_x"),
    ):
        began = time.monotonic()
        with pytest.raises(WeightsError, match=rf"through the proxy {scheme}://{address} \(HTTPS_PROXY") as caught:
            call()
        assert time.monotonic() - began < 5
        assert "secret" not in str(caught.value)
    monkeypatch.undo()
    set_client_factory(default_client_factory)


# Addresses


def test_a_server_with_an_address_of_version_6(how: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "::1")
    with HubServer(host="::1") as hub:
        use_endpoint(monkeypatch, hub.url)
        hub.add("lab/net", FILES)
        assert fetch("hf-hub:lab/net", how).path.read_bytes() == WEIGHTS
        assert fetch(card(hub), how).path.read_bytes() == WEIGHTS
        commit = hub.repos["lab/net"].refs["main"]
        assert hub.requests("HEAD")[-1][1].startswith(f"/lab/net/resolve/{commit}")


@pytest.mark.parametrize("silent", [False, True])
def test_a_name_whose_first_address_does_not_answer(
    hub: HubServer, how: Fetching, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    monkeypatch.setattr(wire, "CONNECT", 0.5)
    hub.add("lab/net", FILES)
    port = int(hub.url.rpartition(":")[2])
    found = socket.getaddrinfo
    kind = (socket.SOCK_STREAM, 6, "")

    def look_up(host: str, *args: object, **options: object) -> list[object]:
        if host != "hub.test":
            return found(host, *args, **options)
        return [(socket.AF_INET6, *kind, ("::1", port, 0, 0)), (socket.AF_INET, *kind, ("127.0.0.1", port))]

    with socket.socket(socket.AF_INET6) as dead:
        dead.bind(("::1", port))
        waiting = [socket.socket(socket.AF_INET6) for _ in range(4 if silent else 0)]
        if silent:
            dead.listen(0)
        for client in waiting:  # with its queue full, the system does not answer those who knock
            client.setblocking(False)
            client.connect_ex(dead.getsockname())
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        monkeypatch.setenv("NO_PROXY", "hub.test")
        use_endpoint(monkeypatch, f"http://hub.test:{port}")
        assert fetch("hf-hub:lab/net", how).config == CONFIG
        for client in waiting:
            client.close()


# The cache


def test_a_file_that_the_system_does_not_let_grow(hub: HubServer, how: Fetching) -> None:
    """As on a full disk: what was written goes on later, and nothing is in the cache that is not whole."""
    hub.add("lab/net", FILES)
    official = card(hub)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        for source in ("hf-hub:lab/net", official):
            with pytest.raises(WeightsError, match=r"cannot write \(File too large\); set HF_HOME, or pass cache_dir="):
                fetch(source, how)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(how.root.rglob("model.safetensors")) + list(how.root.rglob("big.pth"))
    for source in ("hf-hub:lab/net", official):
        assert fetch(source, how).path.read_bytes() == WEIGHTS
    assert [entry[2] for entry in hub.requests("GET") if entry[2]] == ["bytes=100000-"] * 2


def test_caches_that_cannot_be(hub: HubServer, tmp_path: Path) -> None:
    hub.add("lab/net", FILES)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / ("x" * 300), Path("/proc/none")):
        for source in ("hf-hub:lab/net", card(hub)):
            with pytest.raises(WeightsError, match=r"cannot write \(.*\); set HF_HOME, or pass cache_dir="):
                fetch(source, Fetching(place, progress=False))


def test_a_closed_folder_of_the_cache(hub: HubServer, tmp_path: Path) -> None:
    official = card(hub)
    fetch(official, Fetching(tmp_path / "medgmae", progress=False))
    code = f"""
obey_file_modes()
os.chmod("{tmp_path}/medgmae/url", 0)
out["text"] = attempt(fetch, WeightCard("vit_x.y", url="{official.url}", md5="{MD5}"))
"""
    try:
        text = run_client(code, hub, tmp_path)["text"]
    finally:
        (tmp_path / "medgmae/url").chmod(0o755)
    assert "cannot write (Permission denied); set HF_HOME, or pass cache_dir=" in text


def test_a_home_with_spaces_and_a_cache_elsewhere(hub: HubServer, tmp_path: Path) -> None:
    hub.add("lab/net", FILES)
    official = card(hub)
    home, cache = tmp_path / "a home/ünï ☃", tmp_path / "elsewhere"
    code = f"""
out["hub"] = str(fetch("hf-hub:lab/net").path)
out["url"] = str(fetch(WeightCard("vit_x.y", url="{official.url}", md5="{MD5}")).path)
"""
    out = run_client(code, hub, home, HF_HUB_CACHE=str(cache))
    assert Path(out["hub"]).is_relative_to(cache)
    assert Path(out["url"]).is_relative_to(home)
    assert Path(out["hub"]).read_bytes() == Path(out["url"]).read_bytes() == WEIGHTS


# Two processes


def test_the_lock_of_a_killed_process(hub: HubServer, tmp_path: Path) -> None:
    hub.add("lab/net", FILES)
    hub.delay = 30
    client = start_client('fetch("hf-hub:lab/net")', hub, tmp_path)
    end = time.monotonic() + 60
    while not hub.requests("GET") and time.monotonic() < end:
        time.sleep(0.02)
    client.kill()
    hub.delay = 0
    began = time.monotonic()
    assert fetch("hf-hub:lab/net", Fetching(tmp_path, progress=False)).path.read_bytes() == WEIGHTS
    assert list((tmp_path / "hub/.locks").rglob("*.lock"))
    assert time.monotonic() - began < 5


def test_whoever_waits_for_another_process_says_so(
    hub: HubServer, how: Fetching, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(download, "_WAIT", 0.05)
    official = card(hub)
    place = how.root / "url" / MD5[:16] / "big.pth.lock"
    place.parent.mkdir(parents=True)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(place):
            held.set()
            done.wait(0.5)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(10)
    assert fetch(official, how).path.read_bytes() == WEIGHTS
    other.join()
    assert f"{official.url}: another process fetches it, waiting for that ({place})" in caplog.text


def test_a_model_comes_back_after_a_repository_was_renamed(hub: HubServer, how: Fetching, tmp_path: Path) -> None:
    folder = medgmae.save_pretrained(medgmae.create_model("vit_nano_patch8_32"), tmp_path / "saved")
    commit = hub.add("lab/new", {path.name: path.read_bytes() for path in folder.iterdir()})
    for revision in ("main", commit):
        for name in ("model.safetensors", "config.json"):
            path = f"/lab/net/resolve/{revision}/{name}"
            hub.status[path] = [(307, {"Location": path.replace("lab/net", "lab/new")})] * 2
    model = medgmae.create_model("hf-hub:lab/net", cache_dir=how.cache_dir, progress=False)
    assert isinstance(model, torch.nn.Module)
    assert hub.requests("GET", "/lab/new/")
