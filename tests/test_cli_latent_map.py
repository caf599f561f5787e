"""``medgmae latent-map``: the files it writes, how it takes several contrasts, and what it says to wrong use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from test_cli import run

import medgmae

ROOT = Path(__file__).parent.parent
CONTRASTS = ["t1", "t2", "t1ce", "flair"]
INPUT = {"modality": "MR", "channels": 4, "contrasts": CONTRASTS, "orientation": "RAS", "normalize": "zscore_all"}


def latent_map(*args: str | Path) -> Result:
    return run("latent-map", *args, "--threads", "1")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def saved(folder: Path, name: str, block: dict[str, Any], **options: Any) -> str:
    """A small model with a card of preprocessing, as save_pretrained leaves it."""
    torch.manual_seed(0)
    model: Any = medgmae.create_model(name, **options)
    model.pretrained_cfg = {**medgmae.weight_card("vit_tiny_patch8_64.demo").to_json(), "input": block}
    return f"local-dir:{medgmae.save_pretrained(model, folder / name)}"


@pytest.fixture(scope="module")
def vim(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model"), "vim_nano_patch8_32", INPUT, in_chans=4)


@pytest.fixture(scope="module")
def contrasts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One subject: an oblique scan in four files, in the order of CONTRASTS."""
    folder = tmp_path_factory.mktemp("subject")
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1.0]])
    files = [folder / f"a_{name}.nii.gz" for name in CONTRASTS]
    for seed, file in enumerate(files):
        data = (1000 * torch.rand(1, 18, 20, 13, generator=torch.Generator().manual_seed(seed))).short()
        grid = medgmae.data.Grid((18, 20, 13), (3.0, 1.0, 1.5), (7.0, -8.0, 9.0), turn[:, ::-1])
        medgmae.write_volume(medgmae.Volume(data, grid), file)
    return files


def test_the_files_are_the_librarys(tmp_path: Path) -> None:
    brain, tag = ROOT / "examples/data/mr_brain_t1.nii.gz", "mae_vit_tiny_patch8_64.demo"
    out, png = tmp_path / "map.nii.gz", tmp_path / "map.png"
    result = latent_map(brain, "--model", tag, "--out", out, "--png", png, "--seed", "3", "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    volume = medgmae.create_transform(tag, whole=True)(brain)
    expected = medgmae.latent_to_spatial(medgmae.create_model(tag), volume, generator=torch.Generator().manual_seed(3))
    written = medgmae.read_volume(out)
    assert torch.equal(medgmae.data.resample_like(written, volume).data, expected.data)
    assert (facts["mode"], facts["reduction"], facts["mask_ratio"], facts["seed"]) == ("pretrained", "max", 0.75, 3)
    assert (facts["least"], facts["largest"]) == (0.0, float(expected.data.max()))
    assert (facts["scans"], facts["weights"], facts["input"]["spacing"]) == ([str(brain)], tag, [2.0, 2.0, 2.0])
    assert png.stat().st_size > 10_000


@pytest.mark.parametrize("options", [[], ["--upsampling", "linear", "--reduction", "norm"]])
def test_one_subject_in_four_files_or_one_folder(
    options: list[str], vim: str, contrasts: list[Path], tmp_path: Path
) -> None:
    maps, facts = [], []
    for name, scans in [("files", contrasts), ("folder", [contrasts[0].parent])]:
        out = tmp_path / f"{name}.mha"
        result = latent_map(*scans, "--model", vim, "--out", out, *options, "--json")
        assert result.exit_code == 0, result.stderr
        maps.append(medgmae.read_volume(out))
        facts.append(json.loads(result.stdout))
    assert torch.equal(maps[0].data, maps[1].data)
    model = medgmae.create_model(vim)
    volume = medgmae.create_transform(model, whole=True)(dict(zip(CONTRASTS, contrasts, strict=True)))
    keywords = {"upsampling": "linear", "reduction": "norm"} if options else {}
    expected = medgmae.latent_to_spatial(model, volume, **keywords)
    back = medgmae.data.resample_like(maps[0], volume)
    assert torch.equal(back.data, expected.data)
    assert facts[0]["scans"] == list(map(str, contrasts))
    assert (facts[0]["mode"], facts[0]["mask_ratio"], facts[0]["seed"]) == ("finetuned", None, None)
    assert facts[0]["reduction"] == ("norm" if options else "max")


def test_channels_without_names_are_taken_in_order(contrasts: list[Path], tmp_path: Path) -> None:
    name = saved(tmp_path, "mae_vim_nano_patch8_32", {"channels": 4}, in_chans=4)
    out = tmp_path / "map.nii"
    result = latent_map(*contrasts, "--model", name, "--out", out, "--mask-ratio", "0.5", "--mode", "pretrained")
    assert result.exit_code == 0, result.stderr
    volume = medgmae.data.stack_channels([medgmae.read_volume(file) for file in contrasts])
    expected = medgmae.latent_to_spatial(
        medgmae.create_model(name), volume, mask_ratio=0.5, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(medgmae.read_volume(out).data, expected.data)
    assert ["mask_ratio", "0.5"] in [line.split() for line in result.stdout.splitlines()]


def test_the_point_of_the_picture(vim: str, contrasts: list[Path], tmp_path: Path) -> None:
    centre = medgmae.read_volume(contrasts[0]).grid.world((9, 10, 6))
    at = ",".join(f"{value:.2f}" for value in centre)
    options = ["--model", vim, "--out", tmp_path / "m.nii", "--png", tmp_path / "p.png"]
    result = latent_map(*contrasts, *options, "--at", "900,0,0")
    assert result.exit_code == 1
    assert "lies outside the scan" in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert latent_map(*contrasts, *options, "--at", at).exit_code == 0
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("scans", "options", "message", "code"),
    [
        (0, [], "Missing argument", 2),
        (2, [], "got 2 SCANS for a model of 4 channel(s); expected one with all channels, or 4", 2),
        (2, [], "(t1, t2, t1ce, flair). Run the command once per subject", 2),
        (1, [], "has 1 channel(s)", 1),
        (4, ["--model", "vit_nano_patch8_32", "--random-weights"], "expected one scan", 2),
        (4, ["--out", "m.png"], "must end in one of .nii.gz", 2),
        (4, ["--png", "no/such/p.png"], "does not exist", 2),
        (4, ["--at", "1,2,3"], "name one with --png", 2),
        (4, ["--png", "p.png", "--at", "1,2"], "is not a point such as", 2),
        (4, ["--mask-ratio", "0.5"], "is for --mode pretrained", 2),
        (4, ["--mode", "trained"], "trained", 2),
        (4, ["--device", "toaster"], "cannot be used", 2),
        (4, ["--mode", "pretrained", "--mask-ratio", "0.99"], "leaves none visible", 1),
    ],
)
def test_wrong_use(
    scans: int, options: list[str], message: str, code: int, vim: str, contrasts: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    defaults = [] if "--out" in options else ["--out", "m.nii"]
    model = [] if "--model" in options else ["--model", vim]
    result = latent_map(*contrasts[:scans], *model, *defaults, *options)
    assert message in " ".join(result.stderr.split())
    assert result.exit_code == code
    assert list(tmp_path.iterdir()) == []


def test_contrasts_in_another_order_are_noticed(vim: str, contrasts: list[Path], tmp_path: Path) -> None:
    result = latent_map(*contrasts[::-1], "--model", vim, "--out", tmp_path / "m.nii")
    assert result.exit_code == 1
    assert "'t1' is given the file" in result.stderr
    assert "whose name says 'flair'" in result.stderr


def test_an_untrained_model_needs_the_word(contrasts: list[Path], tmp_path: Path) -> None:
    result = latent_map(contrasts[0], "--model", "vim_nano_patch8_32", "--out", tmp_path / "m.nii")
    assert result.exit_code == 2
    assert "untrained" in result.stderr
