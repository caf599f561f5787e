"""CT with Gaussians: starts have the right scale, the descent fits and goes on bit by bit, the commands do the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import medgmae
from medgmae.cli import main
from medgmae.data import Grid, Volume, VolumeError
from medgmae.gaussians.rendering import Gaussians
from medgmae.tomography import (
    Descent,
    Projections,
    circular_geometry,
    default_grid,
    fdk,
    predict_gaussians,
    project,
    reconstruct_ct,
    render_attenuation,
    start_gaussians,
)

GRID = Grid((12, 12, 12), 4.0, (-22.0, -22.0, -22.0))
# For Gaussians that begin far from where they belong.
FAST = Descent(means=0.3, scales=0.03, quats=0.02, densities=0.02)
ANGLES = [2 * math.pi * k / 10 for k in range(10)]


def phantom() -> Volume:
    """Two balls."""
    places = torch.from_numpy(GRID.world(torch.cartesian_prod(*map(torch.arange, GRID.size)).numpy())).float()
    near = [(places - torch.tensor(c)).norm(dim=1) for c in ([3.0, -4.0, 0.0], [-6.0, 2.0, 4.0])]
    values = 0.02 * torch.sigmoid((15 - near[0]) / 2) + 0.01 * torch.sigmoid((7 - near[1]) / 2)
    return Volume(values.reshape(1, *GRID.size), GRID)


def psnr(volume: Volume, truth: Volume, peak: float) -> float:
    return medgmae.psnr(volume.data, truth.data, data_range=peak)


def scan() -> Projections:
    return project(phantom(), circular_geometry(ANGLES, (16, 16), 4.8, sid=300, sdd=450))


def start(count: int = 60) -> Gaussians:
    return start_gaussians(fdk(scan(), GRID), count, progress=False)


@pytest.mark.parametrize("rule", ["gradient", "fit", "r2", "random"])
def test_starts_lie_in_the_volume_and_have_its_attenuation(rule: Any) -> None:
    volume = phantom()
    found = start_gaussians(volume, 80, rule, progress=False)
    assert found.means.shape == (1, 80, 3)
    inside = np.abs(GRID.index(found.means[0].numpy()) - 5.5) < (
        7.5 if rule == "gradient" else 6.1
    )  # edges lie at the rim too
    assert inside.all() or (rule == "fit" and inside.mean() > 0.9)  # a fit may push some out
    assert (found.scales > 0).all()
    rendered = render_attenuation(found, GRID)
    mass = float(rendered.data.sum() / volume.data.sum())
    assert 0.3 < mass < 2.5
    if rule == "fit":
        assert psnr(rendered, volume, 0.03) > 25
    same = start_gaussians(volume, 80, rule, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors(), same.tensors(), strict=True))
    other = start_gaussians(volume, 80, rule, generator=torch.Generator().manual_seed(1), progress=False)
    assert not torch.equal(found.means, other.means)


def test_the_residual_falls() -> None:
    looks: list[Any] = []
    result = reconstruct_ct(
        scan(),
        GRID,
        start_gaussians(phantom(), 60, "random", progress=False),
        steps=80,
        descent=FAST,
        truth=phantom(),
        peak=0.03,
        look_every=20,
        callback=looks.append,
        progress=False,
    )
    assert [look.step for look in result.curve] == list(range(1, 81)) == [look.step for look in looks]
    first, last = (sum(look.residual for look in part) for part in (result.curve[:5], result.curve[-5:]))
    assert last < first / 4
    seen = [look.psnr for look in result.curve if look.psnr is not None]
    assert len(seen) == 4
    assert seen == sorted(seen)
    assert psnr(result.volume, phantom(), 0.03) == pytest.approx(seen[-1])
    assert result.volume.grid == GRID


@pytest.mark.parametrize(
    "options", [Descent(), Descent(rounds=3), Descent(tv=0.01, tv_size=6)], ids=["plain", "growth", "tv"]
)
def test_a_run_that_goes_on_gives_the_same_bits(options: Descent, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(steps: int, **more: Any) -> Any:
        # the rates depend on the share of the run: stop the first part by its budget of steps
        return reconstruct_ct(scan(), GRID, start(), steps=steps, descent=options, progress=False, **more)

    whole = run(12)
    stopped: list[Any] = []

    class Enough(Exception):
        """Ends a run in the middle."""

    def stop(look: Any) -> None:
        stopped.append(look)
        if len(stopped) == 3:  # between two rounds of growth
            raise Enough

    kept: dict[str, Any] = {}
    monkeypatch.setattr("medgmae.tomography.reconstruction.KEEP_EVERY_S", 0.0)
    with pytest.raises(Enough):
        run(12, callback=stop, keep=kept.update)
    assert int(kept["done"]) == 3
    resumed = run(12, resume=kept)
    assert [look.step for look in resumed.curve] == list(range(4, 13))
    for a, b in zip(whole.gaussians.tensors(), resumed.gaussians.tensors(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(VolumeError, match="resume lacks means"):
        run(12, resume={})


def test_growth_adds_what_it_should_and_helps() -> None:
    plain = reconstruct_ct(scan(), GRID, start(30), steps=40, descent=FAST, truth=phantom(), peak=0.03, progress=False)
    grown = reconstruct_ct(
        scan(), GRID, start(30), steps=40, descent=replace(FAST, rounds=4), truth=phantom(), peak=0.03, progress=False
    )
    assert plain.gaussians.means.shape[1] == 30
    assert grown.gaussians.means.shape[1] == 30 + 4 * round(30 / 4)
    assert psnr(grown.volume, phantom(), 0.03) > psnr(plain.volume, phantom(), 0.03)


def test_total_variation_is_that_of_the_rendered_volume() -> None:
    """Its block, rendered in its own frame, has the differences of the whole volume's rendering."""
    from medgmae.tomography.reconstruction import _Descent

    run = _Descent(scan(), GRID, start(), 10, Descent(tv=1.0, tv_size=12, support=6.0), 0)
    whole = render_attenuation(run.gaussians(), GRID, 6.0).data[0] / run.span
    expected = torch.stack([whole.diff(dim=axis).abs().mean() for axis in range(3)]).mean()
    found = run._variation()
    torch.testing.assert_close(found.detach(), expected, rtol=1e-3, atol=1e-7)
    found.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in run.parameters)
    flat = Grid((12, 12, 12), (4.0, 4.0, 5.0))
    with pytest.raises(VolumeError, match="voxels that are cubes"):
        _Descent(scan(), flat, start(), 10, Descent(tv=1.0), 0)


def test_thirty_steps_bring_the_residual_to_a_fifth() -> None:
    begin = start_gaussians(phantom(), 200, "random", progress=False)
    result = reconstruct_ct(scan(), GRID, begin, steps=30, descent=replace(FAST, views=10), progress=False)
    assert result.curve[-1].residual < result.curve[0].residual / 5


def test_a_budget_ends_it() -> None:
    result = reconstruct_ct(scan(), GRID, start(), steps=100_000, budget_s=0.5, progress=False)
    assert 1 <= len(result.curve) < 1000


def test_a_model_predicts_a_start() -> None:
    model = medgmae.create_model("gmae_vit_nano_patch8_32").eval()
    volume = medgmae.data.crop_or_pad(phantom(), 32)
    block = {"orientation": "RAS", "window": [-1000, 1000]}
    found = predict_gaussians(model, volume, block, progress=False)
    assert found.means.shape[0] == 1
    seen = medgmae.data.reorient(volume.with_data((volume.data / 0.04).clamp(0, 1)), "RAS")
    expected = medgmae.reconstruct_scan(model, seen, mask_ratio=0.0, progress=False).gaussians
    torch.testing.assert_close(found.densities, expected.densities * 0.04)
    torch.testing.assert_close(found.means, expected.means)
    model.pretrained_cfg = {"input": block}
    assert torch.equal(predict_gaussians(model, volume, progress=False).means, found.means)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (None, "no weight card that says what it was trained on; pass input="),
        ({"window": [-175, 250]}, "lower end at -1000 HU"),
        ({"window": {"percentiles": [0, 99]}}, "lower end at -1000 HU"),
        ({"orientation": "RAS"}, "window of the model's input is None"),
        ({"window": [-1000, 1000], "range": [-1, 1]}, "expected 0 to 1 and 'none'"),
        ({"window": [-1000, 1000], "normalize": "zscore"}, "expected 0 to 1 and 'none'"),
    ],
)
def test_an_input_that_cannot_be_scaled_back(block: Any, message: str) -> None:
    with pytest.raises(VolumeError, match=message):
        predict_gaussians(medgmae.create_model("gmae_vit_nano_patch8_32"), phantom(), block)


def test_what_cannot_be_is_refused() -> None:
    bad = start()
    bad.densities[0, 3] = torch.nan
    for wrong, message in (
        (bad, "NaN or infinite numbers"),
        (Gaussians.concat([start()])[:0], "expected one set"),
    ):
        with pytest.raises(VolumeError, match=message):
            reconstruct_ct(scan(), GRID, wrong, steps=1)
    with pytest.raises(VolumeError, match="expected one of"):
        start_gaussians(phantom(), 5, "best")  # type: ignore[arg-type]
    with pytest.raises(VolumeError, match="0 voxels are above 5 %"):
        start_gaussians(phantom().with_data(torch.zeros(1, 12, 12, 12)), 5, "r2")


def test_the_grid_that_a_detector_sees() -> None:
    grid = default_grid(circular_geometry(ANGLES, (10, 30), 3.0, sid=500, sdd=750, centre_mm=(5.0, 6.0, 7.0)))
    assert grid.size == (10, 30, 30)
    assert grid.spacing == pytest.approx((2.0, 2.0, 2.0))
    np.testing.assert_allclose(grid.world((np.array(grid.size) - 1) / 2), (5.0, 6.0, 7.0), atol=1e-9)
    coarse = default_grid(circular_geometry(ANGLES, (10, 30), 3.0), 6.0)
    assert coarse.size == (5, 15, 15)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    volume = phantom()
    medgmae.write_volume(volume.with_data(1000 * (volume.data / 0.02 - 1)), tmp_path / "ct.nii.gz")
    short = {"format": "medgmae-projections-1", "sid": 300, "sdd": 450, "pixel_mm": 4.8, "size": [16, 16]}
    (tmp_path / "g.json").write_text(json.dumps({**short, "angles_deg": np.rad2deg(ANGLES).tolist()}))
    return tmp_path


def run(*arguments: Any) -> dict[str, Any]:
    done = CliRunner().invoke(main, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_commands(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run("project", files / "ct.nii.gz", "--geometry", files / "g.json", "--out", files / "p.npy")
    assert (made["views"], made["pixels"]) == (10, [16, 16])
    np.testing.assert_allclose(np.load(files / "p.npy"), scan().data, atol=1e-3)
    shared = ["--geometry", files / "g.json", "--truth", files / "ct.nii.gz"]
    scores = {}
    for method in ("fdk", "sart", "cg"):
        scores[method] = run(
            "reconstruct-ct", files / "p.npy", *shared, "--method", method, "--out", files / f"{method}.nii.gz"
        )["psnr"]
    ours = run(
        *("reconstruct-ct", files / "p.npy", *shared, "--out", files / "g.nii.gz", "--png", files / "g.png"),
        *("--gaussians", 60, "--steps", 20, "--rounds", 2, "--ply", files / "g.ply", "--start", "fdk"),
        *("--curve", files / "c.png"),
    )
    assert ours["gaussians"] == 120
    assert min(scores.values()) > 20
    assert ours["psnr"] > 18
    written = medgmae.read_volume(files / "g.nii.gz")
    assert written.size == (12, 12, 12)
    assert -1300 < float(written.data.float().min()) < -700
    assert all((files / name).stat().st_size > 10_000 for name in ("g.png", "c.png"))
    again = run(
        *("reconstruct-ct", files / "p.npy", *shared, "--out", files / "again.nii.gz"),
        *("--start", files / "g.ply", "--steps", 5, "--rounds", 0),
    )
    assert again["gaussians"] == 120
    half = ["--start", files / "g.ply", "--steps", 8, "--state", files / "s.safetensors", "--seed", 3]
    run("reconstruct-ct", files / "p.npy", *shared, "--out", files / "half.nii.gz", *half)
    on = ["--resume", files / "s.safetensors", "--steps", 12, "--state", files / "t.safetensors"]
    run("reconstruct-ct", files / "p.npy", *shared, "--out", files / "on.nii.gz", *on)
    assert [int(load_file(files / f"{name}.safetensors")["done"]) for name in "st"] == [8, 12]
    write, seen = medgmae.cli.tomography._write_state, []

    def watched(state: dict[str, Any], path: Path) -> None:
        write(state, path)
        seen.append(int(load_file(path)["done"]))

    monkeypatch.setattr("medgmae.tomography.reconstruction.KEEP_EVERY_S", 0.0)
    monkeypatch.setattr("medgmae.cli.tomography._write_state", watched)
    run("reconstruct-ct", files / "p.npy", *shared, "--out", files / "kept.nii.gz", "--overwrite", *half)
    assert seen == [*range(1, 9), 8]
    noisy = run(
        *("project", files / "ct.nii.gz", "--geometry", files / "g.json", "--out", files / "n.npy", "--photons", 1e4),
    )
    assert noisy["photons"] == 1e4
    difference = np.load(files / "n.npy") - np.load(files / "p.npy")
    assert 0.005 < difference.std() < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start", "nearest"], "expected fdk, sart, gaussians:TAG or a .ply file"),
        (["--method", "cg", "--ply", "x.ply"], "--ply needs --method gaussians"),
        (["--curve", "x.png"], "which needs --truth"),
        (["--method", "sart", "--state", "x.safetensors"], "--state needs --method gaussians"),
        (["--resume", "g.json"], "g.json holds no tensors"),
        (["--start", "gaussians:gmae_vit_nano_patch8_32"], "alone is an untrained model"),
        (["--budget", "soon"], "expected a time such as 90s or 2m"),
    ],
)
def test_options_that_cannot_be(
    files: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    np.save("p.npy", scan().data.numpy())
    given = ["reconstruct-ct", "p.npy", "--geometry", "g.json", "--out", "out.nii.gz", *arguments]
    done = CliRunner().invoke(main, given)
    assert done.exit_code != 0
    assert message in " ".join(done.output.split())
    assert not Path("out.nii.gz").exists()
