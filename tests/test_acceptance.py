"""Weights on scans: order of tokens, orientation, features; on small files in the official layouts."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from small_models import randomize
from test_convert_primus import to_colipri, to_nnssl, write

import medgmae
from medgmae.checkpoints import cards
from medgmae.cli import main
from medgmae.cli.acceptance import example_scans, known_features, run_checks

INPUT = {
    "modality": "MR",
    "channels": 1,
    "size": [32, 32, 32],
    "resample": {"to": "size"},
    "orientation": "RAS",
    "normalize": "zscore",
}
MAE = {"check": "reconstruction", "model": "mae_primus_nano_patch8_32"}
MR = Path(__file__).parent.parent / "examples/data/mr_brain_t1.nii.gz"


def card_of(**fields: Any) -> medgmae.WeightCard:
    trained_on = {"modalities": ["MR"], "regions": ["head"], "scans": None}
    return medgmae.WeightCard("primus_nano_patch8_32.test", input=INPUT, trained_on=trained_on, **fields)


@functools.cache
def trained() -> Any:
    """A masked autoencoder that has learned one brain by heart, place by place."""
    torch.manual_seed(0)
    model: Any = medgmae.create_model("mae_primus_nano_patch8_32")
    x = medgmae.create_transform(INPUT)(MR).data[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(params=["swapped", "raster"])
def nnssl(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A container of nnssl's whose file does not say in which order its tokens are."""
    return request.param, write(tmp_path / "checkpoint_final.pth", to_nnssl(trained(), request.param), None)


def test_the_right_order_of_tokens_wins(nnssl: tuple[str, Path]) -> None:
    order, file = nnssl
    found = medgmae.verify_weights(card_of(token_order=order, acceptance=MAE), file=file)
    assert found.passed, str(found)
    check = run_checks(found, [MR])[0]
    assert check.passed, str(check)
    assert check.numbers["ratio"] > 1.5
    assert check.numbers["loss"] < check.numbers["loss_of_the_visible_mean"]
    assert f"in the card's token order {order!r}" in check.said
    assert check.seconds > 0
    assert check.peak_bytes is not None
    assert check.peak_bytes > 10**8


def test_a_card_with_the_wrong_order_is_caught(nnssl: tuple[str, Path]) -> None:
    order, file = nnssl
    wrong = {"raster": "swapped", "swapped": "raster"}[order]
    found = medgmae.verify_weights(card_of(token_order=wrong, acceptance=MAE), file=file)
    assert found.passed  # names, shapes and loading cannot tell
    check = run_checks(found, [MR])[0]
    assert check.passed is False
    assert check.numbers["ratio"] < 0.7


def test_weights_that_reconstruct_nothing_are_caught(tmp_path: Path) -> None:
    file = write(tmp_path / "a.pth", to_nnssl(medgmae.create_model(MAE["model"]), "raster"), None)
    found = medgmae.verify_weights(card_of(token_order="raster", acceptance=MAE), file=file)
    check = run_checks(found, [MR])[0]
    assert check.passed is False


def test_features_are_compared_with_those_of_the_card(nnssl: tuple[str, Path]) -> None:
    order, file = nnssl
    found = medgmae.verify_weights(card_of(token_order=order), file=file)
    first = run_checks(found, [MR])
    assert [check.passed for check in first] == [None]
    known = known_features(first)
    assert known is not None
    assert list(known["scans"]) == ["mr_brain_t1.nii.gz"]
    filled = replace(found, card=replace(found.card, features=known))
    assert [check.passed for check in run_checks(filled, [MR])] == [True]
    other = {"raster": "swapped", "swapped": "raster"}[order]
    wrong = replace(filled, card=replace(filled.card, token_order=other))
    check = run_checks(wrong, [MR])[0]
    assert check.passed is False
    assert "from the card's" in check.said


def test_both_orientations_side_by_side(tmp_path: Path) -> None:
    """COLIPRI's layout: no table of positions, projector and pooler, a text tower."""
    options = {"pos_embed": "none", "projection_dim": 12}
    model: Any = randomize(medgmae.create_model("primus_nano_patch8_32", **options))
    file = tmp_path / "model.safetensors"
    save_file(to_colipri(model), file)
    spec = {"check": "orientation", "model_args": {"projection_dim": 12}, "other": "SAR", "decides": "Their texts."}
    card = card_of(token_order="raster", model_args={"pos_embed": "none"}, acceptance=spec)
    check = run_checks(medgmae.verify_weights(card, file=file), [MR])[0]
    assert check.passed is None  # no number says which is right
    assert check.said.endswith("Their texts.")
    assert {name: len(vector) for name, vector in check.numbers["vectors"].items()} == {"RAS": 12, "SAR": 12}
    scan = medgmae.create_transform({**INPUT, "orientation": "SAR"})(MR)
    expected = medgmae.extract_features(model.eval(), scan, head="projected").pooled
    torch.testing.assert_close(torch.tensor(check.numbers["vectors"]["SAR"]), expected)
    assert check.numbers["cosine"] < 0.9999


def test_the_scan_of_the_card_s_modality_comes_first() -> None:
    assert [path.name for path in example_scans(card_of())] == ["mr_brain_t1.nii.gz", "ct_thorax.nii.gz"]
    ct = medgmae.weight_card("primus_m_patch8_192.colipri")
    assert [path.name for path in example_scans(ct)] == ["ct_thorax.nii.gz", "mr_brain_t1.nii.gz"]


def test_the_command(nnssl: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, file = nnssl
    card = card_of(token_order=order, acceptance=MAE)
    monkeypatch.setattr(cards, "_cards", lambda: {card.tag: card})
    out = tmp_path / "card.json"
    done = CliRunner().invoke(main, ["verify", card.tag, "--file", str(file), "--scan", str(MR), "--card", str(out)])
    assert done.exit_code == 0, done.output
    assert "reconstruction of mr_brain_t1.nii.gz  passed: loss" in done.stdout
    filled = medgmae.WeightCard.from_json(json.loads(out.read_text()))
    assert filled.features is not None
    assert filled.bytes == file.stat().st_size
    wrong = replace(filled, token_order={"raster": "swapped", "swapped": "raster"}[order])
    monkeypatch.setattr(cards, "_cards", lambda: {card.tag: wrong})
    done = CliRunner().invoke(main, ["verify", card.tag, "--file", str(file), "--scan", str(MR), "--json"])
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert told["problems"] == []
    assert [check["passed"] for check in told["checks"]] == [False, False]


@pytest.mark.parametrize(
    "fields",
    [
        {"acceptance": {"check": "luck"}},
        {"acceptance": {"check": "reconstruction"}},
        {"features": {"tolerance": 1, "scans": {}}},
        {"features": {"scans": {}}},
    ],
)
def test_malformed_checks_of_a_card(fields: dict[str, Any]) -> None:
    with pytest.raises(medgmae.WeightsError, match=f"field '{next(iter(fields))}' is .* expected null or"):
        card_of(**fields)


@pytest.mark.parametrize("tag", [tag for tag in medgmae.list_weights() if medgmae.weight_card(tag).acceptance])
def test_the_cards_checks_can_be_run(tag: str) -> None:
    card = medgmae.weight_card(tag)
    spec = dict(card.acceptance or {})
    with torch.device("meta"):
        if spec["check"] == "reconstruction":
            model: Any = medgmae.create_model(spec["model"])
            assert model.norm_target is None  # else a loss says nothing beside that of a constant
        else:
            medgmae.create_model(card.architecture, **{**card.model_args, **spec["model_args"]})
            assert card.input is not None
            assert card.input["orientation"] not in (None, spec["other"])
