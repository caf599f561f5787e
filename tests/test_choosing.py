"""Which weights suit a scan, by header and cards."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import run

import medgmae
from medgmae import Grid, Volume, VolumeError, WeightsError
from medgmae.checkpoints.cards import WeightCard
from medgmae.checkpoints.choosing import PERMISSIVE, Recommendation, ScanFacts, Seen, judged
from medgmae.data.scan_header import read_header

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
import dicom_files as files

THORAX = Path(__file__).parent.parent / "examples/data/ct_thorax.nii.gz"
TANGERINE = "vit_large_patch16_256.tangerine"
CHEST = ScanFacts(1, (1.0, 1.0, 1.0), (256, 256, 256), "CT", "chest")
SEEN = Seen((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (256, 256, 256))


def card(**changes: Any) -> WeightCard:
    domain = {"modalities": ["CT"], "regions": ["chest"], "scans": 1000}
    base = {"license": "mit", "trained_on": domain, "input": {"modality": "CT", "size": [256, 256, 256]}}
    return WeightCard("vit_large_patch16_256.some", url="https://a.b/c", md5="0" * 32, **{**base, **changes})


def test_weights_by_licence_modality_and_region() -> None:
    permissive = medgmae.choose_weights(licence="permissive")
    assert permissive
    assert all(str(medgmae.weight_card(tag).license).lower() in PERMISSIVE for tag in permissive)
    assert {f"mae_{TANGERINE}", TANGERINE} <= set(medgmae.choose_weights(licence="CC-BY-NC-4.0"))
    assert TANGERINE not in permissive
    head = medgmae.choose_weights("vim*", modality="mr", region="head")
    assert "vim_small_patch16_160.mamba_mae" in head
    assert TANGERINE not in head
    assert medgmae.choose_weights(modality="US") == []
    with pytest.raises(WeightsError, match="the region is 'brain'; expected one of"):
        medgmae.choose_weights(region="brain")


def test_the_table_of_permissive_licences() -> None:
    assert {"apache-2.0", "mit", "cc-by-4.0", "cc0-1.0"} <= PERMISSIVE
    assert not any(part in name for name in PERMISSIVE for part in ("nc", "nd", "sa", "gpl", "unknown"))


def test_a_scan_like_those_of_training() -> None:
    found = judged(card(), CHEST, SEEN)
    assert found == Recommendation(
        "vit_large_patch16_256.some", "yes",
        ["trained on CT", "trained on the chest", "sees voxels of 1 x 1 x 1 mm, near those of the scan",
         "trained on 1,000 scans", "one input holds the scan"],
        [], [], "mit", "url", 1000,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("scan", "seen", "changes", "suits", "words"),
    [
        ({"modality": "MR"}, {}, {}, "no", "trained on CT, and the scan is MR"),
        ({"channels": 4}, {}, {}, "no", "takes 1 channel(s), and the scan has 4"),
        ({"region": "head"}, {}, {}, "perhaps", "trained on chest, and the scan is of the head"),
        ({}, {"stored": (5.0, 1, 1)}, {}, "perhaps", "interpolated from up to 5.0 times as thick ones"),
        ({}, {"stored": (1.0, 0.2, 1)}, {}, "perhaps", "up to 5.0 times as fine"),
        ({}, {"size": (100, 256, 256)}, {}, "yes", "the scan fills 39 % of its input along an axis"),
        ({}, {"size": (512, 512, 256)}, {}, "yes", "one input holds 25 % of the scan"),
        ({}, {}, {"license": "cc-by-nc-4.0"}, "yes", "not for commercial use (cc-by-nc-4.0)"),
        ({}, {}, {"license": "unknown"}, "yes", "no licence is stated"),
        (
            {}, {}, {"trained_on": {"modalities": ["CT"], "regions": ["chest"], "scans": 3}}, "perhaps",
            "trained on 3 scans only",
        ),
    ],
)  # fmt: skip
def test_what_speaks_against(
    scan: dict[str, Any], seen: dict[str, Any], changes: dict[str, Any], suits: str, words: str
) -> None:
    found = judged(card(**changes), dataclasses.replace(CHEST, **scan), dataclasses.replace(SEEN, **seen))
    assert found.suits == suits
    assert len(found.reasons_against) == 1
    assert words in found.reasons_against[0]
    assert judged(card(), CHEST, SEEN).rank < found.rank


def test_what_nobody_says_is_unknown() -> None:
    found = judged(card(), dataclasses.replace(CHEST, modality=None, region=None), SEEN)
    assert found.suits == "perhaps"
    assert [text.split(":")[0] for text in found.unknown] == ["modality", "region"]
    old = judged(card(trained_on=None), CHEST, SEEN)  # a card that only has its input block
    assert "trained on CT" in old.reasons_for
    assert old.unknown == ["region: the weights saw what their card does not say; give the scan's"]


def test_a_chest_ct_and_a_brain_mr() -> None:
    found = medgmae.recommend(THORAX, modality="CT", region="chest")
    grades = {one.tag: one.suits for one in found}
    assert grades["vit_base_patch16_96.glmae"] == "yes"
    assert grades["vit_tiny_patch8_64.demo"] == "perhaps"
    assert grades["vim_small_patch16_160.mamba_mae"] == "no"
    assert not [tag for tag in grades if medgmae.weight_card(tag).availability == "none"]
    size, spacing = (155, 240, 240), (1.0, 1.0, 1.0)
    scans = {name: Volume(torch.zeros(1, *size), Grid(size, spacing)) for name in ("t1", "t2", "t1ce", "flair")}
    found = medgmae.recommend(scans, modality="MR", region="head")
    assert {one.tag for one in found if one.suits == "yes"} >= set(medgmae.list_weights("vim_*.mamba_mae"))
    assert found[0].suits == "yes"
    assert all(one.licence in PERMISSIVE for one in medgmae.recommend(scans, licence="permissive"))


def test_headers_of_dicom_say_more(tmp_path: Path) -> None:
    def change(one: Any) -> None:
        one.Modality, one.BodyPartExamined = "PT", "CHEST"

    voxels = np.zeros((5, 8, 10), np.int16)
    folder = files.write_series(tmp_path / "series", voxels, [change] * 5)
    header = read_header(folder)
    assert (header.modality, header.region, header.channels, header.grid.size) == ("PET", "chest", 1, (5, 8, 10))
    assert header.grid == medgmae.read_volume(folder).grid
    assert read_header(THORAX).modality is None
    assert read_header(THORAX).grid == medgmae.read_volume(THORAX).grid


def test_a_case_in_a_folder_and_scans_that_are_none(tmp_path: Path) -> None:
    for name in ("t1", "t2", "t1ce", "flair"):
        Volume(torch.zeros(1, 4, 5, 6)).save(tmp_path / f"case_{name}.nii.gz")
    assert read_header(tmp_path).channels == 4
    (tmp_path / "case_t1.nii.gz").unlink()
    with pytest.raises(VolumeError, match="no file for the contrast 't1'"):
        medgmae.recommend(tmp_path)
    with pytest.raises(VolumeError, match="a mapping of nothing"):
        medgmae.recommend({})


def test_no_voxel_is_read(tmp_path: Path) -> None:
    Volume(torch.rand(1, 40, 50, 60)).save(tmp_path / "scan.nii")
    content = (tmp_path / "scan.nii").read_bytes()
    (tmp_path / "scan.nii").write_bytes(content[:352] + b"\xff" * (len(content) - 352))  # NaN from end to end
    with pytest.raises(VolumeError, match="NaN"):
        medgmae.read_volume(tmp_path / "scan.nii")
    assert medgmae.recommend(tmp_path / "scan.nii")


def test_commands() -> None:
    rows = json.loads(run("list", "--pretrained", "--licence", "permissive", "--modality", "CT", "--json").stdout)
    expected = set(medgmae.choose_weights(licence="permissive", modality="CT")) & set(
        medgmae.list_models(pretrained=True)
    )
    assert {row["name"] for row in rows} == expected
    nothing = run("list", "--licence", "mit", "--modality", "US")
    assert nothing.exit_code == 2
    assert "no model or weights match '*' --licence mit --modality US" in nothing.stderr
    options = ("--modality", "CT", "--region", "chest")
    found = json.loads(run("recommend", str(THORAX), *options, "--json").stdout)
    assert found == [dataclasses.asdict(one) for one in medgmae.recommend(THORAX, modality="CT", region="chest")]
    text = run("recommend", str(THORAX), *options).stdout
    assert "vit_base_patch16_96.glmae: suits (by hand, unknown)\n  + trained on CT\n" in text
    wrong = run("recommend", str(THORAX), "--region", "brain")
    assert wrong.exit_code == 1
    assert "the region is 'brain'; expected one of ['head'" in wrong.stderr
