"""The Hugging Face hub, with the real client and a real server.

Each client is a fresh process, because huggingface_hub reads its settings once, when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer, finish_client, run_client, start_client
from safetensors import safe_open
from safetensors.torch import load_file

import medgmae
from medgmae.cards import WeightsError
from medgmae.export import model_config, model_readme, push_to_hub, save_pretrained

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
    code = 'found = fetch("hf-hub:net", hub_org="lab"); out["config"] = found.config; out["path"] = str(found.path)'
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
out["other_org"] = attempt(fetch, WeightCard("vit_x.y", {card}, sha256="{SHA256}"), hub_org="mine")
out["url"] = attempt(fetch, WeightCard("vit_x.y", {card}, sha256="{SHA256}", {url}), hub_org="mine")
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
out["token"] = attempt(fetch, "hf-hub:lab/private", token="{TOKEN}")
"""
    out = run_client(code, hub, tmp_path)
    for source in sources:
        assert out[source].startswith(f"WeightsError: hf-hub:{source.split('@')[0].split(':')[0]}@")
    for source in ("lab/none", "lab/private"):
        assert f"no such repository on {hub.url}, or no right to it; check the name; if it is private" in out[source]
    assert "the repository is gated; accept its terms" in out["lab/gated"]
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
    assert [bytes.fromhex(finish_client(client)["weights"]) for client in clients] == [WEIGHTS, WEIGHTS]


def test_cache_dir_holds_everything(hub: HubServer, tmp_path: Path) -> None:
    hub.add("lab/net", FILES)
    mine = tmp_path / "mine"
    run_client(f'fetch("hf-hub:lab/net", cache_dir="{mine}")', hub, tmp_path / "home")
    assert {path.name for path in mine.iterdir()} == {"hub", "verified"}
    assert not (tmp_path / "home" / "hub").exists()
    assert not (tmp_path / "home" / "medgmae").exists()


def tiny(**overrides: object) -> torch.nn.Module:
    return medgmae.create_model("vit_nano_patch8_32", **overrides)


def same(state: dict[str, torch.Tensor], model: torch.nn.Module) -> bool:
    expected = model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], value) for name, value in expected.items())


def test_pushed_model_comes_back(hub: HubServer, tmp_path: Path) -> None:
    code = f"""
import torch, medgmae
torch.manual_seed(0)
model = medgmae.create_model("vit_nano_patch8_32", num_classes=3, in_chans=2)
out["refused"] = attempt(medgmae.push_to_hub, model, "lab/net")
out["address"] = medgmae.push_to_hub(model, "lab/net", token="{TOKEN}")
out["again"] = medgmae.push_to_hub(model, "lab/net", token="{TOKEN}", revision="next", private=True)
revision = out["address"].rpartition("/")[2]
back = medgmae.create_model(f"hf-hub:lab/net@{{revision}}")
out["equal"] = [list(back.state_dict()) == list(model.state_dict()),
                *(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values()))]
other = medgmae.create_model("vit_nano_patch8_32", in_chans=2, pretrained="hf-hub:lab/net@next")
out["encoder"] = torch.equal(other.blocks[1].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight)
out["config"] = [back.config["model_args"], back.num_classes]
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
    assert out["card"]["pipeline_tag"] == "image-feature-extraction"
    assert 'create_model("hf-hub:lab/net")' in out["text"]


def test_push_to_own_name_and_private(hub: HubServer, tmp_path: Path) -> None:
    code = f"""
import medgmae
model = medgmae.create_model("vit_nano_patch8_32")
out["address"] = medgmae.push_to_hub(model, "net", token="{TOKEN}", private=True, commit_message="first")
out["stranger"] = attempt(fetch, "hf-hub:me/net", token=False)
"""
    out = run_client(code, hub, tmp_path)
    assert out["address"].startswith(f"{hub.url}/me/net/tree/")
    assert hub.repos["me/net"].private
    assert "no right to it" in out["stranger"]


def test_push_without_a_model_of_ours() -> None:
    with pytest.raises(WeightsError, match=r"Linear has no \.config with 'architecture' and 'model_args'"):
        push_to_hub(torch.nn.Linear(2, 2), "lab/net")


def test_saved_folder_comes_back(tmp_path: Path) -> None:
    model = tiny(num_classes=2, img_size=(16, 32, 24), drop_path=0.1)
    assert save_pretrained(model, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    back = medgmae.create_model(f"local-dir:{tmp_path}/a/b")
    assert same(back.state_dict(), model)
    assert back.grid == model.grid == (2, 4, 3)
    assert back.config["model_args"] == {"num_classes": 2, "img_size": [16, 32, 24], "drop_path": 0.1}
    x = torch.randn(1, 1, 16, 32, 24)
    assert torch.equal(back.eval()(x), model.eval()(x))
    filled = tiny(num_classes=2, img_size=(16, 32, 24))
    report = medgmae.load_pretrained(filled, tmp_path / "a" / "b")
    assert same(filled.state_dict(), model)
    assert not report.missing
    assert not report.unused


def test_config_has_the_common_layout(tmp_path: Path) -> None:
    save_pretrained(tiny(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "vit_nano_patch8_32"
    assert (config["num_classes"], config["num_features"], config["model_args"]) == (0, 48, {})
    assert (config["library_name"], config["library_version"]) == ("medgmae", medgmae.__version__)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stream:
        metadata = stream.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["medgmae"]) == config


def test_card_travels_with_the_weights(tmp_path: Path) -> None:
    card = medgmae.weight_card("vit_large_patch16_256.tangerine")
    model = tiny()
    model.config["card"] = card.to_json()
    save_pretrained(model, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert {key: saved[key] for key in ("tag", "license", "input", "citation", "page")} == {
        key: card.to_json()[key] for key in ("tag", "license", "input", "citation", "page")
    }
    assert saved["url"] is saved["md5"] is saved["hub"] is None  # they are another file's
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("---\n")
    assert "license: cc-by-nc-4.0" in readme.split("---")[1]
    assert "10.1038/s43856-025-01328-1" in readme
    assert medgmae.create_model(f"local-dir:{tmp_path}").config["card"]["tag"] == card.tag


def test_new_head_is_saved_with_its_size(tmp_path: Path) -> None:
    model = tiny()
    model.reset_classifier(5)
    save_pretrained(model, tmp_path)
    back = medgmae.create_model(f"local-dir:{tmp_path}")
    assert same(back.state_dict(), model)


def test_saving_again_replaces_and_keeps_other_files(tmp_path: Path) -> None:
    save_pretrained(tiny(), tmp_path)
    (tmp_path / "log.txt").write_text("mine")
    other = tiny(in_chans=4)
    save_pretrained(other, tmp_path)
    assert same(load_file(tmp_path / "model.safetensors"), other)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "config.json", "log.txt", "model.safetensors"}


class Awkward(torch.nn.Module):
    """Tensors that safetensors refuses as they are: shared, views of larger memory, not contiguous, empty, scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"architecture": "awkward", "model_args": {}}
        self.a = torch.nn.Linear(4, 4)
        self.b = torch.nn.Linear(4, 4)
        self.b.weight = self.a.weight
        base = torch.arange(24.0).reshape(4, 6)
        views = {"row": base[1], "column": base[:, 2], "turned": base.T, "none": base[:0], "one": base[0, 0]}
        for name, value in views.items():
            self.register_buffer(name, value)
        self.register_buffer("bf16", torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(7))


def test_nothing_is_lost_on_saving(tmp_path: Path) -> None:
    model = Awkward()
    save_pretrained(model, tmp_path)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in model.state_dict().items())
    assert model.b.weight is model.a.weight


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    model = tiny()
    save_pretrained(torch.nn.DataParallel(torch.compile(model)), tmp_path)
    assert same(medgmae.create_model(f"local-dir:{tmp_path}").state_dict(), model)


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = torch.nn.Linear(2, 2)
    empty.config = {"architecture": "x", "model_args": {}}
    with pytest.raises(WeightsError, match="weight: a tensor without values"):
        save_pretrained(empty, tmp_path)
    model = tiny()
    model.config["model_args"] = {"img_size": torch.ones(3)}
    with pytest.raises(WeightsError, match=r"model.config does not fit into JSON.*Tensor"):
        save_pretrained(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"file: cannot write .*; choose another folder"):
        save_pretrained(tiny(), tmp_path / "file")


def test_failed_save_leaves_the_old_model(hub: HubServer, tmp_path: Path) -> None:
    model = tiny()
    save_pretrained(model, tmp_path)
    code = f"""
import medgmae, resource
model = medgmae.create_model("vit_nano_patch8_32")
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
out["found"] = attempt(medgmae.save_pretrained, model, "{tmp_path}")
"""
    assert "cannot write" in run_client(code, hub, tmp_path)["found"]
    assert same(medgmae.create_model(f"local-dir:{tmp_path}").state_dict(), model)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_readme_of_every_card_is_valid() -> None:
    from huggingface_hub import ModelCard

    model = tiny()
    for tag in medgmae.list_weights():
        model.config["card"] = medgmae.weight_card(tag).to_json()
        card = ModelCard(model_readme(model_config(model), "lab/net"), ignore_metadata_errors=False)
        assert card.data.library_name == "medgmae"
        assert tag in card.text
        assert os.linesep + "None" not in card.text
