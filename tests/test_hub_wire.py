"""A hub that breaks off, hides or sends elsewhere: with the real client's settings and cache, in one process."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from hub_client import run_client
from hub_server import FILE, FILES, TOKEN, WEIGHTS, HubServer, use_endpoint
from huggingface_hub import constants

from medgmae.checkpoints import wire
from medgmae.checkpoints.cards import WeightCard, WeightsError
from medgmae.checkpoints.hub import Fetching
from medgmae.checkpoints.sources import fetch


def test_resets_are_survived_and_resumed(hub: HubServer, how: Fetching) -> None:
    hub.add("lab/net", FILES)
    hub.resets[FILE] = [40_000] * 7  # more than attempts without progress
    assert fetch("hf-hub:lab/net", how).path.read_bytes() == WEIGHTS
    ranges = [entry[2] for entry in hub.requests("GET", "model.safetensors")]
    assert ranges == [None, *(f"bytes={n * 40_000}-" for n in range(1, 8))]


def test_resets_without_progress_are_counted(hub: HubServer, how: Fetching) -> None:
    hub.add("lab/net", FILES)
    hub.resets[FILE] = [1000] + [0] * 10
    with pytest.raises(WeightsError, match=r"gave up after 5 attempts. 1000 bytes are kept in .*; call again to go on"):
        fetch("hf-hub:lab/net", how)
    assert len(hub.requests("GET", "model.safetensors")) == 6
    hub.resets.clear()
    assert fetch("hf-hub:lab/net", how).path.read_bytes() == WEIGHTS
    assert hub.requests("GET", "model.safetensors")[-1][2] == "bytes=1000-"


def test_a_server_that_starts_over_each_time_makes_no_progress(hub: HubServer, how: Fetching) -> None:
    hub.add("lab/net", FILES)
    hub.ignore_ranges = True
    hub.resets[FILE] = [1000] * 20
    with pytest.raises(WeightsError, match="gave up after 5 attempts"):
        fetch("hf-hub:lab/net", how)


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_kept(hub: HubServer, how: Fetching, status: int) -> None:
    hub.add("lab/net", FILES)
    hub.status[FILE] = [(status, {"Retry-After": "1"})]
    began = time.monotonic()
    assert fetch("hf-hub:lab/net", how).path.read_bytes() == WEIGHTS
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize("wait", ["100000", "9" * 50, "Fri, 31 Dec 2200 23:59:59 GMT"])
def test_nobody_waits_for_hours(hub: HubServer, how: Fetching, wait: str) -> None:
    hub.add("lab/net", FILES)
    hub.status[FILE] = [(429, {"Retry-After": wait})]
    with pytest.raises(WeightsError, match=r"429 Too Many Requests; the server asks to wait for \d+ seconds"):
        fetch("hf-hub:lab/net", how)


@pytest.mark.parametrize("wait", ["-5", "soon", "٣", "Mon, 01 Jan 1990 00:00:00 GMT"])
def test_waits_that_are_none(hub: HubServer, how: Fetching, wait: str) -> None:
    hub.add("lab/net", FILES)
    hub.status["/big.pth"] = [(503, {"Retry-After": wait.encode().decode("latin-1")})]
    hub.files["/big.pth"] = WEIGHTS
    card = WeightCard("vit_x.y", url=f"{hub.url}/big.pth", md5=hashlib.md5(WEIGHTS).hexdigest())
    assert fetch(card, how).path.read_bytes() == WEIGHTS


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "file:///etc/passwd", "gopher://127.0.0.1/"])
def test_redirects_that_are_not_followed(hub: HubServer, how: Fetching, target: str) -> None:
    hub.add("lab/net", FILES)
    hub.status["/big.pth"] = [(302, {"Location": target})]
    hub.status[FILE] = [(302, {"Location": target})]
    card = WeightCard("vit_x.y", url=f"{hub.url}/big.pth", md5="0" * 32)
    for source in (card, "hf-hub:lab/net"):
        with pytest.raises(WeightsError, match=r"the server redirects from http to .*, which is not followed"):
            fetch(source, how)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_redirects_from_https_to_http(tmp_path: Path) -> None:
    certificate = tmp_path / "certificate.pem"
    asked = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(certificate)]
    subprocess.run(
        ["openssl", "req", *asked, *files, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True
    )
    both = tmp_path / "both.pem"
    both.write_text(certificate.read_text() + (tmp_path / "key.pem").read_text())
    with HubServer() as plain, HubServer(both) as hub:
        plain.files["/big.pth"] = hub.files["/safe.pth"] = WEIGHTS
        hub.add("lab/net", FILES)
        stored = hub.add("lab/store", FILES)
        hub.status["/big.pth"] = [(302, {"Location": f"{plain.url}/big.pth"})]
        hub.status["/lab/net/resolve/main/model.safetensors"] = [(307, {"Location": f"{plain.url}/big.pth"})]
        headers = {"X-Repo-Commit": stored, "X-Linked-Etag": f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'}
        store = (302, {**headers, "X-Linked-Size": "300000", "Location": f"{plain.url}/big.pth"})
        hub.status["/lab/store/resolve/main/model.safetensors"] = [store, store]
        code = f"""
md5 = "{hashlib.md5(WEIGHTS).hexdigest()}"
how = Fetching("{tmp_path}/cache", progress=False)
for name in ("safe", "big"):
    out[name] = attempt(fetch, WeightCard("vit_x.y", url=f"{hub.url}/{{name}}.pth", md5=md5), how)
for repo in ("lab/net", "lab/store"):
    out[repo] = attempt(fetch, f"hf-hub:{{repo}}", how)
"""
        out = run_client(code, hub, tmp_path / "home", SSL_CERT_FILE=str(certificate))
        assert plain.log == []
    assert out.pop("safe").startswith("FetchedFile")
    assert set(out) == {"big", "lab/net", "lab/store"}
    for message in out.values():
        assert "the server redirects from https to http" in message
        assert "which is not followed" in message


@pytest.mark.parametrize("target", ["http://a..b/", f"http://{'a' * 200}/"])
def test_redirects_to_no_address_name_what_was_asked_for(hub: HubServer, how: Fetching, target: str) -> None:
    hub.add("lab/net", FILES)
    hub.status[FILE] = [(302, {"Location": target})] * 10
    with pytest.raises(WeightsError, match=r"to which http://.*/lab/net/resolve/.* leads, cannot be asked for"):
        fetch("hf-hub:lab/net", how)


def test_what_a_redirect_denies_is_not_remembered(hub: HubServer, how: Fetching) -> None:
    commit = hub.add("lab/net", FILES)
    hub.status[FILE] = [(302, {"Location": FILE.replace("model.safetensors", "none")})]
    with pytest.raises(WeightsError, match="no such file"):
        fetch(f"hf-hub:lab/net@{commit}", how)
    assert fetch(f"hf-hub:lab/net@{commit}", how).path.read_bytes() == WEIGHTS


def test_redirects_without_end(hub: HubServer, how: Fetching) -> None:
    hub.status["/big.pth"] = [(302, {"Location": "/big.pth"})] * 100
    with pytest.raises(WeightsError, match="more than 10 redirects"):
        fetch(WeightCard("vit_x.y", url=f"{hub.url}/big.pth", md5="0" * 32), how)


def test_redirect_to_a_store_keeps_the_token_at_home(hub: HubServer, how: Fetching) -> None:
    commit = hub.add("lab/net", FILES, private=True)
    seen: list[tuple[str, str | None]] = []
    with HubServer() as store:
        store.files["/blob"] = WEIGHTS
        store.on_request = lambda path, headers: seen.append((path, headers.get("Authorization")))
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'}
        hub.status[FILE] = [(302, {**headers, "X-Linked-Size": "300000", "Location": f"{store.url}/blob"})] * 2
        found = fetch("hf-hub:lab/net", Fetching(how.cache_dir, token=TOKEN, progress=False))
    assert found.path.read_bytes() == WEIGHTS
    assert seen == [("/blob", None)]


@pytest.mark.parametrize("size", [10, 400_000])
def test_answers_of_another_length(hub: HubServer, how: Fetching, size: int) -> None:
    hub.add("lab/net", FILES)
    hub.headers[FILE] = {"X-Linked-Size": str(size)}
    with pytest.raises(WeightsError, match=f"the server sends 300000 bytes of a file of {size}"):
        fetch("hf-hub:lab/net", how)


def test_an_answer_from_another_place_is_not_appended(hub: HubServer, how: Fetching) -> None:
    hub.add("lab/net", FILES)
    hub.resets[FILE] = [1000]
    hub.headers[FILE] = {"ETag": '"no-hash"', "Content-Range": "bytes 0-299999/300000"}
    assert fetch("hf-hub:lab/net", how).path.read_bytes() == WEIGHTS


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("blackhole", "silent", "slow name")]


@pytest.mark.parametrize("kind", ["refused", "unknown name", *SLOW])
def test_hosts_that_do_not_answer(how: Fetching, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    waiting = [socket.socket() for _ in range(4 if kind == "blackhole" else 0)]
    if kind in ("silent", "blackhole"):
        listener.listen(0 if kind == "blackhole" else 5)
    for client in waiting:  # with its queue full, the system does not answer those who knock
        client.setblocking(False)
        client.connect_ex(listener.getsockname())
    host = "127.0.0.1" if kind in ("silent", "blackhole", "refused") else "no-such-host.invalid"
    if kind == "slow name":
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: time.sleep(30))
    use_endpoint(monkeypatch, f"http://{host}:{port}")
    card = WeightCard("vit_x.y", url=f"http://{host}:{port}/big.pth", md5="0" * 32)
    for source, remedy in (
        (card, "copy the file from a machine that has it to"),
        ("hf-hub:lab/net", "copy that cache"),
    ):
        began = time.monotonic()
        with pytest.raises(WeightsError, match=remedy):
            fetch(source, how)
        assert time.monotonic() - began < (9.5 if kind == "silent" else 5)
    for client in (listener, *waiting):
        client.close()


def test_more_patience_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    before = wire.Attempts().timeout()
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 60)
    after = wire.Attempts().timeout()
    assert (before.connect, before.read) == (4, 8)
    assert (after.connect, after.read) == (24, 48)


def test_the_cache_serves_where_the_hub_cannot_be_asked(
    hub: HubServer, how: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("lab/net", FILES)
    path = fetch("hf-hub:lab/net", how).path
    hub.status[FILE] = [503]
    assert fetch("hf-hub:lab/net", how).path == path
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert fetch("hf-hub:lab/net", how).path == path


def test_tangerine_without_a_network(how: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    from medgmae.checkpoints.cards import weight_card

    card = weight_card("vit_large_patch16_256.tangerine")
    file = how.root / "url" / str(card.md5)[:16] / "tangerine.pth"

    def no_network(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        began = time.monotonic()
        with pytest.raises(WeightsError) as caught:
            fetch(card, how)
        assert time.monotonic() - began < 5
        assert f"or copy the file from a machine that has it to {file}, where it is found" in str(caught.value)
        assert 'pretrained="/path/to/tangerine.pth"' in str(caught.value)
        assert file.parent.is_dir()
