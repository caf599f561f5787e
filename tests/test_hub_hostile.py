"""Answers of a server that no hub gives: bodies of refusals, parts, names of contents, bytes without end."""

from __future__ import annotations

import gzip
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import warm_python
from hub_server import CONFIG, FILE, FILES, WEIGHTS, HubServer, use_endpoint

from medgmae.checkpoints import wire
from medgmae.checkpoints.cards import WeightCard, WeightsError
from medgmae.checkpoints.hub import Fetching
from medgmae.checkpoints.sources import fetch

JSON = {"Content-Type": "application/json"}
FUZZ = Path(__file__).parent / "fuzz/fuzz_wire.py"


@pytest.mark.parametrize(
    ("headers", "body", "said"),
    [
        (JSON, b"[]", ""),
        (JSON, b'"no"', ""),
        (JSON, b'{"errors": 5, "error": {"a": 1}}', ""),
        (JSON, b"[" * 60_000, ""),
        (JSON, b'{"errors": [{"message": "a reason"}, 1]}', ": a reason"),
        (JSON | {"Content-Encoding": "gzip"}, b"no gzip", ""),
        ({"Content-Type": "text/plain; charset=no-such"}, b"a reason\x1b[2J", r": a reason \[2J"),
        (JSON, b'{"error": "' + b"long " * 50_000 + b'"}', ""),
    ],
)
def test_refusals_with_bodies_of_any_form(
    hub: HubServer, how: Fetching, headers: dict[str, str], body: bytes, said: str
) -> None:
    hub.add("lab/net", FILES)
    hub.status[FILE] = [200, (403, headers, body)]
    commit = hub.repos["lab/net"].refs["main"]
    etag = hashlib.sha256(WEIGHTS).hexdigest()
    hub.status[FILE][0] = (200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "X-Linked-Size": str(len(WEIGHTS))})
    with pytest.raises(WeightsError, match=rf"model.safetensors: .* does not serve it \(403 Forbidden{said}\); log in"):
        fetch("hf-hub:lab/net", how)
    assert fetch("hf-hub:lab/net", how).path.read_bytes() == WEIGHTS


def test_a_compressed_body_of_a_refusal_is_not_unpacked(hub: HubServer, how: Fetching) -> None:
    bomb = gzip.compress(bytes(300 << 20), 1)
    hub.status["/big.pth"] = [(403, {**JSON, "Content-Encoding": "gzip"}, bomb)]
    began = time.process_time()
    with pytest.raises(WeightsError, match="the server answers 403 Forbidden; look at"):
        fetch(WeightCard("vit_x.y", url=f"{hub.url}/big.pth", md5="0" * 32), how)
    assert time.process_time() - began < 0.5


def test_one_etag_for_all_files_does_not_mix_them(hub: HubServer, how: Fetching) -> None:
    commit = hub.add("lab/net", FILES)
    for path in (FILE, f"/lab/net/resolve/{commit}/config.json"):
        hub.headers[path] = {"ETag": 'W/"1"'}
    found = fetch("hf-hub:lab/net", how)
    assert found.path.read_bytes() == WEIGHTS
    assert found.config == CONFIG
    hub.add("lab/net", {"model.safetensors": WEIGHTS[::-1]})  # the branch moves, the ETag stays
    assert fetch("hf-hub:lab/net", how).path.read_bytes() == WEIGHTS[::-1]


def test_a_branch_that_moves_between_two_requests(hub: HubServer, how: Fetching) -> None:
    hub.add("lab/net", FILES)
    hub.headers[FILE] = {"ETag": '"1"'}  # with a hash it would be noticed

    def push(path: str, headers: Any) -> None:
        if len(hub.log) == 2:
            hub.add("lab/net", {"model.safetensors": WEIGHTS[::-1]})

    hub.on_request = push
    found = fetch("hf-hub:lab/net", how)
    assert len(hub.repos["lab/net"].commits) == 2
    assert found.path.read_bytes() == WEIGHTS


def test_a_404_that_is_not_the_hubs_says_nothing_of_a_config(hub: HubServer, how: Fetching) -> None:
    commit = hub.add("lab/net", FILES)
    hub.status[f"/lab/net/resolve/{commit}/config.json"] = [404]
    with pytest.raises(WeightsError, match=r"config.json: .* \(404 Not Found\); call again later; if it stays"):
        fetch("hf-hub:lab/net", how)
    assert fetch("hf-hub:lab/net", how).config == CONFIG


@pytest.mark.parametrize("place", ["bytes 1000-299999/300000", "", "bytes x"])
def test_a_part_that_was_not_asked_for(hub: HubServer, how: Fetching, place: str) -> None:
    hub.add("lab/net", FILES)
    hub.headers[FILE] = {"ETag": '"1"'}
    head = (200, {"X-Repo-Commit": hub.repos["lab/net"].refs["main"], "ETag": '"1"'})
    hub.status[FILE] = [head, *[(206, {"Content-Range": place}, WEIGHTS[1000:])] * 5]
    hub.announce[FILE] = len(WEIGHTS)
    with pytest.raises(WeightsError, match="continues at another place than it was asked to; gave up after 5 attempts"):
        fetch("hf-hub:lab/net", how)


def test_bytes_that_come_compressed(hub: HubServer, how: Fetching) -> None:
    hub.files["/big.pth"] = gzip.compress(WEIGHTS)
    hub.headers["/big.pth"] = {"Content-Encoding": "gzip"}
    with pytest.raises(WeightsError, match=r"compressed \(gzip\), which was not asked for; check whether a proxy"):
        fetch(WeightCard("vit_x.y", url=f"{hub.url}/big.pth", md5="0" * 32), how)


def test_a_date_without_a_zone_is_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        date = datetime.fromtimestamp(time.time() + 60, timezone.utc).strftime("%a, %d %b %Y %H:%M:%S")
        response = type("Response", (), {"headers": {"Retry-After": date}})
        assert wire._retry_after(response) == pytest.approx(60, abs=3)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.fixture
def dripping(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server whose answer, headers or body, comes one byte at a time and does not end."""
    for name in ("CONNECT", "ANSWER", "SOON", "TIMEOUT"):
        monkeypatch.setattr(wire, name, 0.3)
    monkeypatch.setattr(wire, "BACKOFF", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=drip, args=(client,), daemon=True).start()

        def drip(client: socket.socket) -> None:
            asked = client.recv(65536)
            try:
                if b"/body" in asked:
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                    for _ in range(1000):
                        client.sendall(b"x")
                        time.sleep(0.05)
                client.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                for _ in range(1000):
                    client.sendall(b"x")
                    time.sleep(0.05)
            except OSError:
                client.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("head", "did not finish the headers"),
        ("body", "sends fewer than 1000 bytes in 0 seconds|the connection ended at byte"),
    ],
)
def test_a_server_that_drips(dripping: str, how: Fetching, path: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(WeightsError, match=message):
        fetch(WeightCard("vit_x.y", url=f"{dripping}/{path}", md5="0" * 32), how)
    assert time.monotonic() - began < 10  # the drip itself takes 50 seconds


def test_a_standstill_ends_before_the_attempts_do(
    dripping: str, how: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "STALLED", 0.5)
    with pytest.raises(WeightsError, match=r"fewer than 1000 bytes .*gave up after [12] attempts?\."):
        fetch(WeightCard("vit_x.y", url=f"{dripping}/body", md5="0" * 32), how)


def test_waiting_as_the_server_asks_is_no_standstill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "STALLED", 0.5)
    attempts = wire.Attempts(answered=True)
    for _ in range(4):
        attempts.failed(wire.Interrupted("busy", wait=0.2))
    assert attempts.failures == 4


def test_a_hub_that_drips(dripping: str, how: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, dripping)
    with pytest.raises(WeightsError, match="did not finish the headers of its answer"):
        fetch("hf-hub:lab/net", how)


def test_an_index_that_is_damaged_says_what_to_do(hub: HubServer, how: Fetching) -> None:
    index = {"weight_map": {"a": "../x.safetensors"}}
    hub.add("lab/net", {"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(WeightsError, match=r"files beside the index; .* force_download=True fetches"):
        fetch("hf-hub:lab/net", how)


@pytest.mark.parametrize("kind", ["hub", "shards", "url"])
def test_the_fuzzer_of_the_wire_finds_nothing_in_a_short_run(kind: str) -> None:
    """The full run has 10,000 cases of each kind: python tests/fuzz/fuzz_wire.py KIND --count 10000."""
    done = warm_python.run("-W", "ignore", FUZZ, kind, "--count", "4", "--seed", "3", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 findings" in done.stdout
