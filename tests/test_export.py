"""Saved folders: everything comes back, nothing half-written stays, and the card in them is valid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hub_client import run_client
from hub_server import HubServer
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import randomize

import medgmae
from medgmae.checkpoints.cards import WeightsError
from medgmae.checkpoints.saving import model_config, model_readme, save_pretrained


def tiny(**overrides: object) -> torch.nn.Module:
    return medgmae.create_model("vit_nano_patch8_32", **overrides)


def same(state: dict[str, torch.Tensor], model: torch.nn.Module) -> bool:
    expected = model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], value) for name, value in expected.items())


def test_saved_folder_comes_back(tmp_path: Path) -> None:
    model = tiny(num_classes=2, img_size=(16, 32, 24), drop_path_rate=0.1)
    assert save_pretrained(model, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    back = medgmae.create_model(f"local-dir:{tmp_path}/a/b")
    assert same(back.state_dict(), model)
    assert back.grid_size == model.grid_size == (2, 4, 3)
    assert back.config["model_args"] == {"num_classes": 2, "img_size": [16, 32, 24], "drop_path_rate": 0.1}
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
    model.pretrained_cfg = card.to_json()
    save_pretrained(model, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["weight_card"]
    assert {key: saved[key] for key in ("tag", "license", "input", "citation", "page")} == {
        key: card.to_json()[key] for key in ("tag", "license", "input", "citation", "page")
    }
    assert saved["url"] is saved["md5"] is saved["hub"] is None  # they are another file's
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("---\n")
    assert "license: cc-by-nc-4.0" in readme.split("---")[1]
    assert "10.1038/s43856-025-01328-1" in readme
    assert medgmae.create_model(f"local-dir:{tmp_path}").pretrained_cfg["tag"] == card.tag


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
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # as readable as any file of the user's


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


def test_failed_save_leaves_the_old_model(tmp_path: Path) -> None:
    model = tiny()
    save_pretrained(model, tmp_path)
    code = f"""
import medgmae, resource
model = medgmae.create_model("vit_nano_patch8_32")
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
out["found"] = attempt(medgmae.save_pretrained, model, "{tmp_path}")
"""
    with HubServer() as hub:
        assert "cannot write" in run_client(code, hub, tmp_path / "home")["found"]
    assert same(medgmae.create_model(f"local-dir:{tmp_path}").state_dict(), model)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_readme_of_every_card_is_valid() -> None:
    from huggingface_hub import ModelCard

    model = tiny()
    for tag in medgmae.list_weights():
        model.pretrained_cfg = medgmae.weight_card(tag).to_json()
        card = ModelCard(model_readme(model_config(model), "lab/net"), ignore_metadata_errors=False)
        assert card.data.library_name == "medgmae"
        assert tag in card.text
        assert "None" not in card.text


def test_a_part_replaced_by_hand_is_not_lost_in_silence(tmp_path: Path) -> None:
    model = medgmae.create_model("vit_nano_patch8_32")
    model.head = torch.nn.Linear(48, 5)
    with pytest.raises(WeightsError, match=r"head\.bias, head\.weight changed.*reset_classifier"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_methods_change_is_saved(tmp_path: Path) -> None:
    model = medgmae.create_model("vit_nano_patch8_32")
    model.reset_classifier(3, "avg")  # whose tokens go on being normalised
    model.set_input_size((16, 24, 32))
    save_pretrained(model, tmp_path)
    back = medgmae.create_model(tmp_path)
    assert (back.img_size, back.global_pool, back.num_classes) == ((16, 24, 32), "avg", 3)
    assert same(back.state_dict(), model)
    x = torch.rand(1, 1, 16, 24, 32)
    torch.testing.assert_close(back.eval()(x), model.eval()(x))


def built_by_hand(kind: str) -> torch.nn.Module:
    """Models that no registered name stands for, made by their classes."""
    encoder = medgmae.ViT((16, 32, 24), 8, 2 if kind != "gmae" else 1, 24, 3, 2, drop_path_rate=0.2)
    length = 2 * 8**3
    if kind == "mae":
        decoder = medgmae.ViTDecoder(24, length, encoder.grid_size, 12, 1, 2, sigmoid=True)
        return medgmae.MaskedAutoencoder(encoder, decoder, mask_ratio=0.6, norm_target="unbiased")
    if kind == "gmae":
        decoder = medgmae.GaussianDecoder(24, 7, 12, 1, 2, kind="residual", ratios=(2,), spread=True)
        weights = {"mse": 0.5, "ssim": 0.5}
        return medgmae.GaussianMAE(encoder, decoder, medgmae.GaussianRenderer("box"), loss_weights=weights)
    if kind == "vim":
        return medgmae.Vim(16, 8, 1, 24, 3, class_token="middle", global_pool="token", num_classes=2)
    if kind == "mae_vim":
        vim = medgmae.Vim(16, 8, 1, 24, 2, scan_order="given", rope="sequence")
        return medgmae.MaskedAutoencoder(vim, medgmae.VimDecoder(24, 8**3, vim.grid_size, 12, 1, off_by_one=True))
    return medgmae.ViT(16, 8, 1, 24, 3, 2, class_token=False, global_pool="avg", fc_norm=False, num_classes=3)


@pytest.mark.parametrize("kind", ["vit", "vim", "mae", "mae_vim", "gmae"])
def test_models_built_by_their_classes_come_back(kind: str, tmp_path: Path) -> None:
    model = randomize(built_by_hand(kind))
    assert not hasattr(model, "config")
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == type(model).__name__
    back = medgmae.create_model(f"local-dir:{tmp_path}")
    assert type(back) is type(model)
    assert same(back.state_dict(), model)
    assert back.options() == model.options()
    assert (back.load_report.missing, back.load_report.unused) == ([], {})
    filled = built_by_hand(kind)
    medgmae.load_pretrained(filled, tmp_path)
    assert same(filled.state_dict(), model)
    assert save_pretrained(back, tmp_path / "again")  # and what came back can be saved like any other
    assert json.loads((tmp_path / "again/config.json").read_text())["model_args"] == config["model_args"]
    assert medgmae.inspect_checkpoint(tmp_path)["problem"] is None


def test_a_class_of_ones_own_is_refused_with_the_remedy(tmp_path: Path) -> None:
    class MyViT(medgmae.ViT):
        pass

    with pytest.raises(WeightsError, match=r"could not build 'MyViT' again.*state_dict.*register_model"):
        save_pretrained(MyViT(16, 8, 1, 24, 1, 2), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_option_that_was_changed_by_hand_is_not_lost_in_silence(tmp_path: Path) -> None:
    model = medgmae.create_model("mae_vit_nano_patch8_32")
    model.mask_ratio = 0.5
    save_pretrained(model, tmp_path)
    assert medgmae.create_model(f"local-dir:{tmp_path}").mask_ratio == 0.5
    by_class = built_by_hand("mae")
    by_class.mask_ratio = 0.5  # there the options are what the model has now
    save_pretrained(by_class, tmp_path)
    assert medgmae.create_model(f"local-dir:{tmp_path}").mask_ratio == 0.5


def test_a_cards_text_has_no_meaning_in_the_readme() -> None:
    """A card may come from a stranger's config.json."""
    card = medgmae.weight_card("vit_base_patch16_96.glmae").to_json()
    card["notes"] = "see\n\n# Free weights\n<img src=x onerror=y> [here](http://x.y) `a` **b** https://ok.org/a_b."
    card["citation"] = "---\nlicense: mit\n---\n| a | b |"
    card["input"] = {**card["input"], "modality": "CT |\n\n<b>x"}
    model = tiny()
    model.pretrained_cfg = card
    readme = model_readme(model_config(model))
    notes = r"**Notes:** see \# Free weights \<img src=x onerror=y\> \[here\](http://x.y) \`a\` \*\*b\*\* https://ok.org/a_b."
    assert notes in readme.splitlines()
    assert r"--- license: mit --- \| a \| b \|" in readme.splitlines()
    assert r"| modality | CT \| \<b\>x |" in readme.splitlines()


@pytest.mark.parametrize("name", ["vim_nano_patch8_32", "gmae_vit_nano_patch8_32"])
def test_what_onnx_has_no_operators_for_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)  # what the exporter sets while it traces
    model = medgmae.create_model(name).eval()
    with pytest.raises(NotImplementedError, match=r"ONNX has no operator for \w+.*torch\.export"):
        torch.export.export(model, (torch.rand(1, 1, 32, 32, 32),), strict=False)


def test_names_of_classes_come_back(tmp_path: Path) -> None:
    model = medgmae.create_model("vit_nano_patch8_32", num_classes=2)
    model.label_names = ["healthy", "nodule"]
    medgmae.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "healthy", "1": "nodule"}
    assert "pipeline_tag: image-classification" in (tmp_path / "README.md").read_text()
    again = medgmae.create_model(f"local-dir:{tmp_path}")
    assert again.label_names == ["healthy", "nodule"]
    assert medgmae.create_model(f"local-dir:{tmp_path}", num_classes=3, strict=False).label_names is None
    again.reset_classifier(2)
    assert again.label_names is None
    model.label_names = ["healthy"]
    with pytest.raises(WeightsError, match="expected a list of 2 names, one per class"):
        medgmae.save_pretrained(model, tmp_path)


@pytest.mark.parametrize("named", [["a", "b"], {"0": "a", "2": "b"}, {"0": 1}, "ab"])
def test_wrong_names_of_classes_are_refused(named: object, tmp_path: Path) -> None:
    medgmae.save_pretrained(medgmae.create_model("vit_nano_patch8_32", num_classes=2), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": named}))
    with pytest.raises(WeightsError, match="id2label"):
        medgmae.create_model(f"local-dir:{tmp_path}")


def test_no_other_library_takes_the_folder_for_its_own(tmp_path: Path) -> None:
    """transformers hands a config with pretrained_cfg to timm, and names an unknown model_type."""
    medgmae.save_pretrained(medgmae.create_model("vit_nano_patch8_32"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "medgmae"
    assert "pretrained_cfg" not in config


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = medgmae.create_model("vit_nano_patch8_32", num_classes=2)
    model.label_names = ["gesund", "Rundherd: ü"]
    files = {medgmae.save_pretrained(model, tmp_path / str(i)).joinpath("model.safetensors") for i in range(6)}
    assert len({file.read_bytes() for file in files}) == 1
    assert medgmae.create_model(tmp_path / "0").label_names == model.label_names
