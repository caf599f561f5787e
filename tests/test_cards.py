"""The cards in weights/: complete, honest, in step with the models and with their README."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import medgmae
from medgmae.checkpoints.cards import WeightCard, WeightsError, list_weights, weight_card, weights_folder
from medgmae.checkpoints.hashes import file_hashes

ROOT = Path(__file__).parent.parent
TAGS = list_weights()
FIELDS = [field.name for field in dataclasses.fields(WeightCard)]


@pytest.mark.parametrize("tag", TAGS)
def test_card_fits_a_registered_model(tag: str) -> None:
    card = weight_card(tag)
    with torch.device("meta"):
        model = medgmae.create_model(tag, pretrained=False)
    assert model.config["architecture"] == card.architecture
    if card.input is not None:
        encoder = getattr(model, "encoder", model)
        assert tuple(card.input["size"]) == encoder.img_size
        assert card.input["channels"] == encoder.in_chans


@pytest.mark.parametrize("tag", TAGS)
def test_card_says_what_a_user_must_know(tag: str) -> None:
    card = weight_card(tag)
    assert card.notes
    assert card.training_data
    assert card.citation or card.availability == "package"  # what ships is our own and asks for no citation
    if card.availability == "none":
        assert "weights" in card.notes  # says in words that there are none
    else:
        assert card.license
    if card.hub is not None:
        pinned = re.fullmatch("[0-9a-f]{40}", card.hub["revision"])
        assert pinned or (card.hub["revision"] == "main" and "not seen by us" in card.notes)
        assert card.sha256 or "/" in card.hub["repo"]  # of a file of others only the hub's own hash is known
    if card.file is not None:
        path = weights_folder() / card.file
        assert path.stat().st_size == card.bytes
        assert file_hashes(path, ("sha256",)) == {"sha256": card.sha256}


def test_cards_of_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "medgmae.weights", None)  # as if the package were not there
    assert weights_folder() == ROOT / "weights"


def test_card_is_the_file_in_the_repository() -> None:
    for tag in TAGS:
        text = (ROOT / "weights" / f"{tag}.json").read_text(encoding="utf-8")
        assert weight_card(tag).to_json() == {name: json.loads(text).get(name) for name in FIELDS}
        assert WeightCard.from_json(weight_card(tag).to_json()) == weight_card(tag)


def test_readme_explains_every_field() -> None:
    fields, _, block = (ROOT / "weights/README.md").read_text().partition("## The input block")
    assert re.findall(r"^\| `(\w+)` \|", fields, re.MULTILINE) == FIELDS
    rows = re.findall(r"^\| (`[`\w, ]+`) \|", block, re.MULTILINE)
    assert {key for row in rows for key in re.findall(r"\w+", row)} == set(medgmae.create_transform({}).input)


def test_published_weights() -> None:
    tangerine = weight_card("vit_large_patch16_256.tangerine")
    assert tangerine.availability == "url"
    assert tangerine.url == weight_card("mae_vit_large_patch16_256.tangerine").url
    assert tangerine.url_hashes() == ("d594de5ec0f59c55a1c20ec9f6ad3bef", None)
    assert weight_card("vit_base_patch16_96.glmae").availability == "page"
    assert weight_card("vit_wide_patch12_96.medgmae").availability == "none"
    mamba = weight_card("vim_small_patch16_160.mamba_mae")
    assert mamba.availability == "page"
    assert mamba.page == weight_card("mae_vim_small_patch16_160.mamba_mae").page


def test_list_weights() -> None:
    assert list_weights("*large*.tangerine") == [
        "mae_vit_large_patch16_256.tangerine",
        "vit_large_patch16_256.tangerine",
    ]
    assert list_weights("nothing*") == []
    assert sorted(TAGS) == TAGS


def test_bare_tag_belongs_to_an_architecture() -> None:
    assert weight_card("tangerine", "vit_large_patch16_256").tag == "vit_large_patch16_256.tangerine"
    full = "vit_large_patch16_256.tangerine"
    assert weight_card(full, "mae_vit_large_patch16_256").tag == full


@pytest.mark.parametrize(
    ("tag", "architecture", "hint"),
    [
        ("vit_large_patch16_256.tangerin", None, "did you mean '(mae_)?vit_large_patch16_256.tangerine'"),
        ("tangerine", None, "'mae_vit_large_patch16_256.tangerine' or 'vit_large_patch16_256.tangerine'"),
        (
            "glmae",
            "vit_large_patch16_96",
            "no weights are known as 'vit_large_patch16_96.glmae'; did you mean 'vit_base",
        ),
        ("qqqqqq", None, r"list_weights\(\) names all"),
    ],
)
def test_unknown_tag(tag: str, architecture: str | None, hint: str) -> None:
    with pytest.raises(WeightsError, match=hint):
        weight_card(tag, architecture)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tag": "NoDot"}, "'tag' is 'NoDot'"),
        ({"tag": 3}, "'tag' is 3"),
        ({"model_args": ["pool"]}, "'model_args'"),
        ({"hub": {"repo": "a/b"}}, "'hub' is .*expected null or {repo, revision, file}"),
        ({"hub": {"repo": "a/b", "revision": None, "file": "f"}}, "'hub'"),
        ({"url": "file:///etc/passwd", "md5": "0" * 32}, "'url' is 'file:///etc/passwd'"),
        ({"url": "https://x.org/f"}, "a 'url' needs the hash of its file"),
        ({"url": "https://x.org/f", "sha256": "0" * 64, "file": "f"}, "a 'url' needs the hash"),
        ({"page": "github.com/x"}, "'page'"),
        ({"file": "../secret"}, r"'file' is '\.\./secret', expected null or a file name"),
        ({"md5": "0" * 31}, "'md5'"),
        ({"sha256": "A" * 64}, "'sha256'"),
        ({"bytes": 0}, "'bytes' is 0"),
        ({"bytes": True}, "'bytes' is True"),
        ({"license": ""}, "'license'"),
        ({"input": "CT"}, "'input'"),
        ({"redistribute": "no"}, "'redistribute' is 'no', expected null, true or false"),
        ({"trained_on": {"modalities": ["CT"]}}, "'trained_on'"),
        ({"trained_on": {"modalities": ["CT"], "regions": ["brain"], "scans": None}}, r"some of \[.head"),
    ],
)
def test_malformed_fields(fields: dict[str, Any], message: str) -> None:
    data = WeightCard("vit_x.y").to_json() | fields
    with pytest.raises(WeightsError, match=message):
        WeightCard.from_json(data, "card.json")


def test_missing_and_unknown_fields() -> None:
    data = WeightCard("vit_x.y").to_json()
    del data["page_file"], data["redistribute"]  # the fields that may be left out
    assert WeightCard.from_json(data) == WeightCard("vit_x.y")
    del data["license"]
    with pytest.raises(WeightsError, match=r"card.json: missing fields \['license'\], unknown fields \['licence'\]"):
        WeightCard.from_json(data | {"licence": "mit"}, "card.json")
    with pytest.raises(WeightsError, match=r"card.json: expected a JSON object, got list"):
        WeightCard.from_json([], "card.json")  # type: ignore[arg-type]


def test_cards_are_frozen() -> None:
    card = weight_card("vit_large_patch16_256.tangerine")
    with pytest.raises(dataclasses.FrozenInstanceError):
        card.md5 = None  # type: ignore[misc]
    assert len({card, weight_card(card.tag)}) == 1


def test_a_card_is_short_in_a_console_and_a_table_in_a_notebook() -> None:
    card = weight_card("vit_large_patch16_256.tangerine")
    text = "WeightCard('vit_large_patch16_256.tangerine', availability='url', license='cc-by-nc-4.0')"
    assert repr(card) == text
    table = card._repr_html_()
    assert "<tr><th>license</th><td>cc-by-nc-4.0</td></tr>" in table
    assert "<tr><th>availability</th><td>url</td></tr>" in table
    assert "<th>hub</th>" not in table  # what does not apply is not shown
    shown = dataclasses.replace(card, notes="<b>bold</b>")._repr_html_()
    assert "&lt;b&gt;bold&lt;/b&gt;" in shown
    assert "<b>" not in shown
