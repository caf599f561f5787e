"""``medgmae fit``: its files say the same as the library, and wrong use is answered before the work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from test_cli import run

import medgmae

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A piece of a CT of 3 mm."""
    path = tmp_path_factory.mktemp("scan") / "piece.nii.gz"
    volume = medgmae.read_volume(ROOT / "examples/data/ct_abdomen.nii.gz")
    medgmae.write_volume(medgmae.data.crop_or_pad(volume, (24, 36, 30), start=(40, 30, 30)), path)
    return path


def fit(*args: str | Path) -> Result:
    return run("fit", *args, "--threads", "1")


def test_files_and_figures_are_the_librarys(scan: Path, tmp_path: Path) -> None:
    ply, recon, png = tmp_path / "g.ply", tmp_path / "recon.nii.gz", tmp_path / "p.png"
    result = fit(scan, "--gaussians", "80", "--steps", "25", "--seed", "4", "--input", "window=[-175,250]",
                 "--input", "spacing=[3,4,4]", "--out", ply, "--recon", recon, "--png", png, "--json")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)

    block = {"window": [-175, 250], "spacing": [3, 4, 4], "resample": {"to": "spacing"}}
    volume = medgmae.create_transform(block, whole=True)(scan)
    assert tuple(facts["size"]) == volume.size != medgmae.read_volume(scan).size
    expected = medgmae.fit_gaussians(volume, 80, 25, generator=torch.Generator().manual_seed(4))
    rendered = medgmae.GaussianRenderer(3.0)(expected, volume.size)[0]
    written = medgmae.read_volume(recon)
    assert torch.equal(medgmae.data.resample_like(written, volume).data, rendered)
    span = float(volume.data.max() - volume.data.min())
    assert facts["psnr"] == medgmae.psnr(rendered, volume.data, data_range=span)
    assert facts["psnr"] > 15
    assert (facts["gaussians"], facts["steps"], facts["seed"], facts["input"]["window"]) == (80, 25, 4, [-175, 250])
    assert png.stat().st_size > 10_000

    gaussians = medgmae.Gaussians.load_ply(ply, "world")
    assert gaussians.means.shape == (1, 80, 3)
    again = medgmae.GaussianRenderer(3.0)(gaussians.to_grid(written), written.size)[0]
    torch.testing.assert_close(again, written.data, rtol=0, atol=2e-2)  # at the rim of an ellipsoid voxels may differ
    assert medgmae.psnr(again, written.data) > 60


def test_words_for_people(scan: Path, tmp_path: Path) -> None:
    result = fit(scan, "--gaussians", "20", "--steps", "2", "--out", tmp_path / "g.ply")
    assert result.exit_code == 0, result.stderr
    assert " dB" in result.stdout
    assert "recon" not in result.stdout


def test_the_preprocessing_of_a_card(scan: Path, tmp_path: Path) -> None:
    card = "vit_base_patch16_96.medgmae"  # 1.5 mm, [-175, 250]
    result = fit(scan, "--gaussians", "9", "--steps", "1", "--out", tmp_path / "g.ply", "--input-of", card, "--json")
    facts = json.loads(result.stdout)
    assert facts["input"]["spacing"] == [1.5, 1.5, 1.5]
    assert facts["size"] == list(medgmae.create_transform(card, whole=True)(scan).size)


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--out", "g.txt"], "must end in one of .ply", 2),
        (["--out", "no/such/g.ply"], "does not exist", 2),
        (["--out", "g.ply", "--recon", "r.png"], "must end in one of", 2),
        (["--out", "g.ply", "--png", "r.nii"], "must end in", 2),
        (["--out", "g.ply", "--gaussians", "0"], "--gaussians", 2),
        (["--out", "g.ply", "--steps", "-1"], "--steps", 2),
        (["--out", "g.ply", "--support", "0"], "--support", 2),
        (["--out", "g.ply", "--input", "windoe=[0,1]"], "windoe", 1),
        (["--out", "g.ply", "--input", "window=[5000,6000]"], "nothing to fit", 1),
        (["--out", "g.ply", "--input-of", "vit.none"], "no weights are known", 1),
    ],
)
def test_wrong_use(
    options: list[str], message: str, code: int, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = fit(scan, *options)
    assert message in " ".join(result.stderr.split())
    assert result.exit_code == code
    assert list(tmp_path.iterdir()) == []
