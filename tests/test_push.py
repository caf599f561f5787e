"""Uploads that the hub refuses, and folders of ours in the hands of timm."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, HubServer, use_endpoint
from huggingface_hub import constants
from huggingface_hub.utils import get_session

import medgmae
from medgmae.checkpoints import wire
from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.saving import push_to_hub

# The client's own use of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=.*:DeprecationWarning")
COMMIT = "/api/models/lab/net/commit/main"
BATCH = "/lab/net.git/info/lfs/objects/batch"
YAML = json.dumps({"errors": [{"message": '"license" must be one of [apache-2.0]'}], "warnings": []}).encode()
RIGHT = r"the token needs the right to write there: log in with 'hf auth login' or pass token=, or push to"
ROOM = "free some of the account's storage on the hub, or push to another account"


@pytest.fixture
def model() -> torch.nn.Module:
    return medgmae.create_model("vit_nano_patch8_32")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda hub: hub.status.update({BATCH: [(403, {"X-Error-Message": "no right"})]}), f"no right.*{RIGHT}"),
        (lambda hub: setattr(hub, "lfs_status", 403), f"403 Forbidden.*{RIGHT}"),
        (lambda hub: setattr(hub, "lfs_status", 507), f"507 Insufficient Storage.*{ROOM}"),
        (lambda hub: setattr(hub, "lfs_error", {"code": 403, "message": "quota exceeded"}), f"quota exceeded.*{ROOM}"),
        (lambda hub: hub.status.update({COMMIT: [(403, {"X-Error-Message": "over the storage quota"})]}), ROOM),
        (lambda hub: hub.status.update({COMMIT: [413]}), ROOM),
        (lambda hub: hub.status.update({"/api/repos/create": [402]}), ROOM),
        (lambda hub: hub.status.update({"/api/repos/create": [404]}), "404 Not Found; .* no such address: check HF_EN"),
        (lambda hub: hub.status.update({"/api/repos/create": [(200, {}, b"<html>")]}), "not how a hub answers: check"),
        (lambda hub: hub.status.update({BATCH: [(200, {}, b"[]")]}), "not how a hub answers: check HF_ENDPOINT"),
        (lambda hub: hub.status.update({COMMIT: [(401, {"X-Error-Message": "expired"})]}), "expired; log in with"),
        (lambda hub: hub.status.update({COMMIT: [(409, {"X-Error-Message": "since"})]}), "since; someone else has"),
        (lambda hub: hub.status.update({COMMIT: [(412, {"X-Error-Message": "since"})]}), "since; someone else has"),
        (lambda hub: hub.status.update({COMMIT: [500]}), "500 Internal Server Error; check the connection and call"),
        (
            lambda hub: hub.status.update(
                {COMMIT: [(403, {"X-Error-Message": "Access to this resource is disabled."})]}
            ),
            "resource is disabled; the hub has disabled the repository: look at the repository's page",
        ),
        (
            lambda hub: hub.status.update({"/api/validate-yaml": [(400, {"Content-Type": "application/json"}, YAML)]}),
            r'"license" must be one of \[apache-2.0\]; the hub does not accept the model card: correct',
        ),
    ],
)
def test_uploads_that_the_hub_refuses(
    hub: HubServer, model: torch.nn.Module, fault: Callable[[HubServer], object], message: str
) -> None:
    fault(hub)
    with pytest.raises(WeightsError, match=rf"hf-hub:lab/net: not uploaded to {hub.url}: .*{message}"):
        push_to_hub(model, "lab/net", token=TOKEN)
    assert [commit for repo in hub.repos.values() for commit in repo.commits.values() if commit] == []
    hub.lfs_status, hub.lfs_error = 200, {}
    address = push_to_hub(model, "lab/net", token=TOKEN)
    assert address.endswith(hub.repos["lab/net"].refs["main"])


@pytest.mark.parametrize("fault", ["silent", "closed"])
def test_a_host_that_is_lost_in_an_upload(
    hub: HubServer, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """In the commit, the one request that the client does not repeat."""
    monkeypatch.setattr(wire, "UPLOAD", 0.5)
    went_on = threading.Event()

    def lose(path: str, headers: Any) -> None:
        if path == COMMIT and fault == "silent":
            went_on.wait(20)
        if path == COMMIT:
            raise TimeoutError  # by which the server's handler closes the connection

    hub.on_request = lose
    session = get_session()
    before = session.timeout
    with pytest.raises(WeightsError, match=r"not uploaded to .*; check the connection and call again"):
        push_to_hub(model, "lab/net", token=TOKEN)
    went_on.set()
    assert session.timeout == before
    assert hub.repos["lab/net"].refs["main"] in hub.repos["lab/net"].commits
    assert [commit for commit in hub.repos["lab/net"].commits.values() if commit] == []


def test_a_public_repository_is_not_taken_for_a_private_one(hub: HubServer, model: torch.nn.Module) -> None:
    hub.add("lab/open", {"notes.txt": b""})
    hub.add("lab/closed", {"notes.txt": b""}, private=True)
    with pytest.raises(WeightsError, match=r"exists and is public; make it private on the hub, leave out private=True"):
        push_to_hub(model, "lab/open", token=TOKEN, private=True)
    assert len(hub.repos["lab/open"].commits) == 1
    commit = push_to_hub(model, "lab/closed", token=TOKEN, private=True).rpartition("/")[2]
    assert set(hub.repos["lab/closed"].commits[commit]) >= {"notes.txt", "model.safetensors"}


def test_weights_that_may_not_be_shared_in_a_changed_form(hub: HubServer, model: torch.nn.Module) -> None:
    model.pretrained_cfg = medgmae.weight_card("vit_large_patch16_112.3dino").to_json()
    with pytest.raises(WeightsError, match=r"began with .*\(cc-by-nc-nd-4.0\) does not allow .*; pass private=True"):
        push_to_hub(model, "lab/net", token=TOKEN)
    assert "lab/net" not in hub.repos
    push_to_hub(model, "lab/net", token=TOKEN, private=True)
    assert "lab/net" in hub.repos


@pytest.mark.parametrize("token", [None, False, True, "hf_wrong"])
def test_uploads_without_a_token(hub: HubServer, model: torch.nn.Module, token: Any) -> None:
    with pytest.raises(WeightsError, match="log in with 'hf auth login' or pass token="):
        push_to_hub(model, "lab/net", token=token)


def test_upload_offline(hub: HubServer, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"HF_HUB_OFFLINE is set; unset it, or write a folder with save_pretrained"):
        push_to_hub(model, "lab/net", token=TOKEN)


def test_upload_to_a_host_that_is_silent(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        use_endpoint(monkeypatch, f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(wire, "ANSWER", 0.5)
        began = time.monotonic()
        with pytest.raises(WeightsError, match=r"hf-hub:lab/net: .*fell silent.*check the connection and call again"):
            push_to_hub(model, "lab/net", token=TOKEN)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("repo", "options"),
    [("../net", {}), ("a/b/c", {}), ("lab/net", {"revision": "../x"}), ("lab/net", {"token": "hf_a\nX: 1"})],
)
def test_names_that_are_none(hub: HubServer, model: torch.nn.Module, repo: str, options: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match=r"not the name of a|token= holds characters"):
        push_to_hub(model, repo, **{"token": TOKEN, **options})
    assert hub.log == []


def test_timm_is_told_that_the_model_is_not_its_own(model: torch.nn.Module, tmp_path: Path) -> None:
    import timm

    assert not set(medgmae.list_models()) & set(timm.list_models())
    medgmae.save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["library_name"] == "medgmae"
    with pytest.raises(RuntimeError, match=r"Unknown model \(vit_nano_patch8_32\)"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_a_card_of_a_newer_version(model: torch.nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    card = medgmae.weight_card("vit_tiny_patch8_64.demo").to_json()
    medgmae.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    old = {name: value for name, value in card.items() if name != "notes"}
    config |= {"weight_card": {**old, "doi": "10.1/x"}, "library_version": "9.8.7"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = medgmae.create_model(f"local-dir:{tmp_path}")
    assert loaded.pretrained_cfg == {**card, "notes": None}
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "written by medgmae 9.8.7; fields ['doi'], unknown to this version" in warnings[0]
