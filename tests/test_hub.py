"""The Hugging Face hub, with the real client and a real server.

Each client is a process of its own, because huggingface_hub reads its settings once, when it is imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_client import run_client, start_client
from hub_server import TOKEN, HubServer

import medgmae
from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.saving import push_to_hub

WEIGHTS = hashlib.shake_256(b"weights").digest(200_000)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
FILES = {"model.safetensors": WEIGHTS, "config.json": b'{"architecture": "vit_nano_patch8_32", "model_args": {}}'}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def test_pinned_revision_is_fetched_once(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("lab/net", FILES)
    hub.add("lab/net", {"model.safetensors": b"a later edition"})
    code = f"""
found = fetch("hf-hub:lab/net@{commit}")
out["config"], out["weights"] = found.config, open(found.path, "rb").read().hex()
"""
    first = run_client(code, hub, tmp_path)
    assert bytes.fromhex(first["weights"]) == WEIGHTS
    assert first["config"] == json.loads(FILES["config.json"])
    requests = len(hub.log)
    assert run_client(code, hub, tmp_path) == first
    assert hub.log[requests:] == []


def test_branch_is_asked_for_once_and_brings_its_own_config(hub: HubServer, tmp_path: Path) -> None:
    hub.add("lab/net", FILES)
    code = """
found = fetch("hf-hub:net", Fetching(hub_org="lab"))
out["config"], out["path"] = found.config, str(found.path)
"""
    first = run_client(code, hub, tmp_path)
    requests = len(hub.log)
    assert run_client(code, hub, tmp_path) == first
    assert hub.log[requests:] == [("HEAD", "/lab/net/resolve/main/model.safetensors", None)]
    hub.add("lab/net", {"config.json": b'{"architecture": "new"}'})
    assert run_client(code, hub, tmp_path)["config"] == {"architecture": "new"}


def test_repository_without_config(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("lab/net", {"deep/er.safetensors": WEIGHTS})
    code = f'out["config"] = fetch("hf-hub:lab/net@{commit}:deep/er.safetensors").config'
    assert run_client(code, hub, tmp_path) == {"config": None}
    requests = len(hub.log)
    assert run_client(code, hub, tmp_path) == {"config": None}
    assert hub.log[requests:] == []


def test_offline(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("lab/net", FILES)
    hub.add("lab/other", FILES)
    run_client('fetch("hf-hub:lab/net")', hub, tmp_path)
    requests = len(hub.log)
    code = f"""
out["pinned"] = attempt(fetch, "hf-hub:lab/net@{commit}")
out["branch"] = attempt(fetch, "hf-hub:lab/net")
out["miss"] = attempt(fetch, "hf-hub:lab/other")
"""
    out = run_client(code, hub, tmp_path, HF_HUB_OFFLINE="1")
    assert hub.log[requests:] == []
    assert out["pinned"].startswith("FetchedFile")
    assert out["branch"] == out["pinned"]
    assert "hf-hub:lab/other@main:model.safetensors: not in the cache, and HF_HUB_OFFLINE is set" in out["miss"]


def test_force_download_asks_the_hub_again(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("lab/net", FILES)
    code = f"""
found = fetch("hf-hub:lab/net@{commit}", Fetching(force_download=True))
out["weights"], out["config"] = open(found.path, "rb").read().hex(), found.config
"""
    for _ in range(2):
        out = run_client(code, hub, tmp_path)
        assert bytes.fromhex(out["weights"]) == WEIGHTS
        assert out["config"] == json.loads(FILES["config.json"])
    assert len(hub.requests("GET", "model.safetensors")) == 2
    assert len(hub.requests("GET", "config.json")) == 2
    code = f'out["text"] = attempt(fetch, "hf-hub:lab/net@{commit}", Fetching(force_download=True))'
    text = run_client(code, hub, tmp_path, HF_HUB_OFFLINE="1")["text"]
    assert "force_download=True needs a connection, and HF_HUB_OFFLINE is set" in text


def test_load_pretrained_takes_the_token_that_its_message_asks_for(hub: HubServer, tmp_path: Path) -> None:
    folder = medgmae.save_pretrained(tiny(), tmp_path / "saved")
    hub.add("lab/private", {path.name: path.read_bytes() for path in folder.iterdir()}, private=True)
    code = f"""
import medgmae
model = medgmae.create_model("vit_nano_patch8_32")
out["refused"] = attempt(medgmae.load_pretrained, model, "hf-hub:lab/private")
out["loaded"] = len(medgmae.load_pretrained(model, "hf-hub:lab/private", token="{TOKEN}", progress=False).loaded)
"""
    out = run_client(code, hub, tmp_path / "home")
    assert "or pass token=" in out["refused"]
    assert out["loaded"] == len(tiny().state_dict())


def test_interrupted_download(hub: HubServer, tmp_path: Path) -> None:
    hub.add("lab/net", FILES)
    hub.cut["/lab/net/resolve/main/model.safetensors"] = 100_000
    code = 'out["weights"] = open(fetch("hf-hub:lab/net").path, "rb").read().hex()'
    assert bytes.fromhex(run_client(code, hub, tmp_path)["weights"]) == WEIGHTS
    assert len(hub.requests("GET", "model.safetensors")) == 2


def test_corrupted_download_is_refused_and_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    hub.add("lab/net", FILES)
    hub.corrupt.add("/lab/net/resolve/main/model.safetensors")
    code = 'out["found"] = attempt(fetch, "hf-hub:lab/net")'
    found = run_client(code, hub, tmp_path)["found"]
    assert found.startswith("HashMismatchError: hf-hub:lab/net@main: ")
    assert f"wrong content: expected sha256 {SHA256}, found " in found
    assert "the file was removed, call again" in found
    hub.corrupt.clear()
    assert run_client(code, hub, tmp_path)["found"].startswith("FetchedFile")


def test_card_decides_what_is_right(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("medgmae/net", FILES)
    hub.files["/official.pth"] = WEIGHTS
    card = f'hub={{"repo": "net", "revision": "{commit}", "file": "model.safetensors"}}'
    url = f'url="{hub.url}/official.pth", md5="{hashlib.md5(WEIGHTS).hexdigest()}"'
    code = f"""
out["right"] = attempt(fetch, WeightCard("vit_x.y", {card}, sha256="{SHA256}"))
out["wrong"] = attempt(fetch, WeightCard("vit_x.y", {card}, sha256="{"0" * 64}", {url}))
out["other_org"] = attempt(fetch, WeightCard("vit_x.y", {card}, sha256="{SHA256}"), Fetching(hub_org="mine"))
out["url"] = attempt(fetch, WeightCard("vit_x.y", {card}, sha256="{SHA256}", {url}), Fetching(hub_org="mine"))
"""
    out = run_client(code, hub, tmp_path)
    assert out["right"].startswith("FetchedFile")
    assert f"expected sha256 {'0' * 64}, found {SHA256}" in out["wrong"]
    assert "hf-hub:mine/net@" in out["other_org"]
    assert "no such repository" in out["other_org"]
    assert "official.pth" in out["url"]


def test_refusals_say_what_to_do(hub: HubServer, tmp_path: Path) -> None:
    hub.add("lab/private", FILES, private=True)
    hub.add("lab/gated", FILES, gated=True)
    hub.add("lab/net", FILES)
    hub.status["/lab/broken/resolve/main/model.safetensors"] = [403]
    pinned = f"lab/net@{'f' * 40}"
    sources = ["lab/none", "lab/private", "lab/gated", "lab/net@v9", pinned, "lab/net:x.bin", "lab/broken"]
    code = f"""
for source in {sources}:
    out[source] = attempt(fetch, "hf-hub:" + source)
out["token"] = attempt(fetch, "hf-hub:lab/private", Fetching(token="{TOKEN}"))
"""
    out = run_client(code, hub, tmp_path)
    for source in sources:
        assert out[source].startswith(f"WeightsError: hf-hub:{source.split('@')[0].split(':')[0]}@")
    for source in ("lab/none", "lab/private"):
        assert f"no such repository on {hub.url}, or no access to it; check the name; if it is private" in out[source]
    assert f"the repository is gated; accept its terms on {hub.url}/lab/gated, then log in" in out["lab/gated"]
    assert "no such revision; give a branch, a tag or a commit" in out["lab/net@v9"]
    assert "no such revision" in out[pinned]
    assert "no such file; name another file as 'hf-hub:org/repo@revision:file'" in out["lab/net:x.bin"]
    assert f"{hub.url} does not serve it (403 Forbidden" in out["lab/broken"]
    assert out["token"].startswith("FetchedFile")


def test_read_only_cache(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("lab/net", FILES)
    run_client(f'fetch("hf-hub:lab/net@{commit}")', hub, tmp_path)
    shutil.rmtree(tmp_path / "medgmae")
    folders = [tmp_path, *(folder for folder in tmp_path.rglob("*") if folder.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    hub.add("lab/other", FILES)
    code = f"""
obey_file_modes()
out["hit"] = attempt(fetch, "hf-hub:lab/net@{commit}")
out["branch"] = attempt(fetch, "hf-hub:lab/net")
out["miss"] = attempt(fetch, "hf-hub:lab/other")
"""
    try:
        out = run_client(code, hub, tmp_path)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert out["hit"].startswith("FetchedFile")
    assert out["branch"] == out["hit"]
    assert "cannot write (Permission denied); set HF_HOME, or pass cache_dir=" in out["miss"]


def test_two_processes_at_once(hub: HubServer, tmp_path: Path) -> None:
    hub.add("lab/net", FILES)
    hub.delay = 0.5
    code = 'out["weights"] = open(fetch("hf-hub:lab/net").path, "rb").read().hex()'
    clients = [start_client(code, hub, tmp_path) for _ in range(2)]
    assert [bytes.fromhex(client.finish()["weights"]) for client in clients] == [WEIGHTS, WEIGHTS]


def test_cache_dir_holds_everything(hub: HubServer, tmp_path: Path) -> None:
    hub.add("lab/net", FILES)
    mine = tmp_path / "mine"
    run_client(f'fetch("hf-hub:lab/net", Fetching("{mine}"))', hub, tmp_path / "home")
    assert {path.name for path in mine.iterdir()} == {"hub", "verified"}
    assert not (tmp_path / "home" / "hub").exists()
    assert not (tmp_path / "home" / "medgmae").exists()


def tiny(**overrides: object) -> torch.nn.Module:
    return medgmae.create_model("vit_nano_patch8_32", **overrides)


def test_pushed_model_comes_back(hub: HubServer, tmp_path: Path) -> None:
    code = f"""
import torch, medgmae
torch.manual_seed(0)
model = medgmae.create_model("vit_nano_patch8_32", num_classes=3, in_chans=2)
out["refused"] = attempt(medgmae.push_to_hub, model, "lab/net")
out["address"] = medgmae.push_to_hub(model, "lab/net", token="{TOKEN}")
out["again"] = medgmae.push_to_hub(model, "lab/net", token="{TOKEN}", revision="next")
revision = out["address"].rpartition("/")[2]
back = medgmae.create_model(f"hf-hub:lab/net@{{revision}}")
out["equal"] = [list(back.state_dict()) == list(model.state_dict()),
                *(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values()))]
other = medgmae.create_model("vit_nano_patch8_32", in_chans=2, pretrained="hf-hub:lab/net@next")
out["encoder"] = torch.equal(other.blocks[1].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight)
out["config"] = [back.config["model_args"], back.num_classes]
out["own"] = medgmae.push_to_hub(model, "net", token="{TOKEN}", private=True, commit_message="first")
out["stranger"] = attempt(fetch, "hf-hub:me/net", Fetching(token=False))
from huggingface_hub import ModelCard
card = ModelCard.load("lab/net")
out["card"], out["text"] = card.data.to_dict(), card.text
"""
    out = run_client(code, hub, tmp_path)
    assert "hf auth login" in out["refused"]
    assert "lab/net" in hub.repos
    commit = hub.repos["lab/net"].refs["main"]
    assert out["address"] == f"{hub.url}/lab/net/tree/{commit}"
    assert set(hub.repos["lab/net"].commits[commit]) == {"model.safetensors", "config.json", "README.md"}
    assert out["again"].endswith(hub.repos["lab/net"].refs["next"])
    assert all(out["equal"])
    assert out["encoder"]
    assert out["config"] == [{"num_classes": 3, "in_chans": 2}, 3]
    assert out["card"]["library_name"] == "medgmae"
    assert out["card"]["pipeline_tag"] == "image-classification"
    assert 'create_model("hf-hub:lab/net")' in out["text"]
    assert out["own"].startswith(f"{hub.url}/me/net/tree/")
    assert hub.repos["me/net"].private
    assert "no access to it" in out["stranger"]


def test_push_without_a_model_of_ours() -> None:
    with pytest.raises(
        WeightsError,
        match=r"Linear is not a model of this library and has no \.config with 'architecture' and 'model_args'",
    ):
        push_to_hub(torch.nn.Linear(2, 2), "lab/net")


def official_state() -> dict[str, torch.Tensor]:
    """Random weights under the names that TANGERINE's pre-training gives them, for the nano sizes."""
    state = {}
    for prefix, blocks, width in (("", 2, 48), ("decoder_", 1, 24)):
        state[f"{prefix}pos_embed"] = torch.randn(1, 65, width)
        for i in range(blocks):
            block = f"{prefix}blocks.{i}."
            for name, out_dim, in_dim in (
                ("attn.qkv", 3, 1),
                ("attn.proj", 1, 1),
                ("mlp.fc1", 4, 1),
                ("mlp.fc2", 1, 4),
            ):
                state[f"{block}{name}.weight"] = torch.randn(out_dim * width, in_dim * width)
                state[f"{block}{name}.bias"] = torch.randn(out_dim * width)
        for name in [f"{prefix}blocks.{i}.norm{j}" for i in range(blocks) for j in (1, 2)] + [f"{prefix}norm"]:
            state |= {f"{name}.weight": torch.randn(width), f"{name}.bias": torch.randn(width)}
    state |= {"cls_token": torch.randn(1, 1, 48), "mask_token": torch.randn(1, 1, 24)}
    for name, shape in (
        ("patch_embed.proj", (48, 1, 8, 8, 8)),
        ("decoder_embed", (24, 48)),
        ("decoder_pred.0", (512, 24)),
    ):
        state |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    return state


def test_official_file_behind_an_address(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state = official_state()
    torch.save({"model": state, "epoch": 399, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "official.pth")
    content = hub.files["/files/official.pth"] = (tmp_path / "official.pth").read_bytes()
    card = medgmae.WeightCard(
        "vit_nano_patch8_32.official",
        {"global_pool": "token_avg"},
        url=f"{hub.url}/files/official.pth?download=1",
        md5=hashlib.md5(content).hexdigest(),
    )
    model = tiny(global_pool="token_avg")
    medgmae.load_pretrained(model, card, cache_dir=tmp_path / "cache", progress=False)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"])
    assert torch.equal(model.pos_embed, state["pos_embed"][:, 1:])
    assert torch.equal(model.cls_token, state["cls_token"] + state["pos_embed"][:, :1])
    whole = medgmae.create_model("mae_vit_nano_patch8_32", sigmoid=True)
    report = medgmae.load_pretrained(whole, card, cache_dir=tmp_path / "cache")
    assert torch.equal(whole.decoder.head.weight, state["decoder_pred.0.weight"])
    assert not report.missing
    assert hub.requests("GET") == [("GET", "/files/official.pth", None)]
