"""Every dialect of the border: what is recognised loads exactly, anything else is an error and changes nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dialects import CONTAINERS, DIALECTS, State, to_mae3d, to_masked_autoencoder, to_timm_encoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import assert_same_state, randomize, state_copy
from torch import Tensor

import medgmae
from medgmae import WeightsError
from medgmae.checkpoints.dialects.entries import Target, strip_prefixes
from medgmae.checkpoints.dialects.recognise import convert

NANO = "mae_vit_nano_patch8_32"


def nano(sigmoid: bool = False, seed: int = 0) -> Any:
    """A nano autoencoder whose every entry is random, with a zero position for the class token as in all recipes."""
    model = randomize(medgmae.create_model(NANO, sigmoid=sigmoid), seed)
    with torch.no_grad():
        model.decoder.prefix_pos_embed.zero_()
    return model


SOURCE = state_copy(nano())
ENCODER = {name.removeprefix("encoder."): value for name, value in SOURCE.items() if name.startswith("encoder.")}


def nano_encoder(**options: Any) -> Any:
    return randomize(medgmae.create_model("vit_nano_patch8_32", **options), seed=8)


def refused(model: Any, source: Any, match: str, **options: Any) -> None:
    """``source`` raises a WeightsError that says ``match``, and the model is bit for bit as before."""
    before = state_copy(model)
    with pytest.raises(WeightsError, match=match):
        medgmae.load_pretrained(model, source, **options)
    assert_same_state(model, before)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_in_every_container_fills_the_encoder_exactly(
    dialect: str, container: str, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(CONTAINERS[container](DIALECTS[dialect][0](SOURCE)), path)
    encoder = nano_encoder()
    report = medgmae.load_pretrained(encoder, path)
    assert_same_state(encoder, ENCODER)
    assert sorted(report.loaded) == sorted(ENCODER)
    assert not report.missing
    assert not report.resized
    assert not report.adapted


@pytest.mark.parametrize("dialect", [name for name, (_, whole) in DIALECTS.items() if whole])
def test_whole_autoencoders_fill_both_parts_exactly(dialect: str) -> None:
    model = nano(sigmoid=dialect == "tangerine", seed=8)
    report = medgmae.load_pretrained(model, DIALECTS[dialect][0](SOURCE))
    assert_same_state(model, SOURCE)
    assert not report.unused
    assert not report.missing


@pytest.mark.parametrize("dialect", [name for name, (_, whole) in DIALECTS.items() if not whole])
def test_an_encoder_alone_does_not_make_an_autoencoder_unless_asked(dialect: str) -> None:
    model = nano(seed=8)
    state = DIALECTS[dialect][0](SOURCE)
    other = "decoder: the file has another type of decoder than the model's ViTDecoder; strict=False leaves it out"
    refused(model, state, other if dialect == "medgmae" else r"decoder.embed.weight: not in the file")
    decoder = state_copy(model.decoder)
    report = medgmae.load_pretrained(model, state, strict=False)
    assert_same_state(model.encoder, ENCODER)
    assert_same_state(model.decoder, decoder)
    assert sorted(report.missing) == sorted(name for name in SOURCE if name.startswith("decoder."))


PREFIXES = st.lists(st.sampled_from(["module.", "model.", "_orig_mod."]), max_size=3).map("".join)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dialect=st.sampled_from(list(DIALECTS)),
    container=st.sampled_from(list(CONTAINERS)),
    prefix=PREFIXES,
    order=st.randoms(use_true_random=False),
    damage=st.sampled_from(["none", "drop", "extra", "shape", "double"]),
    count=st.integers(1, 3),
    strict=st.booleans(),
    into=st.sampled_from(["encoder", "autoencoder"]),
)
def test_a_file_loads_exactly_or_not_at_all(
    dialect: str, container: str, prefix: str, order: Any, damage: str, count: int, strict: bool, into: str
) -> None:
    state = DIALECTS[dialect][0](SOURCE)
    names = list(state)
    order.shuffle(names)
    hit = names[:count]
    state = {prefix + name: state[name] for name in names}
    if damage == "drop":
        for name in hit:
            del state[prefix + name]
    elif damage == "extra":
        place = order.choice(["encoder.", "blocks.0.", "blocks.7.", ""])
        state |= {f"{prefix}{place}spare.{name}": torch.ones(3) for name in hit}
    elif damage == "shape":
        for name in hit:
            state[prefix + name] = state[prefix + name][..., :-1].clone()
    elif damage == "double":
        state |= {f"{prefix}module.{name}": state[prefix + name] + 1 for name in hit}
    model = nano(sigmoid=dialect == "tangerine", seed=8) if into == "autoencoder" else nano_encoder()
    before, wanted = state_copy(model), SOURCE if into == "autoencoder" else ENCODER
    try:
        report = medgmae.load_pretrained(model, CONTAINERS[container](state), strict=strict)
    except WeightsError:
        report = None
    if report is None:
        assert damage != "none" or (into == "autoencoder" and strict and not DIALECTS[dialect][1])
        assert_same_state(model, before)
        return
    if damage in ("drop", "shape"):  # what was hit is not the encoder's, or was fitted and is reported
        hit_encoder = {name for name in hit if _is_encoders(name, dialect)}
        assert all(name.endswith("patch_embed.proj.weight") for name in hit_encoder)
        assert len(report.adapted) == len(hit_encoder)
    assert damage != "double"  # one name twice: which one is meant cannot be known
    expected = {n: wanted[n] if n in report.loaded else before[n] for n in before}
    expected |= {n: model.state_dict()[n] for n in report.adapted}
    assert_same_state(model, expected)
    assert set(report.missing) | set(report.loaded) == set(before)
    assert all(name.startswith("decoder.") for name in report.missing)
    assert not (strict and report.missing)


def _is_encoders(name: str, dialect: str) -> bool:
    """Whether an entry of a file belongs to the encoder."""
    if dialect in ("mae3d", "uva", "medgmae", "ours", "unetr"):
        return name.startswith(("encoder.", "encoder_pos_embed"))
    if dialect == "glmae":
        return name.startswith("module.backbone.")
    return not name.startswith(("decoder", "mask_token"))


def test_one_name_twice_is_refused() -> None:
    state = to_timm_encoder(SOURCE)
    refused(nano_encoder(), {**state, "module.norm.bias": torch.zeros(48)}, "are both 'norm.bias' without prefixes")


def test_prefixes_come_off_in_any_number_and_order() -> None:
    assert strip_prefixes("module.model._orig_mod.module.model.x.module.y") == "x.module.y"


@pytest.mark.parametrize("name", ["blocks.0.attn.q_norm.weight", "blocks.1.mlp.w12.weight", "rope.freqs"])
def test_parts_that_change_the_features_are_refused_by_name(name: str) -> None:
    refused(nano_encoder(), {**to_timm_encoder(SOURCE), name: torch.ones(1, 1, 48)}, re.escape(name))


@pytest.mark.parametrize(
    "state", [{"conv1.weight": torch.ones(3)}, {"encoder.x": torch.ones(2), "decoder.y": torch.ones(2)}]
)
def test_what_is_not_a_vit_is_refused_with_its_names(state: State) -> None:
    refused(nano_encoder(), state, f"not recognised.*{next(iter(state))}")


def test_a_class_row_goes_into_the_class_token() -> None:
    state = to_timm_encoder(SOURCE)
    row = torch.randn(1, 1, 48)
    state["pos_embed"] = torch.cat([row, state["pos_embed"][:, 1:]], 1)
    encoder = nano_encoder()
    medgmae.load_pretrained(encoder, state)
    assert_same_state(encoder, {**ENCODER, "cls_token": ENCODER["cls_token"] + row})


def test_a_decoders_class_row_is_kept() -> None:
    state = to_masked_autoencoder(SOURCE)
    row = torch.randn(1, 1, 24)
    state["decoder_pos_embed"] = torch.cat([row, state["decoder_pos_embed"][:, 1:]], 1)
    model = nano(seed=8)
    medgmae.load_pretrained(model, state)
    assert_same_state(model, {**SOURCE, "decoder.prefix_pos_embed": row})


def test_a_sigmoid_head_and_a_plain_one_are_not_mixed_up() -> None:
    refused(nano(sigmoid=True), to_masked_autoencoder(SOURCE), "decoder.sigmoid: False in the file")
    refused(nano(), to_masked_autoencoder(SOURCE, sigmoid=True), "decoder.sigmoid: True in the file")
    refused(nano(sigmoid=True), to_mae3d(SOURCE), "decoder.sigmoid: False in the file")
    medgmae.load_pretrained(nano_encoder(), to_masked_autoencoder(SOURCE, sigmoid=True))


def test_the_gaussian_decoder_is_left_out_and_said() -> None:
    report = medgmae.load_pretrained(nano_encoder(), DIALECTS["medgmae"][0](SOURCE))
    assert "MedGMAE" in report.source
    assert report.unused["decoder.scale_head.weight"] == report.unused["gaussian_query_tokens"] == "decoder"


def test_a_decoder_of_gaussians_does_not_go_into_one_of_voxels() -> None:
    state = DIALECTS["medgmae"][0](SOURCE)  # the names of blocks and norms are the same in both
    refused(nano(seed=8), state, "decoder: the file has another type of decoder than the model's ViTDecoder")
    report = medgmae.load_pretrained(nano(seed=8), state, strict=False)
    assert report.unused["decoder.norm.weight"] == "the file has another type of decoder than the model's ViTDecoder"
    assert "decoder.norm.weight" in report.missing


@pytest.mark.parametrize(
    "name", ["pos_embed", "cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "blocks.1.mlp.fc2.bias"]
)
@pytest.mark.parametrize("whole", [True, False])
def test_an_encoder_entry_that_is_missing_is_named_whatever_strict_is(name: str, whole: bool) -> None:
    for strict in (True, False):
        state = to_masked_autoencoder(SOURCE)
        del state[name]
        refused(nano(seed=8) if whole else nano_encoder(), state, re.escape(name.split(".")[0]), strict=strict)


def test_entries_without_a_place_are_errors_or_reported() -> None:
    state = {**to_timm_encoder(SOURCE), "spare.weight": torch.ones(2)}
    refused(nano_encoder(), state, "spare.weight: in the file, but the model has no such part")
    encoder = nano_encoder()
    report = medgmae.load_pretrained(encoder, state, strict=False)
    assert report.unused == {"spare.weight": "unknown name"}
    assert_same_state(encoder, ENCODER)
    deeper = {**to_timm_encoder(SOURCE), "blocks.2.norm1.weight": torch.ones(48)}
    for strict in (True, False):
        refused(nano_encoder(), deeper, r"blocks.2.norm1.weight: in the file, but", strict=strict)


@pytest.mark.parametrize("rows", [(60, 48), (64,), (1, 64, 48, 1), (2, 64, 48), (1, 0, 48), ()])
@pytest.mark.parametrize("name", ["pos_embed", "cls_token", "patch_embed.proj.weight"])
def test_shapes_that_no_vit_has_are_errors(name: str, rows: tuple[int, ...]) -> None:
    refused(
        nano_encoder(),
        {**to_timm_encoder(SOURCE), name: torch.zeros(rows)},
        r"expected \(1, rows, width\)|has \d+ rows|in the file|not a ViT's|is linear|not as wide",
    )


def test_ambiguous_grids_are_asked_for() -> None:
    wide = nano_encoder(img_size=(16, 32, 64))  # 2 x 4 x 8 = 64 patches, as many as in the cube
    refused(wide, to_timm_encoder(SOURCE), r"\(2, 4, 8\).*or \(4, 4, 4\).*source_grid")
    report = medgmae.load_pretrained(wide, to_timm_encoder(SOURCE), source_grid=(4, 4, 4))
    assert report.resized == {"pos_embed": "grid (4, 4, 4) to (2, 4, 8)"}
    expected = medgmae.resample_pos_embed(ENCODER["pos_embed"], (4, 4, 4), (2, 4, 8))
    assert torch.equal(wide.pos_embed, expected)
    medgmae.load_pretrained(wide, to_timm_encoder(SOURCE), source_grid=(2, 4, 8))
    assert torch.equal(wide.pos_embed, ENCODER["pos_embed"])
    refused(wide, to_timm_encoder(SOURCE), r"not \(3, 3, 3\)", source_grid=(3, 3, 3))
    slab = {**to_timm_encoder(SOURCE), "pos_embed": torch.zeros(1, 13, 48)}
    refused(nano_encoder(), slab, "grid is unknown")


def test_the_grid_is_known_without_a_model_where_it_is_a_cube() -> None:
    found = convert(to_masked_autoencoder(SOURCE))
    assert found.grid == (4, 4, 4)
    assert found.source == "masked autoencoder with timm's names"
    assert convert(to_mae3d(SOURCE), target=Target((2, 2, 2), (8, 8, 8), 1)).grid == (4, 4, 4)


@given(st.lists(st.tuples(st.text(max_size=12), st.lists(st.integers(0, 3), max_size=4)), max_size=6))
@settings(max_examples=60, deadline=None)
def test_arbitrary_dictionaries_are_refused(entries: list[tuple[str, list[int]]]) -> None:
    with pytest.raises(WeightsError):
        medgmae.load_pretrained(FIXED, {name: torch.zeros(shape) for name, shape in entries})
    assert_same_state(FIXED, FIXED_STATE)


FIXED = nano_encoder()
FIXED_STATE: dict[str, Tensor] = state_copy(FIXED)


def test_numpy_arrays_are_not_tensors() -> None:
    refused(nano_encoder(), {n: np.asarray(t) for n, t in to_timm_encoder(SOURCE).items()}, "no weights found")
