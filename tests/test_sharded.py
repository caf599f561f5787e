"""Weights in several files with an index, in a folder and on the hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants
from safetensors.torch import save_file

import medgmae
from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.hub import Fetching
from medgmae.checkpoints.opening import open_source


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
