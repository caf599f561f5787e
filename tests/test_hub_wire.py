"""A hub that lies, breaks off or hides: the real client's settings and cache, our own requests, one process."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from safetensors.torch import save_file

import medgmae
from medgmae.checkpoints import wire
from medgmae.checkpoints.cards import WeightCard, WeightsError
from medgmae.checkpoints.hashes import HashMismatchError
from medgmae.checkpoints.hub import Fetching
from medgmae.checkpoints.opening import open_source
from medgmae.checkpoints.sources import fetch

WEIGHTS = hashlib.shake_256(b"weights").digest(300_000)
CONFIG = {"architecture": "vit_nano_patch8_32", "model_args": {}}
FILES = {"model.safetensors": WEIGHTS, "config.json": json.dumps(CONFIG).encode()}
FILE = "/lab/net/resolve/main/model.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server that this process takes for the hub."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(wire, "BACKOFF", 0.01)
    with HubServer() as server:
        use_endpoint(monkeypatch, server.url)
        yield server


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def how(tmp_path: Path) -> Fetching:
    return Fetching(tmp_path / "cache", progress=False)


def config_path(commit: str) -> str:
    return f"/lab/net/resolve/{commit}/config.json"


# The content


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_bit_never_enters_the_cache(
    hub: HubServer, how: Fetching, monkeypatch: pytest.MonkeyPatch, links: bool, name: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not links)
    commit = hub.add("lab/net", FILES)
    path = {"model.safetensors": FILE, "config.json": config_path(commit)}[name]
    hub.corrupt.add(path)
    for _ in range(2):
        with pytest.raises(HashMismatchError, match="wrong content: expected (sha256|git) .*call again"):
            fetch("hf-hub:lab/net", how)
    assert not list(how.hub_cache.rglob(name))
    hub.corrupt.clear()
    found = fetch("hf-hub:lab/net", how)
    assert found.path.read_bytes() == WEIGHTS
    assert found.path.is_symlink() == links
    assert found.config == CONFIG


@pytest.mark.parametrize("links", [True, False])
def test_a_changed_bit_in_the_cache_is_found(
    hub: HubServer, how: Fetching, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not links)
    source = f"hf-hub:lab/net@{hub.add('lab/net', FILES)}"
    path = fetch(source, how).path
    requests = len(hub.log)
    assert fetch(source, how).path == path
    assert hub.log[requests:] == []  # a commit in the cache needs no request, without links neither
    path.write_bytes(bytes([WEIGHTS[0] ^ 1]) + WEIGHTS[1:])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HashMismatchError, match="the file was removed, call again"):
        fetch(source, how)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert fetch(source, how).path.read_bytes() == WEIGHTS


def test_what_the_client_has_cached_without_links_is_checked(
    hub: HubServer, how: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    commit = hub.add("lab/net", FILES)
    path = Path(hf_hub_download("lab/net", "model.safetensors", cache_dir=how.hub_cache, revision=commit))
    path.write_bytes(bytes([WEIGHTS[0] ^ 1]) + WEIGHTS[1:])
    with pytest.raises(HashMismatchError, match="the file was removed, call again"):
        fetch(f"hf-hub:lab/net@{commit}", how)


def test_the_client_finds_what_we_have_cached(hub: HubServer, how: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir, try_to_load_from_cache

    hub.add("lab/net", FILES)
    path = fetch("hf-hub:lab/net", how).path
    assert try_to_load_from_cache("lab/net", "model.safetensors", cache_dir=how.hub_cache) == str(path)
    gets = len(hub.requests("GET"))
    assert hf_hub_download("lab/net", "model.safetensors", cache_dir=how.hub_cache) == str(path)
    assert len(hub.requests("GET")) == gets
    report = scan_cache_dir(how.hub_cache)
    assert not report.warnings
    assert {file.file_name for repo in report.repos for rev in repo.revisions for file in rev.files} == set(FILES)


def test_damage_without_an_announced_hash_can_be_fetched_again(hub: HubServer, how: Fetching, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "good.safetensors")
    content = (tmp_path / "good.safetensors").read_bytes()
    hub.add("lab/net", {"model.safetensors": content})
    hub.headers[FILE] = {"ETag": '"version-1"'}
    hub.corrupt.add(FILE)
    options: dict[str, Any] = {"cache_dir": how.cache_dir, "progress": False}
    with pytest.raises(WeightsError, match="if the download was damaged, force_download=True fetches it again"):
        open_source("hf-hub:lab/net", **options)
    hub.corrupt.clear()
    opened = open_source("hf-hub:lab/net", force_download=True, **options)
    assert torch.equal(opened.checkpoint.state["a"], torch.zeros(3))
    assert open_source("hf-hub:lab/net", **options).checkpoint.state


# The config


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_config_that_cannot_be_asked_for_is_not_absent(hub: HubServer, how: Fetching, status: int) -> None:
    commit = hub.add("lab/net", FILES)
    hub.status[config_path(commit)] = [status] * 5
    with pytest.raises(WeightsError, match=f"config.json: .*{hub.url} does not serve it .*{status}"):
        fetch("hf-hub:lab/net", how)
    hub.status.clear()
    assert fetch("hf-hub:lab/net", how).config == CONFIG


def test_a_config_that_is_not_in_the_cache_is_not_absent(
    hub: HubServer, how: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    commit = hub.add("lab/net", FILES)
    hf_hub_download("lab/net", "model.safetensors", cache_dir=how.hub_cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for source in ("hf-hub:lab/net", f"hf-hub:lab/net@{commit}"):
        with pytest.raises(WeightsError, match="config.json: not in the cache, and HF_HUB_OFFLINE is set"):
            fetch(source, how)


def test_a_config_that_the_hub_denies_stays_absent_offline(
    hub: HubServer, how: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("lab/net", {"model.safetensors": WEIGHTS})
    assert fetch("hf-hub:lab/net", how).config is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("hf-hub:lab/net", how).config is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}".encode("utf-16"), "not UTF-8"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\0" * 50, "not valid JSON"),
        (b"[]", "should be a JSON object, got list"),
        (b"null", "should be a JSON object, got NoneType"),
    ],
)
def test_configs_that_are_none(hub: HubServer, how: Fetching, tmp_path: Path, content: bytes, message: str) -> None:
    hub.add("lab/net", {"model.safetensors": WEIGHTS, "config.json": content})
    with pytest.raises(WeightsError, match=rf"{message}.*force_download=True fetches it again"):
        fetch("hf-hub:lab/net", how)
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        open_source(tmp_path)


def test_a_config_with_a_byte_order_mark(hub: HubServer, how: Fetching) -> None:
    hub.add("lab/net", {**FILES, "config.json": b"\xef\xbb\xbf" + FILES["config.json"]})
    assert fetch("hf-hub:lab/net", how).config == CONFIG


def test_a_grid_that_contradicts_the_model(tmp_path: Path) -> None:
    folder = medgmae.save_pretrained(medgmae.create_model("vit_nano_patch8_32"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "grid": [2, 4, 8]}))  # as long as its own, 4 x 4 x 4
    for load in (medgmae.create_model, lambda name: medgmae.load_pretrained(model, name)):
        model = medgmae.create_model("vit_nano_patch8_32")
        with pytest.raises(WeightsError, match=r"grid is \[2, 4, 8\].* \[4, 4, 4\]"):
            load(f"local-dir:{folder}")


# Names


@pytest.mark.parametrize(
    "source",
    [
        "lab/net:../x.safetensors",
        "lab/net:a/../../x.safetensors",
        "lab/net:/etc/passwd",
        "lab/net:a//b",
        "lab/net:a\\..\\b",
        "lab/net@../../x",
        "lab/net@refs/../../x",
        "lab/..",
        "../net",
        "lab/net\0",
        "lab/net:\x1b[2J",
        "läb/net",
    ],
)
def test_names_that_lead_elsewhere(hub: HubServer, how: Fetching, source: str) -> None:
    with pytest.raises(WeightsError, match=r"is not the name of a|not the name of a repository"):
        fetch(f"hf-hub:{source}", how)
    assert hub.log == []


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
@pytest.mark.parametrize("value", ["../../../../evil", "..", "/tmp/evil", "a/b", "a" * 300, "", "a\\b"])
def test_headers_that_lead_elsewhere(hub: HubServer, how: Fetching, header: str, value: str, tmp_path: Path) -> None:
    hub.add("lab/net", FILES)
    hub.headers[FILE] = {header: f'"{value}"' if header != "X-Repo-Commit" else value}
    if header == "X-Linked-Etag" and not value:
        hub.headers[FILE]["ETag"] = ""
    with pytest.raises(WeightsError, match="not what a hub sends; check HF_ENDPOINT"):
        fetch("hf-hub:lab/net", how)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_another_commit_than_the_pinned_one(hub: HubServer, how: Fetching) -> None:
    commit = hub.add("lab/net", FILES)
    hub.headers[f"/lab/net/resolve/{commit}/model.safetensors"] = {"X-Repo-Commit": "f" * 40}
    with pytest.raises(WeightsError, match=f"answers with another commit, {'f' * 40}"):
        fetch(f"hf-hub:lab/net@{commit}", how)


def test_folders_in_the_place_of_files(hub: HubServer, how: Fetching, tmp_path: Path) -> None:
    commit = hub.add("lab/net", FILES)
    repo = how.hub_cache / "models--lab--net"
    etag = hashlib.sha256(WEIGHTS).hexdigest()
    for place in (f"snapshots/{commit}/model.safetensors", f"blobs/{etag}", f"blobs/{etag}.incomplete"):
        (repo / place).mkdir(parents=True)
        with pytest.raises(WeightsError, match="a folder stands where a file is expected"):
            fetch("hf-hub:lab/net", how)
        (repo / place).rmdir()
    card = WeightCard("vit_x.y", url=f"{hub.url}/big.pth", md5="0" * 32)
    (how.root / "url" / ("0" * 16) / "big.pth").mkdir(parents=True)
    with pytest.raises(WeightsError, match="a folder stands where a file is expected"):
        fetch(card, how)
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(WeightsError, match="a folder stands where a file is expected"):
        open_source(tmp_path)


def test_a_token_that_is_none(hub: HubServer, how: Fetching) -> None:
    hub.add("lab/net", FILES)
    for token in ("hf_a\nX-Evil: 1", "hf_ä"):
        with pytest.raises(WeightsError, match=r"token= holds characters") as caught:
            fetch("hf-hub:lab/net", Fetching(how.cache_dir, token=token))
        assert token not in str(caught.value)
    assert hub.log == []


# The connection


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
        with pytest.raises(WeightsError, match="the server redirects from http to .*, which is not followed"):
            fetch(source, how)


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


@pytest.mark.parametrize("surplus", ["longer", "shorter", "elsewhere"])
def test_answers_of_another_length_or_place(hub: HubServer, how: Fetching, surplus: str) -> None:
    hub.add("lab/net", FILES)
    if surplus == "elsewhere":
        hub.resets[FILE] = [1000]
        hub.headers[FILE] = {"Content-Range": "bytes 0-299999/300000"}
        message = "continues at another place"
    else:
        hub.headers[FILE] = {"X-Linked-Size": "10" if surplus == "longer" else "400000"}
        message = r"the server sends 300000 bytes of a file of (10|400000)"
    with pytest.raises(WeightsError, match=message):
        fetch("hf-hub:lab/net", how)


def blackhole() -> socket.socket:
    """A port that takes no further connection: what is sent there gets no answer."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    listener.waiting = [socket.socket() for _ in range(4)]  # type: ignore[attr-defined]
    for client in listener.waiting:  # type: ignore[attr-defined]
        client.setblocking(False)
        client.connect_ex(listener.getsockname())
    return listener


@pytest.mark.parametrize("kind", ["refused", "blackhole", "silent", "unknown name", "slow name"])
def test_hosts_that_do_not_answer(how: Fetching, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    listener = blackhole() if kind == "blackhole" else socket.socket()
    if kind == "silent":
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
    port = listener.getsockname()[1] if kind in ("silent", "blackhole") else 9
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
    listener.close()


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


# Weights in several files


def shards(folder: Path, model: torch.nn.Module) -> Path:
    """A saved model, its weights split over two files."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = sorted(state)
    medgmae.save_pretrained(model, folder)
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + (i > 5)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_weights_in_several_files(
    hub: HubServer, how: Fetching, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = medgmae.create_model("vit_nano_patch8_32", num_classes=3)
    folder = shards(tmp_path / "saved", model)
    hub.add("lab/net", {path.name: path.read_bytes() for path in folder.iterdir()})
    options: dict[str, Any] = {"cache_dir": how.cache_dir, "progress": False}
    for source in (f"local-dir:{folder}", "hf-hub:lab/net"):
        again = medgmae.create_model(source, **options)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    index = folder / "model.safetensors.index.json"
    medgmae.load_pretrained(medgmae.create_model("vit_nano_patch8_32", num_classes=3), index)
    assert medgmae.inspect_checkpoint(folder)["tensors"] == len(model.state_dict())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    medgmae.create_model("hf-hub:lab/net", **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(extra="model-00001-of-00002.safetensors"), r"missing there \['extra'\]"),
        (lambda m: m.pop("cls_token"), r"not in the index \['cls_token'\]"),
        (lambda m: m.update(cls_token="../x.safetensors"), "expected safetensors files beside the index"),
        (lambda m: m.update(cls_token="/etc/passwd"), "expected safetensors files beside the index"),
        (lambda m: m.update(cls_token="x.pth"), "expected safetensors files beside the index"),
        (lambda m: m.update(cls_token="gone.safetensors"), "gone.safetensors"),
        (lambda m: m.update(cls_token=3), "expected a 'weight_map'"),
        (lambda m: m.clear(), "expected a 'weight_map'"),
        (lambda m: m.update({f"t{i}": f"{i}.safetensors" for i in range(2000)}), "names 2002 files"),
    ],
)
def test_indices_that_do_not_fit(hub: HubServer, how: Fetching, tmp_path: Path, change: Any, message: str) -> None:
    folder = shards(tmp_path / "saved", medgmae.create_model("vit_nano_patch8_32"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    hub.add("lab/net", {path.name: path.read_bytes() for path in folder.iterdir()})
    for source in (f"local-dir:{folder}", "hf-hub:lab/net"):
        with pytest.raises(WeightsError, match=message):
            open_source(source, cache_dir=how.cache_dir, progress=False)
    assert os.listdir(tmp_path) == ["saved"] or set(os.listdir(tmp_path)) == {"saved", "cache"}
