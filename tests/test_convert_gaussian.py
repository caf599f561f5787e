"""The border for MedGMAE's Gaussian decoders: every kind and spelling loads exactly, or nothing changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from dialects import CONTAINERS, to_mae3d, to_medgmae
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import assert_same_state, randomize, state_copy
from torch import Tensor

import medgmae
from medgmae import WeightsError
from medgmae.checkpoints.dialects.gaussian import turn_rotation

NANO = "gmae_vit_nano_patch8_32"
KINDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "residual": {"kind": "residual", "ratios": (2,)},
    "hierarchical": {"kind": "hierarchical", "ratios": (2, 1)},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def nano(kind: str = "standard", seed: int = 8, **options: Any) -> Any:
    """A small model with MedGMAE's support and start, every entry random."""
    chosen = {"support": "box", "spread": False, "num_gaussians": 6, **KINDS[kind], **options}
    return randomize(medgmae.create_model(NANO, **chosen), seed)


SOURCES = {kind: state_copy(nano(kind, seed=0)) for kind in KINDS}
FILES = {kind: to_medgmae(state, wrapped=kind != "standard") for kind, state in SOURCES.items()}


def refused(model: Any, source: Any, match: str, **options: Any) -> None:
    """``source`` raises a WeightsError that says ``match``, and the model is bit for bit as before."""
    before = state_copy(model)
    with pytest.raises(WeightsError, match=match):
        medgmae.load_pretrained(model, source, **options)
    assert_same_state(model, before)


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("wrapped", [True, False], ids=["base_decoder", "plain"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
@every_kind
def test_every_spelling_fills_the_model_exactly(kind: str, prefix: str, wrapped: bool, tmp_path: Path) -> None:
    state = prefixed(to_medgmae(SOURCES[kind], wrapped), prefix)
    path = tmp_path / "med_gmae_vit_base_mix_ckpt_0020.pth"
    torch.save({**CONTAINERS["best model"](state), "optimizer": {}, "scaler": {"scale": 65536.0}, "phase": "x"}, path)
    model = nano(kind)
    report = medgmae.load_pretrained(model, path)
    assert_same_state(model, SOURCES[kind])
    assert not report.missing
    assert not report.resized
    assert not report.adapted
    assert "MedGMAE" in report.source
    assert (kind in report.source) == (kind != "standard")
    assert report.unused == {
        f"{prefix}mask_token": "MedGMAE's Gaussian decoder reads no mask tokens",
        f"{prefix}decoder_pos_embed": "MedGMAE's Gaussian decoder adds no positions",
    }


@every_kind
def test_the_encoder_alone_loads_from_every_kind(kind: str) -> None:
    encoder = randomize(medgmae.create_model("vit_nano_patch8_32"), seed=8)
    report = medgmae.load_pretrained(encoder, FILES[kind])
    expected = {n.removeprefix("encoder."): t for n, t in SOURCES[kind].items() if n.startswith("encoder.")}
    assert_same_state(encoder, expected)
    assert set(report.unused) == {name for name in FILES[kind] if not name.startswith(("encoder.", "encoder_pos"))}


@every_kind
def test_quaternions_are_conjugated_and_nothing_else_changes(kind: str) -> None:
    # The same numbers as a file of the authors and as one of ours: what the turned heads give is the opposite rotation.
    tokens = torch.randn(2, 5, 48)
    ours, theirs = nano(kind), nano(kind)
    medgmae.load_pretrained(ours, SOURCES[kind])
    state = to_medgmae(SOURCES[kind])
    for name in [name for name in state if "rotation_head" in name]:
        state[name] = SOURCES[kind][name]
    medgmae.load_pretrained(theirs, state)
    expected, found = ours.decoder(tokens), theirs.decoder(tokens)
    assert found.quats.shape[1] == 6 * (1 + sum(KINDS[kind].get("ratios", ())))
    torch.testing.assert_close(found.quats, expected.quats * torch.tensor([1.0, -1.0, -1.0, -1.0]))
    for name in ("means", "scales", "densities"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("kind", ["residual", "hierarchical"])
def test_a_standard_file_fills_the_base_of_another_kind_when_asked(kind: str) -> None:
    refused(
        nano(kind), FILES["standard"], rf"decoder.kind: 'standard' in the file's model, '{kind}' in this one; strict"
    )
    model = nano(kind)
    before = state_copy(model)
    report = medgmae.load_pretrained(model, FILES["standard"], strict=False)
    extra = [name for name in before if "_heads." in name]
    assert sorted(report.missing) == sorted(extra)
    assert report.adapted == {"decoder.kind": f"'standard' in the file's model, '{kind}' in this one"}
    base = {name: before[name] if name in extra else SOURCES["standard"][name] for name in before}
    assert_same_state(model, base)
    assert all(name in str(report) for name in extra[:8])
    assert f"and {len(extra) - 8} more" in str(report)


@pytest.mark.parametrize("kind", ["residual", "hierarchical"])
def test_the_base_of_another_kind_fills_a_standard_model_when_asked(kind: str) -> None:
    refused(nano(), FILES[kind], rf"decoder.kind: '{kind}' in the file's model, 'standard' in this one")
    model = nano()
    report = medgmae.load_pretrained(model, FILES[kind], strict=False)
    assert_same_state(model, {name: SOURCES[kind][name] for name in SOURCES["standard"]})
    assert {name for name in FILES[kind] if "_heads." in name} <= set(report.unused)
    assert not report.missing


def test_other_ratios_are_refused() -> None:
    refused(nano("residual", ratios=(3,)), FILES["residual"], r"residual_position_heads.2.weight: not in the file")
    refused(
        nano("residual", ratios=(1,)), FILES["residual"], r"residual_position_heads.1.weight: the model's decoder has"
    )


def test_another_number_of_gaussians_is_refused() -> None:
    refused(
        nano(num_gaussians=7), FILES["standard"], r"query_tokens: \(1, 6, 24\) in the file, \(1, 7, 24\) in the model"
    )
    report = medgmae.load_pretrained(nano(num_gaussians=7), FILES["standard"], strict=False)
    assert report.missing == ["decoder.query_tokens"]
    assert report.unused["gaussian_query_tokens"] == "decoder of another shape"


@pytest.mark.parametrize("support", [4.0, None])
def test_another_support_is_refused_or_said(support: float | None) -> None:
    match = rf"renderer.support: 'box' in the file's model, {support} in this one; strict=False"
    refused(nano(support=support), FILES["standard"], match)
    model = nano(support=support)
    report = medgmae.load_pretrained(model, FILES["standard"], strict=False)
    assert report.adapted == {"renderer.support": f"'box' in the file's model, {support} in this one"}
    assert model.renderer.support == support
    assert not report.missing


def test_another_density_scale_is_refused_whatever_strict_is() -> None:
    for strict in (True, False):
        refused(nano(density_scale=1.0), FILES["standard"], "decoder.density_scale: 0.1 in", strict=strict)


def test_an_entry_with_and_without_the_wrapper_is_refused() -> None:
    state = {**FILES["residual"], "decoder.norm.bias": torch.zeros(24)}
    match = r"(base_decoder|decoder\.norm\.bias).*stands for 'decoder.norm.bias', which is in the file twice"
    refused(nano("residual"), state, match)
    encoder = randomize(medgmae.create_model("vit_nano_patch8_32"))
    refused(encoder, state, match)


@pytest.mark.parametrize(
    "name",
    [
        "gaussian_query_tokens",
        "decoder.rotation_head.bias",
        "decoder.blocks.0.attn.qkv.weight",
        "encoder_to_decoder.bias",
    ],
)
def test_a_missing_part_is_named(name: str) -> None:
    state = {key: value for key, value in FILES["standard"].items() if key != name}
    ours = name.replace("gaussian_query", "decoder.query").replace("encoder_to_decoder", "decoder.embed")
    refused(nano(), state, rf"{re.escape(ours)}: not in the file")
    assert medgmae.load_pretrained(nano(), state, strict=False).missing == [ours]


def test_a_part_that_is_not_known_is_named() -> None:
    state = {**FILES["standard"], "decoder.cgs_head.weight": torch.ones(3)}
    refused(nano(), state, "decoder.cgs_head.weight: the model's decoder has no such part")
    report = medgmae.load_pretrained(nano(), state, strict=False)
    assert report.unused["decoder.cgs_head.weight"] == "unknown to the decoder"


def test_level_heads_in_one_piece_are_refused_by_name() -> None:
    # The authors' code with these heads is not public; what is known of it has one entry for every head.
    state = {name: tensor for name, tensor in FILES["hierarchical"].items() if "_heads." not in name}
    state |= {f"decoder.level{level}_rotation_heads.weight": torch.ones(8, 24) for level in (1, 2)}
    refused(nano("hierarchical"), state, r"decoder.level1_rotation_heads.weight: the model's decoder has no such part")
    refused(nano(), state, "decoder.kind: 'hierarchical' in the file's model, 'standard' in this one")


@pytest.mark.parametrize("shape", [(5, 24), (3, 24), (8, 24), (4,), (), (0, 24)])
def test_a_rotation_head_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    state = {**FILES["standard"], "decoder.rotation_head.weight": torch.ones(shape)}
    refused(nano(), state, r"decoder.rotation_head.weight: \(")


def test_a_rotation_head_that_is_not_of_real_numbers_is_refused() -> None:
    for head in (torch.ones(4, 24, dtype=torch.bool), torch.ones(4, 24).to_sparse()):
        state = {**FILES["standard"], "decoder.rotation_head.weight": head}
        refused(nano(), state, "decoder.rotation_head.weight(: torch|' is sparse)")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_rotation_heads_are_turned_in_any_precision(dtype: torch.dtype) -> None:
    head = torch.randn(4, 24).to(dtype)
    expected = head.float() * torch.tensor([[1.0], [-1.0], [-1.0], [-1.0]])
    assert torch.equal(turn_rotation("decoder.rotation_head.weight", head).float(), expected)
    other = "decoder.rotation_head_norm.weight"
    assert turn_rotation(other, head) is head


def test_a_decoder_of_voxels_is_left_out_whole() -> None:
    voxels = to_mae3d(state_copy(randomize(medgmae.create_model("mae_vit_nano_patch8_32"))))
    refused(nano(), voxels, "decoder: the file has another type of decoder than the model's GaussianDecoder")
    model = nano()
    before = state_copy(model.decoder)
    report = medgmae.load_pretrained(model, voxels, strict=False)
    assert_same_state(model.decoder, before)
    assert report.unused["decoder.norm.weight"].endswith("another type of decoder than the model's GaussianDecoder")
    assert torch.equal(model.encoder.norm.weight, voxels["encoder.norm.weight"])


def test_a_model_whose_positions_start_spread_gets_no_offset() -> None:
    model, plain = nano(spread=True), nano()
    medgmae.load_pretrained(model, FILES["standard"])
    medgmae.load_pretrained(plain, FILES["standard"])
    assert torch.equal(model.decoder.position_bias, torch.zeros(1, 6, 3))
    tokens = torch.randn(1, 3, 48)
    assert torch.equal(model.decoder(tokens).means, plain.decoder(tokens).means)


@pytest.mark.parametrize("kind", [*KINDS, "cgs"])
@pytest.mark.parametrize("support", ["box", 3.0, None])
def test_our_own_files_come_back(kind: str, support: Any, tmp_path: Path) -> None:
    options = {"kind": "cgs", "ratios": (1, 1, 2), "decoder_depth": 4} if kind == "cgs" else KINDS[kind]
    model = randomize(medgmae.create_model(NANO, num_gaussians=5, support=support, loss="reference", **options))
    medgmae.save_pretrained(model, tmp_path)
    again: Any = medgmae.create_model(f"local-dir:{tmp_path}")
    assert_same_state(again, state_copy(model))
    assert (again.renderer.support, again.loss) == (support, "reference")
    x = torch.rand(1, 1, 32, 32, 32)
    masking = medgmae.random_masking(1, 64, 0.75, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x, masking).loss, model(x, masking).loss)
    # The settings that no tensor shows travel with the file.
    other: Any = medgmae.create_model(NANO, num_gaussians=5, support=2.0, **options)
    refused(other, tmp_path, rf"renderer.support: {support!r} in the file's model, 2.0 in this one")
    bare = medgmae.create_model(NANO, num_gaussians=5, support=2.0, **options)
    assert not medgmae.load_pretrained(bare, state_copy(model)).unused  # names alone, of which it is said nothing else
    assert_same_state(bare, state_copy(model))


def test_a_setting_that_was_changed_by_hand_is_not_lost_in_silence(tmp_path: Path) -> None:
    model = nano()
    model.renderer.support = 4.0
    with pytest.raises(WeightsError, match=r"renderer\.support changed"):
        medgmae.save_pretrained(model, tmp_path)


@every_kind
def test_inspection_says_what_to_build(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(CONTAINERS["best model"](prefixed(FILES[kind], "module.")), path)
    facts = medgmae.inspect_checkpoint(path)
    assert facts["problem"] is None or kind != "standard"  # a nano model of another kind is not registered
    assert facts["sizes"]["kind"] == kind
    assert facts["sizes"]["num_gaussians"] == 6
    assert facts["sizes"]["ratios"] == list(KINDS[kind].get("ratios", ()))
    assert facts["encoder_architecture"] == "vit_nano_patch8_32"
    if kind == "standard":
        assert facts["architecture"] == NANO
        assert facts["model_args"] == {"num_gaussians": 6, "support": "box"}
        model: Any = medgmae.create_model(NANO, pretrained=path, **facts["model_args"])
        assert torch.equal(model.decoder.query_tokens, FILES[kind]["gaussian_query_tokens"])


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(list(KINDS)),
    into=st.sampled_from(list(KINDS)),
    damage=st.sampled_from(["drop", "shape", "extra", "double"]),
    which=st.integers(0, 200),
    strict=st.booleans(),
)
def test_a_damaged_file_loads_what_it_says_or_nothing(
    kind: str, into: str, damage: str, which: int, strict: bool
) -> None:
    state = dict(FILES[kind])
    hit = sorted(state)[which % len(state)]
    if damage == "drop":
        del state[hit]
    elif damage == "shape":
        state[hit] = state[hit][..., :-1].clone()
    elif damage == "extra":
        state[f"{hit}.spare"] = torch.ones(2)
    else:
        state[f"module.{hit}"] = state[hit] + 1
    model = nano(into)
    before = state_copy(model)
    try:
        report = medgmae.load_pretrained(model, state, strict=strict)
    except WeightsError:
        assert_same_state(model, before)
        return
    assert damage != "double"
    expected = {name: SOURCES[kind][name] if name in report.loaded else before[name] for name in before}
    expected |= {name: model.state_dict()[name] for name in report.adapted if name in before}
    assert_same_state(model, expected)
    assert set(report.missing) | set(report.loaded) == set(before)
    assert not (strict and report.missing)
    assert not strict or kind == into
    assert all(name.startswith("decoder.") for name in report.missing)
