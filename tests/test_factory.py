"""Names to models: tags, options, errors that help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import assert_same_state, randomize, state_copy

import medgmae
from medgmae import WeightsError
from medgmae.models.registry import register_model


def test_names_are_sorted_unique_and_filtered() -> None:
    names = medgmae.list_models()
    assert names == sorted(set(names))
    assert medgmae.list_models("vit_large*_*6") == ["vit_large_patch16_256", "vit_large_patch16_96"]
    assert medgmae.list_models("nothing*") == []


def test_names_with_weights_are_those_that_can_be_had() -> None:
    tags = medgmae.list_models(pretrained=True)
    assert "vit_large_patch16_256.tangerine" in tags
    assert "vit_base_patch16_96.glmae" not in tags  # only a person can fetch it
    assert all(tag.partition(".")[0] in medgmae.list_models() for tag in medgmae.list_weights())


@pytest.mark.parametrize("tag", medgmae.list_weights())
def test_every_card_builds_its_architecture(tag: str) -> None:
    with torch.device("meta"):
        model = medgmae.create_model(tag, pretrained=False)
    assert model.config["architecture"] == tag.partition(".")[0]
    assert model.pretrained_cfg["tag"] == tag
    assert all(model.config["model_args"][k] == v for k, v in medgmae.weight_card(tag).model_args.items())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vit_larg_patch16_256", "vit_large_patch16_256"),
        ("ViT_nano_patch8_32", "vit_nano_patch8_32"),
        ("mae_vit_nano_patch8", "mae_vit_nano_patch8_32"),
    ],
)
def test_a_wrong_name_suggests_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"unknown model '{name}'. Did you mean .*'{hint}'"):
        medgmae.create_model(name)


def test_a_name_like_no_other_lists_all() -> None:
    with pytest.raises(ValueError, match=r"Known: glmae_.*, gmae_vit_base_patch16_96, .* and \d+ more"):
        medgmae.create_model("resnet50")


def test_a_wrong_tag_suggests_the_nearest() -> None:
    with pytest.raises(WeightsError, match=r"vit_large_patch16_256\.tangerine"):
        medgmae.create_model("vit_large_patch16_256.tangerin")


@pytest.mark.parametrize("name", ["vit_nano_patch8_32", "mae_vit_nano_patch8_32"])
def test_a_wrong_option_suggests_the_nearest(name: str) -> None:
    with pytest.raises(TypeError, match=r"unknown option 'in_channels'\. Did you mean 'in_chans'"):
        medgmae.create_model(name, in_channels=2)


def test_a_type_error_inside_a_model_is_not_hidden() -> None:
    with pytest.raises(TypeError, match="str"):
        medgmae.create_model("vit_nano_patch8_32", embed_dim="wide")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"img_size": 30}, "multiple of the patch"),
        ({"img_size": (32, 32)}, "img_size must be one positive int or 3"),
        ({"num_heads": 5}, r"embed_dim \(=48\) must be divisible by num_heads \(=5\)"),
        ({"global_pool": "mean"}, "global_pool must be"),
        ({"pos_embed": "rope"}, "pos_embed must be"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        medgmae.create_model("vit_nano_patch8_32", **options)


def test_the_config_builds_the_model_again() -> None:
    model = medgmae.create_model(
        "vit_nano_patch8_32", img_size=(16, 24, 8), in_chans=2, global_pool="token_avg", num_classes=3
    )
    assert model.config == {
        "architecture": "vit_nano_patch8_32",
        "model_args": {"img_size": (16, 24, 8), "in_chans": 2, "global_pool": "token_avg", "num_classes": 3},
    }
    again = medgmae.create_model(model.config["architecture"], **model.config["model_args"])
    again.load_state_dict(model.state_dict())


def test_no_weights_to_choose_from_is_said() -> None:
    with pytest.raises(WeightsError, match="exactly one published checkpoint of vit_nano_patch8_32; there are: none"):
        medgmae.create_model("vit_nano_patch8_32", pretrained=True)


def test_a_tag_and_another_source_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="the tag 'tangerine' names the weights already"):
        medgmae.create_model("vit_large_patch16_256.tangerine", pretrained="other.pth")


def test_a_file_fills_a_new_model_and_the_rest_gets_a_random_start(tmp_path: Path) -> None:
    model: Any = randomize(medgmae.create_model("vit_nano_patch8_32"))
    torch.save(model.state_dict(), tmp_path / "encoder.pth")
    new: Any = medgmae.create_model("vit_nano_patch8_32", pretrained=str(tmp_path / "encoder.pth"), num_classes=4)
    assert new.load_report.missing == ["head.weight", "head.bias"]
    assert not any(value.is_meta for value in new.state_dict().values())
    assert 0 < new.head.weight.abs().max() <= (6 / 52) ** 0.5  # Xavier, as without a file
    assert not new.head.bias.any()
    new.reset_classifier(0)
    assert_same_state(new, state_copy(model))
    assert new.training


def test_a_head_with_buffers_gets_its_start(tmp_path: Path) -> None:
    model: Any = randomize(medgmae.create_model("vit_nano_patch8_32"))
    torch.save(model.state_dict(), tmp_path / "encoder.pth")
    options = {"num_classes": 4, "head_hidden": (6,)}
    new: Any = medgmae.create_model("vit_nano_patch8_32", pretrained=str(tmp_path / "encoder.pth"), **options)
    norm = new.head[2]
    assert torch.equal(norm.running_mean, torch.zeros(6))
    assert torch.equal(norm.running_var, torch.ones(6))
    assert torch.equal(norm.weight, torch.ones(6))
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_loaded_parameters_train_and_leave_the_file_alone(kind: str, tmp_path: Path) -> None:
    model: Any = randomize(medgmae.create_model("vit_nano_patch8_32"))
    path = tmp_path / "encoder.pth"
    if kind == "pth":
        torch.save(model.state_dict(), path)
    else:
        path = medgmae.save_pretrained(model, tmp_path) / "model.safetensors"
    content = path.read_bytes()
    new: Any = medgmae.create_model("vit_nano_patch8_32", pretrained=str(path))
    optimizer = torch.optim.AdamW(new.parameters(), lr=0.1)
    new(torch.rand(2, 1, 32, 32, 32)).square().sum().backward()
    optimizer.step()
    trained = {n for n, p in new.named_parameters() if p.requires_grad}
    assert all(not torch.equal(new.state_dict()[n], model.state_dict()[n]) for n in trained)
    assert path.read_bytes() == content
    torch.save(new.state_dict(), tmp_path / "trained.pth")
    assert (tmp_path / "trained.pth").stat().st_size < 1.3 * len(content)  # parameters do not drag the file along


def test_building_a_model_to_be_loaded_imports_no_compiler(tmp_path: Path) -> None:
    torch.save(medgmae.create_model("vit_nano_patch8_32").state_dict(), tmp_path / "encoder.pth")
    code = (
        # torch.utils.checkpoint imports sympy in torch 2.6.
        "import sys, torch.utils.checkpoint; before = set(sys.modules); import medgmae; "
        "medgmae.create_model('vit_nano_patch8_32', pretrained=sys.argv[1]); "
        "print([m for m in ('torch._dynamo', 'torch._inductor', 'sympy', 'timm') if m in sys.modules.keys() - before])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "encoder.pth")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"


def test_a_name_is_registered_once() -> None:
    def vit_nano_patch8_32(**overrides: Any) -> torch.nn.Module:
        raise NotImplementedError

    with pytest.raises(ValueError, match=r"registered twice, the first time in medgmae\.models\.vit"):
        register_model(vit_nano_patch8_32)


def test_every_kind_of_source_is_loaded(tmp_path: Path) -> None:
    saved = medgmae.create_model("vit_nano_patch8_32")
    medgmae.save_pretrained(saved, tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors", str(tmp_path), saved.state_dict()):
        model = medgmae.create_model("vit_nano_patch8_32", pretrained=source)
        assert torch.equal(model.cls_token, saved.cls_token)
        assert model.load_report.loaded


@pytest.mark.parametrize("source", [1, 0.5, "", {}, b"bytes"])
def test_what_is_no_source_is_refused(source: Any) -> None:
    with pytest.raises(TypeError, match="pretrained must be"):
        medgmae.create_model("vit_nano_patch8_32", pretrained=source)


def test_names_that_are_paths_or_unfinished() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'local-dir:\./folder'\?"):
        medgmae.create_model("./folder")
    with pytest.raises(ValueError, match="ends without a tag"):
        medgmae.create_model("vit_tiny_patch8_64.")
    with pytest.raises(TypeError, match="Did you mean 'strict'"):
        medgmae.create_model("vit_nano_patch8_32", strct=False)


def test_an_autoencoder_needs_normalised_tokens() -> None:
    with pytest.raises(ValueError, match="normalises its tokens"):
        medgmae.create_model("mae_vit_nano_patch8_32", global_pool="avg")


def test_a_masking_of_another_batch_or_grid_is_refused() -> None:
    model = medgmae.create_model("mae_vit_nano_patch8_32")
    for masking in (medgmae.random_masking(1, 64, 0.75), medgmae.random_masking(2, 27, 0.75)):
        with pytest.raises(ValueError, match="the masking is for"):
            model(torch.rand(2, 1, 32, 32, 32), masking)
    with pytest.raises(ValueError, match="keep is for a batch of 1"):
        model.encoder.forward_features(torch.rand(2, 1, 32, 32, 32), keep=medgmae.random_masking(1, 64, 0.5).keep)


def test_paths_and_timms_words_for_weights(tmp_path: Path) -> None:
    model = randomize(medgmae.create_model("vit_nano_patch8_32"))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    again = medgmae.create_model("vit_nano_patch8_32", checkpoint_path=tmp_path / "w.pth")
    assert_same_state(again, state_copy(model))
    assert not hasattr(medgmae.create_model("vit_nano_patch8_32", checkpoint_path=""), "load_report")
    with pytest.raises(ValueError, match="both name weights"):
        medgmae.create_model("vit_nano_patch8_32", pretrained=True, checkpoint_path=tmp_path / "w.pth")
    with pytest.raises(TypeError, match="name of a model is text or a path, got None"):
        medgmae.create_model(None)  # type: ignore[call-overload]


def test_a_folder_without_its_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    medgmae.save_pretrained(medgmae.create_model("vit_nano_patch8_32"), "finetuned")
    with pytest.raises(ValueError, match="but a folder; did you mean 'local-dir:finetuned'"):
        medgmae.create_model("finetuned")
    with pytest.raises(ValueError, match=r"did you mean 'local-dir:/some/folder'\?"):
        medgmae.create_model("/some/folder")
    with pytest.raises(ValueError, match=r"did you mean 'hf-hub:org/net'\?"):
        medgmae.create_model("hf_hub:org/net")
    with pytest.raises(WeightsError, match=r"saved as a folder; leave out '\.safetensors'"):
        medgmae.save_pretrained(medgmae.create_model("vit_nano_patch8_32"), "model.safetensors")


def test_the_preprocessing_of_a_models_own_card() -> None:
    model = medgmae.create_model("vit_tiny_patch8_64.demo")
    for source in (model, model.pretrained_cfg, "vit_tiny_patch8_64.demo"):
        assert medgmae.create_transform(source).input == medgmae.create_transform(model.pretrained_cfg["input"]).input


def test_names_are_listed_by_parts_of_them() -> None:
    assert medgmae.list_models("nano") == [name for name in medgmae.list_models() if "nano" in name]
    both = medgmae.list_models(["vim_*", "gmae_vit_nano*"])
    assert both == sorted([*medgmae.list_models("vim_*"), "gmae_vit_nano_patch8_32"])
    assert medgmae.list_models("tangerine", pretrained=True) == [
        "mae_vit_large_patch16_256.tangerine",
        "vit_large_patch16_256.tangerine",
    ]
