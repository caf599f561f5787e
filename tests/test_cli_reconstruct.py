"""``medgmae reconstruct``: the files it writes, the figures it prints, and what it says to wrong use."""

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
from medgmae.losses import ssim3d
from medgmae.ops import voxelize

ROOT = Path(__file__).parent.parent
NANO = "gmae_vit_nano_patch8_32"
CARD = "vit_base_patch16_96.medgmae"  # 1.5 mm, RAS, [-175, 250], array x, y, z


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of Gaussians with a card of preprocessing, as save_pretrained leaves it."""
    torch.manual_seed(0)
    model: Any = medgmae.create_model(NANO)
    model.pretrained_cfg = medgmae.weight_card(CARD).to_json()
    return medgmae.save_pretrained(model, tmp_path_factory.mktemp("model") / "nano")


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A piece of a CT of 3 mm: 39 x 47 x 71 voxels of 1.5 mm for the model."""
    path = tmp_path_factory.mktemp("scan") / "piece.nii.gz"
    volume = medgmae.read_volume(ROOT / "examples/data/ct_abdomen.nii.gz")
    medgmae.write_volume(medgmae.data.crop_or_pad(volume, (36, 24, 20), start=(30, 30, 30)), path)
    return path


def reconstruct(*args: str | Path) -> Result:
    return run("reconstruct", *args, "--threads", "1")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_files_and_figures_are_the_librarys(saved: Path, scan: Path, tmp_path: Path) -> None:
    files = {
        option: tmp_path / name for option, name in [("--out", "r.nii.gz"), ("--ply", "g.ply"), ("--png", "p.png")]
    }
    options = [part for pair in files.items() for part in pair]
    result = reconstruct(scan, "--model", f"local-dir:{saved}", *options, "--seed", "4", "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)

    model = medgmae.create_model(f"local-dir:{saved}").eval()
    volume = medgmae.create_transform(model, whole=True)(scan)
    assert volume.size == (39, 47, 71)
    expected = medgmae.reconstruct_scan(model, volume, generator=torch.Generator().manual_seed(4))
    written = medgmae.read_volume(files["--out"])
    assert torch.equal(medgmae.data.resample_like(written, volume).data, expected.predicted.data)
    # From the files alone: the Gaussians on the grid of the written volume, and in the patient where the scan is.
    gaussians = medgmae.Gaussians.load_ply(files["--ply"], "world")
    rendered = voxelize(*gaussians.to_grid(written).tensors(), written.size)[0]
    torch.testing.assert_close(rendered, written.data, rtol=0, atol=1e-4)
    source = medgmae.read_volume(scan)
    index = source.grid.index(gaussians.means[0].numpy())
    assert (np.abs(index.mean(0) - (np.array(source.size) - 1) / 2) < 0.2 * np.array(source.size)).all()

    span = float(volume.data.max() - volume.data.min())
    hidden = expected.visible.data.isnan()
    assert facts["data_range"] == span
    assert facts["psnr"] == medgmae.psnr(expected.predicted.data, volume.data, data_range=span)
    assert facts["psnr_hidden"] == medgmae.psnr(expected.predicted.data, volume.data, data_range=span, where=hidden)
    assert expected.apart is not None
    assert facts["psnr_apart"] == medgmae.psnr(expected.apart.data, volume.data, data_range=span)
    assert facts["ssim"] == pytest.approx(
        float(ssim3d(expected.predicted.data[None], volume.data[None], data_range=span)), abs=1e-6
    )
    assert facts["gaussians"] == gaussians.means.shape[1] == 64 * 2 * 2 * 4
    assert (facts["mask_ratio"], facts["seed"], facts["architecture"]) == (0.75, 4, NANO)
    assert facts["input"]["spacing"] == [1.5, 1.5, 1.5]
    assert files["--png"].stat().st_size > 10_000


def test_the_same_seed_gives_the_same_files(saved: Path, scan: Path, tmp_path: Path) -> None:
    contents = []
    for name, seed in [("a", "1"), ("b", "1"), ("c", "2")]:
        out, ply = tmp_path / f"{name}.nii.gz", tmp_path / f"{name}.ply"
        result = reconstruct(scan, "--model", f"local-dir:{saved}", "--out", out, "--ply", ply, "--seed", seed)
        assert result.exit_code == 0, result.stderr
        contents.append((medgmae.read_volume(out).data.numpy().tobytes(), ply.read_bytes()))
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_what_is_printed(scan: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.mha"
    result = reconstruct(scan, "--model", NANO, "--random-weights", "--out", out, "--mask-ratio", "0", "--keep-visible")
    assert result.exit_code == 0, result.stderr
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert facts["psnr"].endswith(" dB")
    assert 0 < float(facts["ssim"]) < 1
    assert "psnr_hidden" not in facts  # nothing was
    assert (facts["out"], facts["weights"]) == (str(out), "random")
    assert "Note" in result.stderr  # no card says what the input is
    volume = medgmae.read_volume(scan)
    kept = medgmae.data.window(volume, medgmae.data.percentiles(volume, (0.5, 99.5)))
    torch.testing.assert_close(medgmae.read_volume(out).data, kept.data)


def test_models_of_voxels_too(tmp_path: Path) -> None:
    brain, out = ROOT / "examples/data/mr_brain_t1.nii.gz", tmp_path / "r.nrrd"
    options = ["--model", "mae_vit_tiny_patch8_64.demo", "--out", out, "--json", "--input", "spacing=[4,4,4]"]
    result = reconstruct(brain, *options)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["gaussians"] is None
    assert "psnr_apart" not in facts
    assert facts["psnr_hidden"] > 10
    assert medgmae.read_volume(out).spacing == pytest.approx((4, 4, 4))


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--out", "r.txt"], "must end in one of .nii.gz", 2),
        (["--out", "no/such/r.nii"], "does not exist", 2),
        (["--ply", "g.obj"], "must end in one of .ply", 2),
        (["--png", "no/such/p.png"], "does not exist", 2),
        (["--mask-ratio", "1"], "mask-ratio", 2),
        (["--overlap", "1"], "overlap", 2),
        (["--model", "vit_nano_patch8_32"], "is an encoder alone", 2),
        (["--model", "mae_vit_nano_patch8_32", "--ply", "g.ply"], "needs a model of Gaussians", 2),
        (["--device", "toaster"], "cannot be used", 2),
        (["--input", "windoe=[0,1]"], "windoe", 1),
        (["--input", "channels=2"], "expected 2", 1),
    ],
)
def test_wrong_use(
    options: list[str], message: str, code: int, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    defaults = [] if "--out" in options else ["--out", "r.nii"]
    result = reconstruct(scan, "--model", NANO, "--random-weights", *defaults, *options)
    assert message in " ".join(result.stderr.split())
    assert result.exit_code == code
    assert list(tmp_path.iterdir()) == []


def test_an_untrained_model_needs_the_word_and_a_scan_must_be_there(tmp_path: Path) -> None:
    result = reconstruct(tmp_path / "absent.nii", "--model", NANO, "--out", tmp_path / "r.nii")
    assert result.exit_code == 2
    assert "untrained" in result.stderr
    result = reconstruct(tmp_path / "absent.nii", "--model", NANO, "--out", tmp_path / "r.nii", "--random-weights")
    assert result.exit_code == 1
    assert "absent.nii: no such file" in result.stderr
