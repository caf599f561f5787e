"""Weights against their cards: hash, names and shapes, the model that they fill; from a hub, by hand, shipped."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hub_client import run_client
from hub_server import HubServer

import medgmae
from medgmae.checkpoints import verification
from medgmae.cli import main

TAG = "vit_nano_patch8_32.test"


def card_of(**fields: Any) -> medgmae.WeightCard:
    return medgmae.WeightCard(TAG, model_args={"img_size": 16}, **fields)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An official file of DataParallel's names, and a manifest of its names and shapes."""
    model = medgmae.create_model("vit_nano_patch8_32", img_size=16)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "nano.pth")
    manifest = {"source": "this test", "tensors": {name: list(t.shape) for name, t in model.state_dict().items()}}
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / f"{TAG}.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(verification, "weights_folder", lambda: tmp_path)
    return tmp_path / "nano.pth"


def test_a_file_that_is_what_its_card_says(file: Path) -> None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    found = medgmae.verify_weights(card_of(sha256=digest), file=file)
    assert found.passed, str(found)
    assert (found.manifest, found.missing, found.shapes, found.unlisted) == (True, [], {}, 0)
    assert found.report is not None
    assert len(found.report.loaded) == len(medgmae.create_model("vit_nano_patch8_32").state_dict())
    assert (found.card.sha256, found.card.bytes) == (digest, file.stat().st_size)


def test_what_differs_is_named(file: Path, tmp_path: Path) -> None:
    saved = torch.load(file, weights_only=True)
    del saved["state_dict"]["module.norm.bias"]
    saved["state_dict"]["module.norm.weight"] = torch.ones(7)
    saved["state_dict"]["module.teacher"] = torch.ones(2)
    torch.save(saved, tmp_path / "other.pth")
    found = medgmae.verify_weights(card_of(sha256="0" * 64), file=tmp_path / "other.pth")
    assert not found.passed
    assert found.missing == ["norm.bias"]
    assert found.shapes == {"norm.weight": "[48] in the manifest, [7] in the file"}
    assert found.unlisted == 1
    said = str(found)
    assert f"sha256 is {found.card.sha256}, the card's {'0' * 64}" in said
    assert "it does not load into vit_nano_patch8_32" in said


def test_the_hub_s_commit_is_filled_in(file: Path, tmp_path: Path) -> None:
    with HubServer() as hub:
        commit = hub.add("lab/nano", {"weights/nano.pth": file.read_bytes()})
        code = f"""
import medgmae
hub = {{"repo": "lab/nano", "revision": "main", "file": "weights/nano.pth"}}
card = WeightCard("{TAG}", model_args={{"img_size": 16}}, hub=hub)
found = medgmae.verify_weights(card, progress=False)
out |= {{"passed": found.passed, "card": found.card.to_json(), "said": str(found)}}
wrong = WeightCard("{TAG}", model_args={{"img_size": 16}}, hub=hub, sha256="{"0" * 64}")
out["wrong"] = attempt(medgmae.verify_weights, wrong, progress=False)
"""
        out = run_client(code, hub, tmp_path / "home")
    assert out["passed"], out["said"]
    assert out["card"]["hub"] == {"repo": "lab/nano", "revision": commit, "file": "weights/nano.pth"}
    assert out["card"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert "no manifest to compare with" in out["said"]
    assert "HashMismatchError" in out["wrong"]


CONFIG = {"file": "vit/config.yaml", "expected": {"student.num_heads": 3, "student.scale": 1e-5, "sets.0.mean": -573.8}}
YAML = "student:\n  num_heads: {}\n  scale: 1e-05\nsets:\n  - mean: -573.8\n"


def test_the_configuration_beside_the_weights(file: Path, tmp_path: Path) -> None:
    card = card_of(hub={"repo": "lab/nano", "revision": "main", "file": "vit/checkpoints/nano.pth"}, config=CONFIG)
    assert "vit/config.yaml of the repository is not beside the file" in str(medgmae.verify_weights(card, file=file))
    (place := tmp_path / "vit/checkpoints").mkdir(parents=True)
    moved = file.rename(place / "nano.pth")
    beside = tmp_path / "vit/config.yaml"
    beside.write_text(YAML.format(3))
    found = medgmae.verify_weights(card, file=moved)
    assert (found.passed, found.config) == (True, [])
    beside.write_text(YAML.format(4).replace("sets:", "others:"))
    found = medgmae.verify_weights(card, file=moved)
    assert not found.passed
    assert found.config == [
        "student.num_heads is '4', the card's 3",
        "sets.0.mean is missing, the card's is -573.8",
    ]
    for damaged in ("a: [1,", "[" * 20000, "\x00", "a: &a [*a, *a]\nstudent: *a"):
        beside.write_text(damaged)
        with contextlib.suppress(medgmae.WeightsError):
            assert not medgmae.verify_weights(card, file=moved).passed


def test_the_configuration_of_the_repository(file: Path, tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.add("lab/nano", {"vit/checkpoints/nano.pth": file.read_bytes(), "vit/config.yaml": YAML.format(5).encode()})
        code = f"""
import medgmae
hub = {{"repo": "lab/nano", "revision": "main", "file": "vit/checkpoints/nano.pth"}}
card = WeightCard("{TAG}", model_args={{"img_size": 16}}, hub=hub, config={CONFIG!r})
out["problems"] = medgmae.verify_weights(card, progress=False).problems
"""
        out = run_client(code, hub, tmp_path / "home")
    assert out["problems"] == ["vit/config.yaml: student.num_heads is '5', the card's 3"]


def test_the_command_on_the_shipped_weights(tmp_path: Path) -> None:
    out = tmp_path / "card.json"
    done = CliRunner().invoke(main, ["verify", "vit_tiny_patch8_64.demo", "--card", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["problems"] == []
    assert json.loads(out.read_text()) == medgmae.weight_card("vit_tiny_patch8_64.demo").to_json()
    wrong = tmp_path / "wrong.pth"
    torch.save({"weight": torch.ones(2)}, wrong)
    done = CliRunner().invoke(main, ["verify", "vit_tiny_patch8_64.demo", "--file", str(wrong)])
    assert done.exit_code == 1
    assert "the card's" in done.stdout
