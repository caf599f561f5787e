"""The border for state-space encoders: the 3D Mamba MAE's files of both stages, and our own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from dialects import CONTAINERS, State, to_mamba_classifier, to_mamba_mae
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import assert_same_state, randomize, state_copy
from torch import Tensor

import medgmae
from medgmae import WeightsError
from medgmae.checkpoints.dialects.recognise import convert

PUBLISHED: dict[str, Any] = {"rope": "sequence", "scan_order": "given", "off_by_one": True}


def autoencoder(seed: int = 0, **options: Any) -> Any:
    return randomize(medgmae.create_model("mae_vim_nano_patch8_32", **{**PUBLISHED, **options}), seed)


def classifier(seed: int = 8, **options: Any) -> Any:
    options = {"rope": "axial_published", "num_classes": 3, **options}
    return randomize(medgmae.create_model("vim_nano_patch8_32", **options), seed)


SOURCE = state_copy(autoencoder())
ENCODER = {name.removeprefix("encoder."): value for name, value in SOURCE.items() if name.startswith("encoder.")}
CLASSIFIER = state_copy(classifier(seed=1))


def refused(model: Any, source: Any, match: str, **options: Any) -> None:
    """``source`` raises a WeightsError that says ``match``, and the model is bit for bit as before."""
    before = state_copy(model)
    with pytest.raises(WeightsError, match=match):
        medgmae.load_pretrained(model, source, **options)
    assert_same_state(model, before)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_pretraining_file_fills_both_parts_exactly(container: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-999.pth"
    torch.save(CONTAINERS[container](to_mamba_mae(SOURCE)), path)
    model = autoencoder(seed=8)
    report = medgmae.load_pretrained(model, path)
    assert_same_state(model, SOURCE)
    assert "3D Mamba MAE, pre-training" in report.source
    assert report.unused == {
        "cls_token": "class token that the authors' 3D models create and never read",
        "rope.freqs": "rotary frequencies: the model computes them",
        "decoder_rope.freqs": "rotary frequencies: the model computes them",
    }
    assert not report.missing
    assert not report.adapted


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("rope", ["sequence", "axial", "axial_published", None])
def test_its_encoder_becomes_a_classifier_whatever_the_rotation(num_classes: int, rope: str | None) -> None:
    model = classifier(num_classes=num_classes, rope=rope)
    head = state_copy(model.head)
    report = medgmae.load_pretrained(model, to_mamba_mae(SOURCE))
    assert_same_state(model, {**ENCODER, **{f"head.{name}": value for name, value in head.items()}})
    assert report.missing == [f"head.{name}" for name in head]
    assert report.unused["decoder_blocks.0.norm.weight"] == report.unused["mask_token"] == "decoder"
    told = {"rope": f"'sequence' in the file's model, {rope!r} in this one"} if rope != "sequence" else {}
    assert report.adapted == {**told, "scan_order": "'given' in the file's model, 'raster' in this one"}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_fine_tuning_file_fills_a_classifier_exactly(container: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-_fold_0_epoch_99.pth"
    torch.save(CONTAINERS[container](to_mamba_classifier(CLASSIFIER, 4)), path)
    model = classifier()
    report = medgmae.load_pretrained(model, path)
    assert_same_state(model, CLASSIFIER)
    assert "3D Mamba MAE, fine-tuning" in report.source
    reason = "rotary table: the model computes it for the grid at hand"
    assert report.unused == {"rope.freqs_cos": reason, "rope.freqs_sin": reason}
    other = classifier(num_classes=2)
    report = medgmae.load_pretrained(other, path)
    assert report.unused["head.bias"] == "head of shape (3,), the model's is (2,)"
    refused(classifier(rope="axial"), path, "rope: 'axial_published' in the file's model, 'axial' in this one; build")
    refused(autoencoder(), path, "decoder.embed.weight: not in the file")


@pytest.mark.parametrize(("whole", "place"), [(False, "front"), (False, "middle"), (False, "double"), (True, "front")])
def test_class_tokens_stand_where_they_stood(whole: bool, place: Any) -> None:
    options: dict[str, Any] = (
        {"class_token": place, "off_by_one": False} if whole else {"class_token": place, "rope": None}
    )
    make: Any = autoencoder if whole else classifier
    source = make(seed=1, **options)
    official = (to_mamba_mae if whole else lambda s, p: to_mamba_classifier(s, 4, p))(source.state_dict(), place)
    model = make(seed=2, **options)
    report = medgmae.load_pretrained(model, official)
    assert not report.missing
    torch.testing.assert_close(dict(model.state_dict()), dict(source.state_dict()))
    encoder = model.encoder if whole else model
    x = torch.rand(1, 1, 32, 32, 32)
    patches = encoder.patch_embed(x)
    cut = 32 if place == "middle" else 0
    head = official.get("cls_token", official.get("cls_token_head"))
    tail = [official["cls_token_tail"]] if place == "double" else []
    sequence = torch.cat([patches[:, :cut], head, patches[:, cut:], *tail], 1) + official["pos_embed"]
    torch.testing.assert_close(encoder._sequence(x, None)[0], sequence)


def test_a_class_token_without_a_place_is_an_error() -> None:
    official = to_mamba_classifier(classifier(class_token="middle", rope=None).state_dict(), 4, "middle")
    refused(classifier(rope=None), official, "cls_token: in the file, but the model has no such part")
    refused(classifier(class_token="double", rope=None), official, r"cls_token: \(1, 1, 48\) in the file, \(1, 2, 48\)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope": "axial"}, r"encoder.rope: 'sequence' in the file's model, 'axial' in this one; .*rope='sequence'"),
        ({"rope": "axial"}, r"decoder.rope: 'sequence'"),
        ({"rope": None}, r"encoder.rope: 'sequence' in the file's model, None"),
        ({"scan_order": "raster"}, r"scan_order: 'given' in .*create_model\(..., scan_order='given'\)"),
        ({"off_by_one": False}, r"off_by_one: True in .*create_model\(..., off_by_one=True\)"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_an_autoencoder_with_other_settings_is_refused_with_the_option(
    options: dict[str, Any], message: str, strict: bool
) -> None:
    refused(autoencoder(**options), to_mamba_mae(SOURCE), message, strict=strict)


def test_files_without_rotation_need_a_model_without() -> None:
    pretrained = {name: value for name, value in to_mamba_mae(SOURCE).items() if "rope" not in name}
    refused(autoencoder(), pretrained, "encoder.rope: None in the file's model, 'sequence' in this one")
    medgmae.load_pretrained(autoencoder(rope=None), pretrained)
    tuned = {name: value for name, value in to_mamba_classifier(CLASSIFIER, 4).items() if "rope" not in name}
    refused(classifier(), tuned, "rope: None in the file's model, 'axial_published' in this one")
    medgmae.load_pretrained(classifier(rope=None), tuned)


@pytest.mark.parametrize("name", ["rope.freqs", "decoder_rope.freqs"])
def test_other_rotary_frequencies_are_refused(name: str) -> None:
    official = to_mamba_mae(SOURCE)
    refused(autoencoder(), official | {name: official[name] * 1.1}, f"{name!r} holds other rotary frequencies")
    refused(autoencoder(), official | {name: official[name][None]}, f"{name!r} holds other rotary frequencies")
    medgmae.load_pretrained(autoencoder(), official | {name: official[name].bfloat16()})


@pytest.mark.parametrize("name", ["rope.freqs_cos", "rope.freqs_sin"])
def test_another_rotary_table_is_refused(name: str) -> None:
    official = to_mamba_classifier(CLASSIFIER, 4)
    for changed in (official[name][:-1], official[name].flip(0), official[name][:, :-2]):
        refused(classifier(), official | {name: changed}, f"{name!r} of shape .* is not the rotary table of a")
    half = {key: value.half() for key, value in official.items()}
    medgmae.load_pretrained(classifier(), half)
    del official["rope.freqs_sin"]
    refused(classifier(), official, "has no 'rope.freqs_sin'")


@pytest.mark.parametrize("size", [(32, 32, 32), (16, 32, 64), (24, 40, 16), (64, 16, 8)])
def test_tables_go_to_any_grid(size: tuple[int, ...]) -> None:
    """The authors' models know cubes only, so 64 rows are 4 x 4 x 4 even for a model of 2 x 4 x 8."""
    grid = tuple(n // 8 for n in size)
    whole, encoder = autoencoder(seed=8, img_size=size), classifier(img_size=size)
    report = medgmae.load_pretrained(whole, to_mamba_mae(SOURCE))
    expected = {"encoder.pos_embed": f"grid (4, 4, 4) to {grid}", "decoder.pos_embed": f"grid (4, 4, 4) to {grid}"}
    assert report.resized == ({} if grid == (4, 4, 4) else expected)
    for name in expected:
        table = medgmae.resample_pos_embed(SOURCE[name], (4, 4, 4), grid)
        torch.testing.assert_close(whole.state_dict()[name], table)
    medgmae.load_pretrained(encoder, to_mamba_classifier(CLASSIFIER, 4))
    torch.testing.assert_close(encoder.pos_embed, medgmae.resample_pos_embed(CLASSIFIER["pos_embed"], (4, 4, 4), grid))
    x = torch.rand(1, 1, *size)
    with torch.no_grad():
        assert whole(x).pred.isfinite().all()
        same = classifier()  # a cube's table, resampled on the way
        medgmae.load_pretrained(same, to_mamba_classifier(CLASSIFIER, 4))
        torch.testing.assert_close(same(x), encoder(x), rtol=1e-5, atol=1e-5)


def test_the_grid_of_a_file_can_be_passed() -> None:
    source = autoencoder(img_size=(16, 24, 40))
    official = to_mamba_mae(source.state_dict())
    refused(autoencoder(), official, "has 30 rows for patches.* Pass source_grid")
    model = autoencoder(seed=8, img_size=(16, 24, 40))
    medgmae.load_pretrained(model, official)  # as many rows as the model's own grid
    assert_same_state(model, state_copy(source))
    report = medgmae.load_pretrained(autoencoder(), official, source_grid=(2, 3, 5))
    assert report.resized["encoder.pos_embed"] == "grid (2, 3, 5) to (4, 4, 4)"
    refused(autoencoder(), official, "has 30 rows", source_grid=(5, 5, 5))
    assert convert(to_mamba_mae(SOURCE)).grid == (4, 4, 4)


def test_stems_are_adapted_as_those_of_a_vit() -> None:
    model = classifier(in_chans=4)
    report = medgmae.load_pretrained(model, to_mamba_mae(SOURCE))
    stem = ENCODER["patch_embed.proj.weight"]
    torch.testing.assert_close(model.patch_embed.proj.weight, stem.expand(-1, 4, -1, -1, -1) / 4)
    assert report.adapted["patch_embed.proj.weight"].startswith("channels 1 to 4")


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.norm.bias", "blocks.1.mixer.A_b_log", "norm_f.weight"])
@pytest.mark.parametrize("strict", [True, False])
def test_an_encoder_entry_that_is_missing_is_named(name: str, strict: bool) -> None:
    for model, state in ((autoencoder(), to_mamba_mae(SOURCE)), (classifier(), to_mamba_mae(SOURCE))):
        del state[name]
        refused(model, state, re.escape(name.split(".")[0].replace("norm_f", "norm")), strict=strict)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tuned=st.booleans(),
    prefix=st.sampled_from(["", "module.", "_orig_mod.module."]),
    damage=st.sampled_from(["none", "drop", "extra", "shape"]),
    order=st.randoms(use_true_random=False),
    strict=st.booleans(),
)
def test_a_file_loads_exactly_or_not_at_all(tuned: bool, prefix: str, damage: str, order: Any, strict: bool) -> None:
    state = to_mamba_classifier(CLASSIFIER, 4) if tuned else to_mamba_mae(SOURCE)
    wanted = CLASSIFIER if tuned else ENCODER
    names = list(state)
    order.shuffle(names)
    hit = names[0]
    state = {prefix + name: state[name] for name in names}
    if damage == "drop":
        del state[prefix + hit]
    elif damage == "extra":
        state[f"{prefix}blocks.0.spare.{hit}"] = torch.ones(3)
    elif damage == "shape":
        state[prefix + hit] = state[prefix + hit][..., :-1].clone()
    model = classifier() if tuned else classifier(rope="sequence")
    before = state_copy(model)
    try:
        report = medgmae.load_pretrained(model, state, strict=strict)
    except WeightsError:
        assert damage != "none"
        assert_same_state(model, before)
        return
    expected = {n: wanted[n] if n in report.loaded else before[n] for n in before}
    expected |= {n: model.state_dict()[n] for n in report.adapted if n in before}
    assert_same_state(model, expected)
    assert set(report.missing) | set(report.loaded) == set(before)
    assert all(name.startswith("head.") for name in report.missing)


def test_our_own_files_keep_their_settings(tmp_path: Path) -> None:
    model = autoencoder()
    medgmae.save_pretrained(model, tmp_path / "saved")
    again = medgmae.create_model(f"local-dir:{tmp_path / 'saved'}")
    assert_same_state(again, state_copy(model))
    for name, value in PUBLISHED.items():
        other: Any = {"rope": "axial", "scan_order": "raster", "off_by_one": False}[name]
        refused(
            autoencoder(**{name: other}), tmp_path / "saved", rf"{name}: {value!r} in the file's .*{name}={value!r}"
        )
    refused(autoencoder(divide_output=False), tmp_path / "saved", r"divide_output: True in the file's")
    refused(autoencoder(rope_residual=False), tmp_path / "saved", r"rope_residual: True in the file's")
    tuned = classifier()
    report = medgmae.load_pretrained(tuned, tmp_path / "saved")
    assert report.adapted["rope"] == "'sequence' in the file's model, 'axial_published' in this one"
    torch.testing.assert_close(tuned.blocks[1].mixer.A_log, model.encoder.blocks[1].mixer.A_log)
    refused(classifier(divide_output=False), tmp_path / "saved", r"divide_output: True in the file's")


def test_a_saved_encoder_keeps_its_rotation_and_class_token(tmp_path: Path) -> None:
    medgmae.save_pretrained(classifier(class_token="front", global_pool="token", rope="axial"), tmp_path)
    refused(classifier(class_token="front"), tmp_path, "rope: 'axial' in the file's model, 'axial_published'")
    refused(classifier(class_token="middle", rope="axial"), tmp_path, "class_token: 'front' in .*class_token='front'")


def test_our_own_names_without_a_config() -> None:
    report = medgmae.load_pretrained(classifier(), CLASSIFIER)  # nothing tells the rotation
    assert "(medgmae)" in report.source
    model = autoencoder(seed=8)
    medgmae.load_pretrained(model, SOURCE)
    assert_same_state(model, SOURCE)
    middle = classifier(class_token="middle")
    medgmae.load_pretrained(again := classifier(seed=3, class_token="middle"), dict(middle.state_dict()))
    assert_same_state(again, state_copy(middle))
    wide = classifier(img_size=(16, 32, 64))
    table = {**CLASSIFIER, "pos_embed": torch.randn(1, 64, 48)}
    refused(wide, table, r"\(2, 4, 8\).*or \(4, 4, 4\).*source_grid")  # ours need not be a cube


@pytest.mark.parametrize("tag", medgmae.list_weights("*.mamba_mae"))
def test_the_published_pretraining_fits_its_cards(tag: str) -> None:
    patch = re.findall(r"patch\d+", tag)[0]
    manifest = Path(__file__).parent / f"fixtures/mamba_mae/manifest_mae_3d_vim_small_{patch}.json"
    with torch.device("meta"):
        model = medgmae.create_model(tag, pretrained=False)
        file = {name: torch.empty(shape) for name, shape in json.loads(manifest.read_text())["state_dict"].items()}
    report = medgmae.load_pretrained(model, file)
    assert not report.missing
    assert not report.resized
    assert sorted(report.adapted) == ([] if tag.startswith("mae_") else ["rope", "scan_order"])


@pytest.mark.parametrize("path", ["encoder.scan_order", "decoder.rope_residual"])
def test_a_setting_that_was_changed_by_hand_is_not_saved_as_another(path: str, tmp_path: Path) -> None:
    model = autoencoder()
    owner, name = path.split(".")
    part = getattr(model, owner)
    if name == "scan_order":
        part.scan_order = "raster"
    else:
        part.blocks.rope_residual = False
    with pytest.raises(WeightsError, match=f"{path} changed"):
        medgmae.save_pretrained(model, tmp_path / "saved")


def test_a_vit_and_a_vim_are_told_apart() -> None:
    vit = randomize(medgmae.create_model("vit_nano_patch8_32"))
    refused(vit, to_mamba_mae(SOURCE), "does not fit this model")
    refused(classifier(), dict(vit.state_dict()), "does not fit this model")


@pytest.mark.parametrize("whole", [True, False])
def test_inspection_finds_the_architecture_and_its_options(whole: bool, tmp_path: Path) -> None:
    state: State = to_mamba_mae(SOURCE) if whole else to_mamba_classifier(CLASSIFIER, 4)
    torch.save({"model": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    facts = medgmae.inspect_checkpoint(tmp_path / "checkpoint.pth")
    assert facts["problem"] is None
    assert (facts["sizes"]["inner_dim"], facts["sizes"]["d_state"], facts["sizes"]["grid"]) == (96, 16, [4, 4, 4])
    if whole:
        assert (facts["architecture"], facts["encoder_architecture"]) == (
            "mae_vim_nano_patch8_32",
            "vim_nano_patch8_32",
        )
        assert facts["model_args"] == PUBLISHED
    else:
        assert facts["architecture"] == "vim_nano_patch8_32"
        assert facts["model_args"] == {"rope": "axial_published", "num_classes": 3}


@pytest.mark.parametrize("place", ["middle", "double"])
def test_inspection_of_class_tokens(place: Any, tmp_path: Path) -> None:
    model = classifier(class_token=place, global_pool="token", rope=None, in_chans=2, img_size=16)
    torch.save(to_mamba_classifier(model.state_dict(), 2, place), tmp_path / "checkpoint.pth")
    facts = medgmae.inspect_checkpoint(tmp_path / "checkpoint.pth")
    assert facts["problem"] is None
    assert facts["model_args"] == {
        "img_size": 16,
        "in_chans": 2,
        "class_token": place,
        "rope": None,
        "global_pool": "token",
        "num_classes": 3,
    }
    again = medgmae.create_model(facts["architecture"], **facts["model_args"])
    medgmae.load_pretrained(again, tmp_path / "checkpoint.pth")
    x: Tensor = torch.rand(1, 2, 16, 16, 16)
    torch.testing.assert_close(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("options", [PUBLISHED, {"class_token": "front", "off_by_one": False}])
def test_inspection_of_our_own_names_without_a_config(options: dict[str, Any], tmp_path: Path) -> None:
    model = autoencoder(**options)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    facts = medgmae.inspect_checkpoint(tmp_path / "plain.pth")
    assert facts["problem"] is None
    shown = {name: facts["model_args"].get(name) for name in ("off_by_one", "class_token")}
    assert shown == {"off_by_one": options["off_by_one"] or None, "class_token": options.get("class_token")}
