"""A hub that lies about contents, configs and names: with the real client's settings and cache, in one process."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import CONFIG, FILE, FILES, WEIGHTS, HubServer
from huggingface_hub import constants
from safetensors.torch import save_file

import medgmae
from medgmae.checkpoints.cards import WeightCard, WeightsError
from medgmae.checkpoints.hashes import HashMismatchError
from medgmae.checkpoints.hub import Fetching
from medgmae.checkpoints.opening import open_source
from medgmae.checkpoints.sources import fetch


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
        with pytest.raises(HashMismatchError, match=r"wrong content: expected (sha256|git) .*call again"):
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
        with pytest.raises(WeightsError, match=r"config\.json: not in the cache, and HF_HUB_OFFLINE is set"):
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
    message = r"the config's grid is \[2, 4, 8\], its model_args make \[4, 4, 4\]"
    with pytest.raises(WeightsError, match=message):
        medgmae.create_model(f"local-dir:{folder}")
    with pytest.raises(WeightsError, match=message):
        medgmae.load_pretrained(medgmae.create_model("vit_nano_patch8_32"), folder)


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
