"""What is said about a weight file: the published manifests at full size, files of our own, and files of nobody."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import medgmae
from medgmae.models import registry

FIXTURES = Path(__file__).parent / "fixtures"

# Manifest of an official file, what create_model is to be given, and the dialect.
PUBLISHED: dict[str, tuple[str, dict[str, Any], str]] = {
    "tangerine/manifest_tangerine_mae_vit_large_patch16_dec512d8b": (
        "mae_vit_large_patch16_256",
        {},
        "TANGERINE pre-training",
    ),
    "tangerine/manifest_tangerine_vit_large_patch16_cls": (
        "vit_large_patch16_256",
        {"num_classes": 1},
        "ViT with timm's names",
    ),
    "tangerine/manifest_tangerine_vit_large_patch16_gp": (
        "vit_large_patch16_256",
        {"global_pool": "token_avg", "num_classes": 1},
        "ViT with timm's names, fine-tuned",
    ),
    "tangerine/manifest_tangerine_vit_large_patch16_gp_nohead": (
        "vit_large_patch16_256",
        {"global_pool": "token_avg"},
        "ViT with timm's names, fine-tuned",
    ),
    "tangerine/manifest_tangerine_vit_large_patch16_power_2": (
        "vit_large_patch16_256",
        {"global_pool": "token_avg", "num_classes": 1, "head_hidden": [64]},
        "ViT with timm's names, fine-tuned",
    ),
    "medgmae/manifest_mae3d_vit_base_p16": (
        "mae_vit_base_patch16_96",
        {},
        "MAE3D of SelfMedMAE or MedGMAE",
    ),
    "medgmae/manifest_mae3d_vit_large_p12": (
        "mae_vit_wide_patch12_96",
        {},
        "MAE3D of SelfMedMAE or MedGMAE",
    ),
    "selfmedmae/manifest_uva_mae3d_btcv": (
        "mae_vit_base_patch16_96x96x16",
        {},
        "MAE3D of the UVA adaptation of SelfMedMAE",
    ),
    "glmae/manifest_vit_base_patch16_3d": ("vit_base_patch16_96", {}, "ViT with timm's names"),
}


def save_shapes(shapes: dict[str, list[int]], path: Path) -> Path:
    """A checkpoint of full-size tensors in a smaller file: they share the memory of the largest."""
    pool = torch.zeros(max(math.prod(shape) for shape in shapes.values()))
    torch.save({"model": {name: pool[: math.prod(shape)].view(shape) for name, shape in shapes.items()}}, path)
    return path


@pytest.mark.parametrize("manifest", PUBLISHED)
def test_published_manifests_find_their_architecture(manifest: str, tmp_path: Path) -> None:
    shapes = json.loads((FIXTURES / f"{manifest}.json").read_text())["state_dict"]
    facts = medgmae.inspect_checkpoint(save_shapes(shapes, tmp_path / "official.pth"))
    architecture, model_args, source = PUBLISHED[manifest]
    assert facts["architecture"] == architecture
    assert facts["model_args"] == model_args
    assert facts["problem"] is None
    assert facts["container"] == "model"
    assert set(facts["renamed"]) | set(facts["unused"]) == set(shapes)
    assert facts["source"] == source
    json.dumps(facts, allow_nan=False)


def test_sizes_are_read_from_the_shapes(tmp_path: Path) -> None:
    name = "tangerine/manifest_tangerine_mae_vit_large_patch16_dec512d8b"
    shapes = json.loads((FIXTURES / f"{name}.json").read_text())["state_dict"]
    path = save_shapes(shapes, tmp_path / "official.pth")
    facts = medgmae.inspect_checkpoint(path)
    assert facts["tensors"] == 398
    assert facts["parameters"] == 340_647_424
    assert facts["bytes"] == path.stat().st_size
    assert facts["sizes"]["grid"] == [16, 16, 16]
    assert (facts["sizes"]["decoder_embed_dim"], facts["sizes"]["decoder_depth"]) == (512, 8)
    assert facts["encoder_architecture"] == "vit_large_patch16_256"
    assert facts["renamed"]["decoder_pred.0.weight"] == "decoder.head.weight"


def test_our_own_folder_and_file(tmp_path: Path) -> None:
    model = medgmae.create_model("vit_nano_patch8_32", num_classes=3, img_size=(16, 32, 32))
    folder = medgmae.save_pretrained(model, tmp_path / "saved")
    for path in (folder, folder / "model.safetensors"):
        facts = medgmae.inspect_checkpoint(path)
        assert facts["source"] == "medgmae"
        assert facts["architecture"] == "vit_nano_patch8_32"
        assert facts["model_args"]["num_classes"] == 3
        assert facts["sizes"]["grid"] == [2, 4, 4]
        assert (facts["missing"], facts["unused"], facts["problem"]) == ([], {}, None)


def test_other_size_and_channels_become_options(tmp_path: Path) -> None:
    model = medgmae.create_model("vit_nano_patch8_32", img_size=48, in_chans=2)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    facts = medgmae.inspect_checkpoint(tmp_path / "plain.pth")
    assert facts["architecture"] == "vit_nano_patch8_32"
    assert facts["model_args"] == {"img_size": 48, "in_chans": 2}


def test_a_grid_that_the_file_leaves_open_is_asked_for(tmp_path: Path) -> None:
    model = medgmae.create_model("vit_nano_patch8_32", img_size=(16, 24, 40))
    torch.save(model.state_dict(), tmp_path / "sincos.pth")
    assert medgmae.inspect_checkpoint(tmp_path / "sincos.pth")["model_args"] == {"img_size": [16, 24, 40]}
    torch.nn.init.normal_(model.pos_embed)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(medgmae.WeightsError, match="source_grid"):
        medgmae.inspect_checkpoint(tmp_path / "plain.pth")
    facts = medgmae.inspect_checkpoint(tmp_path / "plain.pth", source_grid=(2, 3, 5))
    assert facts["model_args"] == {"img_size": [16, 24, 40]}
    assert facts["problem"] is None


def test_unknown_sizes_have_no_architecture(tmp_path: Path) -> None:
    model = medgmae.create_model("mae_vit_nano_patch8_32", depth=3)
    torch.save(model.state_dict(), tmp_path / "odd.pth")
    facts = medgmae.inspect_checkpoint(tmp_path / "odd.pth")
    assert (facts["architecture"], facts["encoder_architecture"]) == (None, None)
    assert "no registered architecture" in facts["problem"]


def test_decoder_of_other_sizes_leaves_the_encoder(tmp_path: Path) -> None:
    model = medgmae.create_model("mae_vit_nano_patch8_32", decoder_depth=3)
    torch.save(model.state_dict(), tmp_path / "odd.pth")
    facts = medgmae.inspect_checkpoint(tmp_path / "odd.pth")
    assert (facts["architecture"], facts["encoder_architecture"]) == (None, "vit_nano_patch8_32")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_executed(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"model": {"pos_embed": torch.zeros(1)}, "args": argparse.Namespace(a=1), "x": Evil()}
    torch.save(content, "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(medgmae.WeightsError, match=r"refused.*mkdir"):
        medgmae.inspect_checkpoint("evil.pth")
    assert not Path("executed").exists()


def test_files_of_nobody(tmp_path: Path) -> None:
    for name, content in {
        "text.pth": b"hello",
        "empty.pth": b"",
        "half.safetensors": b"\x10" + bytes(7) + b'{"a":',
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(medgmae.WeightsError, match=name):
            medgmae.inspect_checkpoint(tmp_path / name)
    torch.save({"resnet.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(medgmae.WeightsError, match="not recognised"):
        medgmae.inspect_checkpoint(tmp_path / "other.pth")
    with pytest.raises(medgmae.WeightsError, match="no such file"):
        medgmae.inspect_checkpoint(tmp_path / "absent.pth")


def test_what_the_file_leaves_open_is_called_unknown(tmp_path: Path) -> None:
    torch.save(medgmae.create_model("mae_vim_nano_patch8_32").state_dict(), tmp_path / "vim.pth")
    facts = medgmae.inspect_checkpoint(tmp_path / "vim.pth")
    assert (facts["sizes"]["rope"], facts["sizes"]["scan_order"]) == ("unknown", "unknown")
    assert facts["sizes"]["off_by_one"] is False
    assert "mlp_dim" not in facts["sizes"]  # a transformer's
    torch.save(medgmae.create_model("vit_nano_patch8_32").state_dict(), tmp_path / "vit.pth")
    facts = medgmae.inspect_checkpoint(tmp_path / "vit.pth")
    assert facts["sizes"]["num_heads"] == "unknown"
    assert not {"d_state", "inner_dim", "decoder_depth"} & set(facts["sizes"])


def test_a_saved_models_settings_are_known(tmp_path: Path) -> None:
    model = medgmae.create_model("mae_vim_nano_patch8_32", rope="sequence", scan_order="given", off_by_one=True)
    facts = medgmae.inspect_checkpoint(medgmae.save_pretrained(model, tmp_path))
    shown = {name: facts["sizes"][name] for name in ("rope", "scan_order", "off_by_one")}
    assert shown == {"rope": "sequence", "scan_order": "given", "off_by_one": True}


def test_an_autoencoder_without_a_class_token(tmp_path: Path) -> None:
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    model = medgmae.create_model("mae_vit_nano_patch8_32", **options)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    facts = medgmae.inspect_checkpoint(tmp_path / "plain.pth")
    assert (facts["architecture"], facts["model_args"]) == ("mae_vit_nano_patch8_32", options)
    assert facts["problem"] is None


@pytest.mark.parametrize("hidden", [(), (6, 5)])
def test_heads_are_read_in_the_order_of_their_layers(hidden: tuple[int, ...], tmp_path: Path) -> None:
    model = medgmae.create_model("vit_nano_patch8_32", num_classes=3, head_hidden=hidden)
    torch.save(dict(reversed(model.state_dict().items())), tmp_path / "classifier.pth")
    facts = medgmae.inspect_checkpoint(tmp_path / "classifier.pth")
    assert facts["head"] == {"num_classes": 3, "head_hidden": list(hidden)}
    assert facts["problem"] is None


@pytest.mark.parametrize("name", ["vit_nano_patch8_32", "vim_nano_patch8_32", "gmae_vit_nano_patch8_32"])
def test_every_family_is_asked_for_its_own_sizes(name: str, tmp_path: Path) -> None:
    model = medgmae.create_model(name)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    facts = medgmae.inspect_checkpoint(tmp_path / "plain.pth")
    assert (facts["architecture"], facts["model_args"], facts["problem"]) == (name, {}, None)
    json.dumps(facts, allow_nan=False)


def test_a_registered_module_of_ones_own_does_not_disturb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def my_linear(**options: Any) -> torch.nn.Module:
        return torch.nn.Linear(2, 2)

    medgmae.list_models()
    monkeypatch.setattr(registry, "_builders", dict(registry._builders))
    medgmae.register_model(my_linear)
    torch.save(medgmae.create_model("vit_nano_patch8_32").state_dict(), tmp_path / "plain.pth")
    assert medgmae.inspect_checkpoint(tmp_path / "plain.pth")["architecture"] == "vit_nano_patch8_32"


def test_an_inspection_shows_itself_in_a_few_lines(tmp_path: Path) -> None:
    torch.save(medgmae.create_model("vit_nano_patch8_32").state_dict(), tmp_path / "<b>.pth")
    facts = medgmae.inspect_checkpoint(tmp_path / "<b>.pth")
    assert json.loads(json.dumps(facts)) == facts
    assert len(repr(facts)) < 1000
    assert "architecture: vit_nano_patch8_32" in repr(facts)
    assert "&lt;b&gt;.pth" in facts._repr_html_()
    assert f"<td>{len(facts['renamed'])}</td>" in facts._repr_html_()
